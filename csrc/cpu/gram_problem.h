#pragma once

// Plan and threads of the gram op on the CPU. The arithmetic is in gram.simd.cpp.
//
// A group's features are cut into chunks whose tile [rows, chunk] stays in the L2 cache. Many groups: one
// task per group. Few groups: the chunks are shared out over a fixed number of splits (independent of the
// number of threads), whose partial matrices are added in order.

#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <type_traits>

#include "common/check.h"
#include "common/parallel.h"
#include "common/rounding.h"
#include "cpu/gram_measures.h"
#include "cpu/gram_plan.h"
#include "cpu/gram_tiles.h"
#include "cpu/workspace.h"

namespace kd {

using torch::stable::Tensor;

// Two sides, and the small matrices XX, YY (and XY) of their rows.
template <class A>
class GramProblem {
 public:
  // gradients: the tensors that receive them, or null. measures: of whole rows, where x and y are blocks of
  // their features; else they are taken here.
  GramProblem(const Tensor& x, const Tensor& y, const GramFlags& flags, const Tensor* grad_x = nullptr,
              const Tensor* grad_y = nullptr, const std::shared_ptr<RowMeasures<A>>& measures = nullptr)
      : GramProblem(sides_of(x, y, grad_x, grad_y, flags), x.size(0), flags, measures) {}

  GramProblem(GramSides<A> sides, int64_t groups, const GramFlags& flags,
              const std::shared_ptr<RowMeasures<A>>& measures = nullptr)
      : k_(gram_kernels<A>()),
        flags_(flags),
        cross_(flags.inter || flags.feature_side),
        extend_(extends(flags)),
        groups_(groups),
        sides_(std::move(sides)),
        measures_(measures) {
    for (int s : {0, 1}) {
      rows_[s] = view(s).rows + extend_;
      padded_[s] = std::max(round_up(rows_[s], k_.product_rows), round_up(rows_[s], k_.product_columns));
    }
    offset_[1] = padded_[0] * padded_[0];
    offset_[2] = offset_[1] + padded_[1] * padded_[1];
    elements_ = offset_[2] + (cross_ ? padded_[0] * padded_[1] : 0);
    for (int s : {0, 1}) chunk_[s] = chunk_size(padded_[s], view(s));
    if (cross_ || differ()) chunk_[0] = chunk_[1] = std::min(chunk_[0], chunk_[1]);
    for (int s : {0, 1}) ld_[s] = tile_ld(chunk_[s]);
    if (measures_ || !measures_rows(flags)) return;
    measures_ = std::make_shared<RowMeasures<A>>();
    measures_late_ = groups_ >= kManyGroups && !norms();
    if (measures_late_) {
      for (int s : {0, 1}) {
        measures_->ref[s].resize(groups_ * view(s).rows), measures_->mean[s].resize(groups_ * view(s).rows);
      }
    } else {
      measure(*measures_);
      measures_->finish(norms());
    }
  }

  // Whether a comparison reads no more of XX and YY than what lies on and above their diagonals.
  bool by_triangles() const {
    const GramFlags& f = flags_;
    return f.compare == Compare::cka && !cross_ && !f.cosine && view(0).rows >= kLeastTriangle;
  }
  static bool extends(const GramFlags& f) { return !f.feature_side && f.centered && (f.inter || f.cosine); }
  // Whether tiles need to know whole rows.
  static bool measures_rows(const GramFlags& f) {
    return (f.cosine && !f.feature_side) || (f.centered && (f.inter || f.feature_side));
  }

