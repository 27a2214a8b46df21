#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

// Ops of kdfast/ops/attention_mask.py on a GPU, of float32, float16 and bfloat16 maps of at most 65535
// images. kdfast/kernels/attention_mask_cuda.py states the same limits and asks first; a call beyond them
// raises here too.

namespace kd {

std::tuple<torch::stable::Tensor, torch::stable::Tensor> attention_pool_cuda(const torch::stable::Tensor& x,
                                                                             bool with_signed);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor, torch::stable::Tensor>
attention_mask_cuda(const torch::stable::Tensor& student, const torch::stable::Tensor& teacher,
                    std::optional<torch::stable::Tensor> adapted, double temperature, double transfer_weight,
                    double masked_weight, bool softmax_of_sum, bool channel_mask, bool with_signed,
                    bool through, bool pairs);

torch::stable::Tensor masked_distance_cuda(const torch::stable::Tensor& x, const torch::stable::Tensor& y,
                                           const torch::stable::Tensor& spatial_mask,
                                           const torch::stable::Tensor& channel_mask);

torch::stable::Tensor attention_mask_backward_cuda(
    const torch::stable::Tensor& x, std::optional<torch::stable::Tensor> other,
    std::optional<torch::stable::Tensor> grad_loss, std::optional<torch::stable::Tensor> terms,
    std::optional<torch::stable::Tensor> spatial, std::optional<torch::stable::Tensor> channel,
    std::optional<torch::stable::Tensor> spatial_mask, std::optional<torch::stable::Tensor> channel_mask,
    std::optional<torch::stable::Tensor> grad_spatial, std::optional<torch::stable::Tensor> grad_channel,
    int64_t side, bool with_signed);

}  // namespace kd
