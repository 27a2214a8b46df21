#pragma once

// What feature_augment.cpp (plans, tables, threads) and feature_augment.simd.cpp (arithmetic on planes, once
// per instruction set) share. Plain data only: an inline function here could be linked from AVX code into the
// baseline code.

#include <cstdint>

#include "common/storage.h"

namespace kd {

// One channel of one image in a tensor; strides in elements.
struct AugmentPlane {
  void* data;
  Dtype dtype;
  int64_t height, width, row_stride, column_stride;
};

// Planes that are resampled together: the values of a pixel in all of them lie side by side, so that a tap is
// loaded and weighted once for all.
constexpr int64_t kAugmentLanes = 16;
// Pixels of a result that have equally many taps.
constexpr int64_t kAugmentGroup = 16;

template <class A>
struct AugmentTap {
  int32_t place;  // kAugmentLanes * pixel
  A weight;
};

// A linear map of planes: to[p] = sum over the taps of p of weight * from[pixel]. Groups of pixels have taps
// begin[group] to begin[group + 1], pixel by pixel, equally many each: those that a pixel lacks have weight 0
// and read the pixel after the last, which is 0.
template <class A>
struct AugmentTable {
  const AugmentTap<A>* taps;
  const int64_t* begin;
  int64_t pixels;
};

template <class A>
struct AugmentKernels {
  void (*load)(const AugmentPlane& from, A* to);
  void (*store)(const A* from, const AugmentPlane& to);
  // to[p, i] = from[i][p] of kAugmentLanes planes, and to[pixels, i] = 0.
  void (*interleave)(const A* const* from, int64_t pixels, A* to);
  // The map of what was interleaved, to the first `planes` planes.
  void (*resample)(const AugmentTable<A>& table, const A* from, A* const* to, int64_t planes);
  // plane[i] += deviation * n(first + i), n of kdfast/reference/feature_augment.py.
  void (*add_noise)(A* plane, int64_t count, int64_t first, A deviation, uint32_t seed_low,
                    uint32_t seed_high);
};

// Rows of bytes: row r of `to` is row source[r] of `from`, where `keep` has ones, and 0 where it has zeros,
// or everywhere if source[r] is -1. Without `keep` rows are copied whole.
struct AugmentRows {
  const char* from;
  char* to;
  const int32_t* source;
  const uint8_t* keep;
  int64_t bytes, from_stride, to_stride;  // in bytes
  bool past_cache;                        // write to memory, without reading there first
};

}  // namespace kd
