// Arithmetic of the feature_augment op on planes, compiled once per instruction set.
//
// A warp takes 16 planes at a time, transposed so that a pixel's 16 values are a vector or two: four taps are
// four loads and multiply-adds for 16 results, beside a quarter of a shuffle per value on the way in and out.
// (A gather takes as long as its loads one by one: about a cycle for each tap of each result.)

#include "cpu/feature_augment.h"

#include "cpu/feature_augment_noise.h"
#include "cpu/simd.h"

namespace kd::KD_ISA {
namespace {

inline bool is_dense(const AugmentPlane& plane) {
  return plane.column_stride == 1 && plane.row_stride == plane.width;
}

template <class T, class A>
void load_plane(const T* data, const AugmentPlane& from, A* to) {
  if (is_dense(from)) return convert(data, to, from.height * from.width);
  for (int64_t r = 0; r < from.height; ++r) {
    const T* row = data + r * from.row_stride;
    if (from.column_stride == 1) {
      convert(row, to + r * from.width, from.width);
    } else {
      for (int64_t c = 0; c < from.width; ++c) {
        to[r * from.width + c] = static_cast<A>(load(row + c * from.column_stride));
      }
    }
  }
}

template <class T, class A>
void store_plane(const A* from, T* data, const AugmentPlane& to) {
  if (is_dense(to)) return convert(from, data, to.height * to.width);
  for (int64_t r = 0; r < to.height; ++r) {
    T* row = data + r * to.row_stride;
    for (int64_t c = 0; c < to.width; ++c) store(row + c * to.column_stride, from[r * to.width + c]);
  }
}

template <class A>
void load_any(const AugmentPlane& from, A* to) {
  with_dtype(from.dtype, from.data, [&](auto* data) { load_plane(data, from, to); });
}

template <class A>
void store_any(const A* from, const AugmentPlane& to) {
  with_dtype(to.dtype, to.data, [&](auto* data) { store_plane(from, data, to); });
}

// The 16 x 16 values whose row i begins at from(i), transposed: row i to to(i). The last argument names the
// type; a float is taken for a double where nothing better is there.
template <class F, class G>
inline void transpose(const F& from, const G& to, double) {
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) to(i)[j] = from(j)[i];
  }
}

#if defined(__AVX512F__)
template <class F, class G>
inline void transpose(const F& from, const G& to, float) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from(i));
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int k = 0; k < 2; ++k) {
      const __m512d low = _mm512_castps_pd(b[i + k]), high = _mm512_castps_pd(b[i + k + 2]);
      a[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // Quarter q of a[4 g + k] is column 4 q + k of rows 4 g to 4 g + 3.
  for (int k = 0; k < 4; ++k) {
    const __m512 front = _mm512_shuffle_f32x4(a[k], a[4 + k], 0x44),
                 back = _mm512_shuffle_f32x4(a[k], a[4 + k], 0xEE),
                 front2 = _mm512_shuffle_f32x4(a[8 + k], a[12 + k], 0x44),
                 back2 = _mm512_shuffle_f32x4(a[8 + k], a[12 + k], 0xEE);
    _mm512_storeu_ps(to(k), _mm512_shuffle_f32x4(front, front2, 0x88));
    _mm512_storeu_ps(to(4 + k), _mm512_shuffle_f32x4(front, front2, 0xDD));
    _mm512_storeu_ps(to(8 + k), _mm512_shuffle_f32x4(back, back2, 0x88));
    _mm512_storeu_ps(to(12 + k), _mm512_shuffle_f32x4(back, back2, 0xDD));
  }
}
#elif defined(__AVX2__)
template <class F, class G>
inline void transpose(const F& from, const G& to, float) {
  for (int block = 0; block < 4; ++block) {
    const int row = block / 2 * 8, column = block % 2 * 8;
    __m256 a[8], b[8];
    for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(from(row + i) + column);
    for (int i = 0; i < 8; i += 2) {
      b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      for (int k = 0; k < 2; ++k) {
        const __m256d low = _mm256_castps_pd(b[i + k]), high = _mm256_castps_pd(b[i + k + 2]);
        a[i + 2 * k] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
        a[i + 2 * k + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
      }
    }
    for (int k = 0; k < 4; ++k) {
      _mm256_storeu_ps(to(column + k) + row, _mm256_permute2f128_ps(a[k], a[4 + k], 0x20));
      _mm256_storeu_ps(to(column + 4 + k) + row, _mm256_permute2f128_ps(a[k], a[4 + k], 0x31));
    }
  }
}
#endif

template <class A>
void interleave(const A* const* from, int64_t pixels, A* to) {
  int64_t p = 0;
  for (; p + 16 <= pixels; p += 16) {
    transpose([&](int i) { return from[i] + p; }, [&](int i) { return to + (p + i) * kAugmentLanes; }, A{});
  }
  for (; p < pixels; ++p) {
    for (int i = 0; i < kAugmentLanes; ++i) to[p * kAugmentLanes + i] = from[i][p];
  }
  for (int i = 0; i < kAugmentLanes; ++i) to[pixels * kAugmentLanes + i] = 0;
}

// The values of a pixel in all planes: `taps` of them.
template <class A>
inline void weigh(const AugmentTap<A>* tap, int64_t taps, const A* from, A* to) {
  constexpr int kVectors = static_cast<int>(kAugmentLanes) / kLanes<A>;
  Vec<A> sums[kVectors] = {};
  for (int64_t k = 0; k < taps; ++k) {
    for (int v = 0; v < kVectors; ++v) {
      sums[v] += tap[k].weight * load_vec(from + tap[k].place + v * kLanes<A>);
    }
  }
  for (int v = 0; v < kVectors; ++v) store_vec(to + v * kLanes<A>, sums[v]);
}

template <class A>
void resample(const AugmentTable<A>& table, const A* from, A* const* to, int64_t planes) {
  A tile[kAugmentGroup * kAugmentLanes], rest[kAugmentGroup * kAugmentLanes];
  const auto row = [&](int i) { return tile + i * kAugmentLanes; };
  for (int64_t first = 0, group = 0; first < table.pixels; first += kAugmentGroup, ++group) {
    const AugmentTap<A>* tap = table.taps + table.begin[group];
    const int64_t taps = (table.begin[group + 1] - table.begin[group]) / kAugmentGroup;
    if (taps == 4) {  // inside the map, forward
      for (int i = 0; i < kAugmentGroup; ++i) weigh(tap + 4 * i, 4, from, row(i));
    } else {
      for (int i = 0; i < kAugmentGroup; ++i) weigh(tap + taps * i, taps, from, row(i));
    }
    const int64_t left = table.pixels - first;
    if (planes == kAugmentLanes && left >= kAugmentGroup) {
      transpose(row, [&](int i) { return to[i] + first; }, A{});
    } else {
      transpose(row, [&](int i) { return rest + i * kAugmentGroup; }, A{});
      const int64_t count = left < kAugmentGroup ? left : kAugmentGroup;
      for (int64_t i = 0; i < planes; ++i) {
        for (int64_t p = 0; p < count; ++p) to[i][first + p] = rest[i * kAugmentGroup + p];
      }
    }
  }
}

typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));

