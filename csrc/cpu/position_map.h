#pragma once

// Maps of positions, of the ops dot_product and softmax_affinity. Plain data only, see dot_product.h.

#include <cstdint>

#include "common/storage.h"

namespace kd {

// A map [channels, positions] of one image; strides in elements. data is null for a map that is not there.
struct PositionMap {
  void* data;
  int64_t channels, channel, position;
};

}  // namespace kd
