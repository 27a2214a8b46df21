#pragma once

// How the row-wise CUDA ops (direction, logits) describe a tensor in plain C types.

#include <cstdint>

extern "C" {

enum kd_dtype { KD_F32 = 0, KD_F64 = 1, KD_F16 = 2, KD_BF16 = 3 };

// Row i starts at data + i / inner * outer_stride + i % inner * inner_stride, its elements are `stride`
// apart; all in elements.
struct kd_rows {
  void* data;
  int64_t inner, outer_stride, inner_stride, stride;
};
}
