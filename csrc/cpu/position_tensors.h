#pragma once

// Tensors [B, channels, n] of positions. Not for *.simd.cpp: it uses torch.

#include <torch/csrc/stable/ops.h>

#include "cpu/position_map.h"
#include "cpu/result.h"

namespace kd {

inline PositionMap position_map(const torch::stable::Tensor* t, int64_t image) {
  if (t == nullptr) return {};
  auto* data = const_cast<char*>(static_cast<const char*>(t->const_data_ptr()));
  data += image * t->stride(0) * static_cast<int64_t>(t->element_size());
  return {data, t->size(1), t->stride(1), t->stride(2)};
}

// [B, channels, n] laid out as the queries are, see the fake.
inline torch::stable::Tensor new_positions(const torch::stable::Tensor& like, int64_t channels) {
  const bool last = like.stride(1) < like.stride(2);
  torch::stable::Tensor x = last ? new_result(like, {like.size(0), like.size(2), channels})
                                 : new_result(like, {like.size(0), channels, like.size(2)});
  return last ? torch::stable::transpose(x, 1, 2) : x;
}

}  // namespace kd
