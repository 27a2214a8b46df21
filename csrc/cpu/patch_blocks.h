#pragma once

// The patch matrices of two maps, a block of groups at a time, and where few groups are large, a block of
// their features at a time: how blocks are cut, and the workspaces that hold one. For patch_gram.cpp only.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "common/check.h"
#include "common/parallel.h"
#include "common/rounding.h"
#include "cpu/gram_blocks.h"
#include "cpu/patched_map.h"

namespace kd {

// Wanted for the patch matrices of a block, per side: a share of a resized map within bounds.
constexpr int64_t kBlockBytes = 1 << 20, kLeastBlockBytes = 1 << 17, kBlockShare = 16;
constexpr int64_t kPartBytes = 4 << 20, kPartShare = 8;  // the same where features are cut
// Enough for one task per group in the gram op: taken where they need up to twice that.
constexpr int64_t kBlockGroups = 8;
// Of the windows of spatial groups, per side: they stay in the L2 cache.
constexpr int64_t kRowBytes = 1 << 19, kLeastRowBytes = 1 << 15, kRowShare = 64, kRowShareUnresized = 128;
// Share of a resized map for the workspaces of threads that work on blocks of their own.
constexpr int64_t kWorkspaceShare = 2, kWorkspaceShareUnresized = 8;
// Share of maps that are not resized for those and the Grams of the blocks that threads work on.
constexpr int64_t kApartShare = 16;

struct PatchFlags {
  int64_t compare;
  bool centered, cosine, inter, feature_side, transposed;
};

struct BlockSizes {
  int64_t groups, parts;  // of a block of groups; blocks of its features
  int64_t bytes;          // of the patch matrices of a part, per side
};

template <class A>
class Blocks;

// Grows on demand; what it held is then lost.
template <class A>
class WindowBuffer {
 public:
  A* data() const { return buffer_ ? buffer_->get() : nullptr; }
  void reserve(int64_t count) {
    if (count <= count_) return;
    release();
    buffer_ = std::make_unique<Buffer<A>>(count), count_ = count;
  }
  void release() { buffer_.reset(), count_ = 0; }

 private:
  std::unique_ptr<Buffer<A>> buffer_;
  int64_t count_ = 0;
};

// Memory of one thread for the patch matrices of some groups; a source of GramBlocks.
template <class A>
class Window {
 public:
  Window(const Blocks<A>& blocks, Tensor* grad_x = nullptr, Tensor* grad_y = nullptr)
      : blocks_(blocks), to_{grad_x, grad_y} {}

  Window another() const {
    Window w(blocks_, to_[0], to_[1]);
    w.set_groups(first_, count_);
    return w;
  }
  int64_t grain() const { return blocks_.window_fits(to_[0], to_[1]) ? 1 : blocks(); }

  void release() {
    for (int s : {0, 1}) tiles_[s].release(), gradients_[s].release();
  }

  void set_groups(int64_t first, int64_t count) { first_ = first, count_ = count; }
  int64_t first() const { return first_; }
  int64_t groups() const { return count_; }
  int64_t blocks() const { return blocks_.sizes().parts; }

  Tensor view(int64_t k, int s) { return blocks_.view(tiles_[s], part(k, s), s); }
  Tensor gradient(int64_t k, int s) { return blocks_.view(gradients_[s], part(k, s), s); }
  Tensor load(int64_t k, int s) {
    const Tensor v = view(k, s);
    blocks_.side(s).read(part(k, s), tiles_[s].data());
    return v;
  }
  void store(int64_t k) const {
    for (int s : {0, 1}) {
      if (to_[s]) blocks_.side(s).write(*to_[s], part(k, s), gradients_[s].data());
    }
  }

 private:
  Part part(int64_t k, int s) const { return blocks_.part(first_, count_, k, s); }

