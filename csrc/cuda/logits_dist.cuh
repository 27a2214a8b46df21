#pragma once

// The kernels of dist: Pearson correlations of rows and of columns of softmax outputs.

#include "common/rounding.h"
#include "logits_rows.cuh"

namespace kd::logits {
namespace {

constexpr double kPearsonEps = 1e-8;  // the published denominator's
constexpr int kColumns = 16;          // of a tile: two rows of it in a warp
constexpr int kHeldRows = 4;          // of a column in a thread

template <class T>
constexpr int kColumnThreads = sizeof(T) == 8 ? 512 : kLargestBlock;

enum Column : int { kMeanS, kMeanT, kColumnNormS, kColumnNormT, kColumnProduct };

// The same to the last bit in every kernel: differences from a column's mean may be all rounding.
template <class A>
__device__ A probability(A z, A max, A scale, A inverse) {
  return rounded_product(exponential(rounded_product(z - max, scale)), inverse);
}

template <class A>
__device__ A distance(A product, A norm_s, A norm_t) {
  return not_negative(1 - product / (norm_s * norm_t + static_cast<A>(kPearsonEps)));
}

// Factors of the other side's deviation and of the own in by * d(correlation)/d(own).
template <class A>
struct Pull {
  A other, own;
};
template <class A>
__device__ Pull<A> pull(A by, A product, A norm_own, A norm_other) {
  const A d = norm_own * norm_other + static_cast<A>(kPearsonEps);
  return {by / d, norm_own > 0 ? -(by / d) * (product / d) * (norm_other / norm_own) : A(0)};
}

template <class T, class Team>
__device__ void dist_row(const Call<T>& call, int64_t row, const Team& team) {
  using A = accumulator<T>;
  constexpr int kCount = kPack<T>;
  const int64_t classes = call.classes;
  A* saved = call.row_saved(row);
  if (call.ignored(row)) return forget_row(call, row, team.lane());
  const T *s_row = call.student.row(row), *t_row = call.teacher.row(row);
  const A scale = call.scale, mean = A(1) / static_cast<A>(classes);
  const int64_t first = int64_t{team.lane()} * kCount, step = int64_t{team.size()} * kCount;
  A s[kCount], t[kCount];
  A tops[2] = {kLowest<A>, kLowest<A>};
  for (int64_t k = first; k < classes; k += step) {
    call.student.load(s_row, k, classes, kMinusInfinity<A>, s);
    call.teacher.load(t_row, k, classes, kMinusInfinity<A>, t);
#pragma unroll
    for (int j = 0; j < kCount; ++j) tops[0] = larger(tops[0], s[j]), tops[1] = larger(tops[1], t[j]);
  }
  team.join(tops, Largest{});
  A sums[2] = {};
  for (int64_t k = first; k < classes; k += step) {
    call.student.load(s_row, k, classes, kMinusInfinity<A>, s);
    call.teacher.load(t_row, k, classes, kMinusInfinity<A>, t);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      sums[0] += probability(s[j], tops[0], scale, A(1)), sums[1] += probability(t[j], tops[1], scale, A(1));
    }
  }
  team.join(sums, Sum{});
  const A inverse_s = 1 / sums[0], inverse_t = 1 / sums[1];
  A products[3] = {};  // st, ss, tt
  for (int64_t k = first; k < classes; k += step) {
    call.student.load(s_row, k, classes, kMinusInfinity<A>, s);
    call.teacher.load(t_row, k, classes, kMinusInfinity<A>, t);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (k + j >= classes) continue;
      const A a = probability(s[j], tops[0], scale, inverse_s) - mean,
              b = probability(t[j], tops[1], scale, inverse_t) - mean;
      products[0] += a * b, products[1] += a * a, products[2] += b * b;
    }
  }
  team.join(products, Sum{});
  if (team.lane() != 0) return;
  const A norm_s = root(products[1]), norm_t = root(products[2]);
  saved[kMaxS] = tops[0], saved[kLogS] = inverse_s, saved[kMaxT] = tops[1], saved[kLogT] = inverse_t;
  saved[kNormS] = norm_s, saved[kNormT] = norm_t, saved[kProduct] = products[0];
  call.values[row] = call.alpha * distance(products[0], norm_s, norm_t);
}

