#pragma once

// Normally distributed numbers of the feature_augment op, for feature_augment.simd.cpp: ten rounds of Philox
// for four of them, a logarithm, a square root, a sine and a cosine for two, all in vectors.

#include "cpu/simd.h"

// GCC 12 takes its own intrinsics' undefined vectors for a mistake (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace kd::KD_ISA {
namespace {

typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
constexpr int kWords = kVectorBytes / 4;

// Upper and lower words of x * factor. A processor multiplies every second word; GCC does not find that.
inline void multiply(const Words& x, uint32_t factor, Words& high, Words& low) {
#if defined(__AVX512F__)
  const __m512i v = (__m512i)x, f = _mm512_set1_epi64(factor);
  const __m512i even = _mm512_mul_epu32(v, f), odd = _mm512_mul_epu32(_mm512_srli_epi64(v, 32), f);
  low = (Words)_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
  high = (Words)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
#elif defined(__AVX2__)
  const __m256i v = (__m256i)x, f = _mm256_set1_epi64x(factor);
  const __m256i even = _mm256_mul_epu32(v, f), odd = _mm256_mul_epu32(_mm256_srli_epi64(v, 32), f);
  low = (Words)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  high = (Words)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
#else
  for (int i = 0; i < kWords; ++i) {
    const uint64_t product = static_cast<uint64_t>(factor) * x[i];
    low[i] = static_cast<uint32_t>(product);
    high[i] = static_cast<uint32_t>(product >> 32);
  }
#endif
}

// Ten rounds on the counters first + order(lane): four words each.
inline constexpr int order(int lane) { return kWords / 4 * (lane % 4) + lane / 4; }
inline void philox(uint64_t first, uint32_t seed_low, uint32_t seed_high, Words (&c)[4]) {
  uint32_t counter[2][kWords];
  for (int i = 0; i < kWords; ++i) {
    const uint64_t number = first + static_cast<uint64_t>(order(i));
    counter[0][i] = static_cast<uint32_t>(number);
    counter[1][i] = static_cast<uint32_t>(number >> 32);
  }
  __builtin_memcpy(&c[0], counter[0], sizeof c[0]);
  __builtin_memcpy(&c[1], counter[1], sizeof c[1]);
  c[2] = c[3] = Words{};
  uint32_t k0 = seed_low, k1 = seed_high;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    Words high0 = {}, low0 = {}, high1 = {}, low1 = {};
    multiply(c[0], 0xD2511F53u, high0, low0);
    multiply(c[2], 0xCD9E8D57u, high1, low1);
    c[0] = high1 ^ c[1] ^ k0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ k1;
    c[3] = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef Vec<float> Floats;

inline Floats roots(Floats x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (Floats)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kWords; ++i) x[i] = square_root(x[i]);
  return x;
#endif
}

// ln x for 0 < x < 1: x = m 2^e with m in [sqrt(1/2), sqrt(2)), ln m = 2 artanh((m - 1) / (m + 1)), whose
// series ends where its next term is below 1e-9.
inline Floats logarithm(Floats x) {
  const Ints bits = (Ints)x - 0x3f3504f3;  // sqrt(1/2)
  const Floats exponent = __builtin_convertvector(bits >> 23, Floats);
  const Floats f = (Floats)((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
  const Floats s = f / (2.0f + f), q = s * s;
  const Floats series = 2.0f + q * (0.6666666667f + q * (0.4f + q * (0.2857142857f + q * 0.2222222222f)));
  return exponent * 0.6931471806f + s * series;
}

// cos and sin of 2 pi u, 0 <= u < 1: a multiple of a quarter turn and a rest of at most an eighth, by Taylor
// series whose next terms are below 1e-9.
inline void turn(Floats u, Floats& cosine, Floats& sine) {
  const Ints quarter = __builtin_convertvector(4.0f * u + 0.5f, Ints);
  const Floats x = 6.283185307f * (u - 0.25f * __builtin_convertvector(quarter, Floats)), q = x * x;
  const Floats s =
      x *
      (1.0f + q * (-1.666666667e-1f + q * (8.333333333e-3f + q * (-1.984126984e-4f + q * 2.755731922e-6f))));
  const Floats c =
      1.0f + q * (-0.5f + q * (4.166666667e-2f +
                               q * (-1.388888889e-3f + q * (2.480158730e-5f + q * -2.755731922e-7f))));
  const Ints swap = (quarter & 1) != 0;
  // Signs: of the cosine in quarters 1 and 2, of the sine in 2 and 3.
  cosine = (Floats)((Ints)(swap ? s : c) ^ ((quarter + 1) & 2) << 30);
  sine = (Floats)((Ints)(swap ? c : s) ^ (quarter & 2) << 30);
}

inline Floats unit(Words word) {
  return (__builtin_convertvector((Ints)(word >> 8), Floats) + 0.5f) * 5.9604644775390625e-8f;  // 2^-24
}

// to[4 i + j] = the lane of from[j] that holds counter i.
inline void in_order(const Floats (&from)[4], float* to) {
#if defined(__AVX512F__)
  for (int k = 0; k < 2; ++k) {
    const __m512 a = k ? _mm512_unpackhi_ps((__m512)from[0], (__m512)from[1])
                       : _mm512_unpacklo_ps((__m512)from[0], (__m512)from[1]),
                 b = k ? _mm512_unpackhi_ps((__m512)from[2], (__m512)from[3])
                       : _mm512_unpacklo_ps((__m512)from[2], (__m512)from[3]);
    const __m512d low = _mm512_castps_pd(a), high = _mm512_castps_pd(b);
    _mm512_storeu_pd(to + 32 * k, _mm512_unpacklo_pd(low, high));
    _mm512_storeu_pd(to + 32 * k + 16, _mm512_unpackhi_pd(low, high));
  }
#elif defined(__AVX2__)
  for (int k = 0; k < 2; ++k) {
    const __m256 a = k ? _mm256_unpackhi_ps((__m256)from[0], (__m256)from[1])
                       : _mm256_unpacklo_ps((__m256)from[0], (__m256)from[1]),
                 b = k ? _mm256_unpackhi_ps((__m256)from[2], (__m256)from[3])
                       : _mm256_unpacklo_ps((__m256)from[2], (__m256)from[3]);
    _mm256_storeu_ps(to + 16 * k,
                     _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b))));
    _mm256_storeu_ps(to + 16 * k + 8,
                     _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b))));
  }
