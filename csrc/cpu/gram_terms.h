#pragma once

// From the small matrices of a group to distances, and from gradients of those to what multiplies the tiles.
// Formulas: kdfast/reference/gram.py.

#include "cpu/gram_features.h"

namespace kd {

// Checks views and flags of a call of the gram op.
GramFlags gram_flags(const Tensor& x, const Tensor& y, int64_t compare, bool centered, bool cosine,
                     bool inter, bool feature_side);
// The flags alone.
GramFlags gram_flags(int64_t compare, bool centered, bool cosine, bool inter, bool feature_side);

// Elements that for_saved_rows() keeps of a group with n rows, dx and dy features.
int64_t saved_elements(int64_t n, int64_t dx, int64_t dy, bool inter, bool feature_side);

// The matrices of one group for both terms. Centred: the tiles are doubly centred and have their column means
// as last row; intra Grams get the row means back, inter ones the column means (both rank-one updates).
template <class A>
class PairTerms {
 public:
  PairTerms(const GramProblem<A>& p, int64_t g, A* matrices)
      : n_(p.view(0).rows), ld_(p.padded(0)), storage_(p.extended() ? 4 * n_ * ld_ : 0), m_(p.xy(matrices)) {
    A* const grams[2] = {p.xx(matrices), p.yy(matrices)};
    for (int s : {0, 1}) {
      intra_[s] = inter_[s] = grams[s];
      if (!p.extended()) continue;
      double mean = 0;
      for (int64_t i = 0; i < n_; ++i) mean += p.row_mean(s, g, i) / static_cast<double>(n_);
      for (int64_t i = 0; i < n_; ++i) row_means_[s].push_back(static_cast<A>(p.row_mean(s, g, i) - mean));
      intra_[s] = storage_.get() + 2 * s * n_ * ld_;
      inter_[s] = intra_[s] + n_ * ld_;
      p.kernels_table().rank_one_updates(grams[s], n_, ld_, row_means(s), p.features(s), intra_[s],
                                         inter_[s]);
    }
    if (p.extended()) p.kernels_table().update_cross(m_, n_, ld_);
    const auto norm = [&](const A* m) { return p.kernels_table().norm_sq(m, n_, n_, ld_); };
    inter = {norm(m_), norm(inter_[0]), norm(inter_[1])};
  }

  A* gram(int side) const { return intra_[side]; }              // of the column-centred X or Y
  const A* inter_gram(int side) const { return inter_[side]; }  // of the row-centred Xr or Yr
  const A* cross() const { return m_; }                         // Xr Yr^T; row n and column n hold its sums
  const A* row_means(int side) const { return row_means_[side].empty() ? nullptr : row_means_[side].data(); }

  NormTerm inter;

 private:
  int64_t n_, ld_;
  Buffer<A> storage_;
  A *intra_[2], *inter_[2], *m_;
  std::vector<A> row_means_[2];
};

template <class A>
CompareArgs<A> arguments(const GramProblem<A>& p, A* k, A* l, const TermGradient& g = {}) {
  return {p.flags().compare, p.flags().centered, p.view(0).rows, p.padded(0), k,   l,
          p.differ(),        g.distance,         g.xy,           g.xx,        g.yy};
}

// Two Grams of which the upper triangles are at hand, compared by `cka`. Threads share the rows: the first
// with the last, so that shares are equal; what rows add is summed in order.
template <class A>
class Triangles {
 public:
  Triangles(const GramProblem<A>& p, A* matrices) : p_(p), k_(p.xx(matrices)), l_(p.yy(matrices)) {
    const int64_t n = p.view(0).rows, ld = p.padded(0);
    const GramKernels<A>& kernels = p.kernels_table();
    std::vector<double> sums(3 * n);
    const auto for_rows = [&](const auto& f) {
      parallel_for(0, ceil_div(n, 2), ceil_div(kTaskElements, n),
                   [&](int64_t begin, int64_t end) { f(begin, end), f(std::max(end, n - end), n - begin); });
    };
    for_rows([&](int64_t begin, int64_t end) {
      kernels.triangle_products(k_, l_, n, ld, begin, end, sums.data());
    });
    for (int64_t i = 0; i < n; ++i)
      products.xy += sums[3 * i], products.xx += sums[3 * i + 1], products.yy += sums[3 * i + 2];
    if (!(products.xx > 0) || !(products.yy > 0)) {
      distance = products.empty() ? 1.0 : products.xx + products.yy;  // NaN passes through
      return;
    }
    for_rows([&](int64_t begin, int64_t end) {
      kernels.triangle_distances(k_, 1 / std::sqrt(products.xx), l_, 1 / std::sqrt(products.yy), n, ld, begin,
                                 end, sums.data());
    });
    for (int64_t i = 0; i < n; ++i) distance += sums[i] / 2;
  }

