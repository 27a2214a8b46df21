#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

// Ops of kdfast/ops/logits.py on the CPU; arguments and results as in the schemas there.

namespace kd {

std::tuple<torch::stable::Tensor, torch::stable::Tensor> logits_cpu(
    const torch::stable::Tensor& student, const torch::stable::Tensor& teacher,
    const std::optional<torch::stable::Tensor>& labels, int64_t kind, double alpha, double beta,
    double temperature, int64_t ignore_index);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> logits_with_gradient_cpu(
    const torch::stable::Tensor& student, const torch::stable::Tensor& teacher,
    const std::optional<torch::stable::Tensor>& labels, int64_t kind, double alpha, double beta,
    double temperature, int64_t ignore_index);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> logits_backward_cpu(
    const torch::stable::Tensor& grad, const torch::stable::Tensor& student,
    const torch::stable::Tensor& teacher, const std::optional<torch::stable::Tensor>& labels,
    const torch::stable::Tensor& saved, int64_t kind, double alpha, double beta, double temperature,
    int64_t ignore_index, bool need_student, bool need_teacher);

}  // namespace kd
