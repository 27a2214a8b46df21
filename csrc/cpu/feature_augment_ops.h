#pragma once

#include <torch/csrc/stable/tensor.h>

// Ops of kdfast/ops/feature_augment.py on the CPU; arguments and results as in the schemas there.

namespace kd {

torch::stable::Tensor feature_augment_cpu(const torch::stable::Tensor& x, const torch::stable::Tensor& steps,
                                          const torch::stable::Tensor& channels);

torch::stable::Tensor feature_augment_backward_cpu(const torch::stable::Tensor& grad,
                                                   const torch::stable::Tensor& steps,
                                                   const torch::stable::Tensor& channels);

}  // namespace kd
