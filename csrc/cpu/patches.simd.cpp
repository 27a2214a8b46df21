// Patches of linearly resized maps and the adjoint, compiled once per instruction set.
//
// Both directions are two sparse linear maps, columns first: a resized pixel costs 2 + 2 multiply-adds
// (bilinear), which is little beside the N / 2 of each Gram; what counts is that a plane is read once and
// stays in the L2 cache.

#include "cpu/patch_lanes.h"
#include "cpu/patch_lines.h"

namespace kd::KD_ISA {
namespace {

template <class A>
inline void copy_run(const A* from, A* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) store_vec(to + i, load_vec(from + i));
  for (; i < count; ++i) to[i] = from[i];
}

// One row of every plane into the patches.
template <class A>
void store_patches(const PatchTile& t, const A* lines, int64_t planes, int64_t ld, int64_t width, A* to) {
  for (int64_t p = 0; p < planes; ++p) {
    for (int64_t j = 0; j * t.patch_w < width; ++j) {
      copy_run(lines + p * ld + j * t.patch_w, to + p * t.plane + j * t.j, t.patch_w);
    }
  }
}

template <class A>
void load_patches(const PatchTile& t, const A* from, int64_t planes, int64_t ld, int64_t width, A* lines) {
  for (int64_t p = 0; p < planes; ++p) {
    for (int64_t j = 0; j * t.patch_w < width; ++j) {
      copy_run(from + p * t.plane + j * t.j, lines + p * ld + j * t.patch_w, t.patch_w);
    }
  }
}

// Row h of a single plane where it lies in memory as it is needed, or null.
template <class A>
A* own_row(const MapPlanes& m, const AxisTaps<A>& rows, const AxisTaps<A>& columns, int64_t h) {
  const bool same_type = m.dtype == (sizeof(A) == 4 ? Dtype::f32 : Dtype::f64);
  const bool as_is = rows.identity && columns.identity && same_type && m.planes == 1 && m.column_stride == 1;
  return as_is ? static_cast<A*>(m.data) + h * m.row_stride : nullptr;
}

// Of the last rows that went through the column map, `rows.count` are kept: [slot, plane, ld].
template <class A>
void read(const MapPlanes& m, const AxisTaps<A>& rows, const AxisTaps<A>& columns, const PatchTile& t,
          A* tile, A* scratch) {
  if (t.plane == 1) return read_lanes(m, rows, columns, t, tile, scratch);
  const int64_t ld_in = columns.in + kSlack, ld = columns.padded;
  A *kept = scratch, *out = kept + rows.count * m.planes * ld, *in = out + m.planes * ld;
  for (int64_t c = 0; c < m.planes * ld_in; ++c) in[c] = 0;
  int64_t done = -1;
  const auto line = [&](int64_t h) {
    A* slot = kept + h % rows.count * m.planes * ld;
    if (h > done && columns.identity) {
      dispatch(m.dtype, [&](auto zero) { load_rows<decltype(zero)>(m, h, columns.in, slot, ld); });
      done = h;
    } else if (h > done) {
      dispatch(m.dtype, [&](auto zero) { load_rows<decltype(zero)>(m, h, columns.in, in, ld_in); });
      for (int64_t p = 0; p < m.planes; ++p) apply_taps(columns, in + p * ld_in, slot + p * ld);
      done = h;
    }
    return slot;
  };
  for (int64_t i = 0; i * t.patch_h < rows.out; ++i) {
    for (int64_t u = t.first_u; u < t.last_u; ++u) {
      const int64_t row = i * t.patch_h + u;
      if (!rows.identity) mix_rows(rows, row, m.planes, ld, line, out);
      const A* own = own_row(m, rows, columns, row);
      store_patches(t,
                    own             ? own
                    : rows.identity ? line(row)
                                    : out,
                    m.planes, ld, columns.out, tile + i * t.i + (u - t.first_u) * t.u);
    }
  }
}

template <class A>
void write(const MapPlanes& m, const AxisTaps<A>& rows, const AxisTaps<A>& columns, const PatchTile& t,
           const A* tile, bool add, A* scratch) {
  if (t.plane == 1) return write_lanes(m, rows, columns, t, tile, add, scratch);
  const int64_t ld_in = columns.in + kSlack, ld = columns.padded;
  A *kept = scratch, *out = kept + rows.count * m.planes * ld, *in = out + m.planes * ld;
  for (int64_t c = 0; c < m.planes * ld_in; ++c) in[c] = 0;
  const bool shared = t.first_u > 0 || t.last_u < t.patch_h;  // with other tiles, whose rows stay
  int64_t done = -1;
  const auto line = [&](int64_t row) -> const A* {
    const int64_t i = row / t.patch_h, u = row % t.patch_h;
    if (u < t.first_u || u >= t.last_u) return nullptr;
    A* slot = kept + row % rows.count * m.planes * ld;
    if (row > done) {
      const A* from = tile + i * t.i + (u - t.first_u) * t.u;
      if (columns.identity) {
        load_patches(t, from, m.planes, ld, columns.in, slot);
      } else {
        load_patches(t, from, m.planes, ld_in, columns.in, in);
        for (int64_t p = 0; p < m.planes; ++p) apply_taps(columns, in + p * ld_in, slot + p * ld);
      }
      done = row;
    }
    return slot;
  };
  for (int64_t h = 0; h < rows.out; ++h) {
    const A* from = out;
    if (A* own = shared || add ? nullptr : own_row(m, rows, columns, h)) {
      load_patches(t, tile + h / t.patch_h * t.i + h % t.patch_h * t.u, 1, ld, columns.out, own);
      continue;
    }
    if (rows.identity) {
      from = line(h);
    } else if (!mix_rows(rows, h, m.planes, ld, line, out) && shared) {
      continue;
    }
    if (!from) continue;
    dispatch(m.dtype, [&](auto zero) { store_rows<decltype(zero)>(m, h, columns.out, from, ld, add); });
  }
}

}  // namespace

extern const PatchKernels<float> patches_float = {read<float>, write<float>};
extern const PatchKernels<double> patches_double = {read<double>, write<double>};

}  // namespace kd::KD_ISA
