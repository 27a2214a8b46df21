// Op patch_gram on the CPU: the gram op on the patches of resized maps, a block of groups at a time, and
// where few groups are large, a block of their features at a time.
//
// A block's patch matrices [groups, N, features] live in a workspace of about 1 MB; the resized map itself
// never exists. Formulas: kdfast/reference/patch_gram.py; the resize and its adjoint: patches.simd.cpp.

#include "cpu/patch_gram.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/check.h"
#include "common/gradient.h"
#include "common/parallel.h"
#include "cpu/gram_blocks.h"
#include "cpu/gram_run.h"
#include "cpu/patched_map.h"

namespace kd {
namespace {

using torch::stable::Tensor;

// Wanted for the patch matrices of a block, per side: a share of a resized map within bounds.
constexpr int64_t kBlockBytes = 1 << 20, kLeastBlockBytes = 1 << 17, kBlockShare = 16;
constexpr int64_t kPartBytes = 4 << 20, kPartShare = 8;  // the same where features are cut
// Enough for one task per group in the gram op: taken where they need up to twice that.
constexpr int64_t kBlockGroups = 8;
// Of the windows of spatial groups, per side: they stay in the L2 cache.
constexpr int64_t kRowBytes = 1 << 19, kLeastRowBytes = 1 << 15, kRowShare = 64, kRowShareUnresized = 128;
// Share of a resized map for what multiplies the patches of all spatial groups.
constexpr double kMixShare = 0.32;
// Share of a resized map for the workspaces of threads that work on blocks of their own.
constexpr int64_t kWorkspaceShare = 2, kWorkspaceShareUnresized = 8;

struct Flags {
  int64_t compare;
  bool centered, cosine, inter, feature_side, transposed;
};

struct Sizes {
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
  Blocks(const Tensor& x, const Tensor& y, const Grid& grid, const Flags& flags, bool at_once = false)
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

