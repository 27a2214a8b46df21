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
};

// For query i, over the keys j with key_j > -query_i: G = sum of v_j, H = sum of key_j v_j; then
// out_i = scale (query_i G + H) and dots_i = scale <with_i, G>. Orders are ascending.
template <class P>
struct AffinitySweep {
  const P* query;
  const int32_t* query_order;
  int64_t queries;
  const P* key;
  const int32_t* key_order;
  int64_t keys;
  const P* values;  // [keys, kAffinityWidth]
  P* out;           // [queries, kAffinityWidth], or null; may be `with`
  const P* with;    // [queries, kAffinityWidth]
  double* dots;     // [queries], or null
  double scale;
  double center;  // of the keys: sums run over key_j - center, so that large offsets cancel before they are
                  // summed
};

template <class P>
struct AffinityKernels {
  // Columns [first, first + count) of a matrix to and from [rows, kAffinityWidth], the rest 0.
  void (*pack)(const AffinityMatrix& from, int64_t first, int64_t count, P* to);
  void (*unpack)(const P* from, int64_t first, int64_t count, const AffinityMatrix& to);
  void (*sweep)(const AffinitySweep<P>& sweep);
};

}  // namespace kd
