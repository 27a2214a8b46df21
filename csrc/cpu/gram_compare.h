#pragma once

// Comparisons of two Grams and their gradients (kdfast/reference/gram.py names them). Row sums run in vectors
// of the accumulation type, sums over rows in double. Included by gram.simd.cpp only.

#include "cpu/gram.h"
#include "cpu/simd.h"

namespace kd::KD_ISA {
namespace {

template <class A, class F>
inline double row_sum(int64_t n, const F& term) {
  Vec<A> partial = {};
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) partial += term(i, Vec<A>{});
  double sum = lanes_sum<A>(partial);
  for (; i < n; ++i) sum += static_cast<double>(term(i, A{}));
  return sum;
}

// Element i of a row, as the type of `like`: one value or a vector.
template <class A>
inline A at(const A* row, int64_t i, A) {
  return row[i];
}
template <class A>
inline Vec<A> at(const A* row, int64_t i, Vec<A>) {
  return load_vec(row + i);
}

template <class A>
inline double dot(const A* a, const A* b, int64_t n) {
  return row_sum<A>(n, [&](int64_t i, auto like) { return at(a, i, like) * at(b, i, like); });
}
template <class A>
inline double sum(const A* a, int64_t n) {
  return row_sum<A>(n, [&](int64_t i, auto like) { return at(a, i, like); });
}
template <class A>
inline double distance_sq(const A* a, A alpha, const A* b, A beta, int64_t n) {
  return row_sum<A>(n, [&](int64_t i, auto like) {
    const auto d = alpha * at(a, i, like) - beta * at(b, i, like);
    return d * d;
  });
}

inline double norm_or_floor(double norm_sq) {
  constexpr double kEps = 1e-12;  // of torch.nn.functional.normalize
  const double norm = __builtin_sqrt(norm_sq);
  return norm > kEps ? norm : kEps;
}

template <class A>
void u_center(A* k, int64_t n, int64_t ld, double* row_means) {
  if (n < 4) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) k[i * ld + j] = 0;
    }
    return;
  }
  double total = 0;
  for (int64_t i = 0; i < n; ++i) {
    k[i * ld + i] = 0;
    row_means[i] = sum(k + i * ld, n) / static_cast<double>(n - 2);
    total += row_means[i];
  }
  total /= static_cast<double>(n - 1);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      k[i * ld + j] =
          static_cast<A>(static_cast<double>(k[i * ld + j]) - row_means[i] - row_means[j] + total);
    }
    k[i * ld + i] = 0;
  }
}

// Removes the row and column means of a symmetric matrix.
template <class A>
void double_center(A* k, int64_t n, int64_t ld, double* row_means) {
  double mean = 0;
  for (int64_t i = 0; i < n; ++i) {
    row_means[i] = sum(k + i * ld, n) / static_cast<double>(n);
    mean += row_means[i] / static_cast<double>(n);
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      k[i * ld + j] = static_cast<A>(static_cast<double>(k[i * ld + j]) - row_means[i] - row_means[j] + mean);
    }
  }
}

template <class A>
inline double inverse_root(A diagonal) {
  return diagonal > 0 ? 1.0 / __builtin_sqrt(static_cast<double>(diagonal)) : 0.0;
}

template <class A>
void scale_rows(A* k, int64_t n, int64_t ld, double* inverse_roots) {
  for (int64_t i = 0; i < n; ++i) {
    inverse_roots[i] = inverse_root(k[i * ld + i]);
    for (int64_t j = 0; j < n; ++j) k[i * ld + j] = static_cast<A>(k[i * ld + j] * inverse_roots[i]);
  }
}

template <class A>
void mirror(A* m, int64_t n, int64_t ld) {
  constexpr int64_t kBlock = 16;  // of a row per cache line, so that strided stores find their lines in L1
  for (int64_t i0 = 0; i0 < n; i0 += kBlock) {
    for (int64_t j0 = 0; j0 <= i0; j0 += kBlock) {
      for (int64_t i = i0; i < i0 + kBlock && i < n; ++i) {
        for (int64_t j = j0; j < j0 + kBlock && j < i; ++j) m[i * ld + j] = m[j * ld + i];
      }
    }
  }
}

