// Arithmetic of the masked_error op, compiled once per instruction set: two loads of the maps (and one of the
// weights, from the L1 cache), three operations and a store per element.

#include "cpu/masked_error.h"

#include "cpu/simd.h"

namespace kd::KD_ISA {
namespace {

constexpr int64_t kBlock = 512;  // elements of a half type that are converted at once
constexpr int64_t kPart = 4096;  // elements whose sum stays in the accumulator's type

template <class A>
inline double lane_sum(const Vec<A>& v) {
  double sum = 0;
  for (int i = 0; i < kLanes<A>; ++i) sum += static_cast<double>(v[i]);
  return sum;
}

// weights: of every element, or of all.
template <class A, bool kByColumn, bool kGradient>
inline void add(const A* x, const A* y, const A* weights, int64_t count, A scale, A* gradient,
                Vec<A> (&sums)[2]) {
  constexpr int64_t kStep = kLanes<A>;
  const auto element = [&](const A* xs, const A* ys, const A* ws, A* to, Vec<A>& sum) {
    const Vec<A> d = load_vec(xs) - load_vec(ys);
    Vec<A> error;
    if constexpr (kByColumn) {
      error = load_vec(ws) * d;
    } else {
      error = weights[0] * d;
    }
    sum += error * d;
    if constexpr (kGradient) store_vec(to, scale * error);
  };
  int64_t i = 0;
  for (; i + 2 * kStep <= count; i += 2 * kStep) {
    for (int64_t k = 0; k < 2; ++k) {
      const int64_t at = i + k * kStep;
      element(x + at, y + at, weights + at, gradient + at, sums[k]);
    }
  }
  for (; i < count; i += kStep) {
    const int64_t left = count - i;
    if (left >= kStep) {
      element(x + i, y + i, weights + i, gradient + i, sums[0]);
      continue;
    }
    A values[4][kStep] = {};
    for (int64_t k = 0; k < left; ++k) {
      values[0][k] = x[i + k], values[1][k] = y[i + k];
      if constexpr (kByColumn) values[2][k] = weights[i + k];
    }
    element(values[0], values[1], values[2], values[3], sums[0]);
    for (int64_t k = 0; k < left && kGradient; ++k) gradient[i + k] = values[3][k];
  }
}

template <class T, class A, bool kByColumn, bool kGradient>
inline void add_converted(const T* x, const T* y, const A* weights, int64_t count, A scale, T* gradient,
                          Vec<A> (&sums)[2]) {
  if constexpr (__is_same(T, A)) {
    add<A, kByColumn, kGradient>(x, y, weights, count, scale, gradient, sums);
  } else {
    A xs[kBlock], ys[kBlock];
    for (int64_t i = 0; i < count; i += kBlock) {
      const int64_t here = count - i < kBlock ? count - i : kBlock;
      convert(x + i, xs, here);
      convert(y + i, ys, here);
      add<A, kByColumn, kGradient>(xs, ys, kByColumn ? weights + i : weights, here, scale, xs, sums);
      if constexpr (kGradient) convert(xs, gradient + i, here);
    }
  }
}

template <class T, class A, bool kByColumn, bool kGradient>
double sum_rows(const MaskedRows& rows, const A* weights, A scale) {
  double total = 0;
  Vec<A> sums[2] = {};
  int64_t summed = 0;
  for (int64_t r = 0; r < rows.rows; ++r) {
    const T *const x = static_cast<const T*>(rows.x) + r * rows.x_stride, *const y =
                                                                              static_cast<const T*>(rows.y) +
                                                                              r * rows.y_stride;
    T* const gradient = kGradient ? static_cast<T*>(rows.gradient) + r * rows.gradient_stride : nullptr;
    for (int64_t i = 0; i < rows.columns; i += kPart) {
      const int64_t here = rows.columns - i < kPart ? rows.columns - i : kPart;
      add_converted<T, A, kByColumn, kGradient>(x + i, y + i, kByColumn ? weights + i : weights + r, here,
                                                scale, kGradient ? gradient + i : nullptr, sums);
      summed += here;
      if (summed < kPart) continue;
      total += lane_sum<A>(sums[0] + sums[1]);
      sums[0] = sums[1] = Vec<A>{};
      summed = 0;
    }
  }
  return total + lane_sum<A>(sums[0] + sums[1]);
}

template <class A, bool kByColumn>
double sum(const MaskedRows& rows, const A* weights, A scale) {
  double total = 0;
  with_dtype(rows.dtype, const_cast<void*>(rows.x), [&]<class T>(T*) {
    if constexpr (__is_same(T, double) == __is_same(A, double)) {  // float64 goes with A = double only
      total = rows.gradient ? sum_rows<T, A, kByColumn, true>(rows, weights, scale)
                            : sum_rows<T, A, kByColumn, false>(rows, weights, scale);
    }
  });
  return total;
}

}  // namespace

extern const MaskedErrorKernels<float> masked_error_float;
extern const MaskedErrorKernels<double> masked_error_double;
const MaskedErrorKernels<float> masked_error_float = {sum<float, true>, sum<float, false>};
const MaskedErrorKernels<double> masked_error_double = {sum<double, true>, sum<double, false>};

}  // namespace kd::KD_ISA
