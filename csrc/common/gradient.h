#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/huge_pages.h"

namespace kd {

// The tensor that a backward writes for input `x`, laid out like it; an empty one where no gradient is
// needed.
inline torch::stable::Tensor new_gradient(const torch::stable::Tensor& x, bool needed = true) {
  if (!needed) return torch::stable::new_empty(x, {0});
  torch::stable::Tensor gradient = torch::stable::empty_like(x);
  advise_huge_pages(gradient.data_ptr(), gradient.numel() * static_cast<int64_t>(gradient.element_size()));
  return gradient;
}

}  // namespace kd
