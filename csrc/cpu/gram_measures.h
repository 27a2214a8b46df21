#pragma once

// Means and norms of the rows of the gram op's views. Not for *.simd.cpp: it uses std.

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace kd {

// What tiles need to know of whole rows: their means (beyond a reference value) and norms. Gathered over one
// or several blocks of features.
template <class A>
struct RowMeasures {
  std::vector<A> norm[2], ref[2], mean[2];  // the norm of a row of zeros is infinite
  std::vector<double> sum[2], sum_sq[2];    // while gathering
  int64_t features[2] = {0, 0};

  void finish(bool norms) {
    constexpr A kInfinity = std::numeric_limits<A>::infinity();
    for (int s : {0, 1}) {
      const size_t total = sum[s].size();
      mean[s].resize(total), norm[s].assign(norms ? total : 0, A(1));
      for (size_t i = 0; i < total; ++i) {
        mean[s][i] = features[s] ? static_cast<A>(sum[s][i] / static_cast<double>(features[s])) : A(0);
        if (norms) norm[s][i] = sum_sq[s][i] > 0 ? static_cast<A>(std::sqrt(sum_sq[s][i])) : kInfinity;
      }
      sum[s] = {}, sum_sq[s] = {};
    }
  }
};

}  // namespace kd
