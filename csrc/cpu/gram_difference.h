#pragma once

// |K - L|^2 on the feature side. From products of X and Y it would be the difference of numbers that nearly
// converged sides make equal; with D = X - Y, K - L = X D^T + D X^T - D D^T, which is as small as D, so
// that |K - L|^2 = 2 <X^T X, D^T D> + |D^T D|^2 + 2 <X^T D, D^T X> - 4 <D^T D, X^T D>.
// Included by gram.simd.cpp only.

#include "cpu/gram_compare.h"

namespace kd::KD_ISA {
namespace {

// What a cell of the matrices, or a vector of cells, adds; t of X^T D, u of its transpose.
template <class V>
struct DifferenceSums {
  V xy, xx, yy, distance;
  void add(V x, V d, V t, V u) {
    const V both = t + u, y = x - both + d, by_row = x - t, by_column = x - u;
    xy += by_row * by_row + by_column * by_column;
    xx += x * x + x * x;
    yy += y * y + y * y;
    distance += d * (2 * (x - both) + d) + 2 * t * u;
  }
};

// The matrices in blocks on and above the diagonal, whose counterparts below are turned: what lies there
// counts twice.
template <class A>
double difference_products(const A* xx, const A* dd, const A* xd, int64_t n, int64_t ld, double* products) {
  constexpr int64_t kBlock = kLanes<A>;
  DifferenceSums<double> sums{};  // of the cells above the diagonal, and half of it
  const auto add_cell = [&](int64_t i, int64_t j, DifferenceSums<double>& to) {
    const auto value = [](A v) { return static_cast<double>(v); };
    to.add(value(xx[i * ld + j]), value(dd[i * ld + j]), value(xd[i * ld + j]), value(xd[j * ld + i]));
  };
  DifferenceSums<double> diagonal{};
  for (int64_t i0 = 0; i0 < n; i0 += kBlock) {
    for (int64_t j0 = i0; j0 < n; j0 += kBlock) {
      if (j0 > i0 && j0 + kBlock <= n) {
        A turned[kBlock][kBlock];
        for (int64_t j = 0; j < kBlock; ++j) {
          for (int64_t i = 0; i < kBlock; ++i) turned[i][j] = xd[(j0 + j) * ld + i0 + i];
        }
        DifferenceSums<Vec<A>> block{};
        for (int64_t i = 0; i < kBlock; ++i) {
          const int64_t at = (i0 + i) * ld + j0;
          block.add(load_vec(xx + at), load_vec(dd + at), load_vec(xd + at), load_vec(turned[i]));
        }
        sums.xy += lanes_sum<A>(block.xy), sums.xx += lanes_sum<A>(block.xx);
        sums.yy += lanes_sum<A>(block.yy), sums.distance += lanes_sum<A>(block.distance);
        continue;
      }
      for (int64_t i = i0; i < i0 + kBlock && i < n; ++i) {
        if (j0 == i0) add_cell(i, i, diagonal);
        for (int64_t j = j0 > i0 ? j0 : i + 1; j < j0 + kBlock && j < n; ++j) add_cell(i, j, sums);
      }
    }
  }
  products[0] = sums.xy + diagonal.xy / 2;
  products[1] = sums.xx + diagonal.xx / 2;
  products[2] = sums.yy + diagonal.yy / 2;
  const double distance = 2 * sums.distance + diagonal.distance;
  return distance < 0 ? 0 : distance;
}

}  // namespace
}  // namespace kd::KD_ISA
