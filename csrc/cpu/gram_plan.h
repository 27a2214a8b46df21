#pragma once

// Settings of the gram op on the CPU: flags of a call, sizes of tiles and tasks, and what is measured of
// whole rows.

#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/gram.h"

namespace kd {

struct GramFlags {
  Compare compare;
  bool centered, cosine, inter, feature_side;
};

constexpr int64_t kTileBytes = 200 * 1024;          // of one tile: two of them fit an L2 cache of 512 KB
constexpr int64_t kMinChunk = 64, kMaxChunk = 512;  // columns of a tile
constexpr int64_t kLongChunk =
    256;  // where it does not fit: the sums across lanes at its end weigh more than L2 misses
constexpr int64_t kMinGradientChunk = 32;   // of a gradient
constexpr int64_t kManyGroups = 8;          // from here on one task per group
constexpr int64_t kTasks = 8;               // wanted where there are fewer groups
constexpr int64_t kTaskElements = 1 << 15;  // to read, below which a second thread does not pay
constexpr int64_t kSplits = 16;             // of the features of a group, at the most
constexpr int64_t kLeastTriangle = 96;      // rows of Grams that are compared by their upper triangles
constexpr int64_t kPartialBytes = 1 << 19;  // of partial matrices, or 1/32 of the inputs

inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// What tiles need to know of whole rows: their means (beyond a reference value) and norms. Gathered over one
// or several blocks of features.
template <class A>
struct RowMeasures {
  std::vector<A> scale[2], ref[2], mean[2];
  std::vector<double> sum[2], sum_sq[2];  // while gathering
  int64_t features[2] = {0, 0};

  void finish(bool norms) {
    for (int s : {0, 1}) {
      const size_t total = sum[s].size();
      mean[s].resize(total), scale[s].assign(norms ? total : 0, A(1));
      for (size_t i = 0; i < total; ++i) {
        mean[s][i] = features[s] ? static_cast<A>(sum[s][i] / static_cast<double>(features[s])) : A(0);
        if (norms) scale[s][i] = sum_sq[s][i] > 0 ? static_cast<A>(1 / std::sqrt(sum_sq[s][i])) : A(0);
      }
      sum[s] = {}, sum_sq[s] = {};
    }
  }
};

}  // namespace kd
