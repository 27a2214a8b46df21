#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

// Ops of kdfast/ops/dot_product.py on the CPU; arguments and results as in the schemas there.

namespace kd {

std::tuple<torch::stable::Tensor, torch::stable::Tensor> dot_product_cpu(const torch::stable::Tensor& query,
                                                                         const torch::stable::Tensor& key,
                                                                         const torch::stable::Tensor& value);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> dot_product_backward_cpu(
    const torch::stable::Tensor& grad, const torch::stable::Tensor& query, const torch::stable::Tensor& key,
    const torch::stable::Tensor& value, const torch::stable::Tensor& weight, bool need_query, bool need_key,
    bool need_value);

}  // namespace kd