template <bool kStream>
inline void put(char* to, Bits value) {
#if defined(__AVX512F__)
  if constexpr (kStream) return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)value);
#elif defined(__AVX2__)
  if constexpr (kStream) return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)value);
#endif
  __builtin_memcpy(to, &value, sizeof value);
}

// The `bytes` of a row, or zeros where `from` is null.
template <bool kStream>
inline void copy_row(const char* from, const uint8_t* keep, char* to, int64_t bytes) {
  const auto vector = [&](int64_t at) {
    Bits value = {}, mask;
    if (from) __builtin_memcpy(&value, from + at, sizeof value);
    if (from && keep) {
      __builtin_memcpy(&mask, keep + at, sizeof mask);
      value &= mask;
    }
    put<kStream>(to + at, value);
  };
  int64_t at = 0;
  for (; at + kVectorBytes <= bytes; at += kVectorBytes) vector(at);
  if (at == bytes) return;
  if (at > 0) return vector(bytes - kVectorBytes);  // some bytes a second time
  for (; at < bytes; ++at) to[at] = from ? static_cast<char>(keep ? from[at] & keep[at] : from[at]) : 0;
}

template <bool kStream>
void copy_rows(const AugmentRows& rows, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const char* const from = rows.source[r] < 0 ? nullptr : rows.from + rows.source[r] * rows.from_stride;
    copy_row<kStream>(from, rows.keep, rows.to + r * rows.to_stride, rows.bytes);
  }
}

}  // namespace

extern const AugmentKernels<float> augment_float;
extern const AugmentKernels<double> augment_double;
const AugmentKernels<float> augment_float = {load_any<float>, store_any<float>, interleave<float>,
                                             resample<float>, add_noise<float>};
const AugmentKernels<double> augment_double = {load_any<double>, store_any<double>, interleave<double>,
                                               resample<double>, add_noise<double>};

void augment_rows(const AugmentRows& rows, int64_t begin, int64_t end);
void augment_rows(const AugmentRows& rows, int64_t begin, int64_t end) {
#if defined(__AVX2__)
  const bool aligned = (reinterpret_cast<uintptr_t>(rows.to) | static_cast<uintptr_t>(rows.to_stride) |
                        static_cast<uintptr_t>(rows.bytes)) %
                           kVectorBytes ==
                       0;
  if (rows.past_cache && aligned) {
    copy_rows<true>(rows, begin, end);
    _mm_sfence();
    return;
  }
#endif
  copy_rows<false>(rows, begin, end);
}

}  // namespace kd::KD_ISA
