#pragma once

// One source, several instruction sets: setup.py compiles every cpu/*.simd.cpp once per set, each time with
// KD_ISA defined as that set's namespace (generic, avx2, avx512). A simd file puts its functions into
// `namespace kd::KD_ISA`; the plain file of the op declares them with KD_DECLARE_ISA and calls
// KD_DISPATCH_ISA(gram_kernels()).

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace kd {

enum class Isa { generic, avx2, avx512 };

inline const char* isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "generic";
}

// Empty when this build and this processor can both run `isa`, else the reason why not.
inline std::string isa_obstacle(Isa isa) {
  if (isa == Isa::generic) return "";
#ifdef KD_HAVE_AVX2
  if (isa == Isa::avx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")
               ? ""
               : "this processor lacks AVX2, FMA or F16C";
  }
#endif
#ifdef KD_HAVE_AVX512
  if (isa == Isa::avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")
               ? ""
               : "this processor lacks AVX-512 F, BW, DQ or VL";
  }
#endif
  return "kdfast was built without it";
}

inline Isa choose_isa() {
  const char* asked = std::getenv("KDFAST_ISA");
  const bool automatic = asked == nullptr || *asked == '\0';
  for (Isa isa : {Isa::avx512, Isa::avx2, Isa::generic}) {
    if (!automatic && std::string(asked) != isa_name(isa)) continue;
    const std::string obstacle = isa_obstacle(isa);
    if (obstacle.empty()) return isa;
    if (!automatic) {
      throw std::runtime_error("KDFAST_ISA=" + std::string(asked) + " cannot run here: " + obstacle);
    }
  }
  throw std::runtime_error("KDFAST_ISA=" + std::string(asked) + " is unknown: use generic, avx2 or avx512");
}

// Read once, at the first call; a refused KDFAST_ISA raises at every call.
inline Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

}  // namespace kd

#ifdef KD_HAVE_AVX2
#define KD_IF_AVX2_(...) __VA_ARGS__
#else
#define KD_IF_AVX2_(...)
#endif
#ifdef KD_HAVE_AVX512
#define KD_IF_AVX512_(...) __VA_ARGS__
#else
#define KD_IF_AVX512_(...)
#endif

// At namespace kd: KD_DECLARE_ISA(const GramKernels& gram_kernels();)
#define KD_DECLARE_ISA(...)                \
  namespace generic {                      \
  __VA_ARGS__                              \
  }                                        \
  KD_IF_AVX2_(namespace avx2{__VA_ARGS__}) \
  KD_IF_AVX512_(namespace avx512{__VA_ARGS__})

// KD_DISPATCH_ISA(gram_kernels()) calls the best variant, e.g. kd::avx2::gram_kernels().
#define KD_DISPATCH_ISA(...)                                                     \
  (KD_IF_AVX512_(::kd::isa() == ::kd::Isa::avx512 ? ::kd::avx512::__VA_ARGS__ :) \
       KD_IF_AVX2_(::kd::isa() == ::kd::Isa::avx2 ? ::kd::avx2::__VA_ARGS__ :)::kd::generic::__VA_ARGS__)
