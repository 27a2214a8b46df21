#pragma once

// What masked_error.cpp (layouts, threads) and masked_error.simd.cpp (arithmetic, once per instruction set)
// share. Plain data only: an inline function here could be linked from AVX code into the baseline code.

#include <cstdint>

#include "common/storage.h"

namespace kd {

// Rows of contiguous columns of two maps, and of x's gradient unless it is null; strides in elements.
struct MaskedRows {
  Dtype dtype;
  const void *x, *y;
  void* gradient;
  int64_t rows, columns, x_stride, y_stride, gradient_stride;
};

template <class A>
struct MaskedErrorKernels {
  // Sum of weight * (x - y)^2, and gradient = scale * weight * (x - y). A weight is that of the column, of
  // `columns` ones, or that of the row.
  double (*by_column)(const MaskedRows& rows, const A* weights, A scale);
  double (*by_row)(const MaskedRows& rows, const A* weights, A scale);
};

}  // namespace kd