template <class T>
__global__ __launch_bounds__(kMostThreads, 1) void dist_rows(Call<T> call) {
  dist_row(call, blockIdx.x, BlockTeam{});
}

// Sums over the rows of a tile, whose columns are threadIdx.x % kColumns, in a fixed order; every thread gets
// those of its column.
template <int kCount, class A>
__device__ void column_sum(A (&values)[kCount]) {
  __shared__ A warps[kCount][kColumns][kLargestBlock / 32 + 1];
  __shared__ A totals[kCount][kColumns];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32,
            count = static_cast<int>(blockDim.x) / 32;
  __syncthreads();
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    values[c] += __shfl_xor_sync(kFullWarp, values[c], kColumns);
    if (lane < kColumns) warps[c][lane][warp] = values[c];
  }
  __syncthreads();
  for (int i = warp; i < kCount * kColumns; i += count) {
    const A total = warp_sum(lane < count ? warps[i / kColumns][i % kColumns][lane] : A(0));
    if (lane == 0) totals[i / kColumns][i % kColumns] = total;
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < kCount; ++c) values[c] = totals[c][lane % kColumns];
}

// Statistics of the columns of a tile by a block, from the maxima and sums of all rows.
template <class T>
__device__ void dist_tile(const Call<T>& call, int64_t tile) {
  using A = accumulator<T>;
  const int64_t classes = call.classes, column = tile * kColumns + threadIdx.x % kColumns;
  const bool inside = column < classes;
  const int64_t k = inside ? column : classes - 1;  // every thread takes part in the sums
  const int64_t lanes = blockDim.x / kColumns, lane = threadIdx.x / kColumns;
  const auto probabilities = [&](int64_t row, A* p, A* q) {
    const A* saved = call.row_saved(row);  // perhaps written by this launch
    *p = probability(static_cast<A>(widen(call.student.row(row)[k * call.student.stride])),
                     __ldcg(saved + kMaxS), call.scale, __ldcg(saved + kLogS));
    *q = probability(static_cast<A>(widen(call.teacher.row(row)[k * call.teacher.stride])),
                     __ldcg(saved + kMaxT), call.scale, __ldcg(saved + kLogT));
  };
  int64_t start = 0;
  while (start < call.rows && call.ignored(start)) ++start;
  A first_p = 0, first_q = 0;
  if (start < call.rows) probabilities(start, &first_p, &first_q);
  A p[kHeldRows], q[kHeldRows];
  bool counts[kHeldRows];
  const auto hold = [&](int64_t base) {
#pragma unroll
    for (int r = 0; r < kHeldRows; ++r) {
      const int64_t row = base + r * lanes;
      counts[r] = row < call.rows && !call.ignored(row);
      p[r] = first_p, q[r] = first_q;
      if (counts[r]) probabilities(row, &p[r], &q[r]);
    }
  };
  const int64_t step = kHeldRows * lanes;
  const bool again = call.rows - start > step;  // a thread has more rows than it holds
  A sums[3] = {};                               // equal rows have a mean that is theirs to the last bit
  for (int64_t base = start + lane; base < call.rows; base += step) {
    hold(base);
#pragma unroll
    for (int r = 0; r < kHeldRows; ++r) {
      sums[0] += p[r] - first_p, sums[1] += q[r] - first_q, sums[2] += counts[r] ? 1 : 0;
    }
  }
  column_sum(sums);
  const A inverse = sums[2] > 0 ? 1 / sums[2] : A(0);
  const A mean_s = first_p + sums[0] * inverse, mean_t = first_q + sums[1] * inverse;
  A products[3] = {};  // st, ss, tt
  for (int64_t base = start + lane; base < call.rows; base += step) {
    if (again) hold(base);
#pragma unroll
    for (int r = 0; r < kHeldRows; ++r) {
      const A a = counts[r] ? p[r] - mean_s : A(0), b = counts[r] ? q[r] - mean_t : A(0);
      products[0] += a * b, products[1] += a * a, products[2] += b * b;
    }
  }
  column_sum(products);
  if (!inside || lane != 0) return;
  const A norm_s = root(products[1]), norm_t = root(products[2]);
  A* to = call.columns() + k;
  to[kMeanS * classes] = mean_s, to[kMeanT * classes] = mean_t;
  to[kColumnNormS * classes] = norm_s, to[kColumnNormT * classes] = norm_t;
  to[kColumnProduct * classes] = products[0];
  call.values[call.rows + k] =
      sums[2] > 0 ? call.beta * distance(products[0], norm_s, norm_t) / static_cast<A>(classes) : A(0);
}