#else
  for (int lane = 0; lane < kWords; ++lane) {
    for (int j = 0; j < 4; ++j) to[4 * order(lane) + j] = from[j][lane];
  }
#endif
}

// normals[4 i + j]: the four numbers of counter i.
inline void normals(const Words (&words)[4], float (&to)[4 * kWords]) {
  Floats found[4];
  for (int pair = 0; pair < 4; pair += 2) {
    const Floats radius = roots(-2.0f * logarithm(unit(words[pair])));
    turn(unit(words[pair + 1]), found[pair], found[pair + 1]);
    found[pair] *= radius;
    found[pair + 1] *= radius;
  }
  in_order(found, to);
}

// float64 maps: the library's functions, so that the result is float64's.
inline void normals(const Words (&words)[4], double (&to)[4 * kWords]) {
  for (int lane = 0; lane < kWords; ++lane) {
    double* const four = to + 4 * order(lane);
    for (int pair = 0; pair < 4; pair += 2) {
      const double u = (static_cast<double>(words[pair][lane] >> 8) + 0.5) * 0x1p-24;
      const double v = (static_cast<double>(words[pair + 1][lane] >> 8) + 0.5) * 0x1p-24;
      const double radius = __builtin_sqrt(-2.0 * __builtin_log(u)), angle = 6.283185307179586 * v;
      four[pair] = radius * __builtin_cos(angle);
      four[pair + 1] = radius * __builtin_sin(angle);
    }
  }
}

template <class A>
void add_noise(A* plane, int64_t count, int64_t first, A deviation, uint32_t seed_low, uint32_t seed_high) {
  constexpr int64_t kNumbers = 4 * kWords;
  Words words[4];
  A numbers[kNumbers];
  int64_t i = 0;
  while (i < count) {
    const int64_t place = first + i, skip = place % 4;  // a plane may begin inside a counter's four numbers
    philox(static_cast<uint64_t>(place / 4), seed_low, seed_high, words);
    normals(words, numbers);
    const int64_t left = count - i;
    if (skip == 0 && left >= kNumbers) {
      for (int64_t k = 0; k < kNumbers; ++k) plane[i + k] += deviation * numbers[k];
      i += kNumbers;
      continue;
    }
    const int64_t here = left < kNumbers - skip ? left : kNumbers - skip;
    for (int64_t k = 0; k < here; ++k) plane[i + k] += deviation * numbers[skip + k];
    i += here;
  }
}

}  // namespace
}  // namespace kd::KD_ISA
