#pragma once

// 2^y in vectors, for *.simd.cpp. Needs no library, and is compiled per instruction set as simd.h is.
//
// y = n + r with |r| <= 1/2, and 2^r from a polynomial fitted to the relative error: 2e-9 (float, degree 6)
// and 4e-18 (double, degree 11) before rounding. Measured with rounding: at most 0.95 ulp with FMA, 1.21
// without (every seventh float of [-126, 0]); double 1.01 and 1.28 ulp (random in [-1000, 0]).

#include "cpu/simd.h"

namespace kd::KD_ISA {
namespace {

template <class A>
struct Exp2;

template <>
struct Exp2<float> {
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
  static constexpr float kLowest = -126, kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int kMantissa = 23;
  static constexpr float kCoefficients[] = {
      1.5345807849580302e-4f, 1.339993156722888e-3f, 9.618488975867028e-3f, 5.5503287761298606e-2f,
      2.4022646890429744e-1f, 6.931472057376326e-1f, 1.0000000005541985f};
};

template <>
struct Exp2<double> {
  typedef int64_t Bits __attribute__((vector_size(kVectorBytes)));
  static constexpr double kLowest = -1022, kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kMantissa = 52;
  static constexpr double kCoefficients[] = {
      4.434364267525739e-10, 7.074098981378172e-9,  1.0178204332072957e-7, 1.3215433131848112e-6,
      1.525273347418601e-5,  1.5403530462420185e-4, 1.3333558146807326e-3, 9.618129107588422e-3,
      5.550410866481984e-2,  2.4022650695910155e-1, 6.931471805599453e-1,  1.0};
};

// For y <= 1. Below the smallest normal number 0; NaN stays NaN.
template <class A>
inline Vec<A> exp2_vec(Vec<A> y) {
  using E = Exp2<A>;
  const Vec<A> lowest = Vec<A>{} + E::kLowest;
  const Vec<A> clamped = y < lowest ? lowest : y;
  const Vec<A> shifted = clamped + E::kRound;
  const Vec<A> r = clamped - (shifted - E::kRound);
  Vec<A> power = Vec<A>{} + E::kCoefficients[0];
#pragma GCC unroll 16
  for (int i = 1; i < static_cast<int>(sizeof E::kCoefficients / sizeof(A)); ++i) {
    power = power * r + E::kCoefficients[i];
  }
  typename E::Bits bits, n;
  __builtin_memcpy(&bits, &power, sizeof bits);
  __builtin_memcpy(&n, &shifted, sizeof n);
  bits += n << E::kMantissa;  // the integer stands in the low bits of `shifted`
  __builtin_memcpy(&power, &bits, sizeof bits);
  return y < lowest ? Vec<A>{} : power;
}

}  // namespace
}  // namespace kd::KD_ISA
