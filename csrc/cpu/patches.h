#pragma once

// What patches.cpp (tap tables, blocks, threads) and patches.simd.cpp (arithmetic, once per instruction set)
// share. Plain data only, for the reason given in gram.h.

#include <cstdint>

#include "cpu/gram.h"

namespace kd {

// A sparse linear map along one axis: out[o] = sum_k weight[k, o] * in[index[k, o]], index ascending in k and
// in o. Rows of the tables, and lines of a plane, are padded to kLinePadding with weight 0.
constexpr int64_t kTapLanes = 8, kLinePadding = 16;
// Channels that go together where they are neighbours in a map or a matrix.
constexpr int64_t kPlanes = 16;

template <class A>
struct AxisTaps {
  int64_t in, out, padded, count;
  bool identity;         // out[o] = in[o]
  const int32_t* index;  // [count, padded]
  const A* weight;       // [count, padded]
  // windows * kTapLanes inputs from first[k, o / kTapLanes] serve kTapLanes outputs; windows 0: more than two
  // are needed.
  const int32_t* first;
  int windows;
};

// Some planes [in rows, in columns] of a map.
struct MapPlanes {
  void* data;
  Dtype dtype;
  int64_t planes, plane_stride, row_stride, column_stride;
};

// Where pixel (i * patch_h + u, j * patch_w + v) of a plane lies in the patch matrices; only u in [first_u,
// last_u) is there. plane 1: the channels of a pixel are neighbours.
struct PatchTile {
  int64_t plane, i, j, u, v;  // strides
  int64_t patch_h, patch_w, first_u, last_u;
};

template <class A>
struct PatchKernels {
  // Patches of resized planes. rows, columns: from the map to the resized map. scratch: per plane,
  // rows.count + 2 lines of the wider map plus 3 * kTapLanes.
  void (*read)(const MapPlanes&, const AxisTaps<A>& rows, const AxisTaps<A>& columns, const PatchTile&,
               A* tile, A* scratch);
  // The adjoint; rows, columns: from the resized map to the map. add: to what is there.
  void (*write)(const MapPlanes&, const AxisTaps<A>& rows, const AxisTaps<A>& columns, const PatchTile&,
                const A* tile, bool add, A* scratch);
};

}  // namespace kd