template <class A>
double norm_sq(const A* m, int64_t rows, int64_t columns, int64_t ld) {
  double total = 0;
  for (int64_t i = 0; i < rows; ++i) total += dot(m + i * ld, m + i * ld, columns);
  return total;
}

template <class A>
void rank_one_updates(const A* gram, int64_t n, int64_t ld, const A* r, int64_t features, A* intra,
                      A* inter) {
  const A *last = gram + n * ld, corner = last[n];
  for (int64_t i = 0; i < n; ++i) {
    const A *row = gram + i * ld, scale = static_cast<A>(features) * r[i], side = row[n] + corner;
    for (int64_t j = 0; j < n; ++j) {
      intra[i * ld + j] = row[j] + scale * r[j];
      inter[i * ld + j] = row[j] + (side + last[j]);
    }
  }
}

template <class A>
void update_cross(A* m, int64_t n, int64_t ld) {
  A *last = m + n * ld, corner = last[n];
  for (int64_t i = 0; i < n; ++i) {
    A *row = m + i * ld, side = row[n] + corner;
    for (int64_t j = 0; j < n; ++j) row[j] += side + last[j];
    row[n] = static_cast<A>(sum(row, n));
  }
  for (int64_t j = 0; j < n; ++j) last[j] = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) last[j] += m[i * ld + j];
  }
}

template <class A>
void add_inter(A* g, const A* inter, double factor, const A* r, int64_t n, int64_t ld, A* bias) {
  const A f = static_cast<A>(factor);
  for (int64_t i = 0; i < n; ++i) {
    A* row = g + i * ld;
    const A* from = inter + i * ld;
    if (r) {
      bias[i] = static_cast<A>(dot(row, r, n));
      row[n] = static_cast<A>(factor * sum(from, n));
    }
    for (int64_t j = 0; j < n; ++j) row[j] += f * from[j];
  }
}

// Row means or inverse roots of two matrices; the compare functions run once per group, so an allocation is
// cheap there.
struct Scratch {
  double* data;
  explicit Scratch(int64_t n) : data(static_cast<double*>(__builtin_malloc((2 * n + 1) * sizeof(double)))) {}
  ~Scratch() { __builtin_free(data); }
};

struct Products {
  double xy = 0, xx = 0, yy = 0;
};

template <class A>
Products transform(const CompareArgs<A>& c, double* scratch) {
  if (c.compare == Compare::cka_row) {
    scale_rows(c.k, c.n, c.ld, scratch);
    scale_rows(c.l, c.n, c.ld, scratch + c.n);
  } else if (c.compare == Compare::unbiased) {
    u_center(c.k, c.n, c.ld, scratch);
    u_center(c.l, c.n, c.ld, scratch);
  }
  Products p;
  for (int64_t i = 0; i < c.n; ++i) {
    const A *k = c.k + i * c.ld, *l = c.l + i * c.ld;
    p.xy += dot(k, l, c.n);
    p.xx += dot(k, k, c.n);
    p.yy += dot(l, l, c.n);
  }
  if (c.differ) {  // so far L was K - L
    const double cross = p.xy;
    p.xy = p.xx - cross, p.yy += p.xx - 2 * cross;
  }
  return p;
}

template <class A>
double unit_distance(const CompareArgs<A>& c, const Products& p) {
  if (!(p.xx > 0) || !(p.yy > 0)) {
    return p.xx == 0 || p.yy == 0 ? 1.0 : p.xx + p.yy;  // NaN passes through
  }
  const A alpha = static_cast<A>(1 / __builtin_sqrt(p.xx)), beta = static_cast<A>(1 / __builtin_sqrt(p.yy));
  double d = 0;
  for (int64_t i = 0; i < c.n; ++i) d += distance_sq(c.k + i * c.ld, alpha, c.l + i * c.ld, beta, c.n);
  return d / 2;
}

