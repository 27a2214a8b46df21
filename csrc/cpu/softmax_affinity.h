#pragma once

// What softmax_affinity.cpp (parts of positions, threads) and softmax_affinity.simd.cpp (arithmetic, once per
// instruction set) share. Plain data only, see dot_product.h.

#include <cstdint>

#include "cpu/position_map.h"

namespace kd {

// One image. Keys and values are packed in blocks, each as wide as SoftmaxKernels::packed_ld.
template <class A>
struct SoftmaxCall {
  Dtype dtype;
  int64_t d, e, m;         // channels of queries and keys, channels of values, keys
  int64_t block;           // queries at a time, whole strips
  double scale;            // of the exponents
  const A *keys, *values;  // packed
  A *maxima, *inverses;    // [n]: max of scale log2(e) q.k, and 1 / sum of what is left
  PositionMap query, out;
  // Backward only. The sums over queries start anew: [m, ld_d] and [m, ld_e], or null.
  PositionMap grad_out, grad_query;
  A *grad_keys, *grad_values;
};

template <class A>
struct SoftmaxKernels {
  int64_t strip, keys, packed_ld;   // queries of a strip, keys of a block, and its rows' distance
  int64_t (*ld)(int64_t channels);  // of the sums
  int64_t (*workspace)(const SoftmaxCall<A>& call, bool backward);  // elements
  // to [channels, packed_ld] = `count` positions from `first`.
  void (*pack)(Dtype dtype, const PositionMap& map, int64_t first, int64_t count, A* to);
  // Queries [first, last).
  void (*forward)(const SoftmaxCall<A>& call, int64_t first, int64_t last, A* workspace);
  void (*backward)(const SoftmaxCall<A>& call, int64_t first, int64_t last, A* workspace);
  // Positions [first, first + count) of `map` = the sum of `parts` sums, which lie `step` apart; overwrites
  // the first of them.
  void (*collect)(Dtype dtype, A* sums, int64_t parts, int64_t step, int64_t first, int64_t count,
                  const PositionMap& map);
};

}  // namespace kd
