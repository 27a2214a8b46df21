#include "cpu/result.h"

#include <algorithm>
#include <functional>
#include <numeric>

#include "common/check.h"
#include "cpu/kept_memory.h"

namespace kd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Axes = std::vector<int64_t>;

int64_t product(const Axes& sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<int64_t>());
}

Axes contiguous_strides(const Axes& sizes) {
  Axes strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0; step *= std::max<int64_t>(sizes[i], 1)) strides[i] = step;
  return strides;
}

// Whether x fills its memory without gaps or overlaps: then empty_like has its strides.
bool is_dense(const Axes& sizes, const Axes& strides) {
  Axes order(sizes.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });
  int64_t step = 1;
  for (const int64_t axis : order) {
    if (sizes[axis] == 1) continue;
    if (strides[axis] != step) return false;
    step *= sizes[axis];
  }
  return true;
}

// None where malloc serves as well, or has to.
std::optional<Tensor> kept(const Tensor& like, const Axes& sizes, const Axes& strides, ScalarType type,
                           int64_t bytes) {
  const KeptMemory::Block block = KeptMemory::all().take(bytes);
  if (block.data == nullptr) return std::nullopt;
  return torch::stable::from_blob(block.data, sizes, strides, like.device(), type,
                                  [block](void*) { KeptMemory::all().give(block); });
}

int64_t size_of(const Tensor& like, std::optional<ScalarType> type) {
  if (!type || *type == like.scalar_type()) return static_cast<int64_t>(like.element_size());
  return static_cast<int64_t>(torch::stable::new_empty(like, {0}, type).element_size());
}

}  // namespace

Tensor new_result(const Tensor& like, const Axes& sizes, std::optional<ScalarType> type) {
  const int64_t bytes = product(sizes) * size_of(like, type);
  if (bytes >= KeptMemory::kLeast) {
    if (auto found = kept(like, sizes, contiguous_strides(sizes), type.value_or(like.scalar_type()), bytes))
      return *found;
  }
  return torch::stable::new_empty(like, sizes, type);
}

Tensor result_cpu(const Tensor& like, Axes size) {
  for (const int64_t n : size) KD_CHECK(n >= 0, "result: size has a negative entry, ", n);
  return new_result(like, size);
}

Tensor new_gradient(const Tensor& x, bool needed) {
  if (!needed) return torch::stable::new_empty(x, {0});
  const int64_t bytes = x.numel() * static_cast<int64_t>(x.element_size());
  if (bytes >= KeptMemory::kLeast) {
    const auto sizes = x.sizes(), strides = x.strides();
    const Axes size(sizes.begin(), sizes.end()), stride(strides.begin(), strides.end());
    if (is_dense(size, stride)) {
      if (auto found = kept(x, size, stride, x.scalar_type(), bytes)) return *found;
    }
  }
  return torch::stable::empty_like(x);
}

}  // namespace kd