__host__ __device__ inline int64_t column_tiles(int64_t classes) { return ceil_div(classes, kColumns); }

template <class T>
__global__ __launch_bounds__(kColumnThreads<T>) void dist_columns(Call<T> call) {
  dist_tile(call, blockIdx.x);
}

template <class T>
__global__ __launch_bounds__(kMostThreads, 1) void dist_gradient(Call<T> call, const accumulator<T>* grad,
                                                                 Rows<T> to_student, Rows<T> to_teacher) {
  using A = accumulator<T>;
  constexpr int kCount = kPack<T>;
  const bool teacher = of_teacher(to_student);
  const Rows<T> to = teacher ? to_teacher : to_student;
  const Rows<T> from_own = teacher ? call.teacher : call.student,
                from_other = teacher ? call.student : call.teacher;
  const int64_t row = blockIdx.x, classes = call.classes;
  if (call.ignored(row)) return clear_row(to, row, classes);
  const int own = teacher, other = 1 - own;
  const A* saved = call.row_saved(row);
  const A max_own = saved[kMaxS + 2 * own], inverse_own = saved[kLogS + 2 * own];
  const A max_other = saved[kMaxS + 2 * other], inverse_other = saved[kLogS + 2 * other];
  const A scale = call.scale, mean = A(1) / static_cast<A>(classes);
  const Pull<A> of_row = pull(-*grad * *call.share() * call.alpha * scale, saved[kProduct],
                              saved[kNormS + own], saved[kNormS + other]);
  const A by_column = -*grad * call.beta * scale / static_cast<A>(classes);
  const T *own_row = from_own.row(row), *other_row = from_other.row(row);
  T* to_row = to.row(row);
  A a[kCount], b[kCount], gradient[kCount];
  // a: own probabilities; gradient: with respect to them.
  const auto evaluate = [&](int64_t k) {
    from_own.load(own_row, k, classes, kMinusInfinity<A>, a);
    from_other.load(other_row, k, classes, kMinusInfinity<A>, b);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      gradient[j] = 0;
      if (k + j >= classes) continue;
      a[j] = probability(a[j], max_own, scale, inverse_own);
      b[j] = probability(b[j], max_other, scale, inverse_other);
      const A* column = call.columns() + k + j;
      const Pull<A> of_column =
          pull(by_column, column[kColumnProduct * classes], column[(kColumnNormS + own) * classes],
               column[(kColumnNormS + other) * classes]);
      gradient[j] = of_row.other * (b[j] - mean) + of_row.own * (a[j] - mean) +
                    of_column.other * (b[j] - column[(kMeanS + other) * classes]) +
                    of_column.own * (a[j] - column[(kMeanS + own) * classes]);
    }
  };
  const int64_t first = int64_t{threadIdx.x} * kCount, step = int64_t{blockDim.x} * kCount;
  A dot[1] = {};
  for (int64_t k = first; k < classes; k += step) {
    evaluate(k);
#pragma unroll
    for (int j = 0; j < kCount; ++j) dot[0] += k + j < classes ? gradient[j] * a[j] : A(0);
  }
  block_join(dot, Sum{});
  for (int64_t k = first; k < classes; k += step) {
    if (classes > step) evaluate(k);  // else the values are still here
#pragma unroll
    for (int j = 0; j < kCount; ++j) gradient[j] = a[j] * (gradient[j] - dot[0]);
    to.store(to_row, k, classes, gradient);
  }
}

}  // namespace
}  // namespace kd::logits
