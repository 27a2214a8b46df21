// Patches of linearly resized maps and the adjoint, compiled once per instruction set.
//
// Both directions are two sparse linear maps, columns first: a resized pixel costs 2 + 2 multiply-adds (bilinear), which is
// little beside the N / 2 of each Gram; what counts is that a plane is read once and stays in the L2 cache.

#include "cpu/patches.h"
#include "cpu/simd.h"

namespace kd::KD_ISA {
namespace {

// Room behind a line that vector loads may touch.
constexpr int64_t kSlack = 2 * kTapLanes;

template <class A>
void apply_taps(const AxisTaps<A>& t, const A* in, A* out) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    if (t.first) {  // two registers of inputs, permuted
      for (int64_t o = 0; o < t.padded; o += kTapLanes) {
        const int32_t first = t.first[o / kTapLanes];
        const __m512 low = _mm512_loadu_ps(in + first), high = _mm512_loadu_ps(in + first + kTapLanes);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = 0; k < t.count; ++k) {
          const __m512i at = _mm512_sub_epi32(_mm512_loadu_si512(t.index + k * t.padded + o), _mm512_set1_epi32(first));
          sum = _mm512_fmadd_ps(_mm512_loadu_ps(t.weight + k * t.padded + o), _mm512_permutex2var_ps(low, at, high), sum);
        }
        _mm512_storeu_ps(out + o, sum);
      }
      return;
    }
  }
#endif
  for (int64_t o = 0; o < t.padded; ++o) {
    A sum = 0;
    for (int64_t k = 0; k < t.count; ++k) sum += t.weight[k * t.padded + o] * in[t.index[k * t.padded + o]];
    out[o] = sum;
  }
}

// out = sum of weighted lines (those below `lines` that `active` holds); false if there is none.
template <class A, class F>
bool combine_lines(const AxisTaps<A>& t, int64_t o, const A* lines, int64_t ld, const F& active, A* out) {
  bool found = false;
  for (int64_t k = 0; k < t.count; ++k) {
    const A weight = t.weight[k * t.padded + o];
    const int64_t line = t.index[k * t.padded + o];
    if (weight == 0 || !active(line)) continue;
    const A* from = lines + line * ld;
    if (found) {
      for (int64_t c = 0; c < ld; c += kLanes<A>) store_vec(out + c, load_vec(out + c) + weight * load_vec(from + c));
    } else {
      for (int64_t c = 0; c < ld; c += kLanes<A>) store_vec(out + c, weight * load_vec(from + c));
    }
    found = true;
  }
  if (!found) {
    for (int64_t c = 0; c < ld; ++c) out[c] = 0;
  }
  return found;
}

// Row h of every plane, as lines of `ld` values.
template <class T, class A>
void load_rows(const MapPlanes& m, int64_t h, int64_t columns, A* lines, int64_t ld) {
  const T* row = static_cast<const T*>(m.data) + h * m.row_stride;
  if (m.column_stride == 1) {
    for (int64_t p = 0; p < m.planes; ++p) convert(row + p * m.plane_stride, lines + p * ld, columns);
    return;
  }
  for (int64_t c = 0; c < columns; ++c) {
    const T* pixel = row + c * m.column_stride;
    for (int64_t p = 0; p < m.planes; ++p) lines[p * ld + c] = static_cast<A>(load(pixel + p * m.plane_stride));
  }
}

template <class T, class A>
void store_rows(const MapPlanes& m, int64_t h, int64_t columns, const A* lines, int64_t ld, bool add) {
  T* row = static_cast<T*>(m.data) + h * m.row_stride;
  if (m.column_stride == 1 && !add) {
    for (int64_t p = 0; p < m.planes; ++p) convert(lines + p * ld, row + p * m.plane_stride, columns);
    return;
  }
  for (int64_t c = 0; c < columns; ++c) {
    T* pixel = row + c * m.column_stride;
    for (int64_t p = 0; p < m.planes; ++p) {
      T* to = pixel + p * m.plane_stride;
      store(to, add ? static_cast<A>(load(to)) + lines[p * ld + c] : lines[p * ld + c]);
    }
  }
}

template <class F>
void dispatch(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::f32: return f(float{});
    case Dtype::f64: return f(double{});
    case Dtype::f16: return f(Half{});
    case Dtype::bf16: return f(BFloat16{});
  }
}

