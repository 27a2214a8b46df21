#pragma once

// Pieces of gram.cu: what a kernel gets (Plan), centred tiles of a strided matrix, register-blocked products,
// fixed-order sums over a block.

#include <cstdint>

#include "convert.cuh"
#include "launch.h"

namespace kd::gram {

constexpr int kThreads = 256;
constexpr int kPad = 4;           // floats between the rows of a tile: float4 stays aligned, banks shift
constexpr int kTileCells = 1024;  // of a staged tile: four per thread

// A block makes a kTile x kTile product with kMicro x kMicro cells per thread, in slices of kSlice.
template <int kMicro>
struct Shape {
  static constexpr int kTile = 16 * kMicro;
  static constexpr int kSlice = kTileCells / kTile;
  static constexpr int kLead = kTile + kPad;
};

// Centred value = (x - reference) - mean: exact for constants and close to it for large means.
struct Center {
  float reference, mean;
};

struct Operand {
  const void* data;
  int64_t group_stride, row_stride, feature_stride;
  int features;
  bool along_rows;  // rows are closer together in memory than features
  bool quads;       // four neighbours can be read at once
  // Offsets into a group's workspace: Center of each column and row, and their sums of squares.
  int64_t columns, column_powers, rows, row_powers;
};

struct Plan {
  Operand x, y;
  int rows, centered, inter;
  int tile;   // rows of a tile of the Grams
  int pairs;  // of tiles (i >= j)
  int kinds;  // of products for a pair
  int splits, split_features;
  float* workspace;
  int64_t workspace_stride, sums, counters, partial;
  float* matrices;  // null: not kept
  int64_t matrices_stride;
};

// Normalised Grams of one group: A = K / tr K and B of x and y; with `inter` also M = X Y^T / sqrt(tr tr),
// and if centred Ar, Br, the Grams of the row-centred matrices. Two symmetric matrices share one array of n +
// 1 rows: one below the diagonal, shifted by a row, the other above.
struct Matrices {
  float* base;
  int n;
  bool shared;

  __device__ int64_t side() const { return int64_t{n} * (n + shared); }
  __device__ float* a() const { return base + (shared ? n : 0); }
  __device__ float* b() const { return base + side() + (shared ? n : 0); }
  __device__ float* ar() const { return base; }
  __device__ float* br() const { return base + side(); }
  __device__ float* m() const { return base + 2 * side(); }
  // Index of a symmetric matrix that is kept below (or above) the diagonal.
  __device__ int64_t below(int i, int j) const { return i >= j ? int64_t{i} * n + j : int64_t{j} * n + i; }
  __device__ int64_t above(int i, int j) const { return i <= j ? int64_t{i} * n + j : int64_t{j} * n + i; }
};

__device__ inline Matrices matrices_of(const Plan& plan, int group) {
  return {plan.matrices + group * plan.matrices_stride, plan.rows, plan.centered && plan.inter};
}

// 16 bytes of float32, 8 of half precision.
template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T v[4];
};

// kRows x kColumns cells of a matrix, centred per row or per column, on their way from memory to a shared
// tile. Between fetch and store the products of the previous tile run.
template <class T, int kRows, int kColumns>
struct CenteredTile {
  static_assert(kRows * kColumns == kTileCells);
  float value[4];
  Center center[4];
  int row, column;  // of the first cell, in the tile
  bool along_rows;

  __device__ void fetch(const Operand& operand, const float* workspace, int group, bool by_row, int first_row,
                        int rows, int first_column, int columns) {
    const int t = threadIdx.x;
    along_rows = operand.along_rows;
    row = along_rows ? t % (kRows / 4) * 4 : t / (kColumns / 4);
    column = along_rows ? t / (kRows / 4) : t % (kColumns / 4) * 4;
    const int64_t i = first_row + row, k = first_column + column;
    const int valid = along_rows ? (k < columns ? rows - i : 0) : (i < rows ? columns - k : 0);
    const T* source = static_cast<const T*>(operand.data) + group * operand.group_stride +
                      i * operand.row_stride + k * operand.feature_stride;
    const int64_t step = along_rows ? operand.row_stride : operand.feature_stride;
    if (operand.quads && valid >= 4) {
      const Quad<T> quad = *reinterpret_cast<const Quad<T>*>(source);
#pragma unroll
      for (int e = 0; e < 4; ++e) value[e] = to_float(quad.v[e]);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) value[e] = e < valid ? to_float(source[e * step]) : 0.0f;
    }
    const Center* centers =
        reinterpret_cast<const Center*>(workspace + (by_row ? operand.rows : operand.columns)) +
        (by_row ? i : k);
    const int along = by_row == along_rows ? 1 : 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) center[e] = e < valid ? centers[e * along] : Center{0.0f, 0.0f};
  }

  // tile[column][row] where kFeatureMajor, else tile[row][column]
  template <bool kFeatureMajor, int kLead>
  __device__ void store(float (*tile)[kLead]) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float centered = (value[e] - center[e].reference) - center[e].mean;
      const int i = row + (along_rows ? e : 0), k = column + (along_rows ? 0 : e);
      tile[kFeatureMajor ? k : i][kFeatureMajor ? i : k] = centered;
    }
  }
};

template <int kCount>
struct alignas(4 * kCount) Fragment {
  float v[kCount];
};

// cells[m][n] += sum_s left[s][16-thread row's m] * right[s][16-thread column's n]
template <int kMicro, int kSlice, int kLead>
__device__ inline void multiply_slice(const float (*left)[kLead], const float (*right)[kLead],
                                      float (&cells)[kMicro][kMicro]) {
  const int first_row = threadIdx.x / 16 * kMicro, first_column = threadIdx.x % 16 * kMicro;
#pragma unroll
  for (int s = 0; s < kSlice; ++s) {
    const auto a = *reinterpret_cast<const Fragment<kMicro>*>(&left[s][first_row]);
    const auto b = *reinterpret_cast<const Fragment<kMicro>*>(&right[s][first_column]);
#pragma unroll
    for (int m = 0; m < kMicro; ++m) {
#pragma unroll
      for (int n = 0; n < kMicro; ++n) cells[m][n] += a.v[m] * b.v[n];
    }
  }
}

// Every thread's values, added in a fixed order; every thread gets the result.
template <int kCount>
__device__ inline void block_sum(float (&values)[kCount]) {
  __shared__ float warps[kThreads / 32][kCount];
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) values[c] += __shfl_xor_sync(0xffffffffu, values[c], mask);
  }
  __syncthreads();  // an earlier sum may still be read
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) warps[threadIdx.x / 32][c] = values[c];
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    values[c] = 0.0f;
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) values[c] += warps[w][c];
  }
}

// True in the last of `count` blocks to come here, which then sees what the others wrote before.
__device__ inline bool arrive_last(int* counter, int count) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(counter, 1) == count - 1;
  __syncthreads();
  const bool result = last;
  __threadfence();
  return result;
}

}  // namespace kd::gram
