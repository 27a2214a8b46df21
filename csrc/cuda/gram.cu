// Linear CKA of small inputs (logits), centred or not, alone or with the comparison of the transposes, in few
// launches:
//   forward   gram_statistics, gram_products                     2 launches
//   backward  gram_statistics, [gram_products,] gram_gradient    2 launches, 3 where the Grams were not saved
//
// Notation (kdfast/reference/gram.py): N rows, D features; K = Xc Xc^T, L = Yc Yc^T with columns centred;
// with `inter` also Kr, Lr, M = Xr Yr^T with rows centred, since |Xr^T Yr|^2-like products of the D x D side
// are those of the N x N side. Grams are divided by their trace first, so their squares neither overflow nor
// vanish: A = K / tr K, B = L / tr L. The distance is computed in one pass and keeps its digits near 0: with
// a = |A|, b = |B|,
//   1 - <A,B>/(a b) = (|A - B|^2 - (a - b)^2) / (2 a b),   a - b = <A - B, A + B> / (a + b).
//
// Counts per group, x and y of N x D in e-byte elements, P = products (K, L: 2 halves; inter: + M; centred
// inter: + Kr, Lr):
//   statistics  reads 2 N D e bytes (centred inter: twice), 4 operations per value
//   products    N^2 D (1 | 2 | 3) multiply-adds for (no inter | inter | centred inter), reads 2 N D e (N /
//   kTile) from the
//               caches, moves 4 N^2 bytes per product and split through the cache; keeps (2 | 3 | 5 halves +
//               1) N^2 floats
//   gradient    per side: N^2 D (1 | 2 | 3) multiply-adds, writes N D e bytes

#include <algorithm>
#include <cmath>

#include "gram.h"
#include "gram_tiles.cuh"

namespace kd::gram {
namespace {

constexpr int kItems = 16;  // rows or columns per block of the statistics, with as many lanes each
constexpr int kSums = 8;
constexpr int kTargetBlocks =
    264;  // two on each multiprocessor of a large GPU; fixed, so results do not depend on it
constexpr int kMaxSplits = 8, kMinSplitFeatures = 32;

enum Sum { kXY, kXX, kYY, kGap, kSkew, kInterXY, kInterXX, kInterYY };
enum Kind { kK, kL, kM, kMTransposed, kKr, kLr };

// ----------------------------------------------------------------------------------------------------
// statistics

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
    const int items = columns ? operand.features : plan.rows, blocks = (items + kItems - 1) / kItems;
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

// ------------------------------------------------------------------------------------------------------
// scalars

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

// -----------------------------------------------------------------------------------------------------
// products

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

// -----------------------------------------------------------------------------------------------------
// gradient

struct Upstream {
  const float* products;  // [terms, 3, groups]
  const float* distance;  // [terms, groups]
  int64_t products_strides[3], distance_strides[2];

