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

// A linear map of planes: to[p] = sum over k < taps of weight[k, p] * from[place[k, p]], pixels last. Both
// arrays hold whole vectors: `pixels` is padded up to kAugmentPadding with taps of weight 0 at place 0.
template <class A>
struct AugmentTable {
  const int32_t* place;  // [taps, padded pixels]
  const A* weight;
  int64_t taps, padded;
};

constexpr int64_t kAugmentPadding = 16;

template <class A>
struct AugmentKernels {
  void (*load)(const AugmentPlane& from, A* to);
  void (*store)(const A* from, const AugmentPlane& to);
  void (*resample)(const AugmentTable<A>& table, const A* from, A* to);
  // plane[i] += deviation * n(first + i), n of kdfast/reference/feature_augment.py.
  void (*add_noise)(A* plane, int64_t count, int64_t first, A deviation, uint32_t seed_low,
                    uint32_t seed_high);
};

}  // namespace kd
