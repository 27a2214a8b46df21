#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

// Ops of kdfast/ops/gram.py on the CPU; arguments and results as in the schemas there.

namespace kd {

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> gram_cpu(
    const torch::stable::Tensor& x, const torch::stable::Tensor& y, int64_t compare, bool centered,
    bool cosine, bool inter, bool feature_side, bool save);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> gram_backward_cpu(
    const torch::stable::Tensor& grad_products, const torch::stable::Tensor& grad_distance,
    const torch::stable::Tensor& x, const torch::stable::Tensor& y, const torch::stable::Tensor& saved,
    int64_t compare, bool centered, bool cosine, bool inter, bool feature_side, bool need_x, bool need_y);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> gram_with_gradient_cpu(
    const torch::stable::Tensor& student, const torch::stable::Tensor& teacher, int64_t layout,
    int64_t compare, bool centered, bool cosine, bool inter, bool feature_side, double weight,
    double inter_weight);

}  // namespace kd