  const GramKernels<A>& kernels_table() const { return k_; }
  const GramFlags& flags() const { return flags_; }
  int64_t groups() const { return groups_; }
  const TileSource<A>& view(int side) const { return *sides_.inputs[side]; }
  bool extended() const { return extend_; }
  bool cross() const { return cross_; }
  // Whether, with D = X - Y, YY is D D^T and XY is X D^T (feature side), or YY is K - L.
  bool differ() const { return sides_.differ; }
  bool wants(int side) const { return sides_.gradients[side] != nullptr; }
  int64_t rows(int side) const { return rows_[side]; }      // of a tile: the view's, and one of column means
  int64_t padded(int side) const { return padded_[side]; }  // leading dimension of the matrices
  int64_t matrix_elements() const { return elements_; }
  A* xx(A* matrices) const { return matrices; }
  A* yy(A* matrices) const { return matrices + offset_[1]; }
  A* xy(A* matrices) const { return matrices + offset_[2]; }  // [x rows, y rows], leading dimension padded(1)
  const A* row_norm(int side, int64_t g) const { return measures_->norm[side].data() + g * view(side).rows; }
  double row_mean(int side, int64_t g, int64_t row) const {
    const int64_t at = g * view(side).rows + row;
    return static_cast<double>(measures_->ref[side][at]) + static_cast<double>(measures_->mean[side][at]);
  }
  // Reference values and means of a group's rows into `kept` or out of it.
  void keep_row_means(int64_t g, A* kept, bool load) const {
    for (int s : {0, 1}) {
      const int64_t n = view(s).rows;
      for (int i = 0; i < 2; ++i, kept += n) {
        if (!centers_rows()) {
          if (!load) std::fill_n(kept, n, A(0));
          continue;
        }
        A* mine = (i ? measures_->mean : measures_->ref)[s].data() + g * n;
        std::memcpy(load ? mine : kept, load ? kept : mine, n * sizeof(A));
      }
    }
  }
  // Of whole rows, where the view is a block of them.
  int64_t features(int side) const {
    return measures_ && measures_->features[side] ? measures_->features[side] : view(side).features;
  }

  // Calls f(group, matrices) with the complete matrices of every group, in parallel over groups. known(group,
  // matrices): fills them if they were kept, of many groups some. whole: else XX and YY may lack what lies
  // below their diagonals, as they do where they are compared by triangles.
  template <class F, class K>
  void for_matrices(const F& f, const K& known, bool whole = true) const {
    if (groups_ >= kManyGroups) {
      parallel_for(0, groups_, 1, [&](int64_t begin, int64_t end) {
        Buffer<A> matrices(elements_);
        for (int64_t g = begin; g < end; ++g) {
          if (!known(g, matrices.get())) {
            Buffer<A> tiles(tile_elements(0) + tile_elements(1));  // given back before f takes its own
            std::memset(matrices.get(), 0, elements_ * sizeof(A));
            accumulate(g, 0, 1, 0, 1, tiles.get(), matrices.get());
            if (whole) complete(matrices.get());
          }
          f(g, matrices.get());
        }
      });
      return;
    }
    const int64_t chunks = std::max<int64_t>(1, std::max(chunks_of(0), chunks_of(1)));
    const int64_t splits = std::clamp<int64_t>(allowed_splits(), 1, std::min(kSplits, chunks));
    Buffer<A> partial(elements_ * groups_ * splits);
    parallel_for(0, elements_ * groups_ * splits, 1 << 16, [&](int64_t begin, int64_t end) {
      std::memset(partial.get() + begin, 0, (end - begin) * sizeof(A));
    });
    // Shares of the matrices change no result, so they follow the threads; each packs the tiles again, which
    // costs less than waiting for one another at every tile where a core is not free.
    const int64_t parts = ceil_div(num_threads(), std::max<int64_t>(groups_ * splits, 1));
    parallel_for(0, groups_ * splits * parts, 1, [&](int64_t begin, int64_t end) {
      Buffer<A> tiles(tile_elements(0) + tile_elements(1));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t part = task % parts, split = task / parts % splits, g = task / parts / splits;
        accumulate(g, split, splits, part, parts, tiles.get(),
                   partial.get() + (g * splits + split) * elements_);
      }
    });
    for (int64_t g = 0; g < groups_; ++g) {
      A* sum = partial.get() + g * splits * elements_;
      parallel_for(0, splits > 1 ? elements_ : 0, 16384, [&](int64_t begin, int64_t end) {
        for (int64_t s = 1; s < splits; ++s) {
          const A* from = sum + s * elements_;
          for (int64_t i = begin; i < end; ++i) sum[i] += from[i];
        }
      });
      if (whole) complete(sum);
      f(g, sum);
    }
  }

