#pragma once

// What attention_mask.cpp (layouts, threads, masks) and attention_mask.simd.cpp (arithmetic, once per
// instruction set) share. Plain data only: an inline function here would be compiled with AVX flags and could
// be linked into the baseline code.

#include <cstdint>

#include "common/storage.h"

namespace kd {

// Rows of contiguous columns: channels x pixels of an NCHW map, or pixels x channels of a channels_last one.
struct MapTile {
  const void* data;
  int64_t row_stride;
};

constexpr int64_t kColumnPadding =
    16;  // column arrays hold a multiple of it; what is beyond the columns is 0

template <class A>
struct AttentionKernels {
  // Sums over columns (rows [rows] =) and over rows (columns [columns] +=) of |x|, and of x unless
  // signed_rows is null.
  void (*pool)(Dtype, MapTile x, int64_t rows, int64_t columns, A* rows_abs, A* columns_abs, A* rows_signed,
               A* columns_signed);
  // d = x - y: row_errors [rows] = sum over columns of weight * d^2; column_errors += row_weight * d^2,
  // unless null.
  void (*errors)(Dtype, MapTile x, MapTile y, int64_t rows, int64_t columns, const A* row_weights,
                 const A* column_weights, A* row_errors, A* column_errors);
  // out = sign(x) (row_sign + column_sign) + (row_plain + column_plain) + row_weight column_weight (x - y)
  void (*gradient)(Dtype, MapTile x, MapTile y, int64_t rows, int64_t columns, const A* const row_terms[3],
                   const A* const column_terms[3], void* out, int64_t out_stride);
  // out [count] = the mask of two attention maps; scale: 1 / temperature. Returns the sum of what it
  // multiplies, 0 where that is null. `out` may be any of the inputs.
  double (*mask)(const A* student, const A* teacher, int64_t count, A scale, bool softmax_of_sum,
                 const A* multiplied, A* out);
};

}  // namespace kd
