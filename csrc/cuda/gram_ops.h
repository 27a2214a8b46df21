#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

// Ops of kdfast/ops/gram.py on a GPU: compare="cka" on the Gram side of small inputs.
// kdfast/kernels/gram_cuda.py states the same limits and asks first; a call beyond them raises here too.

namespace kd {

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> gram_cuda(
    const torch::stable::Tensor& x, const torch::stable::Tensor& y, int64_t compare, bool centered,
    bool cosine, bool inter, bool feature_side, bool save);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> gram_backward_cuda(
    const torch::stable::Tensor& grad_products, const torch::stable::Tensor& grad_distance,
    const torch::stable::Tensor& x, const torch::stable::Tensor& y, const torch::stable::Tensor& saved,
    int64_t compare, bool centered, bool cosine, bool inter, bool feature_side, bool need_x, bool need_y);

}  // namespace kd
