#pragma once

// The comparison `cka` of two large Grams from what lies on and above their diagonals, in shares of their
// rows: half of what gram_compare.h reads, and nothing to mirror. Included by gram.simd.cpp only.

#include "cpu/gram_compare.h"

namespace kd::KD_ISA {
namespace {

// Row i of sums [n, 3]: what it and column i add to <K, L>, <K, K>, <L, L>. Rows [begin, end).
template <class A>
void triangle_products(const A* k, const A* l, int64_t n, int64_t ld, int64_t begin, int64_t end,
                       double* sums) {
  for (int64_t i = begin; i < end; ++i) {
    const A *ki = k + i * ld, *li = l + i * ld;
    Vec<A> xy = {}, xx = {}, yy = {};
    int64_t j = i + 1;
    for (; j + kLanes<A> <= n; j += kLanes<A>) {
      const Vec<A> a = load_vec(ki + j), b = load_vec(li + j);
      xy += a * b, xx += a * a, yy += b * b;
    }
    double sum[3] = {lanes_sum<A>(xy), lanes_sum<A>(xx), lanes_sum<A>(yy)};
    for (; j <= n; ++j) {  // last, half of it: the diagonal
      const double half = j < n ? 1 : 0.5;
      const double a = static_cast<double>(ki[j < n ? j : i]), b = static_cast<double>(li[j < n ? j : i]);
      sum[0] += half * a * b, sum[1] += half * a * a, sum[2] += half * b * b;
    }
    for (int s = 0; s < 3; ++s) sums[3 * i + s] = 2 * sum[s];
  }
}

// The same of |alpha K - beta L|^2, into sums [n].
template <class A>
void triangle_distances(const A* k, double alpha, const A* l, double beta, int64_t n, int64_t ld,
                        int64_t begin, int64_t end, double* sums) {
  const A by_k = static_cast<A>(alpha), by_l = static_cast<A>(beta);
  for (int64_t i = begin; i < end; ++i) {
    const A *ki = k + i * ld, *li = l + i * ld;
    const double diagonal = static_cast<double>(by_k * ki[i] - by_l * li[i]);
    sums[i] = diagonal * diagonal + 2 * distance_sq(ki + i + 1, by_k, li + i + 1, by_l, n - i - 1);
  }
}

// alpha K + beta L for mix, blocks [begin, end) of kRows rows each.
template <class A, int kRows>
void pack_triangles(const A* k, double alpha, const A* l, double beta, int64_t n, int64_t ld, int64_t begin,
                    int64_t end, A* packed) {
  const auto value = [&](int64_t at) {
    return static_cast<A>(alpha * static_cast<double>(k[at]) + beta * static_cast<double>(l[at]));
  };
  constexpr int64_t kColumns = kLanes<A>;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t i0 = block * kRows, rows = n - i0 < kRows ? n - i0 : kRows;
    A* to = packed + i0 * n;
    if (rows < kRows) {
      for (int64_t at = 0; at < kRows * n; ++at) to[at] = 0;
    }
    int64_t j = 0;
    for (; j < i0; ++j) {  // above the diagonal these rows are columns
      if (rows == kRows) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < kRows; ++i) to[j * kRows + i] = value(j * ld + i0 + i);
      } else {
        for (int64_t i = 0; i < rows; ++i) to[j * kRows + i] = value(j * ld + i0 + i);
      }
    }
    for (; j < i0 + rows; ++j) {
      for (int64_t i = 0; i < rows; ++i) {
        to[j * kRows + i] = value(i0 + i < j ? (i0 + i) * ld + j : j * ld + i0 + i);
      }
    }
    for (; j + kColumns <= n; j += kColumns) {
      A turned[kRows][kColumns];
      for (int64_t i = 0; i < kRows; ++i) {
        for (int64_t c = 0; c < kColumns; ++c) turned[i][c] = value((i0 + i) * ld + j + c);
      }
      for (int64_t c = 0; c < kColumns; ++c) {
        for (int64_t i = 0; i < kRows; ++i) to[(j + c) * kRows + i] = turned[i][c];
      }
    }
    for (; j < n; ++j) {
      for (int64_t i = 0; i < rows; ++i) to[j * kRows + i] = value((i0 + i) * ld + j);
    }
  }
}

}  // namespace
}  // namespace kd::KD_ISA