  NormTerm products{0, 0, 0};
  double distance = 0;

  // What multiplies the tiles of a side.
  std::unique_ptr<Buffer<A>> mix(int side, const TermGradient& g) const {
    const int64_t n = p_.view(0).rows, rows = p_.kernels_table().mix_rows;
    double own = 4 * (side ? g.yy : g.xx), cross = 2 * g.xy;
    if (!products.empty()) {
      own += 2 * g.distance * (1 - distance) / (side ? products.yy : products.xx);
      cross -= 2 * g.distance / (std::sqrt(products.xx) * std::sqrt(products.yy));
    }
    auto packed = std::make_unique<Buffer<A>>(p_.mix_elements(side, side));
    parallel_for(0, ceil_div(n, rows), ceil_div(kTaskElements, n * rows), [&](int64_t begin, int64_t end) {
      p_.kernels_table().pack_triangles(side ? l_ : k_, own, side ? k_ : l_, cross, n, p_.padded(0), begin,
                                        end, packed->get());
    });
    return packed;
  }

 private:
  const GramProblem<A>& p_;
  A *k_, *l_;
};

// Group g of products [terms, 3, groups] and distance [terms, groups].
template <class A>
void forward_group(const GramProblem<A>& p, int64_t g, A* matrices, A* to_products, A* to_distance) {
  double products[6], distance[2];
  const auto set = [&](int term, const NormTerm& t, double n) {
    products[3 * term] = t.xy, products[3 * term + 1] = t.xx, products[3 * term + 2] = t.yy;
    distance[term] = t.distance(p.flags().compare, n);
  };
  if (p.flags().feature_side) {
    distance[0] = compare_features(p, matrices, products);
  } else if (p.flags().inter) {
    const PairTerms<A> terms(p, g, matrices);
    distance[0] = p.kernels_table().compare(arguments(p, terms.gram(0), terms.gram(1)), products);
    set(1, terms.inter, static_cast<double>(p.features(0)));
  } else if (p.by_triangles()) {
    const Triangles<A> grams(p, matrices);
    set(0, grams.products, 0);
    distance[0] = grams.distance;
  } else {
    distance[0] = p.kernels_table().compare(arguments(p, p.xx(matrices), p.yy(matrices)), products);
  }
  const int64_t groups = p.groups();
  for (int64_t t = 0; t < (p.flags().inter ? 2 : 1); ++t) {
    to_distance[t * groups + g] = static_cast<A>(distance[t]);
    for (int64_t i = 0; i < 3; ++i)
      to_products[(t * 3 + i) * groups + g] = static_cast<A>(products[3 * t + i]);
  }
}

// A mix that lies in memory of its owner's.
template <class A>
struct PlacedMix {
  typename GramProblem<A>::Mix sides[2];
  typename GramProblem<A>::Mix get(int side) const { return sides[side]; }
};

// A matrix for each side whose gradient is wanted, else null.
template <class A>
class SideGrams {
 public:
  SideGrams(const GramProblem<A>& p, int64_t elements) {
    for (int s : {0, 1}) {
      if (p.wants(s)) grams_[s] = std::make_unique<Buffer<A>>(elements);
    }
  }
  A* get(int side) const { return grams_[side] ? grams_[side]->get() : nullptr; }

