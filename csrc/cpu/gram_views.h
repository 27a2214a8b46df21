#pragma once

// Strided tensors [G, R1, R2, F1, F2, F3] as rows x features. For gram.cpp only (not for *.simd.cpp: it uses
// std).

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <memory>
#include <vector>

#include "common/dtype.h"
#include "cpu/gram.h"

namespace kd {

inline Dtype gram_dtype(const torch::stable::Tensor& x) { return dtype_of(x.scalar_type(), "gram: x and y"); }

// A tensor seen as [G, R1, R2, F1, F2, F3].
class GramAxes {
 public:
  GramAxes(const torch::stable::Tensor& x)  // NOLINT: a view as it comes
      : GramAxes(x, {0, 1, 2, 3, 4, 5}) {}

  // axes: those of x, or -1 for one of size 1.
  GramAxes(const torch::stable::Tensor& x, const std::array<int, 6>& axes)
      : data_(const_cast<void*>(x.const_data_ptr())), dtype_(gram_dtype(x)) {
    for (size_t a = 0; a < axes.size(); ++a) {
      sizes_[a] = axes[a] < 0 ? 1 : x.size(axes[a]);
      strides_[a] = axes[a] < 0 ? 0 : x.stride(axes[a]);
    }
  }

  int64_t size(int axis) const { return sizes_[axis]; }
  int64_t stride(int axis) const { return strides_[axis]; }
  int64_t rows() const { return size(1) * size(2); }
  int64_t features() const { return size(3) * size(4) * size(5); }
  void* data() const { return data_; }
  Dtype dtype() const { return dtype_; }

 private:
  void* data_;
  Dtype dtype_;
  std::array<int64_t, 6> sizes_, strides_;
};

// Axes of some tensors, merged where the strides of all of them allow it.
struct Axes {
  std::vector<int64_t> sizes;
  std::vector<std::vector<int64_t>> strides;  // [tensor][axis]

  Axes(const std::vector<const GramAxes*>& tensors, const std::vector<int>& order) : strides(tensors.size()) {
    for (int a : order) sizes.push_back(tensors[0]->size(a));
    for (size_t t = 0; t < tensors.size(); ++t) {
      for (int a : order) strides[t].push_back(tensors[t]->stride(a));
    }
    for (size_t a = sizes.size(); a-- > 0;) {
      if (sizes[a] == 1 && sizes.size() > 1) erase(a);
    }
    for (size_t a = sizes.size(); a-- > 1;) {
      const bool nested = std::all_of(strides.begin(), strides.end(),
                                      [&](const auto& s) { return s[a - 1] == sizes[a] * s[a]; });
      if (!nested) continue;
      sizes[a] *= sizes[a - 1];
      erase(a - 1);
    }
  }

  // Offsets of every element of the first `axes` axes.
  std::vector<int64_t> offsets(size_t tensor, size_t axes) const {
    std::vector<int64_t> result{0};
    for (size_t a = 0; a < axes; ++a) {
      std::vector<int64_t> next;
      next.reserve(result.size() * sizes[a]);
      for (int64_t base : result) {
        for (int64_t i = 0; i < sizes[a]; ++i) next.push_back(base + i * strides[tensor][a]);
      }
      result = std::move(next);
    }
    return result;
  }

 private:
  void erase(size_t a) {
    const auto at = static_cast<std::ptrdiff_t>(a);
    sizes.erase(sizes.begin() + at);
    for (auto& s : strides) s.erase(s.begin() + at);
  }
};

struct OwnedView {
  GramView view;
  std::vector<int64_t> row_offset, outer;
};

// Views of tensors whose features stand in one order: an input and its gradient, or inputs that are
// multiplied with one another. transposed: the feature axes are the rows (their sizes may then differ), the
// row axes are the features.
inline std::vector<std::unique_ptr<OwnedView>> make_views(const std::vector<const GramAxes*>& tensors,
                                                          bool transposed) {
  const std::vector<int> row_axes{1, 2}, feature_axes{3, 4, 5};
  std::vector<int> order = transposed ? row_axes : feature_axes;
  // The order of the features is free as long as all agree: run along the smallest stride of the first
  // tensor.
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return tensors[0]->stride(a) > tensors[0]->stride(b); });
  const Axes features(tensors, order);
  std::vector<std::unique_ptr<OwnedView>> views;
  for (size_t t = 0; t < tensors.size(); ++t) {
    const Axes rows({tensors[t]}, transposed ? feature_axes : row_axes);
    auto owned = std::make_unique<OwnedView>();
    owned->row_offset = rows.offsets(0, rows.sizes.size());
    owned->outer = features.offsets(t, features.sizes.size() - 1);
    GramView& v = owned->view;
    v.data = tensors[t]->data();
    v.dtype = tensors[t]->dtype();
    v.group_stride = tensors[t]->stride(0);
    v.rows = static_cast<int64_t>(owned->row_offset.size());
    v.inner = features.sizes.back();
    v.features = v.inner * static_cast<int64_t>(owned->outer.size());
    v.inner_stride = features.strides[t].back();
    v.row_offset = owned->row_offset.data();
    v.outer = owned->outer.data();
    views.push_back(std::move(owned));
  }
  return views;
}

}  // namespace kd
