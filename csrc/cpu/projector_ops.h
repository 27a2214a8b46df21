#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

// Ops of kdfast/ops/projector.py; arguments and results as in the schemas there.

namespace kd {

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> projector_cpu(
    const torch::stable::Tensor& x, const std::optional<torch::stable::Tensor>& noise,
    const torch::stable::Tensor& gamma, const torch::stable::Tensor& beta,
    const torch::stable::Tensor& weight, const torch::stable::Tensor& bias,
    torch::stable::Tensor running_mean, torch::stable::Tensor running_var, double momentum, double eps);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor>
projector_backward_cpu(const torch::stable::Tensor& grad, const torch::stable::Tensor& x,
                       const std::optional<torch::stable::Tensor>& noise, const torch::stable::Tensor& gamma,
                       const torch::stable::Tensor& beta, const torch::stable::Tensor& weight,
                       const torch::stable::Tensor& mean, const torch::stable::Tensor& scale);

}  // namespace kd
