#pragma once

// The feature side of a group: D x D products, from which squared norms are the distance; and what every
// comparison leaves for the gradients.

#include "cpu/gram_problem.h"

namespace kd {

// What a loss term is given and asked for: gradients of products (xy, xx, yy) and distance.
struct TermGradient {
  double xy, xx, yy, distance;
};

// Products and distance from squared norms: the side that is not N x N.
struct NormTerm {
  double xy, xx, yy;
  bool empty() const { return xx == 0 || yy == 0; }
  double similarity() const { return empty() ? 0 : xy / (std::sqrt(xx) * std::sqrt(yy)); }
  double distance(Compare compare, double n) const {
    if (compare == Compare::difference) return std::max(0.0, (xx + yy - 2 * xy) / (n * n));
    return empty() ? 1.0 : std::max(0.0, 1 - similarity());
  }
  // Factors of M Y, K X (for dX) and M^T X, L Y (for dY).
  struct Factors {
    double cross, own_x, own_y;
  };
  Factors gradient(Compare compare, double n, const TermGradient& g) const {
    Factors f{2 * g.xy, 4 * g.xx, 4 * g.yy};
    if (compare == Compare::difference) {
      f.cross -= 4 * g.distance / (n * n), f.own_x += 4 * g.distance / (n * n),
          f.own_y += 4 * g.distance / (n * n);
    } else if (!empty()) {
      const double scale = 2 * g.distance / (std::sqrt(xx) * std::sqrt(yy));
      f.cross -= scale, f.own_x += scale * xy / xx, f.own_y += scale * xy / yy;
    }
    return f;
  }
};

// What write_gradient needs for one group.
template <class A>
struct GroupMix {
  std::unique_ptr<Buffer<A>> own[2], other[2], bias[2];
  typename GramProblem<A>::Mix get(int side) const {
    const auto pointer = [](const std::unique_ptr<Buffer<A>>& b) { return b ? b->get() : nullptr; };
    return {pointer(own[side]), pointer(other[side]), pointer(bias[side])};
  }
};

template <class A>
std::unique_ptr<Buffer<A>> packed(const GramProblem<A>& p, int side, int from, const A* m, int64_t row_stride,
                                  int64_t column_stride = 1, double scale = 1) {
  auto buffer = std::make_unique<Buffer<A>>(p.mix_elements(side, from));
  p.kernels_table().pack_mix(m, row_stride, column_stride, scale, p.view(side).rows, p.rows(from),
                             buffer->get());
  return buffer;
}

template <class A>
NormTerm feature_term(const GramProblem<A>& p, A* matrices) {
  const int64_t dx = p.view(0).rows, dy = p.view(1).rows;
  const auto norm_sq = p.kernels_table().norm_sq;
  return {norm_sq(p.xy(matrices), dx, dy, p.padded(1)), norm_sq(p.xx(matrices), dx, dx, p.padded(0)),
          norm_sq(p.yy(matrices), dy, dy, p.padded(1))};
}

// Products of the feature side, and the distance.
template <class A>
double compare_features(const GramProblem<A>& p, A* matrices, double* products) {
  const double samples = static_cast<double>(p.features(0));
  if (p.differ()) {
    return p.kernels_table().difference_products(p.xx(matrices), p.yy(matrices), p.xy(matrices),
                                                 p.view(0).rows, p.padded(0), products) /
           (samples * samples);
  }
  const NormTerm term = feature_term(p, matrices);
  products[0] = term.xy, products[1] = term.xx, products[2] = term.yy;
  return term.distance(p.flags().compare, samples);
}

// xx X^T X + dd D^T D + xd X^T D + dx D^T X, where the feature side has these; packed for the gradient of
// `side` and what it takes of the tile `from`.
template <class A>
std::unique_ptr<Buffer<A>> packed_sum(const GramProblem<A>& p, int side, int from, A* matrices, double xx,
                                      double dd, double xd, double dx) {
  const int64_t n = p.view(0).rows, ld = p.padded(0);
  A* const all[3] = {p.xx(matrices), p.yy(matrices), p.xy(matrices)};
  if (dd == 0 && dx == 0 && (xx == 0 || xd == 0)) {
    return packed(p, side, from, xx == 0 ? all[2] : all[0], ld, 1, xx == 0 ? xd : xx);
  }
  Buffer<A> sum(n * ld);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const auto at = [&](int m, int64_t place) { return static_cast<double>(all[m][place]); };
      sum.get()[i * ld + j] = static_cast<A>(xx * at(0, i * ld + j) + dd * at(1, i * ld + j) +
                                             xd * at(2, i * ld + j) + dx * at(2, j * ld + i));
    }
  }
  return packed(p, side, from, sum.get(), ld);
}

// Of |K - L|^2 / N^2 where D = X - Y is at hand: with K - L = X D^T + D Y^T, dX is D (X^T X) + Y (D^T X) and
// dY is -D (X^T Y) - Y (D^T Y), times 4 / N^2; X^T Y = X^T X - X^T D costs dY of a teacher that is smaller
// than the student as many digits. The products' gradients are written with X = D + Y.
template <class A>
GroupMix<A> difference_mix(const GramProblem<A>& p, A* matrices, const TermGradient& g, double* distance) {
  const double n = static_cast<double>(p.features(0));
  double products[3], f = 4 * g.distance / (n * n), xy = 2 * g.xy, xx = 4 * g.xx, yy = 4 * g.yy;
  if (distance) *distance = compare_features(p, matrices, products);
  if (p.flags().centered && n <= 2) f = xy = xx = yy = 0;
  GroupMix<A> mix;
  if (p.wants(0)) {  // of D and Y
    mix.own[0] = packed_sum(p, 0, 0, matrices, f + xx, 0, 0, 0);
    mix.other[0] = packed_sum(p, 0, 1, matrices, xx + xy, 0, f - xy, 0);
  }
  if (p.wants(1)) {  // of Y and D
    mix.own[1] = packed_sum(p, 1, 1, matrices, yy + xy, f + yy, -f - yy, -xy - yy);
    mix.other[1] = packed_sum(p, 1, 0, matrices, xy - f, 0, 0, f - xy);
  }
  return mix;
}

template <class A>
GroupMix<A> feature_mix(const GramProblem<A>& p, A* matrices, const TermGradient& g, double* distance) {
  if (p.differ()) return difference_mix(p, matrices, g, distance);
  const int64_t samples = p.features(0), ldx = p.padded(0), ldy = p.padded(1);
  const NormTerm term = feature_term(p, matrices);
  if (distance) *distance = term.distance(p.flags().compare, static_cast<double>(samples));
  auto f = term.gradient(p.flags().compare, static_cast<double>(samples), g);
  if (p.flags().centered && samples <= 2) f = {0, 0, 0};
  GroupMix<A> mix;
  if (p.wants(0)) {
    mix.own[0] = packed(p, 0, 0, p.xx(matrices), ldx, 1, f.own_x);
    mix.other[0] = packed(p, 0, 1, p.xy(matrices), ldy, 1, f.cross);
  }
  if (p.wants(1)) {
    mix.own[1] = packed(p, 1, 1, p.yy(matrices), ldy, 1, f.own_y);
    mix.other[1] = packed(p, 1, 0, p.xy(matrices), 1, ldy, f.cross);
  }
  return mix;
}

}  // namespace kd
