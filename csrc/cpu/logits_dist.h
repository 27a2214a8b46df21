#pragma once

// DIST: Pearson correlations of rows and of columns of softmax outputs. Included by logits.simd.cpp only.
//
// Forward: rows are turned into probabilities in groups that stay in the L2 cache, where their columns are
// summed. Padding of a row holds 1 / K, so that its deviation from the mean is 0.

#include "cpu/logits.h"
#include "cpu/logits_rows.h"

namespace kd::KD_ISA {
namespace {

// A row as the accumulation type, padded: in place where it can be, else in `out`.
template <class A>
const A* whole_row(const LogitsMatrix& m, int64_t row, int64_t classes, A* out) {
  return load_block<A>(m, row_data(m, row), 0, classes, -1, out);
}

template <class A>
void pad_with_mean(A* p, int64_t classes) {
  for (int64_t k = classes; k < padded<A>(classes); ++k) p[k] = A(1) / static_cast<A>(classes);
}

// Sums of term(i) over the row's vectors, cut into blocks for their rounding.
template <class A, class F>
double sum_blocks(int64_t count, const F& term) {
  double total = 0;
  for (int64_t first = 0; first < count; first += kBlock) {
    Vec<A> sum = {};
    const int64_t end = first + kBlock < count ? first + kBlock : count;
    for (int64_t i = first; i < end; i += kLanes<A>) sum += term(i);
    total += lanes_sum<A>(sum);
  }
  return total;
}

template <class A>
void softmax_row(const LogitsMatrix& m, int64_t row, int64_t classes, double c, A* out, A& max, A& inverse) {
  const A* z = whole_row(m, row, classes, out);
  const int64_t width = padded<A>(classes);
  max = block_max(z, width);
  const A scale = static_cast<A>(c);
  const double sum = sum_blocks<A>(width, [&](int64_t i) {
    const Vec<A> e = exp2_vec<A>((load_vec(z + i) - max) * scale);
    store_vec(out + i, e);
    return e;
  });
  inverse = static_cast<A>(1 / sum);
  for (int64_t i = 0; i < width; i += kLanes<A>) store_vec(out + i, load_vec(out + i) * inverse);
  pad_with_mean(out, classes);
}

// The same from what a forward saved, to the bit: differences from a column's mean may be all rounding.
template <class A>
void saved_softmax_row(const LogitsMatrix& m, int64_t row, int64_t classes, double c, A max, A inverse,
                       A* out) {
  const A* z = whole_row(m, row, classes, out);
  const A scale = static_cast<A>(c);
  for (int64_t i = 0; i < padded<A>(classes); i += kLanes<A>) {
    store_vec(out + i, exp2_vec<A>((load_vec(z + i) - max) * scale) * inverse);
  }
  pad_with_mean(out, classes);
}

constexpr double kPearsonEps = 1e-8;  // the published denominator's

// Columns of `held` rows joined to those of `count` rows before, moments [5, K] about their means (Chan et
// al.): no digits are lost, wherever the means lie.
template <class A>
void join_columns(const A* ps, const A* pt, int64_t width, int64_t held, int64_t count, double* moments) {
  const A share = A(1) / static_cast<A>(held);
  const double total = static_cast<double>(count + held), step = static_cast<double>(held) / total;
  const double cross = static_cast<double>(count) * step;
  for (int64_t k = 0; k < width; k += kLanes<A>) {
    const Vec<A> first_s = load_vec(ps + k), first_t = load_vec(pt + k);
    Vec<A> mean_s = {}, mean_t = {}, ss = {}, tt = {}, st = {};
    for (int64_t i = 1; i < held; ++i) {
      mean_s += load_vec(ps + i * width + k) - first_s;
      mean_t += load_vec(pt + i * width + k) - first_t;
    }
    mean_s = first_s + mean_s * share;  // equal rows have this very mean
    mean_t = first_t + mean_t * share;
    for (int64_t i = 0; i < held; ++i) {
      const Vec<A> s = load_vec(ps + i * width + k) - mean_s, t = load_vec(pt + i * width + k) - mean_t;
      ss += s * s, tt += t * t, st += s * t;
    }
    for (int lane = 0; lane < kLanes<A>; ++lane) {
      double* to = moments + k + lane;
      const double ds = static_cast<double>(mean_s[lane]) - to[kMeanS * width];
      const double dt = static_cast<double>(mean_t[lane]) - to[kMeanT * width];
      to[kMeanS * width] += ds * step, to[kMeanT * width] += dt * step;
      to[kMomentSS * width] += static_cast<double>(ss[lane]) + ds * ds * cross;
      to[kMomentTT * width] += static_cast<double>(tt[lane]) + dt * dt * cross;
      to[kMomentST * width] += static_cast<double>(st[lane]) + ds * dt * cross;
    }
  }
}

template <class A>
int64_t dist_forward(const LogitsCall<A>& call, int64_t begin, int64_t end, int64_t dist_rows, A* scratch,
                     double* moments, double* values) {
  const int64_t width = padded<A>(call.classes);
  const double c = kLog2E / call.temperature;
  const A mean = A(1) / static_cast<A>(call.classes);
  A *const ps = scratch, *const pt = scratch + dist_rows * width;
  int64_t count = 0;
  for (int64_t row = begin; row < end;) {
    int64_t held = 0;
    for (; row < end && held < dist_rows; ++row) {
      values[row] = 0;
      if (is_ignored(call, row)) continue;
      A *saved = call.saved + row * call.saved_width, *s = ps + held * width, *t = pt + held * width;
      ++held;
      softmax_row(call.student, row, call.classes, c, s, saved[kStudentMax], saved[kStudentInverse]);
      softmax_row(call.teacher, row, call.classes, c, t, saved[kTeacherMax], saved[kTeacherInverse]);
      const auto product = [&](const A* a, const A* b) {
        return sum_blocks<A>(width,
                             [&](int64_t i) { return (load_vec(a + i) - mean) * (load_vec(b + i) - mean); });
      };
      const double norm_s = __builtin_sqrt(product(s, s)), norm_t = __builtin_sqrt(product(t, t));
      const double st = product(s, t), distance = 1 - st / (norm_s * norm_t + kPearsonEps);
      saved[kStudentNorm] = static_cast<A>(norm_s), saved[kTeacherNorm] = static_cast<A>(norm_t);
      saved[kProduct] = static_cast<A>(st);
      values[row] = call.alpha * (distance < 0 ? 0 : distance);
    }
    if (held) join_columns(ps, pt, width, held, count, moments);
    count += held;
  }
  return count;
}

// columns [4, K]: factors of the other's deviation and of the own, means of own and other. scratch [2, K].
template <class A>
void dist_backward(const LogitsCall<A>& call, const LogitsGradient<A>& g, int64_t begin, int64_t end,
                   const A* columns, A* scratch) {
  const int64_t width = padded<A>(call.classes);
  const double c = kLog2E / call.temperature;
  const A mean = A(1) / static_cast<A>(call.classes);
  const A *by_other = columns, *by_own = columns + width, *mean_own = columns + 2 * width,
          *mean_other = columns + 3 * width;
  A *const p = scratch, *const gp =
                            scratch + width;  // the other side's probabilities become the gradient of p
  for (int64_t row = begin; row < end; ++row) {
    if (is_ignored(call, row)) {
      zero_row(call, g.to, row);
      continue;
    }
    const A* saved = call.saved + row * call.saved_width;
    const int s = kStudentMax, t = kTeacherMax, own = g.teacher ? t : s, other = g.teacher ? s : t;
    const LogitsMatrix &from = g.teacher ? call.teacher : call.student,
                       &to_other = g.teacher ? call.student : call.teacher;
    saved_softmax_row(from, row, call.classes, c, saved[own], saved[own + 1], p);
    saved_softmax_row(to_other, row, call.classes, c, saved[other], saved[other + 1], gp);
    const double norm_own = saved[g.teacher ? kTeacherNorm : kStudentNorm];
    const double norm_other = saved[g.teacher ? kStudentNorm : kTeacherNorm];
    const double d = norm_own * norm_other + kPearsonEps, by = -g.scale * call.alpha / call.temperature;
    const A row_other = static_cast<A>(by / d);
    const A row_own =
        static_cast<A>(norm_own > 0 ? -by * saved[kProduct] * norm_other / (d * d * norm_own) : 0);
    const A dot = static_cast<A>(sum_blocks<A>(width, [&](int64_t i) {
      const Vec<A> a = load_vec(p + i), b = load_vec(gp + i);
      const Vec<A> gradient = row_other * (b - mean) + row_own * (a - mean) +
                              load_vec(by_other + i) * (b - load_vec(mean_other + i)) +
                              load_vec(by_own + i) * (a - load_vec(mean_own + i));
      store_vec(gp + i, gradient);
      return gradient * a;
    }));
    char* to = row_data(g.to, row);
    const bool direct = in_place<A>(g.to, call.classes);
    A* out = direct ? reinterpret_cast<A*>(to) : gp;
    for (int64_t i = 0; i < width; i += kLanes<A>)
      store_vec(out + i, load_vec(p + i) * (load_vec(gp + i) - dot));
    if (!direct) store_block(g.to, to, 0, call.classes, out);
  }
}

}  // namespace
}  // namespace kd::KD_ISA