  template <class F>
  void for_matrices(const F& f, bool whole = true) const {
    for_matrices(f, [](int64_t, A*) { return false; }, whole);
  }

  // One pass over the sides; adds to what earlier blocks of the features left in `m`.
  void measure(RowMeasures<A>& m) const {
    for (int s : {0, 1}) {
      const TileSource<A>& v = view(s);
      const int64_t n = v.rows, total = groups_ * n;
      const bool fresh = m.features[s] == 0;
      if (fresh) m.ref[s].assign(total, A(0)), m.sum[s].assign(total, 0.0), m.sum_sq[s].assign(total, 0.0);
      m.features[s] += v.features;
      if (v.features == 0 || total == 0) continue;
      const int64_t chunks = chunks_of(s),
                    splits = std::min<int64_t>(chunks, groups_ >= kManyGroups ? 1 : kTasks);
      std::vector<double> sums(2 * splits * total, 0.0);
      const int64_t grain = ceil_div(kTaskElements, ceil_div(n * v.features, splits));
      parallel_for(0, groups_ * splits, grain, [&](int64_t begin, int64_t end) {
        Buffer<A> tile(tile_elements(s));
        for (int64_t task = begin; task < end; ++task) {
          const int64_t g = task / splits, split = task % splits;
          std::vector<A> ref(n, A(0));
          if (!fresh) {
            std::copy_n(m.ref[s].begin() + g * n, n, ref.begin());
          } else if (centers_rows()) {
            v.load(g, 0, v.unit, tile.get(), ld_[s]);
            for (int64_t r = 0; r < n; ++r) ref[r] = tile.get()[r * ld_[s]];
          }
          if (fresh && split == 0) std::copy(ref.begin(), ref.end(), m.ref[s].begin() + g * n);
          double* sum = sums.data() + 2 * task * n;
          for (int64_t c = chunks * split / splits; c < chunks * (split + 1) / splits; ++c) {
            const int64_t first = c * chunk_[s], count = std::min(chunk_[s], v.features - first);
            v.load(g, first, count, tile.get(), ld_[s]);
            k_.row_sums(tile.get(), ld_[s], count, n, ref.data(), centers_rows() ? sum : nullptr,
                        norms() ? sum + n : nullptr);
          }
        }
      });
      for (int64_t i = 0; i < total; ++i) {
        const int64_t g = i / n, r = i % n;
        for (int64_t split = 0; split < splits; ++split) {
          m.sum[s][i] += sums[2 * (g * splits + split) * n + r];
          m.sum_sq[s][i] += sums[(2 * (g * splits + split) + 1) * n + r];
        }
      }
    }
  }

  // XX and YY hold only their upper triangles so far.
  void complete(A* matrices) const {
    if (by_triangles()) return;
    k_.mirror(xx(matrices), rows_[0], padded_[0]);
    k_.mirror(yy(matrices), rows_[1], padded_[1]);
  }

  // A gradient of one side: rows = own * its tile + other * the other side's tile + bias.
  struct Mix {
    A* own;    // packed [view rows, rows(side)]
    A* other;  // packed [view rows, rows(1 - side)] or null
    A* bias;   // [view rows] or null
  };
  int64_t mix_elements(int side, int from) const {
    return round_up(view(side).rows, k_.mix_rows) * rows_[from];
  }
  int64_t chunks_of(int side) const { return ceil_div(view(side).features, chunk_[side]); }
  // Columns of a gradient that are written at a time: less than a tile's where threads would be idle.
  int64_t gradient_chunk(int side) const {
    if (groups_ >= kManyGroups || view(side).unit > 1) return chunk_[side];
    const int64_t share = round_up(ceil_div(view(side).features, kTasks), k_.lanes);
    return std::min(chunk_[side], std::max(share, kMinGradientChunk));
  }
  int64_t gradient_chunks(int side) const { return ceil_div(view(side).features, gradient_chunk(side)); }
  int64_t gradient_scratch(int side) const {
    return tile_elements(side) + (cross_ ? tile_elements(1 - side) : 0) + padded_[side] * ld_[side];
  }