  __device__ float product(int term, int which, int group) const {
    return products[term * products_strides[0] + which * products_strides[1] + group * products_strides[2]];
  }
  __device__ float of_distance(int term, int group) const {
    return distance[term * distance_strides[0] + group * distance_strides[1]];
  }
};

// dX = (gap (A - B) + other B + own A) Xc + rows Ar Xr + mixed M Yr; for y with A, B and x, y exchanged and M
// transposed.
struct Mixture {
  float gap, other, own, rows, mixed;
};

__device__ Mixture mixture(const Plan& plan, const Upstream& upstream, int group, bool for_x, const Traces& t,
                           const Scores& s) {
  const float trace = for_x ? t.x : t.y, trace_other = for_x ? t.y : t.x;
  const float norm = for_x ? s.norm_x : s.norm_y, norm_other = for_x ? s.norm_y : s.norm_x;
  const float norm_gap = for_x ? s.norm_gap : -s.norm_gap;
  const int own = for_x ? 1 : 2;
  Mixture out = {};
  if (!plan.centered || plan.rows > 2) {
    if (!s.empty) {
      out.gap = 2.0f * upstream.of_distance(0, group) / (norm * norm) / trace;
      out.other = -out.gap * norm_gap / norm_other;
      out.own = -out.gap * s.distance;
    }
    out.other += 2.0f * upstream.product(0, 0, group) * trace_other;
    out.own += 4.0f * upstream.product(0, own, group) * trace;
  }
  if (plan.inter && (!plan.centered || plan.x.features > 2)) {
    const float rows = for_x ? t.rows_x : t.rows_y, square = for_x ? s.inter_xx : s.inter_yy;
    const float scale = sqrtf(t.rows_x) * sqrtf(t.rows_y);
    if (!s.inter_empty) {
      const float both = sqrtf(s.inter_xx) * sqrtf(s.inter_yy), g = 2.0f * upstream.of_distance(1, group);
      out.mixed = -g / both / scale;
      out.rows = g * (s.inter_xy / both) / square / rows;
    }
    out.mixed += 2.0f * upstream.product(1, 0, group) * scale;
    out.rows += 4.0f * upstream.product(1, own, group) * rows;
  }
  if (!plan.centered) out.own += out.rows;  // Ar is A, Xr is X
  return out;
}

struct Gradient {
  void* data;  // null: not needed
  int64_t group_stride, row_stride, feature_stride;
};

// blockIdx: x = tile of rows and of features, y = side, z = group.
template <class T, int kMicro>
__global__ void __launch_bounds__(kThreads, 2)
    gram_gradient(const __grid_constant__ Plan plan, const __grid_constant__ Upstream upstream,
                  const __grid_constant__ Gradient grad_x, const __grid_constant__ Gradient grad_y) {
  constexpr int kTile = Shape<kMicro>::kTile, kSlice = Shape<kMicro>::kSlice, kLead = Shape<kMicro>::kLead;
  __shared__ __align__(16) float left[2][kSlice][kLead];
  __shared__ __align__(16) float right[2][kSlice][kLead];
  const int group = blockIdx.z, n = plan.rows;
  const bool for_x = grad_x.data != nullptr && blockIdx.y == 0;
  const Operand& own = for_x ? plan.x : plan.y;
  const Operand& other = for_x ? plan.y : plan.x;
  const int row_tiles = (n + kTile - 1) / kTile;
  const int first_row = blockIdx.x % row_tiles * kTile, first_feature = blockIdx.x / row_tiles * kTile;
  if (first_feature >= own.features) return;

  const float* workspace = plan.workspace + group * plan.workspace_stride;
  const Matrices saved = matrices_of(plan, group);
  const Traces trace = traces(plan, workspace);
  const Mixture mix = mixture(plan, upstream, group, for_x, trace, scores(plan, workspace, trace));
  const float* gram_own = for_x ? saved.a() : saved.b();
  const float* gram_other = for_x ? saved.b() : saved.a();
  const float* gram_rows = for_x ? saved.ar() : saved.br();

  // Steps: all slices of rows for the columns' term, then for the rows' (centred inter), then for the mixed
  // one (inter).
  const int slices = (n + kSlice - 1) / kSlice, terms = plan.inter ? (plan.centered ? 3 : 2) : 1;
  const int steps = slices * terms;
  // Each thread brings four cells of the small matrix: row `i`, columns j .. j + 3.
  const int down = threadIdx.x % kTile, across = threadIdx.x / kTile * 4, i = first_row + down;
  float first[4], second[4];
  float scale_first = 0.0f, scale_second = 0.0f, scale_gap = 0.0f;
  CenteredTile<T, kSlice, kTile> next;

  const auto fetch = [&](int step) {
    const int term = step / slices, j = step % slices * kSlice;
    const bool columns = term == 0, mixed = term > 0 && term == terms - 1;
    scale_gap = columns ? mix.gap : 0.0f;
    scale_first = columns ? mix.own : mixed ? mix.mixed : mix.rows;
    scale_second = columns ? mix.other : 0.0f;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int jj = j + across + e;
      const bool valid = i < n && jj < n;
      const int64_t mixed_at = for_x ? int64_t{i} * n + jj : int64_t{jj} * n + i;
      const float* source = columns ? gram_own + saved.below(i, jj)
                            : mixed ? saved.m() + mixed_at
                                    : gram_rows + saved.above(i, jj);
      first[e] = valid ? *source : 0.0f;
      second[e] = valid && columns ? gram_other[saved.below(i, jj)] : 0.0f;
    }
    next.fetch(mixed ? other : own, workspace, group, !columns && plan.centered, j, n, first_feature,
               own.features);
  };
  const auto store = [&](int buffer) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      left[buffer][across + e][down] =
          scale_gap * (first[e] - second[e]) + scale_first * first[e] + scale_second * second[e];
    }
    next.template store<false>(right[buffer]);
  };

  float cells[kMicro][kMicro] = {};
  fetch(0);
  store(0);
  __syncthreads();
  for (int step = 0; step < steps; ++step) {
    const bool more = step + 1 < steps;
    if (more) fetch(step + 1);
    multiply_slice<kMicro, kSlice>(left[step % 2], right[step % 2], cells);
    if (more) store((step + 1) % 2);
    __syncthreads();
  }

  const Gradient& gradient = for_x ? grad_x : grad_y;
  T* out = static_cast<T*>(gradient.data) + group * gradient.group_stride;