 private:
  std::unique_ptr<Buffer<A>> grams_[2];
};

// Intra: G1 X. Inter: own K Xr + cross M Yr. With the tile's last row, the column means, Xr = Xd + 1 mean^T.
template <class A>
GroupMix<A> pair_mix(const GramProblem<A>& p, int64_t group, A* matrices, const TermGradient& intra,
                     const TermGradient& inter, double* distances) {
  const int64_t n = p.view(0).rows, ld = p.padded(0);
  const PairTerms<A> terms(p, group, matrices);
  if (distances) distances[1] = terms.inter.distance(p.flags().compare, static_cast<double>(p.features(0)));
  auto f = terms.inter.gradient(p.flags().compare, static_cast<double>(p.features(0)), inter);
  if (p.flags().centered && p.features(0) <= 2) f = {0, 0, 0};
  const SideGrams<A> g(p, n * ld);
  p.kernels_table().compare_backward(arguments(p, terms.gram(0), terms.gram(1), intra), g.get(0), g.get(1),
                                     distances);
  GroupMix<A> mix;
  for (int s : {0, 1}) {
    if (!p.wants(s)) continue;
    A* own = g.get(s);
    if (p.extended()) mix.bias[s] = std::make_unique<Buffer<A>>(n);
    p.kernels_table().add_inter(own, terms.inter_gram(s), s ? f.own_y : f.own_x, terms.row_means(s), n, ld,
                                mix.get(s).bias);
    mix.own[s] = packed(p, s, s, own, ld);
    mix.other[s] = packed(p, s, 1 - s, terms.cross(), s ? 1 : ld, s ? ld : 1, f.cross);
  }
  return mix;
}

// G X, and where rows were scaled to unit length first, its projection: u_i (Z_i - (x_i . Z_i) x_i) with Z =
// G Xc.
template <class A>
GroupMix<A> gram_mix(const GramProblem<A>& p, int64_t group, A* matrices, const TermGradient& gradient,
                     double* distance) {
  GroupMix<A> mix;
  if (p.by_triangles()) {
    const Triangles<A> grams(p, matrices);
    if (distance) *distance = grams.distance;
    for (int s : {0, 1}) {
      if (p.wants(s)) mix.own[s] = grams.mix(s, gradient);
    }
    return mix;
  }
  const int64_t n = p.view(0).rows, ld = p.padded(0);
  const SideGrams<A> sides(p, n * ld);
  Buffer<A> grams(p.flags().cosine ? p.matrix_elements() : 0);
  if (p.flags().cosine) std::memcpy(grams.get(), matrices, p.matrix_elements() * sizeof(A));
  p.kernels_table().compare_backward(arguments(p, p.xx(matrices), p.yy(matrices), gradient), sides.get(0),
                                     sides.get(1), distance);
  for (int s : {0, 1}) {
    if (!p.wants(s)) continue;
    A* g = sides.get(s);
    if (p.flags().cosine) {
      const A *gram = s ? p.yy(grams.get()) : p.xx(grams.get()), *norm = p.row_norm(s, group);
      for (int64_t i = 0; i < n; ++i) {
        // x_i . Z_i = sum_j G_ij x_i . xc_j; the uncentred x_i is xc_i plus the mean, which is the tile's
        // last row.
        double q = 0;
        const A u = 1 / norm[i];
        for (int64_t j = 0; j < n; ++j) {
          const double mean_part = p.extended() ? static_cast<double>(gram[j * ld + n]) : 0.0;
          q += static_cast<double>(g[i * ld + j]) * (static_cast<double>(gram[i * ld + j]) + mean_part);
        }
        for (int64_t j = 0; j < n; ++j) g[i * ld + j] *= u;
        g[i * ld + i] -= static_cast<A>(q) * u;
        if (p.extended()) g[i * ld + n] = static_cast<A>(-q) * u;
      }
    }
    mix.own[s] = packed(p, s, s, g, ld);
  }
  return mix;
}

// f(a piece of a group's padded matrices, the same of `kept`, count): XX and YY as rows of their upper
// triangles, XY whole. Returns where the pieces of `kept` end.
template <class A, class F>
A* for_kept_rows(const GramProblem<A>& p, A* matrices, A* kept, const F& f) {
  const auto each = [&](A* m, int64_t rows, int64_t columns, int64_t ld, bool triangle) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t first = triangle ? i : 0, count = columns - first;
      f(m + i * ld + first, kept, count);
      kept += count;
    }
  };
  each(p.xx(matrices), p.rows(0), p.rows(0), p.padded(0), true);
  each(p.yy(matrices), p.rows(1), p.rows(1), p.padded(1), true);
  if (p.cross()) each(p.xy(matrices), p.rows(0), p.rows(1), p.padded(1), false);
  return kept;
}

