#pragma once

// Lines of resized maps: taps along a line, weighted sums of lines. Included by patches.simd.cpp only.

#include "cpu/patches.h"
#include "cpu/simd.h"

namespace kd::KD_ISA {
namespace {

// Room behind a line that vector loads may touch.
constexpr int64_t kSlack = 2 * kTapLanes;

#if defined(__AVX2__)
// Inputs come by permutation of the one or two registers that hold them.
template <bool kTwo>
void permute_taps(const AxisTaps<float>& t, const float* in, float* out) {
  for (int64_t o = 0; o < t.padded; o += kTapLanes) {
    __m256 sum = _mm256_setzero_ps();
    for (int64_t k = 0; k < t.count; ++k) {
      const int64_t row = k * t.padded + o;
      const int32_t first = t.first[row / kTapLanes];
      const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(t.index + row));
      const __m256i at = _mm256_sub_epi32(index, _mm256_set1_epi32(first));
      __m256 value = _mm256_permutevar8x32_ps(_mm256_loadu_ps(in + first), at);
      if constexpr (kTwo) {
        const __m256 above = _mm256_permutevar8x32_ps(_mm256_loadu_ps(in + first + kTapLanes), at);
        const __m256i is_above = _mm256_cmpgt_epi32(at, _mm256_set1_epi32(kTapLanes - 1));
        value = _mm256_blendv_ps(value, above, _mm256_castsi256_ps(is_above));
      }
      sum = _mm256_fmadd_ps(_mm256_loadu_ps(t.weight + row), value, sum);
    }
    _mm256_storeu_ps(out + o, sum);
  }
}
#endif

template <class A>
void apply_taps(const AxisTaps<A>& t, const A* in, A* out) {
#if defined(__AVX2__)
  if constexpr (sizeof(A) == 4) {
    if (t.windows == 1) return permute_taps<false>(t, in, out);
    if (t.windows == 2) return permute_taps<true>(t, in, out);
  }
#endif
  for (int64_t o = 0; o < t.padded; ++o) {
    A sum = 0;
    for (int64_t k = 0; k < t.count; ++k) sum += t.weight[k * t.padded + o] * in[t.index[k * t.padded + o]];
    out[o] = sum;
  }
}

// The lines that make up one line, and their weights.
template <class A>
struct Mixture {
  const A* line[kTapLanes];
  A weight[kTapLanes];
  int count = 0;
};

template <class A, int kCount>
void mix_some(const Mixture<A>& m, int64_t plane, int64_t width, bool add, A* out) {
  for (int64_t c = 0; c < width; c += kLanes<A>) {
    Vec<A> sum = m.weight[0] * load_vec(m.line[0] + plane + c);
    for (int k = 1; k < kCount; ++k) sum += m.weight[k] * load_vec(m.line[k] + plane + c);
    store_vec(out + c, add ? load_vec(out + c) + sum : sum);
  }
}

// out = weighted sum of the lines of one plane, which begins `plane` elements behind each.
template <class A>
void mix_lines(const Mixture<A>& m, int64_t plane, int64_t width, bool add, A* out) {
  switch (m.count) {
    case 0:
      for (int64_t c = 0; c < width && !add; ++c) out[c] = 0;
      return;
    case 1:
      return mix_some<A, 1>(m, plane, width, add, out);
    case 2:
      return mix_some<A, 2>(m, plane, width, add, out);
    case 3:
      return mix_some<A, 3>(m, plane, width, add, out);
    case 4:
      return mix_some<A, 4>(m, plane, width, add, out);
    default:
      break;
  }
  for (int k = 0; k < m.count; ++k) {
    Mixture<A> one;
    one.line[0] = m.line[k], one.weight[0] = m.weight[k];
    mix_some<A, 1>(one, plane, width, add || k > 0, out);
  }
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
    for (int64_t p = 0; p < m.planes; ++p)
      lines[p * ld + c] = static_cast<A>(load(pixel + p * m.plane_stride));
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
    case Dtype::f32:
      return f(float{});
    case Dtype::f64:
      return f(double{});
    case Dtype::f16:
      return f(Half{});
    case Dtype::bf16:
      return f(BFloat16{});
  }
}

// out = mixture of the rows that output row o needs; line(row) makes a needed row ready and returns its first
// plane.
template <class A, class F>
bool mix_rows(const AxisTaps<A>& rows, int64_t o, int64_t planes, int64_t ld, const F& line, A* out) {
  bool found = false;
  for (int64_t k = 0; k < rows.count;) {
    Mixture<A> m;
    for (; k < rows.count && m.count < kTapLanes; ++k) {
      const A weight = rows.weight[k * rows.padded + o];
      const A* from = weight == 0 ? nullptr : line(rows.index[k * rows.padded + o]);
      if (from) m.line[m.count] = from, m.weight[m.count++] = weight;
    }
    for (int64_t p = 0; p < planes; ++p) mix_lines(m, p * ld, ld, found, out + p * ld);
    found |= m.count > 0;
  }
  return found;
}

}  // namespace
}  // namespace kd::KD_ISA
