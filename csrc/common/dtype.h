#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "check.h"
#include "storage.h"

namespace kd {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// Sums run in float, or in double for double input.
template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls f(T{}) with the C++ type that `dtype` stands for:
//   dispatch_float(x.scalar_type(), "x", [&](auto zero) { using T = decltype(zero); ... });
template <class F>
decltype(auto) dispatch_float(ScalarType dtype, const char* argument, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(Half{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      KD_CHECK(false, argument, " must be float32, float64, float16 or bfloat16, got ", toString(dtype));
  }
  __builtin_unreachable();
}

inline Dtype dtype_of(ScalarType dtype, const char* argument) {
  return dispatch_float(dtype, argument, [](auto zero) {
    using T = decltype(zero);
    return std::is_same_v<T, double>     ? Dtype::f64
           : std::is_same_v<T, Half>     ? Dtype::f16
           : std::is_same_v<T, BFloat16> ? Dtype::bf16
                                         : Dtype::f32;
  });
}

}  // namespace kd
