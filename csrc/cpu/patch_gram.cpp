// Op patch_gram on the CPU: the gram op on the patches of resized maps, a block of groups at a time, and
// where few groups are large, a block of their features at a time.
//
// A block's patch matrices [groups, N, features] live in a workspace of about 1 MB; the resized map itself
// never exists. Formulas: kdfast/reference/patch_gram.py; the resize and its adjoint: patches.simd.cpp.

#include "cpu/patch_gram.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "common/check.h"
#include "cpu/gram_run.h"
#include "cpu/patch_blocks.h"
#include "cpu/result.h"

namespace kd {
namespace {

using torch::stable::Tensor;

// Share of a resized map for what multiplies the patches of all spatial groups.
constexpr double kMixShare = 0.32;

template <class A>
Tensor new_empty(const Tensor& like, const std::vector<int64_t>& size) {
  return new_result(like, size, std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
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
                                           const PatchFlags& flags, int64_t saved_groups) {
  const Blocks<A> blocks(x, y, grid, flags);
  const int64_t groups = blocks.groups(), terms = flags.inter ? 2 : 1;
  Tensor products = new_empty<A>(x, {terms, 3, groups}), distance = new_empty<A>(x, {terms, groups});
  const bool save = saved_groups > 0;
  Tensor saved = new_empty<A>(x, {saved_groups, save ? blocks.saved_size() : 0});
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
              const Tensor& saved, const Grid& grid, const PatchFlags& flags, bool at_once, Tensor* grad_x,
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
                   const PatchFlags& flags, int64_t sides) {
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
  const PatchFlags flags{compare, centered, cosine, inter, feature_side, transposed};
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
  const PatchFlags flags{compare, centered, cosine, inter, feature_side, transposed};
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
    sums[s] = apart ? new_result(v, {v.size(0), v.size(1), v.size(2), v.size(3)}, sum_type) : gradients[s];
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
