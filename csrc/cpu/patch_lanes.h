#pragma once

// The same two directions for matrices whose neighbours are channels: up to kPlanes planes go through
// together, interleaved, so that a resize needs no permutations and a pixel's channels are one run of a
// matrix. Planes that lie apart are transposed once on the way in and out. Included by patches.simd.cpp only.

#include "cpu/patch_lines.h"

namespace kd::KD_ISA {
namespace {

constexpr int64_t kBlock = 8;  // of a transposition

// to[c, r] = from[r, c], 8 x 8.
template <class A>
inline void transpose(const A* from, int64_t ld_from, A* to, int64_t ld_to) {
#if defined(__AVX2__)
  if constexpr (sizeof(A) == 4) {
    __m256 r[8], s[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * ld_from);
    for (int i = 0; i < 8; i += 2) {
      s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]), s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44), r[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      _mm256_storeu_ps(to + i * ld_to, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
      _mm256_storeu_ps(to + (i + 4) * ld_to, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
    return;
  }
#endif
  for (int64_t i = 0; i < kBlock; ++i) {
    for (int64_t j = 0; j < kBlock; ++j) to[j * ld_to + i] = from[i * ld_from + j];
  }
}

// Row h of the planes as pixels of kPlanes values; planes that are not there stay as they are.
template <class T, class A>
void load_lanes(const MapPlanes& m, int64_t h, int64_t columns, A* line) {
  const T* row = static_cast<const T*>(m.data) + h * m.row_stride;
  if (m.plane_stride == 1 || m.column_stride != 1) {
    for (int64_t c = 0; c < columns; ++c) {
      const T* pixel = row + c * m.column_stride;
      if (m.plane_stride == 1) {
        convert(pixel, line + c * kPlanes, m.planes);
      } else {
        for (int64_t p = 0; p < m.planes; ++p)
          line[c * kPlanes + p] = static_cast<A>(load(pixel + p * m.plane_stride));
      }
    }
    return;
  }
  A block[kPlanes * kBlock] = {};
  for (int64_t c = 0; c < columns; c += kBlock) {
    const int64_t count = columns - c < kBlock ? columns - c : kBlock;
    for (int64_t p = 0; p < m.planes; ++p) convert(row + p * m.plane_stride + c, block + p * kBlock, count);
    A pixels[kBlock * kPlanes];
    A* to = count == kBlock ? line + c * kPlanes : pixels;
    for (int64_t p = 0; p < kPlanes; p += kBlock) transpose(block + p * kBlock, kBlock, to + p, kPlanes);
    for (int64_t i = 0; to == pixels && i < count * kPlanes; ++i) line[c * kPlanes + i] = pixels[i];
  }
}

template <class T, class A>
void store_run(const A* from, T* to, int64_t count, bool add) {
  if (!add) return convert(from, to, count);
  for (int64_t i = 0; i < count; ++i) store(to + i, static_cast<A>(load(to + i)) + from[i]);
}

template <class T, class A>
void store_lanes(const MapPlanes& m, int64_t h, int64_t columns, const A* line, bool add) {
  T* row = static_cast<T*>(m.data) + h * m.row_stride;
  if (m.plane_stride == 1 || m.column_stride != 1) {
    for (int64_t c = 0; c < columns; ++c) {
      T* pixel = row + c * m.column_stride;
      if (m.plane_stride == 1) {
        store_run(line + c * kPlanes, pixel, m.planes, add);
      } else {
        for (int64_t p = 0; p < m.planes; ++p)
          store_run(line + c * kPlanes + p, pixel + p * m.plane_stride, 1, add);
      }
    }
    return;
  }
  A block[kPlanes * kBlock], pixels[kBlock * kPlanes] = {};
  for (int64_t c = 0; c < columns; c += kBlock) {
    const int64_t count = columns - c < kBlock ? columns - c : kBlock;
    const A* from = line + c * kPlanes;
    if (count < kBlock) {
      for (int64_t i = 0; i < count * kPlanes; ++i) pixels[i] = from[i];
      from = pixels;
    }
    for (int64_t p = 0; p < kPlanes; p += kBlock) transpose(from + p, kPlanes, block + p * kBlock, kBlock);
    for (int64_t p = 0; p < m.planes; ++p)
      store_run(block + p * kBlock, row + p * m.plane_stride + c, count, add);
  }
}

template <class A>
void apply_taps_lanes(const AxisTaps<A>& t, const A* in, A* out) {
  for (int64_t o = 0; o < t.out; ++o) {
    for (int64_t lane = 0; lane < kPlanes; lane += kLanes<A>) {
      Vec<A> sum = t.weight[o] * load_vec(in + t.index[o] * kPlanes + lane);
      for (int64_t k = 1; k < t.count; ++k) {
        const int64_t at = k * t.padded + o;
        sum += t.weight[at] * load_vec(in + t.index[at] * kPlanes + lane);
      }
      store_vec(out + o * kPlanes + lane, sum);
    }
  }
}

// One row of pixels, [i, j, v] for a given i, into the matrices or out of them.
template <class A, class F>
inline void for_pixels(const PatchTile& t, int64_t width, int64_t planes, const F& f) {
  for (int64_t j = 0; j * t.patch_w < width; ++j) {
    for (int64_t v = 0; v < t.patch_w; ++v) {
      const int64_t line = (j * t.patch_w + v) * kPlanes, tile = j * t.j + v * t.v;
      if (planes == kPlanes) {
        for (int64_t p = 0; p < kPlanes; p += kLanes<A>) f(line + p, tile + p, Vec<A>{});
      } else {
        for (int64_t p = 0; p < planes; ++p) f(line + p, tile + p, A{});
      }
    }
  }
}

template <class V, class A>
inline void copy_as(const A* from, A* to) {
  __builtin_memcpy(to, from, sizeof(V));
}

template <class A>
void read_lanes(const MapPlanes& m, const AxisTaps<A>& rows, const AxisTaps<A>& columns, const PatchTile& t,
                A* tile, A* scratch) {
  const int64_t ld = columns.padded * kPlanes;
  A *kept = scratch, *out = kept + rows.count * ld, *in = out + ld;
  for (int64_t i = 0; i < (columns.in + kTapLanes) * kPlanes; ++i) in[i] = 0;
  int64_t done = -1;
  const auto line = [&](int64_t h) {
    A* slot = kept + h % rows.count * ld;
    if (h > done) {
      dispatch(m.dtype, [&](auto zero) {
        load_lanes<decltype(zero)>(m, h, columns.in, columns.identity ? slot : in);
      });
      if (!columns.identity) apply_taps_lanes(columns, in, slot);
      done = h;
    }
    return slot;
  };
  for (int64_t i = 0; i * t.patch_h < rows.out; ++i) {
    for (int64_t u = t.first_u; u < t.last_u; ++u) {
      const int64_t row = i * t.patch_h + u;
      if (!rows.identity) mix_rows(rows, row, 1, columns.out * kPlanes, line, out);
      const A* from = rows.identity ? line(row) : out;
      A* to = tile + i * t.i + (u - t.first_u) * t.u;
      for_pixels<A>(t, columns.out, m.planes, [&](int64_t pixel, int64_t at, auto like) {
        copy_as<decltype(like)>(from + pixel, to + at);
      });
    }
  }
}

template <class A>
void write_lanes(const MapPlanes& m, const AxisTaps<A>& rows, const AxisTaps<A>& columns, const PatchTile& t,
                 const A* tile, bool add, A* scratch) {
  const int64_t ld = columns.padded * kPlanes;
  A *kept = scratch, *out = kept + rows.count * ld, *in = out + ld;
  for (int64_t i = 0; i < (columns.in + kTapLanes) * kPlanes; ++i) in[i] = 0;
  const bool shared = t.first_u > 0 || t.last_u < t.patch_h;  // with other tiles, whose rows stay
  int64_t done = -1;
  const auto line = [&](int64_t row) -> const A* {
    const int64_t i = row / t.patch_h, u = row % t.patch_h;
    if (u < t.first_u || u >= t.last_u) return nullptr;
    A* slot = kept + row % rows.count * ld;
    if (row > done) {
      const A* from = tile + i * t.i + (u - t.first_u) * t.u;
      A* to = columns.identity ? slot : in;
      for_pixels<A>(t, columns.in, m.planes, [&](int64_t pixel, int64_t at, auto like) {
        copy_as<decltype(like)>(from + at, to + pixel);
      });
      if (!columns.identity) apply_taps_lanes(columns, in, slot);
      done = row;
    }
    return slot;
  };
  for (int64_t h = 0; h < rows.out; ++h) {
    const A* from = out;
    if (rows.identity) {
      from = line(h);
    } else if (!mix_rows(rows, h, 1, columns.out * kPlanes, line, out) && shared) {
      continue;
    }
    if (!from) continue;
    dispatch(m.dtype, [&](auto zero) { store_lanes<decltype(zero)>(m, h, columns.out, from, add); });
  }
}

}  // namespace
}  // namespace kd::KD_ISA
