#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

// Ops of kdfast/ops/patch_gram.py on the CPU; arguments and results as in the schemas there.

namespace kd {

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> patch_gram_cpu(
    const torch::stable::Tensor& x, const torch::stable::Tensor& y, int64_t patch_h, int64_t patch_w,
    int64_t rows, int64_t columns, bool bilinear, int64_t average, int64_t compare, bool centered,
    bool cosine, bool inter, bool feature_side, bool transposed, int64_t saved_groups);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> patch_gram_backward_cpu(
    const torch::stable::Tensor& grad_products, const torch::stable::Tensor& grad_distance,
    const torch::stable::Tensor& x, const torch::stable::Tensor& y, const torch::stable::Tensor& saved,
    int64_t patch_h, int64_t patch_w, int64_t rows, int64_t columns, bool bilinear, int64_t average,
    int64_t compare, bool centered, bool cosine, bool inter, bool feature_side, bool transposed, bool need_x,
    bool need_y);

}  // namespace kd
