#pragma once

// What the kernels of the op attention_mask share: rows of any type as vectors, the last one filled with
// zeros.

#include "cpu/simd.h"

namespace kd::KD_ISA {
namespace {

template <class A>
struct BitsOf;
template <>
struct BitsOf<float> {
  typedef uint32_t type __attribute__((vector_size(kVectorBytes)));
  static constexpr uint32_t sign = 0x80000000u;
};
template <>
struct BitsOf<double> {
  typedef uint64_t type __attribute__((vector_size(kVectorBytes)));
  static constexpr uint64_t sign = 0x8000000000000000u;
};
template <class A>
using Bits = typename BitsOf<A>::type;

typedef uint16_t Shorts __attribute__((vector_size(kVectorBytes / 2)));

template <class A>
inline Vec<A> magnitude(const Vec<A>& x) {
  return (Vec<A>)((Bits<A>)x & ~BitsOf<A>::sign);
}

// sign(x) * v, 0 where x is 0
template <class A>
inline Vec<A> times_sign(const Vec<A>& x, const Vec<A>& v) {
  const Bits<A> flipped = (Bits<A>)v ^ ((Bits<A>)x & BitsOf<A>::sign);
  return (Vec<A>)(flipped & (Bits<A>)(x != 0));
}

template <class A>
inline A lane_sum(const Vec<A>& v) {
  A parts[kLanes<A>];
  store_vec(parts, v);
  for (int width = kLanes<A> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  }
  return parts[0];
}

// The first `count` values of a row, fewer than a vector has, and 0 for the others; to memory, those only. An
// odd width meets one in every row: by way of memory they would cost as much as ten whole vectors.
#if defined(__AVX512F__)
inline uint32_t first_lanes(int64_t count) { return (1u << count) - 1; }
inline Vec<float> load_part(const float* from, int64_t count) {
  return (Vec<float>)_mm512_maskz_loadu_ps(first_lanes(count), from);
}
inline Vec<double> load_part(const double* from, int64_t count) {
  return (Vec<double>)_mm512_maskz_loadu_pd(first_lanes(count), from);
}
inline Vec<float> load_part(const BFloat16* from, int64_t count) {
  const Shorts bits = (Shorts)_mm256_maskz_loadu_epi16(first_lanes(count), from);
  return (Vec<float>)(__builtin_convertvector(bits, Bits<float>) << 16);
}
inline Vec<float> load_part(const Half* from, int64_t count) {
  return (Vec<float>)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), from));
}
inline void store_part(float* to, const Vec<float>& v, int64_t count) {
  _mm512_mask_storeu_ps(to, first_lanes(count), (__m512)v);
}
inline void store_part(double* to, const Vec<double>& v, int64_t count) {
  _mm512_mask_storeu_pd(to, first_lanes(count), (__m512d)v);
}
#elif defined(__AVX2__)
inline __m256i first_floats(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i first_doubles(int64_t count) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}
inline Vec<float> load_part(const float* from, int64_t count) {
  return (Vec<float>)_mm256_maskload_ps(from, first_floats(count));
}
inline Vec<double> load_part(const double* from, int64_t count) {
  return (Vec<double>)_mm256_maskload_pd(from, first_doubles(count));
}
inline void store_part(float* to, const Vec<float>& v, int64_t count) {
  _mm256_maskstore_ps(to, first_floats(count), (__m256)v);
}
inline void store_part(double* to, const Vec<double>& v, int64_t count) {
  _mm256_maskstore_pd(to, first_doubles(count), (__m256d)v);
}
#endif
template <class T, class A>
concept HasParts = requires(T* memory, Vec<A> v) { v = load_part(memory, 1); };
template <class T, class A>
concept StoresParts = requires(T* memory, Vec<A> v) { store_part(memory, v, 1); };

template <class T, class A>
inline Vec<A> load_columns(const T* from, int64_t count) {
  if (count >= kLanes<A>) {
    if constexpr (__is_same(T, A)) {
      return load_vec(from);
    } else if constexpr (__is_same(T, BFloat16)) {
      Shorts bits;
      __builtin_memcpy(&bits, from, sizeof bits);
      return (Vec<A>)(__builtin_convertvector(bits, Bits<float>) << 16);
#if defined(__AVX512F__)
    } else if constexpr (__is_same(T, Half)) {
      return (Vec<A>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
    } else if constexpr (__is_same(T, Half)) {
      return (Vec<A>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
    } else {
      A wide[kLanes<A>];
      convert(from, wide, kLanes<A>);
      return load_vec(wide);
    }
  }
  if constexpr (HasParts<T, A>) {
    return load_part(from, count);
  } else {
    A wide[kLanes<A>] = {};
    convert(from, wide, count);
    return load_vec(wide);
  }
}

template <class T, class A>
inline void store_columns(T* to, const Vec<A>& v, int64_t count) {
  if constexpr (__is_same(T, A)) {
    if (count >= kLanes<A>) {
      store_vec(to, v);
      return;
    }
  }
  if constexpr (__is_same(T, BFloat16)) {
    if (count >= kLanes<A>) {
      const Bits<float> bits = (Bits<float>)v, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
      const Bits<float> result = v == v ? rounded : Bits<float>{} + 0x7fc0u;
      const Shorts narrow = __builtin_convertvector(result, Shorts);
      __builtin_memcpy(to, &narrow, sizeof narrow);
      return;
    }
  }
  if constexpr (StoresParts<T, A>) {
    store_part(to, v, count);
    return;
  }
  A wide[kLanes<A>];
  store_vec(wide, v);
  convert(wide, to, count < kLanes<A> ? count : kLanes<A>);
}

// f(column, columns left) for every vector of columns; the compiler sees a constant for all but the last.
template <class A, class F>
inline void for_columns(int64_t columns, const F& f) {
  int64_t j = 0;
  for (; j + kLanes<A> <= columns; j += kLanes<A>) f(j, int64_t{kLanes<A>});
  if (j < columns) f(j, columns - j);
}

}  // namespace
}  // namespace kd::KD_ISA
