#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

// Ops of kdfast/ops/softmax_affinity.py on the CPU; arguments and results as in the schemas there.

namespace kd {

std::tuple<torch::stable::Tensor, torch::stable::Tensor> softmax_affinity_cpu(
    const torch::stable::Tensor& query, const torch::stable::Tensor& key, const torch::stable::Tensor& value,
    double scale);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> softmax_affinity_backward_cpu(
    const torch::stable::Tensor& grad, const torch::stable::Tensor& query, const torch::stable::Tensor& key,
    const torch::stable::Tensor& value, const torch::stable::Tensor& out, const torch::stable::Tensor& saved,
    double scale, bool need_query, bool need_key, bool need_value);

}  // namespace kd
