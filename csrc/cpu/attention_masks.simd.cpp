// What the op attention_mask computes of pooled maps: masks, and squared norms.

#include "cpu/attention_mask.h"
#include "cpu/attention_simd.h"

namespace kd::KD_ISA {
namespace {

template <class A>
inline Vec<A> spread(A value) {
  return Vec<A>{} + value;
}

// e^x for x <= 0; relative error below 2e-7, and 0 below -87.
inline Vec<float> exponential(const Vec<float>& given) {
  typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
  const Vec<float> low = spread(-87.0f);
  const Vec<float> x = given > low ? given : low;
  const Vec<float> shift = spread(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> n = (x * 1.44269504f + shift) - shift;
  const Vec<float> r =
      (x - n * 0.693359375f) + n * 2.12194440e-4f;  // log 2 in two parts, the first exact in n * it
  Vec<float> p = spread(1.0f / 5040);
  constexpr float taylor[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (const float coefficient : taylor) p = p * r + coefficient;
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  const Vec<float> result = p * (Vec<float>)power;
  return given >= low ? result : Vec<float>{};
}
inline Vec<double> exponential(const Vec<double>& x) {
  Vec<double> result = {};
  for (int i = 0; i < kLanes<double>; ++i) result[i] = __builtin_exp(x[i]);
  return result;
}

template <class A>
inline Vec<A> sum_of(const A* first, const A* second, int64_t i, int64_t left) {
  const Vec<A> v = load_columns<A, A>(first + i, left);
  return second ? v + load_columns<A, A>(second + i, left) : v;
}

template <class A>
A largest(const A* first, const A* second, int64_t count) {
  Vec<A> mosts = spread(second ? first[0] + second[0] : first[0]);
  for_columns<A>(count, [&](int64_t i, int64_t left) {
    if (left < kLanes<A>) {
      for (int64_t k = 0; k < left; ++k) {
        const A v = second ? first[i + k] + second[i + k] : first[i + k];
        mosts[k] = v > mosts[k] || v != v ? v : mosts[k];
      }
    } else {
      const Vec<A> v = sum_of(first, second, i, left);
      mosts = (v > mosts) | (v != v) ? v : mosts;
    }
  });
  A most = mosts[0];
  for (int i = 1; i < kLanes<A>; ++i) most = mosts[i] > most || mosts[i] != mosts[i] ? mosts[i] : most;
  return most;
}

// Of exp((v - most) * scale) with v = first (+ second), which goes to `out` unless that is null.
template <class A>
SoftmaxTerms<A> softmax_terms(const A* first, const A* second, int64_t count, A scale, A* out) {
  const A most = largest(first, second, count);
  Vec<A> total = {};
  for_columns<A>(count, [&](int64_t i, int64_t left) {
    Vec<A> e = exponential((sum_of(first, second, i, left) - most) * scale);
    for (int64_t lane = left; lane < kLanes<A>; ++lane) e[lane] = 0;
    total += e;
    if (out) store_columns<A, A>(out + i, e, left);
  });
  return {most, lane_sum<A>(total)};
}

template <class A>
double mask(const A* student, const A* teacher, int64_t count, A scale, bool softmax_of_sum,
            const A* multiplied, A* out) {
  constexpr int64_t kBlock = 1024;  // whose sum stays in the accumulator's type
  const A size = static_cast<A>(count);
  const A* const added = softmax_of_sum ? teacher : nullptr;
  const SoftmaxTerms<A> s = softmax_terms<A>(student, added, count, scale, nullptr);
  const SoftmaxTerms<A> t = softmax_of_sum ? s : softmax_terms<A>(teacher, nullptr, count, scale, nullptr);
  const A share_s = (softmax_of_sum ? size : size / 2) / s.total, share_t = size / 2 / t.total;
  double sum = 0;
  for (int64_t first = 0; first < count; first += kBlock) {
    Vec<A> part = {};
    for_columns<A>(count - first < kBlock ? count - first : kBlock, [&](int64_t j, int64_t left) {
      const int64_t i = first + j;
      Vec<A> m = share_s * exponential((sum_of(student, added, i, left) - s.most) * scale);
      if (!softmax_of_sum)
        m += share_t * exponential((load_columns<A, A>(teacher + i, left) - t.most) * scale);
      if (multiplied) part += m * load_columns<A, A>(multiplied + i, left);
      store_columns<A, A>(out + i, m, left);
    });
    sum += lane_sum<A>(part);
  }
  return sum;
}

template <class A>
double squares(const A* x, const A* y, int64_t count) {
  constexpr int64_t kBlock = 1024;
  double sum = 0;
  for (int64_t first = 0; first < count; first += kBlock) {
    Vec<A> part = {};
    for_columns<A>(count - first < kBlock ? count - first : kBlock, [&](int64_t j, int64_t left) {
      Vec<A> v = load_columns<A, A>(x + first + j, left);
      if (y) v -= load_columns<A, A>(y + first + j, left);
      part += v * v;
    });
    sum += lane_sum<A>(part);
  }
  return sum;
}

}  // namespace

extern const MaskKernels<float> mask_float;
extern const MaskKernels<double> mask_double;
const MaskKernels<float> mask_float = {mask<float>, softmax_terms<float>, squares<float>};
const MaskKernels<double> mask_double = {mask<double>, softmax_terms<double>, squares<double>};

}  // namespace kd::KD_ISA
