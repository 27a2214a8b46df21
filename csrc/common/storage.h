#pragma once

namespace kd {

// Storage types of the kernels' inputs and results. Plain data, for headers that *.simd.cpp include as well.
enum class Dtype : int { f32, f64, f16, bf16 };

}  // namespace kd
