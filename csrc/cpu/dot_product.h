#pragma once

// What dot_product.cpp (parts of positions, threads) and dot_product.simd.cpp (products, once per instruction
// set) share. Plain data only: an inline function here could be linked from AVX code into the baseline code.

#include <cstdint>

#include "cpu/position_map.h"

namespace kd {

// One sweep over positions with maps x [e, n] and y [d, n]: where asked for,
//   sums [e, d] = x y^T,   out_x [e, n] = matrix y,   out_y [d, n] = matrix^T x.
template <class A>
struct DotPass {
  Dtype dtype;
  int64_t e, d, block;  // `block` positions at a time, whole vectors
  PositionMap x, y, out_x, out_y;
  const A* matrix;  // [e, ld]
  A* sums;          // [e, ld], or null
  int64_t ld;       // whole vectors
};

template <class A>
struct DotKernels {
  int64_t lanes;
  int64_t (*workspace)(int64_t e, int64_t d, int64_t block);  // elements
  // Positions [first, last). What of `sums` lies beyond d is written too.
  void (*pass)(const DotPass<A>& pass, int64_t first, int64_t last, A* workspace);
};

}  // namespace kd
