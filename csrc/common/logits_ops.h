#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

// Ops of kdfast/ops/logits.py; arguments and results as in the schemas there.

namespace kd {

using LogitsForward = std::tuple<torch::stable::Tensor, torch::stable::Tensor>(
    const torch::stable::Tensor& student, const torch::stable::Tensor& teacher,
    const std::optional<torch::stable::Tensor>& labels, int64_t kind, double alpha, double beta,
    double temperature, int64_t ignore_index);

using LogitsBackward = std::tuple<torch::stable::Tensor, torch::stable::Tensor>(
    const torch::stable::Tensor& grad, const torch::stable::Tensor& student,
    const torch::stable::Tensor& teacher, const std::optional<torch::stable::Tensor>& labels,
    const torch::stable::Tensor& saved, int64_t kind, double alpha, double beta, double temperature,
    int64_t ignore_index, bool need_student, bool need_teacher);

LogitsForward logits_cpu, logits_cuda, logits_with_gradient_cpu;
LogitsBackward logits_backward_cpu, logits_backward_cuda;

}  // namespace kd
