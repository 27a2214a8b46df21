#pragma once

// Blocks of positions, for *.simd.cpp: to and from maps of any strides and type.

#include "common/rounding.h"
#include "cpu/criss_cross_tiles.h"
#include "cpu/position_map.h"
#include "cpu/simd.h"

namespace kd::KD_ISA {
namespace {

// An odd number of vectors, so that neighbouring rows do not fall into the same sets of the L1 cache.
template <class A>
inline int64_t padded(int64_t columns) {
  return (ceil_div(columns, kLanes<A>) | 1) * kLanes<A>;
}

// to[r, c] = from[r * row + c * column], [rows, columns] of the map's type.
template <class T, class A>
inline void read(const T* from, int64_t row, int64_t column, int64_t rows, int64_t columns, A* to,
                 int64_t ld) {
  if (column == 1) {
    for (int64_t r = 0; r < rows; ++r) convert(from + r * row, to + r * ld, columns);
  } else if (row == 1) {
    gather_units(from, column, rows, columns, to, ld);
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) to[r * ld + c] = load(from + r * row + c * column);
    }
  }
}

template <class T, class A>
inline void write(const A* from, int64_t ld, int64_t rows, int64_t columns, T* to, int64_t row,
                  int64_t column) {
  if (column == 1) {
    for (int64_t r = 0; r < rows; ++r) convert(from + r * ld, to + r * row, columns);
  } else if (row == 1) {
    scatter_units(from, ld, rows, columns, to, column);
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) store(to + r * row + c * column, from[r * ld + c]);
    }
  }
}

template <class T>
inline T* at(const PositionMap& map, int64_t position) {
  return static_cast<T*>(map.data) + position * map.position;
}

inline void fetch(Ahead& ahead, const PositionMap& map, int64_t position, int64_t count, int64_t bytes) {
  if (map.data == nullptr || count <= 0) return;
  char* const data = static_cast<char*>(map.data) + position * map.position * bytes;
  ahead.add({data, 0, map.channel, 0, map.position}, {0, 0, 1, 0, map.channels}, count, bytes);
}

}  // namespace
}  // namespace kd::KD_ISA
