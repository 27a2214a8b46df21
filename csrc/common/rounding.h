#pragma once

// Counts of blocks and padded sizes. For kernels and *.simd.cpp as well: always inlined, so that no copy
// compiled for one instruction set can be linked into another's code.

#ifdef __CUDACC__
#define KD_INLINE_EVERYWHERE __host__ __device__ __forceinline__
#else
#define KD_INLINE_EVERYWHERE [[gnu::always_inline]] inline
#endif

namespace kd {

// Blocks of `by` that hold n >= 0.
template <class N, class By>
KD_INLINE_EVERYWHERE constexpr auto ceil_div(N n, By by) {
  return (n + by - 1) / by;
}

// The least multiple of `to` that is at least n >= 0.
template <class N, class To>
KD_INLINE_EVERYWHERE constexpr auto round_up(N n, To to) {
  return ceil_div(n, to) * to;
}

}  // namespace kd