  int64_t groups() const { return x_.groups(); }
  // Elements of the Grams of a group as the gram op saves them.
  int64_t saved_size() const {
    const Part all{0, 1, 0, x_.units()}, all_y{0, 1, 0, y_.units()};
    int64_t n = grid_.patches(), dx = x_.features(all), dy = y_.features(all_y);
    if (flags_.transposed) n = dx, dx = dy = grid_.patches();
    return saved_elements(n, dx, dy, flags_.inter, flags_.feature_side);
  }
  const Sizes& sizes() const { return sizes_; }
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
    const bool apart = !adds && blocks >= 2 * threads && window_fits(grad_x, grad_y);
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
  Flags flags_;
  PatchedMap<A> x_, y_;
  Sizes sizes_;
};

template <class A>
Tensor new_empty(const Tensor& like, const std::vector<int64_t>& size) {
  return torch::stable::new_empty(like, size,
                                  std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
}

template <class A>
A* data_of(const Tensor& t) {
  return static_cast<A*>(const_cast<void*>(t.const_data_ptr()));
}

// Copies columns [first, first + count) of a dense [rows, columns] matrix into or out of a dense [rows,
// count] one.
template <class A>
void copy_columns(A* all, int64_t rows, int64_t columns, int64_t first, int64_t count, A* part, bool out) {
  for (int64_t r = 0; r < rows; ++r) {
    A *a = all + r * columns + first, *p = part + r * count;
    out ? std::copy(p, p + count, a) : std::copy(a, a + count, p);
  }
}

template <class A>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& y, const Grid& grid,
                                           const Flags& flags, int64_t saved_groups) {
  const Blocks<A> blocks(x, y, grid, flags);
  const int64_t groups = blocks.groups(), terms = flags.inter ? 2 : 1;
  Tensor products = new_empty<A>(x, {terms, 3, groups}), distance = new_empty<A>(x, {terms, groups});
  const bool save = saved_groups > 0;
  Tensor saved = new_empty<A>(x, {saved_groups, save ? blocks.saved_size() : 0});
  advise_huge_pages(saved.data_ptr(), saved.numel() * static_cast<int64_t>(sizeof(A)));
  if (blocks.of_planes()) {
    run_forward(blocks.problem(nullptr, nullptr), products, distance, saved);
    return {products, distance, save ? saved : new_empty<A>(x, {0})};
  }
  KD_CHECK(!save || saved_groups == groups, "patch_gram: these Grams are saved of all groups or of none");
  blocks.run([&](Window<A>& w) {
    const int64_t first = w.first(), count = w.groups();
    Tensor p = new_empty<A>(x, {terms, 3, count}), d = new_empty<A>(x, {terms, count});
    const GramFlags f = blocks.gram_flags_of(w);
    if (w.blocks() == 1) {
      const Tensor kept = save ? torch::stable::narrow(saved, 0, first, count) : saved;
      run_forward(GramProblem<A>(w.load(0, 0), w.load(0, 1), f), p, d, kept);
    } else {
      A* keep = save ? data_of<A>(saved) + first * saved.size(1) : nullptr;
      GramBlocks<A, Window<A>>(f, w).forward(data_of<A>(p), data_of<A>(d), keep, saved.size(1));
    }
    copy_columns(data_of<A>(products), 3 * terms, groups, first, count, data_of<A>(p), true);
    copy_columns(data_of<A>(distance), terms, groups, first, count, data_of<A>(d), true);
  });
  return {products, distance, save ? saved : new_empty<A>(x, {0})};
}

template <class A>
void backward(const Tensor& grad_products, const Tensor& grad_distance, const Tensor& x, const Tensor& y,
              const Tensor& saved, const Grid& grid, const Flags& flags, bool at_once, Tensor* grad_x,
              Tensor* grad_y) {
  const Blocks<A> blocks(x, y, grid, flags, at_once);
  const int64_t groups = blocks.groups();
  const Tensor gp = torch::stable::contiguous(grad_products), gd = torch::stable::contiguous(grad_distance);
  const int64_t terms = gd.size(0);
  if (blocks.of_planes()) return run_backward(blocks.problem(grad_x, grad_y), gp, gd, saved);
  // Saved Grams know all of a side that gets no gradient, unless a cross product multiplies it.
  const bool all = !saved.numel() || flags.inter || flags.feature_side;
  const auto one = [&](Window<A>& w) {
    const int64_t first = w.first(), count = w.groups();
    const Tensor p = new_empty<A>(x, {terms, 3, count}), d = new_empty<A>(x, {terms, count});
    copy_columns(data_of<A>(gp), 3 * terms, groups, first, count, data_of<A>(p), false);
    copy_columns(data_of<A>(gd), terms, groups, first, count, data_of<A>(d), false);
    Tensor kept = saved;
    if (saved.numel()) kept = torch::stable::narrow(kept, 0, first, count);
    const GramFlags f = blocks.gram_flags_of(w);
    if (w.blocks() > 1) {
      GramBlocks<A, Window<A>>(f, w).backward(p, d, kept, grad_x != nullptr, grad_y != nullptr);
      return;
    }
    const Tensor vx = all || grad_x ? w.load(0, 0) : w.view(0, 0);
    const Tensor vy = all || grad_y ? w.load(0, 1) : w.view(0, 1);
    const Tensor gx = grad_x ? w.gradient(0, 0) : vx, gy = grad_y ? w.gradient(0, 1) : vy;
    run_backward(GramProblem<A>(vx, vy, f, grad_x ? &gx : nullptr, grad_y ? &gy : nullptr), p, d, kept);
    w.store(0);
  };
  blocks.run(one, grad_x, grad_y);
}

// Whether the gradients of spatial groups are made of all groups at once, so that each pixel is written once.
bool mixes_at_once(const Tensor& x, const Tensor& y, const Tensor& saved, const Grid& grid,
                   const Flags& flags, int64_t sides) {
  if (grid.average != Average::spatial || flags.feature_side || flags.transposed || !saved.numel())
    return false;
  const auto resized = [&](const Tensor& v) {
    return v.size(2) != grid.rows * grid.patch_h || v.size(3) != grid.columns * grid.patch_w;
  };
  if (!resized(x) && !resized(y)) return false;
  const double n = static_cast<double>(grid.patches()), features = static_cast<double>(x.size(0) * x.size(1));
  return static_cast<double>(sides) * n * (1 + flags.inter) <= kMixShare * features;
}

bool is_wide(const Tensor& x, const Tensor& y) {
  return x.scalar_type() == ScalarType::Double || y.scalar_type() == ScalarType::Double;
}

Grid grid_of(const Tensor& x, const Tensor& y, int64_t patch_h, int64_t patch_w, int64_t rows,
             int64_t columns, bool bilinear, int64_t average) {
  KD_CHECK(x.dim() == 4 && y.dim() == 4, "patch_gram: x and y must be maps [B, C, H, W], got ", x.dim(),
           " and ", y.dim(), " axes");
  KD_CHECK(patch_h > 0 && patch_w > 0 && rows > 0 && columns > 0,
           "patch_gram: patches and their grid must not be empty");
  KD_CHECK(0 <= average && average <= 2, "patch_gram: unknown average ", average);
  for (const Tensor* t : {&x, &y}) {
    KD_CHECK(t->size(2) > 0 && t->size(3) > 0, "patch_gram: maps must not be empty, got ", t->size(2), " x ",
             t->size(3));
  }
  return {patch_h, patch_w, rows, columns, bilinear, static_cast<Average>(average)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> patch_gram_cpu(const Tensor& x, const Tensor& y, int64_t patch_h,
                                                  int64_t patch_w, int64_t rows, int64_t columns,
                                                  bool bilinear, int64_t average, int64_t compare,
                                                  bool centered, bool cosine, bool inter, bool feature_side,
                                                  bool transposed, int64_t saved_groups) {
  const Workspaces::Call call;
  const Grid grid = grid_of(x, y, patch_h, patch_w, rows, columns, bilinear, average);
  const Flags flags{compare, centered, cosine, inter, feature_side, transposed};
  return is_wide(x, y) ? forward<double>(x, y, grid, flags, saved_groups)
                       : forward<float>(x, y, grid, flags, saved_groups);
}

std::tuple<Tensor, Tensor> patch_gram_backward_cpu(const Tensor& grad_products, const Tensor& grad_distance,
                                                   const Tensor& x, const Tensor& y, const Tensor& saved,
                                                   int64_t patch_h, int64_t patch_w, int64_t rows,
                                                   int64_t columns, bool bilinear, int64_t average,
                                                   int64_t compare, bool centered, bool cosine, bool inter,
                                                   bool feature_side, bool transposed, bool need_x,
                                                   bool need_y) {
  const Workspaces::Call call;
  const Grid grid = grid_of(x, y, patch_h, patch_w, rows, columns, bilinear, average);
  const Flags flags{compare, centered, cosine, inter, feature_side, transposed};
  const bool wide = is_wide(x, y), spatial = grid.average == Average::spatial;
  const bool at_once = mixes_at_once(x, y, saved, grid, flags, need_x + need_y);
  Tensor gradients[2], sums[2];
  for (int s : {0, 1}) {
    const Tensor& v = s ? y : x;
    const bool needed = s ? need_y : need_x;
    gradients[s] = new_gradient(v, needed);
    if (!needed) continue;
    const ScalarType sum_type = wide ? ScalarType::Double : ScalarType::Float;
    // Spatial groups add to rows of the map that they share: in the accumulation type.
    const bool resized = v.size(2) != rows * patch_h || v.size(3) != columns * patch_w;
    const bool adds = spatial && resized && !at_once, apart = adds && v.scalar_type() != sum_type;
    sums[s] = apart ? torch::stable::new_empty(v, {v.size(0), v.size(1), v.size(2), v.size(3)}, sum_type)
                    : gradients[s];
    if (adds) torch::stable::zero_(sums[s]);
  }
  Tensor *to_x = need_x ? &sums[0] : nullptr, *to_y = need_y ? &sums[1] : nullptr;
  if (wide) {
    backward<double>(grad_products, grad_distance, x, y, saved, grid, flags, at_once, to_x, to_y);
  } else {
    backward<float>(grad_products, grad_distance, x, y, saved, grid, flags, at_once, to_x, to_y);
  }
  for (int s : {0, 1}) {
    if ((s ? need_y : need_x) && sums[s].data_ptr() != gradients[s].data_ptr())
      torch::stable::copy_(gradients[s], sums[s]);
  }
  return {gradients[0], gradients[1]};
}

}  // namespace kd