#pragma unroll
  for (int m = 0; m < kMicro; ++m) {
    const int row = first_row + threadIdx.x / 16 * kMicro + m;
#pragma unroll
    for (int c = 0; c < kMicro; ++c) {
      const int feature = first_feature + threadIdx.x % 16 * kMicro + c;
      if (row < n && feature < own.features) {
        out[row * gradient.row_stride + feature * gradient.feature_stride] = from_float<T>(cells[m][c]);
      }
    }
  }
}

// --------------------------------------------------------------------------------------------------------
// host

constexpr int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }
constexpr int64_t align(int64_t floats) { return (floats + 3) / 4 * 4; }

int element_size(int32_t dtype) { return dtype == KD_GRAM_F32 ? 4 : 2; }

Operand operand(const kd_gram_matrix& m, int32_t dtype) {
  Operand out{};
  out.data = m.data;
  out.group_stride = m.group_stride, out.row_stride = m.row_stride, out.feature_stride = m.feature_stride;
  out.features = static_cast<int>(m.features);
  out.along_rows = m.row_stride == 1 && m.feature_stride != 1;
  const int64_t far = out.along_rows ? m.feature_stride : m.row_stride;
  out.quads = (out.along_rows || m.feature_stride == 1) && far % 4 == 0 && m.group_stride % 4 == 0 &&
              reinterpret_cast<uintptr_t>(m.data) % (4 * element_size(dtype)) == 0;
  return out;
}

int micro(const kd_gram_problem& p) { return p.rows <= 128 ? 2 : 4; }

// Fills a plan's sizes and offsets; returns the floats of the workspace.
int64_t make_plan(const kd_gram_problem& p, int32_t phase, Plan* plan) {
  plan->x = operand(p.x, p.dtype), plan->y = operand(p.y, p.dtype);
  plan->rows = static_cast<int>(p.rows), plan->centered = p.centered, plan->inter = p.inter;
  const int tile = 16 * micro(p), tiles = ceil_div(p.rows, tile);
  plan->tile = tile;
  plan->pairs = tiles * (tiles + 1) / 2;
  plan->kinds = p.inter ? (p.centered ? 6 : 4) : 2;
  const int64_t features = std::max(p.x.features, p.y.features),
                blocks = p.groups * plan->pairs * plan->kinds;
  const int wanted =
      std::min<int64_t>({ceil_div(kTargetBlocks, blocks), kMaxSplits, ceil_div(features, kMinSplitFeatures)});
  plan->split_features = ceil_div(ceil_div(features, wanted), kMinSplitFeatures) * kMinSplitFeatures;
  plan->splits = ceil_div(features, plan->split_features);

  int64_t floats = 0;
  const auto take = [&](int64_t count) {
    const int64_t at = floats;
    floats += align(count);
    return at;
  };
  for (Operand* side : {&plan->x, &plan->y}) {
    side->columns = take(2 * side->features);
    side->column_powers = take(side->features);
    side->rows = take(2 * p.rows);
    side->row_powers = take(p.rows);
  }
  plan->sums = take(plan->pairs * kSums);
  plan->counters = take(plan->pairs + 1);
  const bool multiplies = phase != KD_GRAM_BACKWARD_SAVED;
  plan->partial = take(multiplies ? int64_t{plan->pairs} * plan->kinds * plan->splits * tile * tile : 0);
  plan->matrices_stride = (p.inter ? 3 : 2) * (p.rows + p.inter) * (p.rows + p.inter);
  plan->workspace_stride = floats;
  return p.groups * floats + (phase == KD_GRAM_BACKWARD_AGAIN ? p.groups * plan->matrices_stride : 0);
}

template <class T>
cudaError_t launch_statistics(const kd_gram_problem& p, const Plan& plan, bool sum_saved,
                              cudaStream_t stream) {
  int blocks = ceil_div(p.x.features, kItems) + ceil_div(p.y.features, kItems);
  if (p.centered && p.inter) blocks += 2 * ceil_div(p.rows, kItems);
  if (sum_saved) blocks += plan.pairs;
  const dim3 grid(blocks, 1, static_cast<unsigned>(p.groups));
  return KD_LAUNCH(gram_statistics<T>, grid, dim3(kThreads), 0, stream, plan, sum_saved);
}

