// Sweeps of the affinity op on the CPU, compiled once per instruction set.
//
// Per key and 16 columns: one row of 16 values read, 32 multiply-adds into sums that stay in registers; per
// query one row written. Sums run in double, and over keys less their median: a_i G + H cancels where a_i
// and the b_j are large and opposite, and a prefix may hold tens of thousands of keys.

#include "cpu/affinity.h"

#include "cpu/simd.h"

namespace kd::KD_ISA {
namespace {

constexpr int64_t kWidth = kAffinityWidth;
constexpr int kVectors = static_cast<int>(kWidth) / kLanes<double>;
constexpr int64_t kTile = 64;  // rows transposed at a time: 4 KB of float

typedef float Narrow __attribute__((vector_size(kVectorBytes / 2)));

inline Vec<double> widen(const double* from) { return load_vec(from); }
inline Vec<double> widen(const float* from) {
  Narrow v;
  __builtin_memcpy(&v, from, sizeof v);
  return __builtin_convertvector(v, Vec<double>);
}
inline void narrow(const Vec<double>& v, double* to) { store_vec(to, v); }
inline void narrow(const Vec<double>& v, float* to) {
  const Narrow n = __builtin_convertvector(v, Narrow);
  __builtin_memcpy(to, &n, sizeof n);
}

template <class P>
void sweep(const AffinitySweep<P>& s) {
  constexpr int lanes = kLanes<double>;
  Vec<double> sum[kVectors] = {}, weighted[kVectors] = {};
  int64_t left = s.keys;
  for (int64_t r = 0; r < s.queries; ++r) {
    const int64_t i = s.query_order[r];
    const P threshold = -s.query[i];
    for (; left > 0; --left) {
      const int64_t j = s.key_order[left - 1];
      if (!(s.key[j] > threshold)) break;
      const Vec<double> weight = Vec<double>{} + (static_cast<double>(s.key[j]) - s.center);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const Vec<double> value = widen(s.values + j * kWidth + v * lanes);
        sum[v] += value;
        weighted[v] += weight * value;
      }
    }
    if (s.dots != nullptr) {
      Vec<double> dot = {};
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) dot += widen(s.with + i * kWidth + v * lanes) * sum[v];
      double total = 0;
      for (int lane = 0; lane < lanes; ++lane) total += dot[lane];
      s.dots[i] = s.scale * total;
    }
    if (s.out != nullptr) {
      const Vec<double> weight = Vec<double>{} + (static_cast<double>(s.query[i]) + s.center);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        narrow((weight * sum[v] + weighted[v]) * s.scale, s.out + i * kWidth + v * lanes);
      }
    }
  }
}

// f(element of the tensor, element of the packed rows) for every element, in tiles that stay in L1.
template <class T, class P, class F>
void for_elements(T* data, const AffinityMatrix& m, int64_t first, int64_t count, P* packed, const F& f) {
  for (int64_t begin = 0; begin < m.rows; begin += kTile) {
    const int64_t end = begin + kTile < m.rows ? begin + kTile : m.rows;
    if (m.column_stride == 1) {
      for (int64_t r = begin; r < end; ++r) {
        T* row = data + r * m.row_stride + first;
        for (int64_t c = 0; c < count; ++c) f(row + c, packed + r * kWidth + c);
      }
    } else {
      for (int64_t c = 0; c < count; ++c) {
        T* column = data + (first + c) * m.column_stride;
        for (int64_t r = begin; r < end; ++r) f(column + r * m.row_stride, packed + r * kWidth + c);
      }
    }
  }
}

template <class P>
void pack(const AffinityMatrix& from, int64_t first, int64_t count, P* to) {
  if (count < kWidth) __builtin_memset(to, 0, sizeof(P) * kWidth * from.rows);
  with_dtype(from.dtype, from.data, [&](auto* data) {
    for_elements(data, from, first, count, to,
                 [](const auto* element, P* packed) { *packed = static_cast<P>(load(element)); });
  });
}

template <class P>
void unpack(const P* from, int64_t first, int64_t count, const AffinityMatrix& to) {
  with_dtype(to.dtype, to.data, [&](auto* data) {
    for_elements(data, to, first, count, const_cast<P*>(from),
                 [](auto* element, const P* packed) { store(element, *packed); });
  });
}

}  // namespace

extern const AffinityKernels<float> affinity_float;
extern const AffinityKernels<double> affinity_double;
const AffinityKernels<float> affinity_float = {pack<float>, unpack<float>, sweep<float>};
const AffinityKernels<double> affinity_double = {pack<double>, unpack<double>, sweep<double>};

}  // namespace kd::KD_ISA
