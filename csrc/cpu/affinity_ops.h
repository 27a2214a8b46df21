#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

// Ops of kdfast/ops/affinity.py on the CPU; arguments and results as in the schemas there.

namespace kd {

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> affinity_cpu(
    const torch::stable::Tensor& a, const torch::stable::Tensor& b, const torch::stable::Tensor& g);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> affinity_backward_cpu(
    const torch::stable::Tensor& grad, const torch::stable::Tensor& a, const torch::stable::Tensor& b,
    const torch::stable::Tensor& g, const torch::stable::Tensor& order_a,
    const torch::stable::Tensor& order_b, bool need_a, bool need_b, bool need_g);

}  // namespace kd
