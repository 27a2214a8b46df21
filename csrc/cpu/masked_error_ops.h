#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

// Ops of kdfast/ops/masked_error.py on the CPU; arguments and results as in the schemas there.

namespace kd {

torch::stable::Tensor masked_error_cpu(const torch::stable::Tensor& x, const torch::stable::Tensor& y,
                                       const torch::stable::Tensor& mask);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> masked_error_with_gradient_cpu(
    const torch::stable::Tensor& x, const torch::stable::Tensor& y, const torch::stable::Tensor& mask);

torch::stable::Tensor masked_error_backward_cpu(const torch::stable::Tensor& x,
                                                const torch::stable::Tensor& y,
                                                const torch::stable::Tensor& mask,
                                                const torch::stable::Tensor& grad);

torch::stable::Tensor area_mask_cpu(const torch::stable::Tensor& boxes, int64_t height, int64_t width,
                                    int64_t multiplicity);

}  // namespace kd
