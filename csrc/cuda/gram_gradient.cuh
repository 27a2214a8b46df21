#pragma once

// The last kernel of gram.cu: gradients from the Grams.

#include "common/rounding.h"
#include "gram_statistics.cuh"

namespace kd::gram {
namespace {

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
  const int row_tiles = ceil_div(n, kTile);
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
  const int slices = ceil_div(n, kSlice), terms = plan.inter ? (plan.centered ? 3 : 2) : 1;
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

}  // namespace
}  // namespace kd::gram
