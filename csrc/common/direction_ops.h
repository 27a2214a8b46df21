#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

// Ops of kdfast/ops/direction.py; arguments and results as in the schemas there.

namespace kd {

using DirectionForward = std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>(
    const torch::stable::Tensor& student, const std::optional<torch::stable::Tensor>& teacher,
    const torch::stable::Tensor& centers, const std::optional<torch::stable::Tensor>& labels,
    int64_t ignore_index, bool balanced);

using DirectionBackward = std::tuple<torch::stable::Tensor, torch::stable::Tensor>(
    const torch::stable::Tensor& grad, const torch::stable::Tensor& student,
    const std::optional<torch::stable::Tensor>& teacher, const torch::stable::Tensor& centers,
    const std::optional<torch::stable::Tensor>& labels, const torch::stable::Tensor& factors,
    const torch::stable::Tensor& total, int64_t ignore_index, bool balanced, bool need_student,
    bool need_teacher);

DirectionForward direction_cpu, direction_cuda;
DirectionBackward direction_backward_cpu, direction_backward_cuda;

std::tuple<torch::stable::Tensor, torch::stable::Tensor> direction_with_gradient_cpu(
    const torch::stable::Tensor& student, const std::optional<torch::stable::Tensor>& teacher,
    const torch::stable::Tensor& centers, const std::optional<torch::stable::Tensor>& labels,
    int64_t ignore_index, bool balanced, double weight);

}  // namespace kd
