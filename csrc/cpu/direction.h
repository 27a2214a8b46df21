#pragma once

// What direction.cpp (threads, weights) and direction.simd.cpp (arithmetic on rows, once per instruction set)
// share. Plain data only: an inline function here could be linked from AVX code into the baseline code.

#include <cstdint>

#include "common/storage.h"

namespace kd {

// Rows of a matrix; `row_stride` in elements, columns are neighbours.
struct DirectionRows {
  void* data;
  Dtype dtype;
  int64_t row_stride;
};

// Of one row: <s, c>, <s, s>, <t, t>, <c, c>.
struct DirectionSums {
  double dot, student, teacher, center;
};

template <class A>
struct DirectionKernels {
  // teacher.data may be null.
  DirectionSums (*sums)(const DirectionRows& student, const DirectionRows& teacher,
                        const DirectionRows& centers, int64_t row, int64_t center, int64_t columns);
  // to[row] = f0 * centers[center] + f1 * from[row]; a factor that is 0 leaves its rows unread. `streams`:
  // past the caches; end_streams() after the last row.
  void (*mix)(double f0, const DirectionRows& centers, int64_t center, double f1, const DirectionRows& from,
              const DirectionRows& to, int64_t row, int64_t columns, bool streams);
  void (*end_streams)();
};

}  // namespace kd
