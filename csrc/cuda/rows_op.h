#pragma once

// torch's side of the row-wise CUDA ops: tensors as kd_rows.

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/check.h"
#include "common/dtype.h"
#include "cuda/rows.h"

namespace kd {

inline int32_t dtype_code(const torch::stable::Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return KD_F32;
    case ScalarType::Double:
      return KD_F64;
    case ScalarType::Half:
      return KD_F16;
    case ScalarType::BFloat16:
      return KD_BF16;
    default:
      KD_CHECK(false, name, " must be float32, float64, float16 or bfloat16, got ",
               toString(x.scalar_type()));
  }
  return KD_F32;
}

// Fills `rows` with the layout of x [..., K] and `data`; false where the leading axes are more than two.
inline bool as_rows(const torch::stable::Tensor& x, void* data, kd_rows* rows) {
  const int64_t last = x.dim() - 1;
  int64_t size[2] = {1, 1}, step[2] = {0, 0};  // innermost first
  int axes = 0;
  for (int64_t a = last; a-- > 0;) {
    if (x.size(a) == 1) continue;
    if (axes > 0 && x.stride(a) == size[axes - 1] * step[axes - 1]) {
      size[axes - 1] *= x.size(a);
      continue;
    }
    if (axes == 2) return false;
    size[axes] = x.size(a), step[axes++] = x.stride(a);
  }
  *rows = {data, size[0], step[1], step[0], x.size(last) == 1 ? 1 : x.stride(last)};
  return true;
}

// Rows to read: the tensor's own, or those of a copy that it keeps alive.
class InputRows {
 public:
  explicit InputRows(const torch::stable::Tensor& x) : tensor_(x) {
    if (as_rows(tensor_, const_cast<void*>(tensor_.const_data_ptr()), &rows_)) return;
    tensor_ = torch::stable::contiguous(x);
    as_rows(tensor_, const_cast<void*>(tensor_.const_data_ptr()), &rows_);
  }
  const kd_rows& get() const { return rows_; }

 private:
  torch::stable::Tensor tensor_;
  kd_rows rows_;
};

// The gradient of x, laid out like empty_like as the fakes promise, and rows to write it to.
class OutputRows {
 public:
  OutputRows(const torch::stable::Tensor& x, bool needed)
      : result_(needed ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0})), written_(result_) {
    if (!needed || as_rows(result_, result_.mutable_data_ptr(), &rows_)) return;
    written_ = torch::stable::contiguous(result_);
    as_rows(written_, written_.mutable_data_ptr(), &rows_);
    copied_ = true;
  }
  const kd_rows* get() const { return &rows_; }
  torch::stable::Tensor result() const {
    return copied_ ? torch::stable::copy_(const_cast<torch::stable::Tensor&>(result_), written_) : result_;
  }

 private:
  torch::stable::Tensor result_, written_;
  kd_rows rows_ = {};
  bool copied_ = false;
};

}  // namespace kd