  const Blocks<A>& blocks_;
  Tensor* to_[2];
  int64_t first_ = 0, count_ = 0;
  WindowBuffer<A> tiles_[2], gradients_[2];
};

template <class A>
class Blocks {
 public:
  // at_once: spatial groups all in one block.
  Blocks(const Tensor& x, const Tensor& y, const Grid& grid, const PatchFlags& flags, bool at_once = false)
      : like_(x), other_(y), grid_(grid), flags_(flags), x_(x, grid), y_(y, grid) {
    KD_CHECK(x_.groups() == y_.groups(), "patch_gram: x and y have ", x_.groups(), " and ", y_.groups(),
             " groups");
    const int64_t groups = std::max<int64_t>(1, x_.groups()), total = total_bytes();
    const int64_t bytes = std::max<int64_t>(1, total / groups);
    const bool resized = x_.resized() || y_.resized();
    const int64_t units = std::max<int64_t>(1, std::min(x_.units(), y_.units()));
    // The other side of a problem has patches as features, which no block of a map holds.
    const bool whole = flags.feature_side || flags.transposed;
    if (grid.average == Average::spatial && !whole) {
      const int64_t map = std::max(x.numel() * static_cast<int64_t>(x.element_size()),
                                   y.numel() * static_cast<int64_t>(y.element_size()));
      sizes_.groups = at_once ? groups : grid.patch_w;
      const int64_t matrix_row = sizes_.groups * grid.patches() * static_cast<int64_t>(sizeof(A));
      const int64_t most =
          std::clamp(map / (resized ? kRowShare : kRowShareUnresized), kLeastRowBytes, kRowBytes) /
          matrix_row;
      sizes_.parts = std::max<int64_t>(1, units / std::max(kPlanes, most / kPlanes * kPlanes));
      sizes_.bytes = matrix_row * ceil_div(std::max(x_.units(), y_.units()), sizes_.parts);
      return;
    }
    const int64_t wanted = std::clamp(total / kBlockShare, kLeastBlockBytes, kBlockBytes) >> !resized;
    const int64_t unit = grid.average == Average::spatial ? grid.patch_w : 1;
    int64_t count = std::max<int64_t>(1, wanted / bytes);
    if (count < kBlockGroups && kBlockGroups * bytes <= 2 * wanted) count = kBlockGroups;
    sizes_.groups = std::clamp(round_up(count, unit), unit, std::max(unit, groups));
    // Threads meet several times in every block of features: no more of them than memory asks for.
    const int64_t part = resized ? std::max(wanted, std::min(total / kPartShare, kPartBytes)) : wanted;
    sizes_.parts = whole ? 1 : std::clamp<int64_t>(sizes_.groups * bytes / part, 1, units);
    sizes_.bytes = std::min(sizes_.groups, groups) * bytes / sizes_.parts;
  }

  // Whether every thread may have a window of its own.
  bool window_fits(const Tensor* grad_x, const Tensor* grad_y) const {
    const int64_t share = x_.resized() || y_.resized() ? kWorkspaceShare : kWorkspaceShareUnresized;
    return num_threads() * (2 + (grad_x != nullptr) + (grad_y != nullptr)) * sizes_.bytes <=
           total_bytes() / share;
  }

  // Whether the blocks of all threads are small beside maps that are read as they are.
  bool blocks_fit(const Tensor* grad_x, const Tensor* grad_y) const {
    if (x_.resized() || y_.resized() || sizes_.parts == 1) return true;
    const auto bytes = [](const Tensor& t) { return t.numel() * static_cast<int64_t>(t.element_size()); };
    const int64_t grams = sizes_.groups * saved_size() * static_cast<int64_t>(sizeof(A));
    const int64_t windows = (2 + (grad_x != nullptr) + (grad_y != nullptr)) * sizes_.bytes;
    return num_threads() * (windows + grams) <= (bytes(like_) + bytes(other_)) / kApartShare;
  }

