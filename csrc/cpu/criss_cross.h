#pragma once

// What criss_cross.cpp (checks, threads) and criss_cross.simd.cpp (arithmetic on lines, once per instruction
// set) share. Plain data only: an inline function here could be linked from AVX code into the baseline code.

#include <cstdint>

#include "common/storage.h"

namespace kd {

// A map [images, channels, lines, positions]: lines are image rows in the row pass, image columns in the
// column pass. Strides in elements; data is null for a gradient that is not needed.
struct CrissCrossMap {
  void* data;
  int64_t image, channel, line, position;
};

template <class A>
struct CrissCrossCall {
  Dtype dtype;
  CrissCrossMap query, key, value, out, grad_out, grad_query, grad_key, grad_value;
  int64_t lines, length;     // cells of a line
  int64_t channels, values;  // of query and key, of value
  bool column;     // the second pass: leaves a position's own cell out, and adds to the first's results
  A *lse, *delta;  // [images, H, W]; the forward's row pass leaves its own log-sum-exp
  int64_t image_step, line_step, position_step;  // of lse and delta
};

template <class A>
struct CrissCrossKernels {
  int64_t (*workspace)(const CrissCrossCall<A>&, int64_t lines, bool backward);  // elements
  // `count` lines from `first` of an image, at most what the workspace was asked for.
  void (*forward)(const CrissCrossCall<A>&, int64_t image, int64_t first, int64_t count, A* workspace);
  void (*backward)(const CrissCrossCall<A>&, int64_t image, int64_t first, int64_t count, A* workspace);
  // The column pass over `columns` columns that lie side by side, in maps that hold A; in about `most`
  // elements.
  int64_t columns;
  int64_t (*workspace_of_columns)(const CrissCrossCall<A>&, int64_t most, bool backward);
  void (*forward_columns)(const CrissCrossCall<A>&, int64_t image, int64_t first, int64_t most, A* workspace);
  void (*backward_columns)(const CrissCrossCall<A>&, int64_t image, int64_t first, int64_t most,
                           A* workspace);
};

}  // namespace kd