  void write_gradient(int side, int64_t g, int64_t chunk, const Mix& m, A* scratch) const {
    A *mine = scratch, *out = mine + tile_elements(side), *theirs = out + padded_[side] * ld_[side];
    const int64_t first = chunk * gradient_chunk(side),
                  count = std::min(gradient_chunk(side), view(side).features - first);
    const int64_t n = view(side).rows, width = round_up(count, k_.lanes);
    const auto add_theirs = [&](A by_mine, A by_theirs, A* to) {
      k_.add_tiles(mine, by_mine, theirs, by_theirs, n, ld_[side], width, to);
    };
    pack(side, g, first, count, mine);
    const bool differs = m.other && differ();
    if (differs) {  // X - Y in the place of X
      pack(1 - side, g, first, count, theirs);
      side ? add_theirs(-1, 1, theirs) : add_theirs(1, -1, mine);
    }
    k_.mix(m.own, n, rows_[side], mine, ld_[side], width, false, out);
    if (m.other) {
      if (!differs) pack(1 - side, g, first, count, theirs);
      k_.mix(m.other, n, rows_[1 - side], theirs, ld_[side], width, true, out);
    }
    if (m.bias) {
      for (int64_t r = 0; r < n; ++r) {
        for (int64_t c = 0; c < count; ++c) out[r * ld_[side] + c] += m.bias[r];
      }
    }
    if (differs && !side && scales_columns()) add_theirs(1, 1, mine);  // X again
    if (scales_columns()) k_.project_columns(out, mine, ld_[side], width, n, column_scale(side, mine));
    sides_.gradients[side]->store(g, first, count, out, ld_[side]);
  }

 private:
  static GramSides<A> sides_of(const Tensor& x, const Tensor& y, const Tensor* grad_x, const Tensor* grad_y,
                               const GramFlags& flags) {
    std::optional<GramAxes> to_x, to_y;
    if (grad_x) to_x.emplace(*grad_x);
    if (grad_y) to_y.emplace(*grad_y);
    return view_sides<A>(x, y, to_x ? &*to_x : nullptr, to_y ? &*to_y : nullptr, flags);
  }
  bool scales_columns() const { return flags_.feature_side && flags_.cosine; }
  bool centers_rows() const { return flags_.centered && cross_; }
  int64_t tile_elements(int side) const { return padded_[side] * ld_[side] + ld_[side]; }
  A* column_scale(int side, A* tile) const { return tile + padded_[side] * ld_[side]; }

  // Partial sums of all matrices for which there is memory.
  int64_t allowed_splits() const {
    const int64_t input =
        groups_ * (view(0).rows * view(0).features + view(1).rows * view(1).features) * sizeof(A);
    return std::max<int64_t>(kPartialBytes, input / 32) /
           std::max<int64_t>(elements_ * groups_ * sizeof(A), 1);
  }

