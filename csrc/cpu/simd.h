#pragma once

// Vectors, loads and conversions for *.simd.cpp. Everything lives in namespace kd::KD_ISA and in an unnamed
// namespace inside it, so that no function compiled for one instruction set can be linked into another's
// code.

#include <cstdint>

#include "common/storage.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace kd::KD_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <class A>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename VecOf<A>::type;

template <class A>
inline Vec<A> load_vec(const A* from) {
  Vec<A> v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class A>
inline void store_vec(A* to, const Vec<A>& v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// A store of a vector that lies whole in a cache line and is not read soon: past the caches, so that the line
// is not read from memory first. end_streams() makes such stores visible to other threads.
template <class A>
inline void stream_vec(A* to, const Vec<A>& v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)v);
#else
  store_vec(to, v);
#endif
}

inline void end_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// to[i] += sum of the lanes of v[i], for four vectors at once: a tree of shuffles, three additions deep per
// halving.
template <class A>
inline void add_sums4(const Vec<A>* v, A* to) {
#if defined(__AVX2__)
  if constexpr (sizeof(A) == 4) {
    __m256 q[4];
    for (int i = 0; i < 4; ++i) {
#if defined(__AVX512F__)
      const __m512 z = (__m512)v[i];
      q[i] = _mm256_add_ps(_mm512_castps512_ps256(z), _mm512_extractf32x8_ps(z, 1));
#else
      q[i] = (__m256)v[i];
#endif
    }
    const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(q[0], q[1]), _mm256_hadd_ps(q[2], q[3]));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), four));
    return;
  }
#endif
  for (int i = 0; i < 4; ++i) {
    A sum = 0;
    for (int lane = 0; lane < kLanes<A>; ++lane) sum += v[i][lane];
    to[i] += sum;
  }
}

// Sum of the lanes in double, halves first.
template <class A>
inline double lanes_sum(const Vec<A>& v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 8) return _mm512_reduce_add_pd((__m512d)v);
  const __m512 z = (__m512)v;
  return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(z)),
                                            _mm512_cvtps_pd(_mm512_extractf32x8_ps(z, 1))));
#elif defined(__AVX2__)
  __m256d sum;
  if constexpr (sizeof(A) == 8) {
    sum = (__m256d)v;
  } else {
    const __m256 z = (__m256)v;
    sum = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(z)),
                        _mm256_cvtps_pd(_mm256_extractf128_ps(z, 1)));
  }
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(sum), _mm256_extractf128_pd(sum, 1));
  return two[0] + two[1];
#else
  double sum = 0;
  for (int lane = 0; lane < kLanes<A>; ++lane) sum += static_cast<double>(v[lane]);
  return sum;
#endif
}

// Largest lane; no lane is NaN.
template <class A>
inline A lanes_max(const Vec<A>& v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 8) {
    return _mm512_reduce_max_pd((__m512d)v);
  } else {
    return _mm512_reduce_max_ps((__m512)v);
  }
#else
  A largest[kLanes<A>];
  store_vec(largest, v);
#pragma GCC unroll 3
  for (int half = kLanes<A> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      largest[i] = largest[i] > largest[i + half] ? largest[i] : largest[i + half];
    }
  }
  return largest[0];
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
template <class A>
inline __m256i first_lanes(int64_t count) {
  if constexpr (sizeof(A) == 8) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
  } else {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
}
#endif

// The first `count` lanes from memory, of which no more is read, the others from `rest`.
template <class A>
inline Vec<A> load_part(const A* from, int64_t count, const Vec<A>& rest) {
#if defined(__AVX512F__)
  const auto mask = static_cast<uint16_t>((1u << count) - 1);
  if constexpr (sizeof(A) == 8) {
    return (Vec<A>)_mm512_mask_loadu_pd((__m512d)rest, static_cast<__mmask8>(mask), from);
  } else {
    return (Vec<A>)_mm512_mask_loadu_ps((__m512)rest, mask, from);
  }
#elif defined(__AVX2__)
  const __m256i mask = first_lanes<A>(count);
  if constexpr (sizeof(A) == 8) {
    return (Vec<A>)_mm256_blendv_pd((__m256d)rest, _mm256_maskload_pd(from, mask), (__m256d)mask);
  } else {
    return (Vec<A>)_mm256_blendv_ps((__m256)rest, _mm256_maskload_ps(from, mask), (__m256)mask);
  }
#else
  Vec<A> v = rest;
  for (int64_t lane = 0; lane < count; ++lane) v[lane] = from[lane];
  return v;
#endif
}