// Of transformed Grams.
template <class A>
double distance_of(const CompareArgs<A>& c, const Products& p) {
  const double n = static_cast<double>(c.n);
  double d = 0;
  switch (c.compare) {
    case Compare::cka:
    case Compare::cka_row:
    case Compare::unbiased:
      return unit_distance(c, p);
    case Compare::row_cosine:
      for (int64_t i = 0; i < c.n; ++i) {
        const A *k = c.k + i * c.ld, *l = c.l + i * c.ld;
        const A alpha = static_cast<A>(1 / norm_or_floor(dot(k, k, c.n)));
        const A beta = static_cast<A>(1 / norm_or_floor(dot(l, l, c.n)));
        d += distance_sq(k, alpha, l, beta, c.n);
      }
      return d / (n * n);
    case Compare::mean: {
      double sk = 0, sl = 0;
      for (int64_t i = 0; i < c.n; ++i) sk += sum(c.k + i * c.ld, c.n), sl += sum(c.l + i * c.ld, c.n);
      const double m = p.xx > 0 ? sk / (n * __builtin_sqrt(p.xx)) : 0,
                   t = p.yy > 0 ? sl / (n * __builtin_sqrt(p.yy)) : 0;
      return (m - t) * (m - t) / 2;
    }
    case Compare::difference:
      if (c.differ) return norm_sq(c.l, c.n, c.n, c.ld) / (n * n);
      for (int64_t i = 0; i < c.n; ++i) d += distance_sq(c.k + i * c.ld, A(1), c.l + i * c.ld, A(1), c.n);
      return d / (n * n);
  }
  __builtin_unreachable();
}

template <class A>
double compare(const CompareArgs<A>& c, double* products) {
  const Scratch scratch(c.n);
  const Products p = transform(c, scratch.data);
  products[0] = p.xy, products[1] = p.xx, products[2] = p.yy;
  return distance_of(c, p);
}

// gx = alpha k + beta l (elementwise), all [n, ld].
template <class A>
void combine(const CompareArgs<A>& c, const A* k, double alpha, const A* l, double beta, A* gx) {
  for (int64_t i = 0; i < c.n; ++i) {
    for (int64_t j = i * c.ld; j < i * c.ld + c.n; ++j) {
      gx[j] = static_cast<A>(alpha * static_cast<double>(k[j]) + beta * static_cast<double>(l[j]));
    }
  }
}

// From g = dLoss/dA for A_ij = K_ij u_i, u_i = K_ii^-1/2 (a holds A): dLoss/dK + its transpose.
template <class A>
void scale_rows_backward(A* g, const A* a, const double* u, int64_t n, int64_t ld) {
  for (int64_t i = 0; i < n; ++i) {
    const double diagonal = -0.5 * u[i] * u[i] * dot(g + i * ld, a + i * ld, n);
    for (int64_t j = 0; j < n; ++j) g[i * ld + j] = static_cast<A>(g[i * ld + j] * u[i]);
    g[i * ld + i] = static_cast<A>(g[i * ld + i] + diagonal);
  }
}

template <class A>
void add_transpose(A* g, int64_t n, int64_t ld) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i; ++j) g[i * ld + j] = g[j * ld + i] = g[i * ld + j] + g[j * ld + i];
  }
}

// dLoss/dK of the row_cosine distance.
template <class A>
void row_cosine_backward(const CompareArgs<A>& c, const A* k, const A* l, A* g) {
  const double scale = 2 * c.gradient / (static_cast<double>(c.n) * static_cast<double>(c.n));
  for (int64_t i = 0; i < c.n; ++i) {
    const A *ki = k + i * c.ld, *li = l + i * c.ld;
    const double nk_sq = dot(ki, ki, c.n), nk = norm_or_floor(nk_sq), nl = norm_or_floor(dot(li, li, c.n));
    const double cosine = dot(ki, li, c.n) / (nk * nl);
    // Below the floor the norm is a constant, and the projection falls away.
    const bool floored = nk_sq < nk * nk * 0.5;
    const double alpha = floored ? 1 : cosine, own = scale * alpha / (nk * nk), other = -scale / (nk * nl);
    for (int64_t j = 0; j < c.n; ++j) {
      g[i * c.ld + j] = static_cast<A>(own * static_cast<double>(ki[j]) + other * static_cast<double>(li[j]));
    }
  }
}

