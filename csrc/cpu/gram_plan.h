#pragma once

// Settings of the gram op on the CPU: flags of a call, sizes of tiles and tasks.

#include <cstdint>

#include "cpu/gram.h"

namespace kd {

struct GramFlags {
  Compare compare;
  bool centered, cosine, inter, feature_side;
};

constexpr int64_t kTileBytes = 200 * 1024;          // of one tile: two of them fit an L2 cache of 512 KB
constexpr int64_t kMinChunk = 64, kMaxChunk = 512;  // columns of a tile
constexpr int64_t kLongChunk = 256;         // where that is not: sums across lanes weigh more than misses
constexpr int64_t kMinGradientChunk = 32;   // of a gradient
constexpr int64_t kManyGroups = 8;          // from here on one task per group
constexpr int64_t kTasks = 8;               // wanted where there are fewer groups
constexpr int64_t kTaskElements = 1 << 15;  // to read, below which a second thread does not pay
constexpr int64_t kSplits = 16;             // of the features of a group, at the most
constexpr int64_t kLeastTriangle = 96;      // rows of Grams that are compared by their upper triangles
constexpr int64_t kPartialBytes = 1 << 19;  // of partial matrices, or 1/32 of the inputs

}  // namespace kd
