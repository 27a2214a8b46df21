// Arithmetic of the feature_augment op on planes, compiled once per instruction set.
//
// A warp is four taps per pixel, one vector gather and multiply-add each; its tables are the same for every
// plane. Noise: ten rounds of Philox for four numbers, a logarithm, a square root, a sine and a cosine for
// two, all in vectors that the compiler makes of loops over 16 lanes.

#include "cpu/feature_augment.h"

#include "cpu/simd.h"

namespace kd::KD_ISA {
namespace {

constexpr int kGroup = 16;  // counters at a time

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

inline Vec<double> gather(const double* from, const int32_t* place) {
  Vec<double> v;
  for (int i = 0; i < kLanes<double>; ++i) v[i] = from[place[i]];
  return v;
}
inline Vec<float> gather(const float* from, const int32_t* place) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_i32gather_ps(_mm512_loadu_si512(place), from, 4);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_i32gather_ps(from, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(place)),
                                         4);
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = from[place[i]];
  return v;
#endif
}

template <class A>
void resample(const AugmentTable<A>& table, const A* from, A* to) {
  for (int64_t p = 0; p < table.padded; p += kLanes<A>) {
    Vec<A> sum = {};
    for (int64_t k = 0; k < table.taps; ++k) {
      const int64_t at = k * table.padded + p;
      sum += load_vec(table.weight + at) * gather(from, table.place + at);
    }
    store_vec(to + p, sum);
  }
}

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

// Ten rounds on counters first, first + 1, ...; word w of counter i in words[w][i].
inline void philox(uint64_t first, uint32_t seed_low, uint32_t seed_high, uint32_t (&words)[4][kGroup]) {
  for (int begin = 0; begin < kGroup; begin += kWords) {
    uint32_t counter[2][kWords];
    for (int i = 0; i < kWords; ++i) {
      const uint64_t number = first + static_cast<uint64_t>(begin + i);
      counter[0][i] = static_cast<uint32_t>(number);
      counter[1][i] = static_cast<uint32_t>(number >> 32);
    }
    Words c[4] = {Words{}, Words{}, Words{}, Words{}};
    __builtin_memcpy(&c[0], counter[0], sizeof c[0]);
    __builtin_memcpy(&c[1], counter[1], sizeof c[1]);
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
    for (int w = 0; w < 4; ++w) __builtin_memcpy(words[w] + begin, &c[w], sizeof c[w]);
  }
}

// ln x for 0 < x < 1: x = m 2^e with m in [sqrt(1/2), sqrt(2)), ln m = 2 artanh((m - 1) / (m + 1)), whose
// series ends where its next term is below 1e-9.
inline float logarithm(float x) {
  const int32_t bits = static_cast<int32_t>(as_bits(x)) - 0x3f3504f3;  // sqrt(1/2)
  const float exponent = static_cast<float>(bits >> 23);
  const float f = as_float((static_cast<uint32_t>(bits) & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  const float s = f / (2.0f + f), q = s * s;
  const float series = 2.0f + q * (0.6666666667f + q * (0.4f + q * (0.2857142857f + q * 0.2222222222f)));
  return exponent * 0.6931471806f + s * series;
}

// cos and sin of 2 pi u, 0 <= u < 1: a multiple of a quarter turn and a rest of at most an eighth, by Taylor
// series whose next terms are below 1e-9.
inline void turn(float u, float& cosine, float& sine) {
  const int32_t quarter = static_cast<int32_t>(4.0f * u + 0.5f);
  const float x = 6.283185307f * (u - 0.25f * static_cast<float>(quarter)), q = x * x;
  const float s =
      x *
      (1.0f + q * (-1.666666667e-1f + q * (8.333333333e-3f + q * (-1.984126984e-4f + q * 2.755731922e-6f))));
  const float c =
      1.0f + q * (-0.5f + q * (4.166666667e-2f +
                               q * (-1.388888889e-3f + q * (2.480158730e-5f + q * -2.755731922e-7f))));
  const bool swap = (quarter & 1) != 0;
  const float a = swap ? s : c, b = swap ? c : s;
  cosine = ((quarter + 1) & 2) != 0 ? -a : a;
  sine = (quarter & 2) != 0 ? -b : b;
}

inline float unit(uint32_t word) {
  return (static_cast<float>(static_cast<int32_t>(word >> 8)) + 0.5f) * 5.9604644775390625e-8f;  // 2^-24
}

// normals[4 i + j]: the four numbers of counter i.
inline void normals(const uint32_t (&words)[4][kGroup], float (&to)[4 * kGroup]) {
  float found[4][kGroup];
  for (int pair = 0; pair < 4; pair += 2) {
    for (int i = 0; i < kGroup; ++i) {
      const float radius = square_root(-2.0f * logarithm(unit(words[pair][i])));
      float cosine, sine;
      turn(unit(words[pair + 1][i]), cosine, sine);
      found[pair][i] = radius * cosine;
      found[pair + 1][i] = radius * sine;
    }
  }
  for (int i = 0; i < kGroup; ++i) {
    for (int j = 0; j < 4; ++j) to[4 * i + j] = found[j][i];
  }
}

// float64 maps: the library's functions, so that the result is float64's.
inline void normals(const uint32_t (&words)[4][kGroup], double (&to)[4 * kGroup]) {
  for (int i = 0; i < kGroup; ++i) {
    for (int pair = 0; pair < 4; pair += 2) {
      const double u = (static_cast<double>(words[pair][i] >> 8) + 0.5) * 0x1p-24;
      const double v = (static_cast<double>(words[pair + 1][i] >> 8) + 0.5) * 0x1p-24;
      const double radius = __builtin_sqrt(-2.0 * __builtin_log(u)), angle = 6.283185307179586 * v;
      to[4 * i + pair] = radius * __builtin_cos(angle);
      to[4 * i + pair + 1] = radius * __builtin_sin(angle);
    }
  }
}

template <class A>
void add_noise(A* plane, int64_t count, int64_t first, A deviation, uint32_t seed_low, uint32_t seed_high) {
  uint32_t words[4][kGroup];
  A numbers[4 * kGroup];
  int64_t i = 0;
  while (i < count) {
    const int64_t place = first + i, skip = place % 4;  // a plane may begin inside a counter's four numbers
    philox(static_cast<uint64_t>(place / 4), seed_low, seed_high, words);
    normals(words, numbers);
    const int64_t left = count - i, here = left < 4 * kGroup - skip ? left : 4 * kGroup - skip;
    for (int64_t k = 0; k < here; ++k) plane[i + k] += deviation * numbers[skip + k];
    i += here;
  }
}

}  // namespace

extern const AugmentKernels<float> augment_float;
extern const AugmentKernels<double> augment_double;
const AugmentKernels<float> augment_float = {load_any<float>, store_any<float>, resample<float>,
                                             add_noise<float>};
const AugmentKernels<double> augment_double = {load_any<double>, store_any<double>, resample<double>,
                                               add_noise<double>};

}  // namespace kd::KD_ISA