template <class T>
cudaError_t launch_products(const kd_gram_problem& p, const Plan& plan, float* products, float* distance,
                            cudaStream_t stream) {
  const dim3 grid(plan.pairs * plan.kinds, plan.splits, static_cast<unsigned>(p.groups));
  const auto kernel = micro(p) == 2 ? gram_products<T, 2> : gram_products<T, 4>;
  return KD_LAUNCH(kernel, grid, dim3(kThreads), 0, stream, plan, products, distance);
}

template <class T>
cudaError_t launch_gradient(const kd_gram_problem& p, const Plan& plan, const Upstream& upstream,
                            const Gradient& grad_x, const Gradient& grad_y, cudaStream_t stream) {
  const int sides = (grad_x.data != nullptr) + (grad_y.data != nullptr);
  const int64_t features = std::max(p.x.features, p.y.features);
  const auto blocks = [&](int m) { return ceil_div(p.rows, 16 * m) * ceil_div(features, 16 * m); };
  const bool large = p.groups * sides * blocks(4) >= kTargetBlocks / 2;
  const dim3 grid(blocks(large ? 4 : 2), sides, static_cast<unsigned>(p.groups));
  const auto kernel = large ? gram_gradient<T, 4> : gram_gradient<T, 2>;
  return KD_LAUNCH(kernel, grid, dim3(kThreads), 0, stream, plan, upstream, grad_x, grad_y);
}

template <class T>
cudaError_t forward(const kd_gram_problem& p, const Plan& plan, float* products, float* distance,
                    cudaStream_t stream) {
  const cudaError_t error = launch_statistics<T>(p, plan, false, stream);
  return error != cudaSuccess ? error : launch_products<T>(p, plan, products, distance, stream);
}

template <class T>
cudaError_t backward(const kd_gram_problem& p, const Plan& plan, bool saved, const Upstream& upstream,
                     const Gradient& grad_x, const Gradient& grad_y, cudaStream_t stream) {
  cudaError_t error = launch_statistics<T>(p, plan, saved, stream);
  if (error == cudaSuccess && !saved) error = launch_products<T>(p, plan, nullptr, nullptr, stream);
  return error != cudaSuccess ? error : launch_gradient<T>(p, plan, upstream, grad_x, grad_y, stream);
}

template <class F>
cudaError_t dispatch(int32_t dtype, const F& run) {
  switch (dtype) {
    case KD_GRAM_F32:
      return run(float{});
    case KD_GRAM_F16:
      return run(__half{});
    case KD_GRAM_BF16:
      return run(__nv_bfloat16{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace kd::gram

extern "C" {

int64_t kd_gram_workspace(const kd_gram_problem* problem, int32_t phase) {
  kd::gram::Plan plan{};
  return kd::gram::make_plan(*problem, phase, &plan);
}

int32_t kd_gram_forward(const kd_gram_problem* problem, float* products, float* distance, float* saved,
                        float* workspace, void* stream) {
  kd::gram::Plan plan{};
  kd::gram::make_plan(*problem, KD_GRAM_FORWARD, &plan);
  plan.workspace = workspace;
  plan.matrices = saved;
  return kd::gram::dispatch(problem->dtype, [&](auto zero) {
    return kd::gram::forward<decltype(zero)>(*problem, plan, products, distance,
                                             static_cast<cudaStream_t>(stream));
  });
}

int32_t kd_gram_backward(const kd_gram_problem* problem, const float* grad_products,
                         const int64_t products_strides[3], const float* grad_distance,
                         const int64_t distance_strides[2], const float* saved, const kd_gram_matrix* grad_x,
                         const kd_gram_matrix* grad_y, float* workspace, void* stream) {
  if (grad_x->data == nullptr && grad_y->data == nullptr) return cudaSuccess;
  kd::gram::Plan plan{};
  kd::gram::make_plan(*problem, saved ? KD_GRAM_BACKWARD_SAVED : KD_GRAM_BACKWARD_AGAIN, &plan);
  plan.workspace = workspace;
  plan.matrices = saved ? const_cast<float*>(saved) : workspace + problem->groups * plan.workspace_stride;
  const kd::gram::Upstream upstream = {grad_products,
                                       grad_distance,
                                       {products_strides[0], products_strides[1], products_strides[2]},
                                       {distance_strides[0], distance_strides[1]}};
  const auto gradient = [](const kd_gram_matrix& m) {
    return kd::gram::Gradient{m.data, m.group_stride, m.row_stride, m.feature_stride};
  };
  return kd::gram::dispatch(problem->dtype, [&](auto zero) {
    return kd::gram::backward<decltype(zero)>(*problem, plan, saved != nullptr, upstream, gradient(*grad_x),
                                              gradient(*grad_y), static_cast<cudaStream_t>(stream));
  });
}
}