// f(line offset in the tile, row of the resized map) for the rows that the tile holds.
template <class F>
void for_tile_rows(const PatchTile& t, int64_t rows, const F& f) {
  for (int64_t i = 0; i * t.patch_h < rows; ++i) {
    for (int64_t u = t.first_u; u < t.last_u; ++u) f(i * t.i + (u - t.first_u) * t.u, i * t.patch_h + u);
  }
}

template <class A>
void read(const MapPlanes& m, const AxisTaps<A>& rows, const AxisTaps<A>& columns, const PatchTile& t, A* tile, A* scratch) {
  const int64_t ld_in = columns.in + kSlack, ld = columns.padded, patches = columns.out / t.patch_w;
  A *lines = scratch, *in = lines + m.planes * rows.in * ld, *out = in + m.planes * ld_in;
  for (int64_t c = 0; c < m.planes * ld_in; ++c) in[c] = 0;
  // Rows that no output row needs are skipped: a tile may hold a few rows of every patch only.
  int64_t done = -1;
  const auto resize_row = [&](int64_t h) {
    dispatch(m.dtype, [&](auto zero) { load_rows<decltype(zero)>(m, h, columns.in, in, ld_in); });
    for (int64_t p = 0; p < m.planes; ++p) apply_taps(columns, in + p * ld_in, lines + (p * rows.in + h) * ld);
  };
  for_tile_rows(t, rows.out, [&](int64_t, int64_t row) {
    for (int64_t k = 0; k < rows.count; ++k) {
      const int64_t h = rows.index[k * rows.padded + row];
      if (h > done && rows.weight[k * rows.padded + row] != 0) resize_row(h), done = h;
    }
  });
  for (int64_t p = 0; p < m.planes; ++p) {
    for_tile_rows(t, rows.out, [&](int64_t offset, int64_t row) {
      combine_lines(rows, row, lines + p * rows.in * ld, ld, [](int64_t) { return true; }, out);
      A* to = tile + p * t.plane + offset;
      for (int64_t j = 0; j < patches; ++j) {
        const A* from = out + j * t.patch_w;
        if (t.v == 1) {
          for (int64_t v = 0; v < t.patch_w; ++v) to[j * t.j + v] = from[v];
        } else {
          for (int64_t v = 0; v < t.patch_w; ++v) to[j * t.j + v * t.v] = from[v];
        }
      }
    });
  }
}

template <class A>
void write(const MapPlanes& m, const AxisTaps<A>& rows, const AxisTaps<A>& columns, const PatchTile& t, const A* tile,
           bool add, A* scratch) {
  const int64_t ld_in = columns.in + kSlack, ld = columns.padded, patches = columns.in / t.patch_w;
  A *lines = scratch, *in = lines + m.planes * rows.in * ld, *out = in + m.planes * ld_in;
  for (int64_t c = columns.in; c < ld_in; ++c) in[c] = 0;
  for (int64_t p = 0; p < m.planes; ++p) {
    for_tile_rows(t, rows.in, [&](int64_t offset, int64_t row) {
      const A* from = tile + p * t.plane + offset;
      for (int64_t j = 0; j < patches; ++j) {
        A* to = in + j * t.patch_w;
        if (t.v == 1) {
          for (int64_t v = 0; v < t.patch_w; ++v) to[v] = from[j * t.j + v];
        } else {
          for (int64_t v = 0; v < t.patch_w; ++v) to[v] = from[j * t.j + v * t.v];
        }
      }
      apply_taps(columns, in, lines + (p * rows.in + row) * ld);
    });
  }
  const auto active = [&](int64_t row) {
    const int64_t u = row % t.patch_h;
    return t.first_u <= u && u < t.last_u;
  };
  for (int64_t h = 0; h < rows.out; ++h) {
    bool found = false;
    for (int64_t p = 0; p < m.planes; ++p) {
      found |= combine_lines(rows, h, lines + p * rows.in * ld, ld, active, out + p * ld);
    }
    if (add && !found) continue;
    dispatch(m.dtype, [&](auto zero) { store_rows<decltype(zero)>(m, h, columns.out, out, ld, add); });
  }
}

}  // namespace

extern const PatchKernels<float> patches_float = {read<float>, write<float>};
extern const PatchKernels<double> patches_double = {read<double>, write<double>};

}  // namespace kd::KD_ISA
