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

// Sums over the columns of a row, and over the rows of a column, of |x|, |y|, x - y and (x - y)^2; null: not
// wanted.
constexpr int kKinds = 4;
template <class A>
struct PairSums {
  A *rows[kKinds], *columns[kKinds];
};

// What the gradient takes from its rows or columns, each array times its factor: what goes with the sign of
// x, what is added, and the weight of x - y. Null: 0.
template <class A>
struct GradientTerms {
  const A* values[3];
  A factors[3];
};

template <class A>
struct AttentionKernels {
  // Sums over columns (rows [rows] =) and over rows (columns [columns] +=) of |x|, and of x unless
  // signed_rows is null.
  void (*pool)(Dtype, MapTile x, int64_t rows, int64_t columns, A* rows_abs, A* columns_abs, A* rows_signed,
               A* columns_signed);
  // The sums that are wanted: rows =, columns +=. |x| and |y| go to pixels always, to channels unless both
  // x - y and (x - y)^2 are wanted; x - y goes to both or neither; (x - y)^2 to one of them or neither.
  void (*pool_pair)(Dtype, MapTile x, MapTile y, int64_t rows, int64_t columns, const PairSums<A>& sums);
  // d = x - y: row_errors [rows] = sum over columns of weight * d^2; column_errors += row_weight * d^2,
  // unless null.
  void (*errors)(Dtype, MapTile x, MapTile y, int64_t rows, int64_t columns, const A* row_weights,
                 const A* column_weights, A* row_errors, A* column_errors);
  // d = x - y under one weight of each pixel, or two (the second null: one); errors[k] are sums over pixels
  // of weights[k] * d^2, one per channel. Where pixels are columns: errors[k] [rows] =; where they are rows:
  // errors[k] [columns] +=.
  void (*channel_errors)(Dtype, MapTile x, MapTile y, int64_t rows, int64_t columns, bool pixels_are_rows,
                         const A* const (&weights)[2], A* const (&errors)[2]);
  // out = sign(x) (row_sign + column_sign) + (row_plain + column_plain) + row_weight column_weight (x - y)
  void (*gradient)(Dtype, MapTile x, MapTile y, int64_t rows, int64_t columns,
                   const GradientTerms<A>& of_rows, const GradientTerms<A>& of_columns, void* out,
                   int64_t out_stride);
};

// Of exp((v - most) * scale): the largest v, and the sum.
template <class A>
struct SoftmaxTerms {
  A most, total;
};

template <class A>
struct MaskKernels {
  // out [count] = the mask of two attention maps; scale: 1 / temperature. Returns the sum of what it
  // multiplies, 0 where that is null. `out` may be any of the inputs.
  double (*mask)(const A* student, const A* teacher, int64_t count, A scale, bool softmax_of_sum,
                 const A* multiplied, A* out);
  // out [count] = exp((v - most) scale) of v = first (+ second, unless null).
  SoftmaxTerms<A> (*weights)(const A* first, const A* second, int64_t count, A scale, A* out);
  // Sum of x^2, or of (x - y)^2 unless y is null.
  double (*squares)(const A* x, const A* y, int64_t count);
};

}  // namespace kd