  int64_t groups() const { return x_.groups(); }
  // Elements of the Grams of a group as the gram op saves them.
  int64_t saved_size() const {
    const Part all{0, 1, 0, x_.units()}, all_y{0, 1, 0, y_.units()};
    int64_t n = grid_.patches(), dx = x_.features(all), dy = y_.features(all_y);
    if (flags_.transposed) n = dx, dx = dy = grid_.patches();
    return saved_elements(n, dx, dy, flags_.inter, flags_.feature_side);
  }
  const BlockSizes& sizes() const { return sizes_; }
  // Whether all groups are one problem, without windows.
  bool of_planes() const {
    return !flags_.feature_side && !flags_.transposed && PlaneTiles<A>::suits(like_, grid_) &&
           PlaneTiles<A>::suits(other_, grid_);
  }
  GramProblem<A> problem(const Tensor* grad_x, const Tensor* grad_y) const {
    KD_CHECK(!flags_.inter || x_.features() == y_.features(), "patch_gram: inter needs equal features, got ",
             x_.features(), " and ", y_.features());
    GramSides<A> sides;
    const Tensor* to[2] = {grad_x, grad_y};
    for (int s : {0, 1}) {
      sides.inputs[s] = std::make_unique<PlaneTiles<A>>(side(s));
      if (to[s]) sides.gradients[s] = std::make_unique<PlaneTiles<A>>(side(s), to[s]);
    }
    return GramProblem<A>(
        std::move(sides), groups(),
        gram_flags(flags_.compare, flags_.centered, flags_.cosine, flags_.inter, flags_.feature_side));
  }
  // Of the views of a window; checks that they go together.
  GramFlags gram_flags_of(Window<A>& w) const {
    return gram_flags(w.view(0, 0), w.view(0, 1), flags_.compare, flags_.centered, flags_.cosine,
                      flags_.inter, flags_.feature_side);
  }
  const PatchedMap<A>& side(int s) const { return s ? y_ : x_; }
  // Equal shares of the features, of whole groups of channels where they are many.
  Part part(int64_t first, int64_t count, int64_t k, int s) const {
    const int64_t units = side(s).units();
    const int64_t step = units % kPlanes || units < kPlanes * sizes_.parts ? 1 : kPlanes;
    const int64_t begin = units / step * k / sizes_.parts * step;
    return {first, count, begin, units / step * (k + 1) / sizes_.parts * step - begin};
  }

  // f(window) for every block of groups, on several threads at once where that keeps the windows small: then
  // a thread never waits for another, and the parallel loops inside run on it alone.
  template <class F>
  void run(const F& f, Tensor* grad_x = nullptr, Tensor* grad_y = nullptr) const {
    const int64_t blocks = ceil_div(groups(), sizes_.groups), threads = num_threads();
    const bool adds = (grad_x && x_.adds(sizes_.groups)) || (grad_y && y_.adds(sizes_.groups));
    const bool apart =
        !adds && blocks >= 2 * threads && window_fits(grad_x, grad_y) && blocks_fit(grad_x, grad_y);
    const auto run_blocks = [&](int64_t first, int64_t last) {
      Window<A> mine(*this, grad_x, grad_y);
      for (int64_t b = first; b < last; ++b) {
        mine.set_groups(b * sizes_.groups, std::min(sizes_.groups, groups() - b * sizes_.groups));
        f(mine);
      }
    };
    apart ? parallel_for(0, blocks, 1, run_blocks) : run_blocks(0, blocks);
  }

  Tensor view(WindowBuffer<A>& data, const Part& part, int s) const {
    const int64_t groups = part.groups, n = grid_.patches(), d = side(s).features(part);
    data.reserve(groups * n * d);
    const std::vector<int64_t> sizes = flags_.transposed ? std::vector<int64_t>{groups, d, 1, 1, 1, n}
                                                         : std::vector<int64_t>{groups, n, 1, 1, 1, d};
    const std::vector<int64_t> strides = flags_.transposed ? std::vector<int64_t>{n * d, 1, 1, 1, 1, d}
                                                           : std::vector<int64_t>{n * d, d, 1, 1, 1, 1};
    return torch::stable::from_blob(data.data(), sizes, strides, like_.device(),
                                    std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
  }

 private:
  int64_t total_bytes() const { return std::max(x_.total(), y_.total()) * static_cast<int64_t>(sizeof(A)); }

  const Tensor &like_, &other_;
  Grid grid_;
  PatchFlags flags_;
  PatchedMap<A> x_, y_;
  BlockSizes sizes_;
};

}  // namespace kd
