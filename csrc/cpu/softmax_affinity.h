#pragma once

// What softmax_affinity.cpp (parts of positions, threads) and softmax_affinity.simd.cpp (arithmetic, once per
// instruction set) share. Plain data only, see dot_product.h.

#include <cstdint>

#include "cpu/position_map.h"

namespace kd {

// Queries and keys of one image. Keys and values are packed in blocks, rows SoftmaxKernels::packed_ld apart.
template <class A>
struct SoftmaxCall {
  Dtype dtype;
  int64_t d, e;               // channels of queries and keys, channels of values
  int64_t block, keys_block;  // queries and keys at a time
  double scale;               // of the exponents
  int64_t keys;               // how many
  const A *packed_keys, *packed_values;
  A *maxima, *inverses;  // [n]: max of scale log2(e) q.k, and 1 / sum of what is left
  PositionMap query, out;
  // Backward only.
  PositionMap grad_out, grad_query;
  A* grad_queries;  // per block of queries [d, ld of the block]: their sums, kept from call to call
  A *grad_keys, *grad_values;  // [keys, ld of the channels], or null: sums over queries
  bool first, last;            // of the ranges of keys: start all those sums; write grad_query
};

template <class A>
struct SoftmaxKernels {
  int64_t strip;                   // queries that are handled together
  int64_t keys, packed_ld;         // keys of a block, at most, and how far its rows are apart
  int64_t (*ld)(int64_t columns);  // of sums
  int64_t (*workspace)(const SoftmaxCall<A>& call, bool backward);  // elements
  // to [channels, packed_ld] = `count` positions from `first`.
  void (*pack)(Dtype dtype, const PositionMap& map, int64_t first, int64_t count, A* to);
  // Queries [first, last).
  void (*forward)(const SoftmaxCall<A>& call, int64_t first, int64_t last, A* workspace);
  void (*backward)(const SoftmaxCall<A>& call, int64_t first, int64_t last, A* workspace);
  // Positions [first, first + count) of `map` = the sum of `sets` of sums, which lie `step` apart; overwrites
  // the first of them.
  void (*collect)(Dtype dtype, A* sums, int64_t sets, int64_t step, int64_t first, int64_t count,
                  const PositionMap& map);
};

}  // namespace kd
