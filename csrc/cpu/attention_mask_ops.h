#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace kd {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> attention_pool_cpu(const Tensor& x, bool with_signed);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_mask_cpu(
    const Tensor& student, const Tensor& teacher, std::optional<Tensor> adapted, double temperature,
    double transfer_weight, double masked_weight, bool softmax_of_sum, bool channel_mask, bool with_signed,
    bool through, bool pairs);

std::tuple<Tensor, Tensor, Tensor> attention_mask_with_gradient_cpu(const Tensor& student,
                                                                    const Tensor& teacher, double temperature,
                                                                    double transfer_weight,
                                                                    double masked_weight, bool softmax_of_sum,
                                                                    bool channel_mask, bool with_signed);

Tensor masked_distance_cpu(const Tensor& x, const Tensor& y, const Tensor& spatial_mask,
                           const Tensor& channel_mask);

Tensor attention_mask_backward_cpu(const Tensor& x, std::optional<Tensor> other,
                                   std::optional<Tensor> grad_loss, std::optional<Tensor> terms,
                                   std::optional<Tensor> spatial, std::optional<Tensor> channel,
                                   std::optional<Tensor> spatial_mask, std::optional<Tensor> channel_mask,
                                   std::optional<Tensor> grad_spatial, std::optional<Tensor> grad_channel,
                                   int64_t side, bool with_signed);

}  // namespace kd