// One side of compare_backward: g for k, whose counterpart is l. own, cross: g = own K + cross L for cka and
// its kin.
template <class A>
void compare_backward_side(const CompareArgs<A>& c, const A* k, const A* l, double own, double cross,
                           const double* inverse_roots, A* g) {
  const int64_t n = c.n, ld = c.ld;
  switch (c.compare) {
    case Compare::cka:
    case Compare::unbiased:
    case Compare::difference:
      return combine(c, k, own, l, cross, g);
    case Compare::cka_row:
      // combine gives dA + dA^T of a symmetric A; A is not, so halve and go through the row scaling.
      combine(c, k, own / 2, l, cross / 2, g);
      scale_rows_backward(g, k, inverse_roots, n, ld);
      break;
    case Compare::row_cosine:
      row_cosine_backward(c, k, l, g);
      break;
    case Compare::mean:  // own: factor of K, cross: of the matrix of ones
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = i * ld; j < i * ld + n; ++j)
          g[j] = static_cast<A>(cross + own * static_cast<double>(k[j]));
      }
      return;
  }
  add_transpose(g, n, ld);
  if (!c.centered) return;
  const Scratch means(n);
  double_center(g, n, ld, means.data);
}

template <class A>
void compare_backward(const CompareArgs<A>& c, A* gx, A* gy, double* distance) {
  A* const sides[2] = {gx, gy};
  const Scratch scratch(c.n);
  const Products p = transform(c, scratch.data);
  const bool aligned = c.compare <= Compare::unbiased;  // its gradient needs the distance
  const double d = distance || aligned ? distance_of(c, p) : 0;
  if (distance) *distance = d;
  if (c.centered && c.n <= 2) {
    for (A* g : sides) {
      for (int64_t i = 0; g && i < c.n; ++i) {
        for (int64_t j = 0; j < c.n; ++j) g[i * c.ld + j] = 0;
      }
    }
    return;
  }
  const double n = static_cast<double>(c.n);
  double own[2] = {4 * c.gxx, 4 * c.gyy}, cross[2] = {2 * c.gxy, 2 * c.gxy};
  const double norms_sq[2] = {p.xx, p.yy};
  if (c.compare == Compare::difference) {
    const double scale = 4 * c.gradient / (n * n);
    for (int s = 0; s < 2; ++s) own[s] = scale, cross[s] = -scale;
    if (c.differ) own[0] = cross[1] = 0, cross[0] = scale, own[1] = -scale;
  } else if (c.compare == Compare::mean) {
    double inverse[2], mean[2];  // 1 / |K|; N times the mean of K / |K|
    A* const grams[2] = {c.k, c.l};
    for (int s = 0; s < 2; ++s) {
      inverse[s] = norms_sq[s] > 0 ? 1 / __builtin_sqrt(norms_sq[s]) : 0;
      double total = 0;
      for (int64_t i = 0; i < c.n; ++i) total += sum(grams[s] + i * c.ld, c.n);
      mean[s] = total * inverse[s] / n;
    }
    for (int s = 0; s < 2; ++s) {
      const double g = c.centered ? 0 : 2 * c.gradient * (mean[s] - mean[1 - s]);
      own[s] = -g * mean[s] * inverse[s] * inverse[s], cross[s] = g * inverse[s] / n;
    }
  } else if (aligned && p.xx != 0 && p.yy != 0) {
    const double similarity = 1 - d;
    for (int s = 0; s < 2; ++s) {
      own[s] += 2 * c.gradient * similarity / norms_sq[s];
      cross[s] -= 2 * c.gradient / (__builtin_sqrt(p.xx) * __builtin_sqrt(p.yy));
    }
  }
  if (gx) compare_backward_side(c, c.k, c.l, own[0], cross[0], scratch.data, gx);
  if (gy) compare_backward_side(c, c.l, c.k, own[1], cross[1], scratch.data + c.n, gy);
}

}  // namespace
}  // namespace kd::KD_ISA
