#pragma once

// New tensors for what an op returns or saves: uninitialised, large ones in kept memory. Not for *.simd.cpp:
// it uses torch.

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace kd {

// Contiguous, on the CPU; of `like`'s type unless another is given.
torch::stable::Tensor new_result(const torch::stable::Tensor& like, const std::vector<int64_t>& sizes,
                                 std::optional<torch::headeronly::ScalarType> type = std::nullopt);

// The tensor that a backward writes for input `x`, laid out as empty_like(x); an empty one where no gradient
// is needed.
torch::stable::Tensor new_gradient(const torch::stable::Tensor& x, bool needed = true);

// Op of kdfast/ops/result.py.
torch::stable::Tensor result_cpu(const torch::stable::Tensor& like, std::vector<int64_t> size);

}  // namespace kd