// The first `count` lanes to memory.
template <class A>
inline void store_part(A* to, int64_t count, const Vec<A>& v) {
#if defined(__AVX512F__)
  const auto mask = static_cast<uint16_t>((1u << count) - 1);
  if constexpr (sizeof(A) == 8) {
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>(mask), (__m512d)v);
  } else {
    _mm512_mask_storeu_ps(to, mask, (__m512)v);
  }
#elif defined(__AVX2__)
  const __m256i mask = first_lanes<A>(count);
  if constexpr (sizeof(A) == 8) {
    _mm256_maskstore_pd(to, mask, (__m256d)v);
  } else {
    _mm256_maskstore_ps(to, mask, (__m256)v);
  }
#else
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = v[lane];
#endif
}

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

// Storage of the half formats; torch's own types convert by functions shared between instruction sets.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// f(data) with the type that `dtype` stands for.
template <class F>
inline void with_dtype(Dtype dtype, const void* data, const F& f) {
  void* from = const_cast<void*>(data);
  switch (dtype) {
    case Dtype::f32:
      return f(static_cast<float*>(from));
    case Dtype::f64:
      return f(static_cast<double*>(from));
    case Dtype::f16:
      return f(static_cast<Half*>(from));
    case Dtype::bf16:
      return f(static_cast<BFloat16*>(from));
  }
}

inline float as_float(uint32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t as_bits(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  return bits;
}

inline float load(const float* p) { return *p; }
inline double load(const double* p) { return *p; }
inline float load(const BFloat16* p) { return as_float(static_cast<uint32_t>(p->bits) << 16); }
inline float load(const Half* p) {
#if defined(__F16C__)
  return _cvtsh_ss(p->bits);
#else
  // Shift the exponent into place, then let a multiplication by 2^112 rescale normal and subnormal numbers
  // alike.
  const uint32_t magnitude = p->bits & 0x7fffu, sign = static_cast<uint32_t>(p->bits & 0x8000u) << 16;
  const float scaled = as_float(magnitude << 13) * as_float(0x77800000u);
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;  // inf and nan keep their exponent
  return as_float(as_bits(scaled) | special | sign);
#endif
}

inline void store(float* p, double v) { *p = static_cast<float>(v); }
inline void store(float* p, float v) { *p = v; }
inline void store(double* p, double v) { *p = v; }
inline void store(double* p, float v) { *p = v; }
inline void store(BFloat16* p, float v) {
  const uint32_t bits = as_bits(v);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  p->bits = static_cast<uint16_t>(nan ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void store(Half* p, float v) {
#if defined(__F16C__)
  p->bits = static_cast<uint16_t>(_cvtss_sh(v, 0));
#else
  const uint32_t bits = as_bits(v), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  } else {  // subnormal: adding 0.5 leaves the rounded value in the low bits
    half = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  }
  p->bits = static_cast<uint16_t>(half | sign);
#endif
}
inline void store(BFloat16* p, double v) { store(p, static_cast<float>(v)); }
inline void store(Half* p, double v) { store(p, static_cast<float>(v)); }

template <class T, class U>
inline void convert(const T* __restrict from, U* __restrict to, int64_t count) {
  int64_t i = 0;
#if defined(__F16C__) && defined(__AVX2__)
  if constexpr (sizeof(T) == 2 && sizeof(U) == 4) {
    for (; i + 8 <= count; i += 8) {
      const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      if constexpr (__is_same(T, Half)) {
        _mm256_storeu_ps(reinterpret_cast<float*>(to + i), _mm256_cvtph_ps(h));
      } else {
        const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), wide);
      }
    }
  } else if constexpr (sizeof(T) == 4 && __is_same(U, Half)) {
    for (; i + 8 <= count; i += 8) {
      const __m256 f = _mm256_loadu_ps(reinterpret_cast<const float*>(from + i));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(f, 0));
    }
  }
#endif
  for (; i < count; ++i) store(to + i, load(from + i));
}

}  // namespace
}  // namespace kd::KD_ISA
