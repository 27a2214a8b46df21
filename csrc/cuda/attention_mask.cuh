#pragma once

// Pieces of attention_mask.cu: tiles of maps, sums over warps and blocks in fixed order.

#include <cstdint>

#include "convert.cuh"
#include "launch.h"

namespace kd::attention {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// Rows of columns: channels x pixels where pixels are neighbours in memory, else pixels x channels.
struct Matrix {
  void* data;
  int64_t image, row, column;
  bool vectors;  // 16 bytes can be read at once
};

// A lane's neighbouring columns: 16 bytes.
template <class T>
constexpr int kVector = 16 / sizeof(T);

template <class T>
struct alignas(16) Vector {
  T v[kVector<T>];
};

// Zero where there is no column. Converted by the caller, who may have more to load before it waits.
template <class T>
__device__ void load(const Matrix& m, int64_t image, int64_t row, int64_t column, int64_t columns,
                     Vector<T>& to) {
  const T* from = static_cast<const T*>(m.data) + image * m.image + row * m.row + column * m.column;
  if (m.vectors && column + kVector<T> <= columns) {
    to = *reinterpret_cast<const Vector<T>*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) to.v[i] = column + i < columns ? from[i * m.column] : T{};
  }
}

template <class T>
__device__ void store(const Matrix& m, int64_t image, int64_t row, int64_t column, int64_t columns,
                      const float (&from)[kVector<T>]) {
  T* to = static_cast<T*>(m.data) + image * m.image + row * m.row + column * m.column;
  if (m.vectors && column + kVector<T> <= columns) {
    Vector<T> v;
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) v.v[i] = from_float<T>(from[i]);
    *reinterpret_cast<Vector<T>*>(to) = v;
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      if (column + i < columns) to[i * m.column] = from_float<T>(from[i]);
    }
  }
}

__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v += __shfl_xor_sync(0xffffffffu, v, mask);
  return v;
}

// NaN wins, as in torch.
__device__ inline float larger(float a, float b) { return a > b || a != a ? a : b; }

__device__ inline float warp_max(float v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v = larger(v, __shfl_xor_sync(0xffffffffu, v, mask));
  return v;
}

// To every thread; all threads of the block call it.
template <bool kMax>
__device__ float block_reduce(float v) {
  __shared__ float parts[kWarps];
  v = kMax ? warp_max(v) : warp_sum(v);
  __syncthreads();  // the last call's parts are read
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
  __syncthreads();
  float all = parts[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) all = kMax ? larger(all, parts[w]) : all + parts[w];
  return all;
}

// Sums of the warps' columns, `kValues` per lane, to out [columns] from `first` on. All threads call it.
template <int kValues>
__device__ void write_columns(const float (&sums)[kValues], float* out, int64_t first, int64_t columns,
                              float factor) {
  __shared__ float parts[kWarps][32 * kValues];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kValues; ++i) parts[threadIdx.x / 32][threadIdx.x % 32 * kValues + i] = sums[i];
  __syncthreads();
  for (int c = threadIdx.x; c < 32 * kValues && first + c < columns; c += kThreads) {
    float all = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) all += parts[w][c];
    out[first + c] = all * factor;
  }
}

}  // namespace kd::attention