  int64_t chunk_size(int64_t padded_rows, const TileSource<A>& v) const {
    const int64_t row =
        std::max<int64_t>(padded_rows, 1) * static_cast<int64_t>(sizeof(A));  // 0 of no samples
    const int64_t fit = kTileBytes / row / k_.lanes * k_.lanes;
    const bool splits = groups_ < kManyGroups && allowed_splits() > 1;
    const int64_t share = splits ? round_up(ceil_div(v.features, kTasks), k_.lanes) : kMaxChunk;
    const int64_t wanted =
        std::clamp<int64_t>(std::max(fit, kLongChunk), kMinChunk, std::clamp(share, kMinChunk, kMaxChunk));
    // Rows of a tile that are no longer than they need be lie close together.
    const int64_t columns = std::min(wanted, round_up(v.features, k_.lanes));
    return std::max<int64_t>(1, columns / v.unit) * v.unit;
  }
  // An odd number of cache lines spreads the rows of a tile over the sets of the L1 cache.
  int64_t tile_ld(int64_t columns) const {
    const int64_t line = 64 / static_cast<int64_t>(sizeof(A)), lines = ceil_div(columns, line);
    return lines < 8 ? round_up(columns, k_.lanes) : (lines | 1) * line;
  }

  // sums: of the rows beyond their reference values, which the first tile sets; added up where it is not
  // null.
  void pack(int side, int64_t g, int64_t first, int64_t count, A* tile, double* sums = nullptr) const {
    const int64_t at = g * view(side).rows;
    view(side).load(g, first, count, tile, ld_[side]);
    if (sums) add_row_sums(side, first == 0, count, tile, measures_->ref[side].data() + at, sums);
    transform(side, g, count, tile);
  }

