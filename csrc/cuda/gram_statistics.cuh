#pragma once

// The first kernel of gram.cu, and the scalars that all of them share: means, traces, sums over Grams,
// scores.

#include "common/rounding.h"
#include "gram_tiles.cuh"

namespace kd::gram {
namespace {

constexpr int kItems = 16;  // rows or columns per block of the statistics, with as many lanes each
constexpr int kSums = 8;

enum Sum { kXY, kXX, kYY, kGap, kSkew, kInterXY, kInterXX, kInterYY };

// NaN stays NaN, unlike with fmaxf.
__device__ float not_negative(float value) { return value < 0.0f ? 0.0f : value; }

// Center and sum of squares of 16 items (columns, or rows) of `count` values each.
template <class T>
__device__ void item_statistics(const T* data, int first, int items, int64_t item_stride, int count,
                                int64_t stride, bool lanes_together, bool centered, Center* centers,
                                float* powers) {
  __shared__ float sums[2][kItems][kItems + 1];
  const int t = threadIdx.x;
  const int item = lanes_together ? t / kItems : t % kItems, lane = lanes_together ? t % kItems : t / kItems;
  const auto reference_of = [&](int item) {
    return centered && first + item < items ? to_float(data[(first + item) * item_stride]) : 0.0f;
  };
  const float reference = reference_of(item);
  float sum = 0.0f, power = 0.0f;
  if (first + item < items) {
    const T* values = data + (first + item) * item_stride;
#pragma unroll 8
    for (int i = lane; i < count; i += kItems) {
      const float value = to_float(values[i * stride]) - reference;
      sum += value;
      power += value * value;
    }
  }
  sums[0][item][lane] = sum;
  sums[1][item][lane] = power;
  __syncthreads();
  if (t < kItems && first + t < items) {
    sum = power = 0.0f;
    for (int l = 0; l < kItems; ++l) {
      sum += sums[0][t][l];
      power += sums[1][t][l];
    }
    // The reference is one of the values, so the difference loses at most a factor `count` of precision.
    const float mean = centered ? sum / count : 0.0f;
    powers[first + t] = not_negative(power - sum * mean);
    centers[first + t] = {reference_of(t), mean};
  }
}

__device__ void pair_tiles(int pair, int* i, int* j) {
  int row = 0;
  while ((row + 1) * (row + 2) / 2 <= pair) ++row;
  *i = row;
  *j = pair - row * (row + 1) / 2;
}

// Both triangles' share of one cell (i >= j) of the symmetric Grams.
__device__ void add_symmetric(float (&sums)[kSums], float a, float b, float ar, float br, bool diagonal) {
  const float weight = diagonal ? 1.0f : 2.0f;
  sums[kXY] += weight * a * b;
  sums[kXX] += weight * a * a;
  sums[kYY] += weight * b * b;
  sums[kGap] += weight * (a - b) * (a - b);
  sums[kSkew] += weight * (a - b) * (a + b);
  sums[kInterXX] += weight * ar * ar;
  sums[kInterYY] += weight * br * br;
}

__device__ void write_sums(float (&sums)[kSums], float* out) {
  block_sum(sums);
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int s = 0; s < kSums; ++s) out[s] = sums[s];
}

__device__ void sums_of_saved(const Plan& plan, int group, int pair, float* out) {
  const int tile = plan.tile;
  const Matrices saved = matrices_of(plan, group);
  const int n = plan.rows;
  int tile_i, tile_j;
  pair_tiles(pair, &tile_i, &tile_j);
  float sums[kSums] = {};
  for (int cell = threadIdx.x; cell < tile * tile; cell += kThreads) {
    const int i = tile_i * tile + cell / tile, j = tile_j * tile + cell % tile;
    if (i >= n || j >= n) continue;
    if (i >= j) {
      const bool rows = saved.shared;
      add_symmetric(sums, saved.a()[saved.below(i, j)], saved.b()[saved.below(i, j)],
                    rows ? saved.ar()[saved.above(i, j)] : 0.0f, rows ? saved.br()[saved.above(i, j)] : 0.0f,
                    i == j);
    }
    if (plan.inter) {
      const float m = saved.m()[int64_t{i} * n + j],
                  mt = tile_i == tile_j ? 0.0f : saved.m()[int64_t{j} * n + i];
      sums[kInterXY] += m * m + mt * mt;
    }
  }
  write_sums(sums, out);
}

// blockIdx.x runs over 16 columns of x, of y, 16 rows of x, of y (centred inter), and, for a backward with
// saved Grams, the pairs of tiles of those; blockIdx.z over groups.
template <class T>
__global__ void __launch_bounds__(kThreads)
    gram_statistics(const __grid_constant__ Plan plan, const bool sum_saved) {
  const int group = blockIdx.z;
  float* workspace = plan.workspace + group * plan.workspace_stride;
  if (blockIdx.x == 0) {
    int* counters = reinterpret_cast<int*>(workspace + plan.counters);
    for (int c = threadIdx.x; c <= plan.pairs; c += kThreads) counters[c] = 0;
  }
  int block = blockIdx.x;
#pragma unroll 1
  for (int part = 0; part < (plan.centered && plan.inter ? 4 : 2); ++part) {
    const Operand& operand = part % 2 == 0 ? plan.x : plan.y;
    const bool columns = part < 2;
    const int items = columns ? operand.features : plan.rows, blocks = ceil_div(items, kItems);
    if (block < blocks) {
      const T* data = static_cast<const T*>(operand.data) + group * operand.group_stride;
      item_statistics(data, block * kItems, items, columns ? operand.feature_stride : operand.row_stride,
                      columns ? plan.rows : operand.features,
                      columns ? operand.row_stride : operand.feature_stride, columns == operand.along_rows,
                      plan.centered,
                      reinterpret_cast<Center*>(workspace + (columns ? operand.columns : operand.rows)),
                      workspace + (columns ? operand.column_powers : operand.row_powers));
      return;
    }
    block -= blocks;
  }
  if (sum_saved) sums_of_saved(plan, group, block, workspace + plan.sums + block * kSums);
}

struct Traces {
  float x, y, rows_x, rows_y;  // of K, L, Kr, Lr
};

__device__ Traces traces(const Plan& plan, const float* workspace) {
  float sums[4] = {};
  for (int k = threadIdx.x; k < plan.x.features; k += kThreads)
    sums[0] += workspace[plan.x.column_powers + k];
  for (int k = threadIdx.x; k < plan.y.features; k += kThreads)
    sums[1] += workspace[plan.y.column_powers + k];
  const bool rows = plan.centered && plan.inter;
  for (int i = threadIdx.x; rows && i < plan.rows; i += kThreads) {
    sums[2] += workspace[plan.x.row_powers + i];
    sums[3] += workspace[plan.y.row_powers + i];
  }
  block_sum(sums);
  return {sums[0], sums[1], rows ? sums[2] : sums[0], rows ? sums[3] : sums[1]};
}

struct Scores {
  float xy, xx, yy;                // of A and B
  float norm_x, norm_y, norm_gap;  // |A|, |B|, |A| - |B|
  float distance;
  float inter_xy, inter_xx, inter_yy;  // |M|^2, |Ar|^2, |Br|^2
  float inter_distance;
  bool empty, inter_empty;
};

__device__ Scores scores(const Plan& plan, const float* workspace, const Traces& trace) {
  float sums[kSums] = {};
  for (int pair = threadIdx.x; pair < plan.pairs; pair += kThreads) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) sums[s] += __ldcg(workspace + plan.sums + pair * kSums + s);
  }
  block_sum(sums);
  Scores out;
  out.xy = sums[kXY], out.xx = sums[kXX], out.yy = sums[kYY];
  out.norm_x = sqrtf(out.xx), out.norm_y = sqrtf(out.yy);
  out.empty = trace.x == 0.0f || trace.y == 0.0f;
  out.norm_gap = out.empty ? 0.0f : sums[kSkew] / (out.norm_x + out.norm_y);
  const float gap = sums[kGap] - out.norm_gap * out.norm_gap;
  out.distance = out.empty ? 1.0f : not_negative(gap) / (2.0f * out.norm_x * out.norm_y);
  out.inter_xy = sums[kInterXY];
  out.inter_xx = plan.centered ? sums[kInterXX] : out.xx;
  out.inter_yy = plan.centered ? sums[kInterYY] : out.yy;
  out.inter_empty = trace.rows_x == 0.0f || trace.rows_y == 0.0f;
  const float score = out.inter_xy / (sqrtf(out.inter_xx) * sqrtf(out.inter_yy));
  out.inter_distance = out.inter_empty ? 1.0f : not_negative(1.0f - score);
  return out;
}

}  // namespace
}  // namespace kd::gram
