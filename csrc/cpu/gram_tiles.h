#pragma once

// Where the tiles of a Gram problem come from and where its gradients go: strided tensors here, the planes of
// resized maps in patched_map.h. Not for *.simd.cpp: it uses std.

#include <algorithm>
#include <memory>
#include <type_traits>

#include "common/isa.h"
#include "cpu/gram.h"
#include "cpu/gram_plan.h"
#include "cpu/gram_views.h"

namespace kd {

KD_DECLARE_ISA(extern const GramKernels<float> gram_float; extern const GramKernels<double> gram_double;)

template <class A>
const GramKernels<A>& gram_kernels() {
  if constexpr (std::is_same_v<A, float>) {
    return KD_DISPATCH_ISA(gram_float);
  } else {
    return KD_DISPATCH_ISA(gram_double);
  }
}

// One side of a problem, rows x features per group. A tile is [rows, count] with leading dimension ld; its
// first feature and count are multiples of `unit` (the last count may be the rest).
template <class A>
struct TileSource {
  int64_t rows, features, unit;
  TileSource(int64_t rows, int64_t features, int64_t unit) : rows(rows), features(features), unit(unit) {}
  virtual ~TileSource() = default;
  virtual void load(int64_t group, int64_t first, int64_t count, A* tile, int64_t ld) const = 0;
  virtual void store(int64_t group, int64_t first, int64_t count, const A* tile, int64_t ld) const = 0;
};

template <class A>
class ViewTiles : public TileSource<A> {
 public:
  explicit ViewTiles(std::unique_ptr<OwnedView> view)
      : TileSource<A>(view->view.rows, view->view.features, 1), view_(std::move(view)) {}
  void load(int64_t group, int64_t first, int64_t count, A* tile, int64_t ld) const override {
    gram_kernels<A>().pack(view_->view, group, first, count, tile, ld);
  }
  void store(int64_t group, int64_t first, int64_t count, const A* tile, int64_t ld) const override {
    gram_kernels<A>().unpack(view_->view, group, first, count, tile, ld);
  }

 private:
  std::unique_ptr<OwnedView> view_;
};

// Both sides, and where their gradients go (null: nowhere).
template <class A>
struct GramSides {
  std::unique_ptr<TileSource<A>> inputs[2], gradients[2];
  // K - L is computed from X - Y, not as the difference of what nearly equal sides make equal. Not from rows
  // of unit length on the Gram side: their own rounding is as large, and their projection needs both Grams.
  bool differ = false;
};

// Of [G, R1, R2, F1, F2, F3].
template <class A>
GramSides<A> view_sides(const GramAxes& x, const GramAxes& y, const GramAxes* grad_x, const GramAxes* grad_y,
                        const GramFlags& flags) {
  const GramAxes* all[2][2] = {{&x, grad_x}, {&y, grad_y}};
  const bool transposed = flags.feature_side;
  GramSides<A> sides;
  sides.differ = flags.compare == Compare::difference && (flags.feature_side || !flags.cosine);
  for (int a = 3; a < 6; ++a) sides.differ &= x.size(a) == y.size(a);
  // Whether both sides' features are multiplied with one another.
  const bool together = flags.inter || flags.feature_side || sides.differ;
  std::vector<const GramAxes*> tensors;
  std::vector<std::unique_ptr<TileSource<A>>*> targets;
  const auto make = [&] {
    auto views = make_views(tensors, transposed);
    for (size_t i = 0; i < views.size(); ++i)
      *targets[i] = std::make_unique<ViewTiles<A>>(std::move(views[i]));
    tensors.clear(), targets.clear();
  };
  for (int s : {0, 1}) {
    tensors.push_back(all[s][0]), targets.push_back(&sides.inputs[s]);
    if (all[s][1]) tensors.push_back(all[s][1]), targets.push_back(&sides.gradients[s]);
    if (!together) make();
  }
  if (together) make();
  return sides;
}

}  // namespace kd