  // y becomes x - y, centred where the sides are. In double: neither the sides' rounding when they are
  // centred one by one nor that of a difference of means is left in it.
  void subtract(int64_t count, const A* x, A* y) const {
    const int64_t n = rows_[0], ld = ld_[0];
    const auto difference = [&](int64_t at) {
      return static_cast<double>(x[at]) - static_cast<double>(y[at]);
    };
    std::vector<double> means(count, 0.0);
    for (int64_t r = 0; flags_.centered && r < n; ++r) {
      for (int64_t c = 0; c < count; ++c) means[c] += difference(r * ld + c) / static_cast<double>(n);
    }
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t c = 0; c < count; ++c) y[r * ld + c] = static_cast<A>(difference(r * ld + c) - means[c]);
    }
  }

  void transform(int side, int64_t g, int64_t count, A* tile) const {
    const int64_t at = g * view(side).rows;
    TileTransform<A> t{};
    if (norms()) t.row_norm = measures_->norm[side].data() + at;
    if (centers_rows())
      t.row_ref = measures_->ref[side].data() + at, t.row_mean = measures_->mean[side].data() + at;
    if (scales_columns()) t.column_scale = column_scale(side, tile);
    t.center = flags_.centered && !flags_.feature_side;
    t.extend = extend_;
    k_.transform(t, view(side).rows, count, tile, ld_[side], round_up(count, k_.lanes), padded_[side]);
  }

  void add_row_sums(int side, bool first, int64_t count, const A* tile, A* ref, double* sums) const {
    const int64_t n = view(side).rows;
    if (first) {  // the means of the first tile
      for (int64_t r = 0; r < n; ++r) ref[r] = tile[r * ld_[side]];
      k_.row_sums(tile, ld_[side], count, n, ref, sums, nullptr);
      for (int64_t r = 0; r < n; ++r) {
        ref[r] = static_cast<A>(ref[r] + sums[r] / static_cast<double>(count)), sums[r] = 0;
      }
    }
    k_.row_sums(tile, ld_[side], count, n, ref, sums, nullptr);
  }

  // Tiles t that lack e = the row means beyond the reference values (and of the means over the rows, which is
  // their last row): their row sums are D e, so that the Grams of t - e 1^T are those of t less D e e^T. The
  // means of the first tile are the reference, hence D e e^T is at most D / chunk of what remains.
  void center_rows(int64_t g, const std::vector<double>* sums, A* matrices) const {
    std::vector<double> beyonds[2];
    std::vector<A> e[2], scaled[2];
    for (int s : {0, 1}) {
      const int64_t n = view(s).rows;
      const double features = static_cast<double>(view(s).features);
      A* mean = measures_->mean[s].data() + g * n;
      double shift = 0;
      for (int64_t r = 0; r < n; ++r) shift += extend_ ? sums[s][r] / features / static_cast<double>(n) : 0;
      for (int64_t r = 0; r < rows_[s]; ++r) {
        if (r < n) mean[r] = static_cast<A>(sums[s][r] / features);
        beyonds[s].push_back(r < n ? sums[s][r] / features - shift : shift);
      }
    }
    for (int64_t r = 0; differ() && r < rows_[1]; ++r) beyonds[1][r] = beyonds[0][r] - beyonds[1][r];
    for (int s : {0, 1}) {
      const double features = static_cast<double>(view(s).features);
      for (double beyond : beyonds[s]) {
        e[s].push_back(static_cast<A>(beyond)), scaled[s].push_back(static_cast<A>(features * beyond));
      }
    }
    const auto subtract = [&](int a, int b, A* m) {
      k_.subtract_outer(m, rows_[a], rows_[b], padded_[b], scaled[a].data(), e[b].data());
    };
    subtract(0, 0, xx(matrices)), subtract(1, 1, yy(matrices)), subtract(0, 1, xy(matrices));
  }

  void accumulate(int64_t g, int64_t split, int64_t splits, int64_t part, int64_t parts, A* tiles,
                  A* matrices) const {
    A* tile[2] = {tiles, tiles + tile_elements(0)};
    std::vector<double> sums[2];
    for (int s : {0, 1}) sums[s].assign(measures_late_ ? view(s).rows : 0, 0.0);
    const auto sums_of = [&](int s) { return measures_late_ ? sums[s].data() : nullptr; };
    const auto product = [&](int a, int b, int64_t width, A* out, bool triangle = false) {
      k_.products(tile[a], rows_[a], ld_[a], tile[b], rows_[b], ld_[b], width, triangle || a == b, part,
                  parts, out, padded_[b]);
    };
    for (int s : {0, 1}) {
      if ((cross_ || differ()) && s == 1) break;  // both sides go together
      const int64_t chunks = chunks_of(s);
      for (int64_t c = chunks * split / splits; c < chunks * (split + 1) / splits; ++c) {
        const int64_t first = c * chunk_[s], count = std::min(chunk_[s], view(s).features - first);
        const int64_t width = round_up(count, k_.lanes);
        if (differ() && !cross_) {
          // K - L = S D^T + D S^T with S = X - D / 2, the mean of the sides.
          for (int side : {0, 1}) view(side).load(g, first, count, tile[side], ld_[side]);
          subtract(count, tile[0], tile[1]);
          transform(0, g, count, tile[0]);
          k_.transform({}, rows_[1], count, tile[1], ld_[1], width, padded_[1]);  // what lies around it
          product(0, 0, width, xx(matrices));
          k_.add_tiles(tile[0], 1, tile[1], A(-0.5), rows_[0], ld_[0], width, tile[0]);
          product(0, 1, width, yy(matrices), true), product(1, 0, width, yy(matrices), true);
          continue;
        }
        pack(s, g, first, count, tile[s], sums_of(s));
        product(s, s, width, matrices + (s ? offset_[1] : 0));
        if (!cross_) continue;
        pack(1, g, first, count, tile[1], sums_of(1));
        if (differ()) k_.add_tiles(tile[0], 1, tile[1], -1, rows_[0], ld_[0], width, tile[1]);
        product(1, 1, width, yy(matrices));
        product(0, 1, width, xy(matrices));
      }
    }
    if (measures_late_ && view(0).features) center_rows(g, sums, matrices);
  }

  bool norms() const { return flags_.cosine && !flags_.feature_side; }

  const GramKernels<A>& k_;
  GramFlags flags_;
  bool cross_, extend_;
  int64_t groups_;
  GramSides<A> sides_;
  int64_t rows_[2], padded_[2], chunk_[2], ld_[2], offset_[3] = {}, elements_;
  std::shared_ptr<RowMeasures<A>> measures_;
  bool measures_late_ = false;  // while the Grams add up, instead of in a pass before
};

}  // namespace kd