// Between saved [G, ...] and a group's padded matrices; what row means are known by goes with XY.
template <class A>
void for_saved_rows(const GramProblem<A>& p, int64_t g, A* matrices, A* saved, bool load) {
  saved = for_kept_rows(p, matrices, saved, [&](A* row, A* kept, int64_t count) {
    std::memcpy(load ? row : kept, load ? kept : row, count * sizeof(A));
  });
  if (load) p.complete(matrices);
  if (p.cross()) p.keep_row_means(g, saved, load);
}

// The mix of any comparison. distances: out, of both terms, where it is not null.
template <class A>
GroupMix<A> group_mix(const GramProblem<A>& p, int64_t g, A* matrices, const TermGradient& term,
                      const TermGradient& inter, double* distances = nullptr) {
  if (p.flags().feature_side) return feature_mix(p, matrices, term, distances);
  if (p.flags().inter) return pair_mix(p, g, matrices, term, inter, distances);
  return gram_mix(p, g, matrices, term, distances);
}

// From gradients of products [terms, 3, groups] and distance [terms, groups].
template <class A>
GroupMix<A> group_mix(const GramProblem<A>& p, int64_t g, A* matrices, const Tensor& grad_products,
                      const Tensor& grad_distance) {
  const auto gradient_of = [&](int64_t term) -> TermGradient {
    const A* gp = static_cast<const A*>(grad_products.const_data_ptr());
    const A* gd = static_cast<const A*>(grad_distance.const_data_ptr());
    const auto product = [&](int64_t i) {
      return gp[term * grad_products.stride(0) + i * grad_products.stride(1) + g * grad_products.stride(2)];
    };
    return {product(0), product(1), product(2),
            gd[term * grad_distance.stride(0) + g * grad_distance.stride(1)]};
  };
  return group_mix(p, g, matrices, gradient_of(0), p.flags().inter ? gradient_of(1) : TermGradient{});
}

// f(group, matrices) for every group of saved [G, ...], in parallel over groups.
template <class A, class F>
void for_saved_matrices(const GramProblem<A>& p, const Tensor& saved, const F& f) {
  parallel_for(0, p.groups(), 1, [&](int64_t begin, int64_t end) {
    Buffer<A> matrices(p.matrix_elements());
    for (int64_t g = begin; g < end; ++g) {
      A* kept = static_cast<A*>(const_cast<void*>(saved.const_data_ptr())) + g * saved.size(1);
      for_saved_rows(p, g, matrices.get(), kept, true);
      f(g, matrices.get());
    }
  });
}

template <class A, class M>
void write_chunks(const GramProblem<A>& p, int side, int64_t g, const M& mix, int64_t begin, int64_t end) {
  Buffer<A> scratch(p.gradient_scratch(side));
  for (int64_t c = begin; c < end; ++c) p.write_gradient(side, g, c, mix.get(side), scratch.get());
}

// Gradients of all groups, in parallel over groups and chunks.
template <class A, class M>
void write_gradients(const GramProblem<A>& p, const std::vector<M>& mixes) {
  for (int s : {0, 1}) {
    const int64_t chunks = p.gradient_chunks(s);
    if (!p.wants(s) || !chunks) continue;
    parallel_for(0, p.groups() * chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end;) {
        const int64_t g = task / chunks, last = std::min(end, (g + 1) * chunks);
        write_chunks(p, s, g, mixes[g], task - g * chunks, last - g * chunks);
        task = last;
      }
    });
  }
}

}  // namespace kd
