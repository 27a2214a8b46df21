#pragma once

// The second kernel of gram.cu: the Grams, their sums and, in a forward, the results.

#include "gram_statistics.cuh"

namespace kd::gram {
namespace {

enum Kind { kK, kL, kM, kMTransposed, kKr, kLr };

// Four cells of one product of a pair of tiles, added over the splits.
__device__ float4 sum_splits(const float4* partial, int splits, int tile_quads) {
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
  for (int split = 0; split < splits; ++split) {
    const float4 part = __ldcg(partial + int64_t{split} * tile_quads);
    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
  }
  return sum;
}

__device__ float normalised(float value, float scale) { return scale == 0.0f ? 0.0f : value / scale; }

// The last block of a pair of tiles adds the splits, keeps the normalised Grams and their sums.
template <int kMicro>
__device__ void finish_pair(const Plan& plan, int group, int pair, int tile_i, int tile_j,
                            const Traces& trace) {
  constexpr int kTile = Shape<kMicro>::kTile, kQuads = kTile * kTile / 4;
  float* workspace = plan.workspace + group * plan.workspace_stride;
  const Matrices keep = matrices_of(plan, group);
  const int n = plan.rows;
  const bool kept = plan.matrices != nullptr, rows = plan.centered && plan.inter;
  const float scale_m = sqrtf(trace.rows_x) * sqrtf(trace.rows_y);
  const float4* partial = reinterpret_cast<const float4*>(workspace + plan.partial) +
                          int64_t{pair} * plan.kinds * plan.splits * kQuads + threadIdx.x;
  const int64_t kind_quads = int64_t{plan.splits} * kQuads;
  const bool mirrored = plan.inter && tile_i != tile_j;
  float sums[kSums] = {};
#pragma unroll 1
  for (int quad = 0; quad < kMicro * kMicro / 4; ++quad) {
    const float4* source = partial + quad * kThreads;
    const float4 none = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const float4 found[6] = {
        sum_splits(source + kK * kind_quads, plan.splits, kQuads),
        sum_splits(source + kL * kind_quads, plan.splits, kQuads),
        plan.inter ? sum_splits(source + kM * kind_quads, plan.splits, kQuads) : none,
        mirrored ? sum_splits(source + kMTransposed * kind_quads, plan.splits, kQuads) : none,
        rows ? sum_splits(source + kKr * kind_quads, plan.splits, kQuads) : none,
        rows ? sum_splits(source + kLr * kind_quads, plan.splits, kQuads) : none,
    };
    const auto cell_of = [&](int kind, int c) {
      const float4& q = found[kind];
      return c == 0 ? q.x : c == 1 ? q.y : c == 2 ? q.z : q.w;
    };
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int down = threadIdx.x / 16 * kMicro + (quad * 4 + c) / kMicro;
      const int across = threadIdx.x % 16 * kMicro + (quad * 4 + c) % kMicro;
      const int i = tile_i * kTile + down, j = tile_j * kTile + across;
      if (i < n && j < n && i >= j) {
        const float a = normalised(cell_of(kK, c), trace.x), b = normalised(cell_of(kL, c), trace.y);
        const float ar = normalised(cell_of(kKr, c), trace.rows_x),
                    br = normalised(cell_of(kLr, c), trace.rows_y);
        add_symmetric(sums, a, b, ar, br, i == j);
        if (kept) {
          keep.a()[keep.below(i, j)] = a;
          keep.b()[keep.below(i, j)] = b;
        }
        if (kept && rows) {
          keep.ar()[keep.above(i, j)] = ar;
          keep.br()[keep.above(i, j)] = br;
        }
      }
      if (plan.inter && i < n && j < n) {
        const float m = normalised(cell_of(kM, c), scale_m);
        sums[kInterXY] += m * m;
        if (kept) keep.m()[int64_t{i} * n + j] = m;
      }
      const int row = tile_j * kTile + down, column = tile_i * kTile + across;
      if (mirrored && row < n && column < n) {
        const float m = normalised(cell_of(kMTransposed, c), scale_m);
        sums[kInterXY] += m * m;
        if (kept) keep.m()[int64_t{row} * n + column] = m;
      }
    }
  }
  write_sums(sums, workspace + plan.sums + pair * kSums);
}

__device__ void write_scores(const Plan& plan, int group, int groups, const Traces& t, const Scores& s,
                             float* products, float* distance) {
  if (threadIdx.x != 0) return;
  products[group] = s.xy * t.x * t.y;
  products[groups + group] = s.xx * t.x * t.x;
  products[2 * groups + group] = s.yy * t.y * t.y;
  distance[group] = s.distance;
  if (!plan.inter) return;
  products[3 * groups + group] = s.inter_xy * t.rows_x * t.rows_y;
  products[4 * groups + group] = s.inter_xx * t.rows_x * t.rows_x;
  products[5 * groups + group] = s.inter_yy * t.rows_y * t.rows_y;
  distance[groups + group] = s.inter_distance;
}

// blockIdx: x = pair of tiles and kind of product, y = split of the features, z = group. `products` is null
// in a backward.
template <class T, int kMicro>
__global__ void __launch_bounds__(kThreads, 2)
    gram_products(const __grid_constant__ Plan plan, float* products, float* distance) {
  constexpr int kTile = Shape<kMicro>::kTile, kSlice = Shape<kMicro>::kSlice, kLead = Shape<kMicro>::kLead;
  __shared__ __align__(16) float left[2][kSlice][kLead];
  __shared__ __align__(16) float right[2][kSlice][kLead];
  const int pair = blockIdx.x / plan.kinds, kind = blockIdx.x % plan.kinds, split = blockIdx.y,
            group = blockIdx.z;
  float* workspace = plan.workspace + group * plan.workspace_stride;
  int tile_i, tile_j;
  pair_tiles(pair, &tile_i, &tile_j);
  if (kind == kMTransposed && tile_i == tile_j) return;

  const bool mirrored = kind == kMTransposed, mixed = kind == kM || mirrored,
             by_row = kind >= kM && plan.centered;
  const Operand& a = kind == kL || kind == kLr ? plan.y : plan.x;
  const Operand& b = mixed ? plan.y : a;
  const int first_a = (mirrored ? tile_j : tile_i) * kTile, first_b = (mirrored ? tile_i : tile_j) * kTile;
  const int begin = split * plan.split_features, end = min(begin + plan.split_features, a.features);

  float cells[kMicro][kMicro] = {};
  CenteredTile<T, kTile, kSlice> next_a, next_b;
  if (begin < end) {
    next_a.fetch(a, workspace, group, by_row, first_a, plan.rows, begin, end);
    next_b.fetch(b, workspace, group, by_row, first_b, plan.rows, begin, end);
    next_a.template store<true>(left[0]);
    next_b.template store<true>(right[0]);
  }
  __syncthreads();
  int buffer = 0;
  for (int k = begin; k < end; k += kSlice) {
    const bool more = k + kSlice < end;
    if (more) {
      next_a.fetch(a, workspace, group, by_row, first_a, plan.rows, k + kSlice, end);
      next_b.fetch(b, workspace, group, by_row, first_b, plan.rows, k + kSlice, end);
    }
    multiply_slice<kMicro, kSlice>(left[buffer], right[buffer], cells);
    buffer ^= 1;
    if (more) {
      next_a.template store<true>(left[buffer]);
      next_b.template store<true>(right[buffer]);
    }
    __syncthreads();
  }

  float4* partial = reinterpret_cast<float4*>(workspace + plan.partial) +
                    (int64_t{blockIdx.x} * plan.splits + split) * (kTile * kTile / 4) + threadIdx.x;
#pragma unroll
  for (int quad = 0; quad < kMicro * kMicro / 4; ++quad) {
    float part[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) part[c] = cells[(quad * 4 + c) / kMicro][(quad * 4 + c) % kMicro];
    partial[quad * kThreads] = make_float4(part[0], part[1], part[2], part[3]);
  }
  int* counters = reinterpret_cast<int*>(workspace + plan.counters);
  const int kinds = plan.kinds - (plan.inter && tile_i == tile_j ? 1 : 0);
  if (!arrive_last(&counters[pair], kinds * plan.splits)) return;
  const Traces trace = traces(plan, workspace);
  finish_pair<kMicro>(plan, group, pair, tile_i, tile_j, trace);
  if (products == nullptr || !arrive_last(&counters[plan.pairs], plan.pairs)) return;
  write_scores(plan, group, gridDim.z, trace, scores(plan, workspace, trace), products, distance);
}

}  // namespace
}  // namespace kd::gram
