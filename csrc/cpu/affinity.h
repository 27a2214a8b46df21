#pragma once

// What affinity.cpp (orders, threads) and affinity.simd.cpp (sweeps, once per instruction set) share. Plain
// data only: an inline function here could be linked from AVX code into the baseline code.

#include <cstdint>

#include "common/storage.h"

namespace kd {

constexpr int64_t kAffinityWidth = 16;  // columns of e that one sweep carries

// A matrix [rows, columns] in a tensor; strides in elements.
struct AffinityMatrix {
  void* data;
  Dtype dtype;
  int64_t rows, row_stride, column_stride;
  bool past_caches = false;  // so large that writing it had better not go through the caches
};

// Queries and keys stand in ascending order. For query r, over the counted[r] last keys, which are those with
// key > -query: G = sum of their values, H = sum of key times value; then out_r = scale (query_r G + H) and
// dots_r = scale <with_r, G>.
template <class P>
struct AffinitySweep {
  const P* query;
  int64_t queries;
  const P* key;
  int64_t keys;
  const int32_t* counted;  // [queries], ascending
  const P* values;         // [keys, kAffinityWidth]
  P* out;                  // [queries, kAffinityWidth], or null; may be `with`
  int64_t out_step;        // from row to row, in elements; may be negative, and rows may lie on values that
                           // were read for the same query or before
  const P* with;           // [queries, kAffinityWidth]
  P* dots;                 // [queries], or null
  double scale;
  double center;  // of the keys: sums run over key - center, so that large offsets cancel before they are
                  // summed
};

template <class P>
struct AffinityKernels {
  // Columns [first, first + count) of a matrix to and from [rows, kAffinityWidth], the rest 0. Row i of the
  // matrix is row rank[i] there.
  void (*pack)(const AffinityMatrix& from, const int32_t* rank, int64_t first, int64_t count, P* to);
  // `step` is from row to row of what is unpacked.
  void (*unpack)(const P* from, int64_t step, const int32_t* rank, int64_t first, int64_t count,
                 const AffinityMatrix& to);
  void (*sweep)(const AffinitySweep<P>& sweep);
};

}  // namespace kd
