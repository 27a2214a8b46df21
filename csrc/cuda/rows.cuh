#pragma once

// Pieces of the row-wise kernels (direction.cu, logits.cu): strided rows read and written 16 bytes at a time
// where their addresses allow it, sums over warps and blocks in a fixed order.

#include <cstdint>

#include "common/rounding.h"
#include "launch.h"
#include "rows.h"

namespace kd {
namespace {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kMostThreads = 256;    // of a block that has a row
constexpr int kLargestBlock = 1024;  // of one that adds up

// A block with a thread for each of `count` items, as far as there are threads.
inline dim3 whole_warps(int64_t count, int most = kMostThreads) {
  const int64_t threads = round_up(count, 32);
  return dim3(static_cast<unsigned>(threads < 32 ? 32 : threads > most ? most : threads));
}

// Sums run in float, in double for double.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using accumulator = typename Accumulator<T>::type;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void narrow(float x, float* to) { *to = x; }
__device__ inline void narrow(double x, double* to) { *to = x; }
__device__ inline void narrow(float x, __half* to) { *to = __float2half(x); }
__device__ inline void narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16(x); }

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }
__device__ inline float logarithm_1p(float x) { return log1pf(x); }
__device__ inline double logarithm_1p(double x) { return log1p(x); }
__device__ inline float root(float x) { return sqrtf(x); }
__device__ inline double root(double x) { return sqrt(x); }
// Never fused with an addition.
__device__ inline float rounded_product(float x, float y) { return __fmul_rn(x, y); }
__device__ inline double rounded_product(double x, double y) { return __dmul_rn(x, y); }

template <class A>
__device__ A larger(A x, A y) {
  return x < y ? y : x;
}
// NaN stays NaN.
template <class A>
__device__ A not_negative(A x) {
  return x < 0 ? A(0) : x;
}

// Elements that a thread handles at a time: 16 bytes of the input.
template <class T>
constexpr int kPack = 16 / sizeof(T);

template <class T, int kCount>
struct alignas(16) Pack {
  T v[kCount];
};

template <class T>
struct Rows {
  T* data;
  int64_t inner, outer_stride, inner_stride, stride;
  bool packed;  // every row starts at 16 bytes, its elements are neighbours

  explicit Rows(const kd_rows& rows)
      : data(static_cast<T*>(rows.data)),
        inner(rows.inner),
        outer_stride(rows.outer_stride),
        inner_stride(rows.inner_stride),
        stride(rows.stride) {
    const auto aligned = [](int64_t elements) { return elements * int64_t{sizeof(T)} % 16 == 0; };
    packed = stride == 1 && aligned(outer_stride) && aligned(inner_stride) &&
             reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }

  __device__ T* row(int64_t i) const {
    // 64-bit divisions are slow, and one row axis is the rule.
    return i < inner ? data + i * inner_stride : data + i / inner * outer_stride + i % inner * inner_stride;
  }

  // Elements [first, first + kCount) of a row of `count`; `other` beyond its end.
  template <int kCount, class A>
  __device__ void load(const T* row, int64_t first, int64_t count, A other, A (&to)[kCount]) const {
    if (packed && first + kCount <= count) {
      const auto pack = *reinterpret_cast<const Pack<T, kCount>*>(row + first);
#pragma unroll
      for (int j = 0; j < kCount; ++j) to[j] = static_cast<A>(widen(pack.v[j]));
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        to[j] = first + j < count ? static_cast<A>(widen(row[(first + j) * stride])) : other;
      }
    }
  }

  // kSteps packs that lie `step` elements apart: all are under way before the first is used.
  template <int kSteps, int kCount, class A>
  __device__ void load(const T* row, int64_t first, int64_t step, int64_t count, A other,
                       A (&to)[kSteps][kCount]) const {
    if (packed && first + (kSteps - 1) * step + kCount <= count) {
      Pack<T, kCount> packs[kSteps];
#pragma unroll
      for (int u = 0; u < kSteps; ++u) {
        packs[u] = *reinterpret_cast<const Pack<T, kCount>*>(row + first + u * step);
      }
#pragma unroll
      for (int u = 0; u < kSteps; ++u) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) to[u][j] = static_cast<A>(widen(packs[u].v[j]));
      }
    } else {
#pragma unroll
      for (int u = 0; u < kSteps; ++u) load(row, first + u * step, count, other, to[u]);
    }
  }

  template <int kCount, class A>
  __device__ void store(T* row, int64_t first, int64_t count, const A (&from)[kCount]) const {
    if (packed && first + kCount <= count) {
      Pack<T, kCount> pack;
#pragma unroll
      for (int j = 0; j < kCount; ++j) narrow(from[j], &pack.v[j]);
      *reinterpret_cast<Pack<T, kCount>*>(row + first) = pack;
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if (first + j < count) narrow(from[j], row + (first + j) * stride);
      }
    }
  }
};

// Every lane gets the sum.
template <class A>
__device__ A warp_sum(A value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(kFullWarp, value, mask);
  return value;
}

// Values of the lanes of a warp, joined in a fixed order; every lane gets the result.
template <int kCount, class A, class F>
__device__ void warp_join(A (&values)[kCount], const F& join) {
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
      values[c] = join(values[c], __shfl_xor_sync(kFullWarp, values[c], mask));
    }
  }
}

// Likewise of all threads of a block of whole warps.
template <int kCount, class A, class F>
__device__ void block_join(A (&values)[kCount], const F& join) {
  __shared__ A warps[kLargestBlock / 32][kCount];
  warp_join(values, join);
  const int count = static_cast<int>(blockDim.x) / 32;
  if (count == 1) return;
  __syncthreads();  // an earlier result may still be read
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) warps[threadIdx.x / 32][c] = values[c];
  }
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int c = 0; c < kCount; ++c) values[c] = lane < count ? warps[lane][c] : F::template none<A>();
  warp_join(values, join);
}

// Threads that share a row.
struct WarpTeam {
  __device__ int lane() const { return static_cast<int>(threadIdx.x) % 32; }
  __device__ int size() const { return 32; }
  template <int kCount, class A, class F>
  __device__ void join(A (&values)[kCount], const F& f) const {
    warp_join(values, f);
  }
};
struct BlockTeam {
  __device__ int lane() const { return static_cast<int>(threadIdx.x); }
  __device__ int size() const { return static_cast<int>(blockDim.x); }
  template <int kCount, class A, class F>
  __device__ void join(A (&values)[kCount], const F& f) const {
    block_join(values, f);
  }
};

struct Sum {
  template <class A>
  __device__ static A none() {
    return A(0);
  }
  template <class A>
  __device__ A operator()(A x, A y) const {
    return x + y;
  }
};
struct Largest {
  template <class A>
  __device__ static A none() {
    return static_cast<A>(-INFINITY);
  }
  template <class A>
  __device__ A operator()(A x, A y) const {
    return larger(x, y);
  }
};

}  // namespace
}  // namespace kd
