// Arithmetic of the logits op on the CPU, compiled once per instruction set.
//
// Forward: each logit is read once and costs one exponential; maxima run along (online log-sum-exp), by
// block. Backward: one more read, one exponential each, one write. with_gradient does both row by row, so
// that the second read comes from the cache: 2 reads and 1 write of memory, not 4 and 1; of a row that fits
// one block it keeps the exponentials. At vocabulary sizes
// of float32 an exponential (13 vector operations) costs about what its bytes do; the next block is
// prefetched while one is summed, so that the two overlap.

#include "cpu/logits.h"

#include "cpu/logits_dist.h"
#include "cpu/logits_rows.h"

namespace kd::KD_ISA {
namespace {

// Sums over the part of a row that was seen, relative to its maxima. With a = (t - max_t) c, b = (s - max_s)
// c:
struct RowSums {
  double s = 0, t = 0;              // of 2^b, of 2^a
  double cross = 0;                 // of 2^a (a - b), or for nkd of 2^a (-b)
  double plain_s = 0, plain_t = 0;  // nkd: as s, t at T = 1
};

template <class A, bool kNkd, bool kPlain>
inline void add_block(const A* s, const A* t, int64_t count, A max_s, A max_t, A c, const Ahead& next_s,
                      const Ahead& next_t, RowSums& sums) {
  Vec<A> sum_s = {}, sum_t = {}, cross = {}, plain_s = {}, plain_t = {};
  const A log2e = static_cast<A>(kLog2E);
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    next_s.fetch(i), next_t.fetch(i);
    const Vec<A> ds = load_vec(s + i) - max_s, dt = load_vec(t + i) - max_t, b = ds * c, a = dt * c;
    const Vec<A> es = exp2_vec<A>(b), et = exp2_vec<A>(a);
    sum_s += es;
    sum_t += et;
    const Vec<A> term = et * (kNkd ? -b : a - b);
    cross += et == Vec<A>{} ? Vec<A>{} : term;  // 0 * inf of a padded or hidden class
    if constexpr (kPlain) {
      plain_s += exp2_vec<A>(ds * log2e);
      plain_t += exp2_vec<A>(dt * log2e);
    }
  }
  sums.s += lanes_sum<A>(sum_s);
  sums.t += lanes_sum<A>(sum_t);
  sums.cross += lanes_sum<A>(cross);
  if constexpr (kPlain) {
    sums.plain_s += lanes_sum<A>(plain_s);
    sums.plain_t += lanes_sum<A>(plain_t);
  }
}

// The maxima grow by -step_s, -step_t.
inline void rescale(RowSums& sums, double step_s, double step_t, double c, bool nkd) {
  const double fs = __builtin_exp2(step_s * c), ft = __builtin_exp2(step_t * c);
  sums.cross = ft * (sums.cross + sums.t * ((nkd ? 0 : step_t * c) - step_s * c));
  sums.s *= fs;
  sums.t *= ft;
  sums.plain_s *= __builtin_exp2(step_s * kLog2E);
  sums.plain_t *= __builtin_exp2(step_t * kLog2E);
}

template <class A>
struct RowPair {
  const LogitsCall<A>& call;
  int64_t row, target;
  char *s, *t;
  A* saved;
  double c;  // log2(e) / T

  RowPair(const LogitsCall<A>& call, int64_t row, A* saved)
      : call(call),
        row(row),
        target(call.kind == LogitsKind::kl ? -1 : call.labels[row]),
        s(row_data(call.student, row)),
        t(row_data(call.teacher, row)),
        saved(saved),
        c(kLog2E / call.temperature) {}

  // Log-odds of the target against the other classes, natural; `plain`: at T = 1 of the student.
  double odds(bool teacher) const {
    const double z = teacher ? load_one(call.teacher, t, target) : load_one(call.student, s, target);
    const int max = teacher ? kTeacherMax : kStudentMax, log = teacher ? kTeacherLog : kStudentLog;
    return (z - saved[max]) / call.temperature - saved[log] * kLn2;
  }
  double plain_odds() const {
    return load_one(call.student, s, target) - saved[kStudentMax] - saved[kPlainLog] * kLn2;
  }
};

template <class A, bool kNkd, bool kPlain>
double forward_row(const RowPair<A>& r) {
  alignas(64) A buffer_s[kBlock], buffer_t[kBlock];
  RowSums sums;
  A max_s = kLowestMax<A>, max_t = kLowestMax<A>;
  const int64_t classes = r.call.classes;
  for (int64_t first = 0; first < classes; first += kBlock) {
    const int64_t count = classes - first < kBlock ? classes - first : kBlock, width = padded<A>(count);
    const A* s = load_block(r.call.student, r.s, first, count, r.target, buffer_s);
    const A* t = load_block(r.call.teacher, r.t, first, count, r.target, buffer_t);
    const A block_s = block_max(s, width), block_t = block_max(t, width);
    if (block_s > max_s || block_t > max_t) {
      const A new_s = block_s > max_s ? block_s : max_s, new_t = block_t > max_t ? block_t : max_t;
      if (first)
        rescale(sums, static_cast<double>(max_s) - new_s, static_cast<double>(max_t) - new_t, r.c, kNkd);
      max_s = new_s, max_t = new_t;
    }
    add_block<A, kNkd, kPlain>(s, t, width, max_s, max_t, static_cast<A>(r.c),
                               Ahead(r.call.student, r.s, first + kBlock),
                               Ahead(r.call.teacher, r.t, first + kBlock), sums);
  }
  const double log_s = __builtin_log2(sums.s), log_t = __builtin_log2(sums.t);
  double value = kLn2 * (sums.cross / sums.t + log_s - (kNkd ? 0 : log_t));
  if (value < 0) value = 0;  // rounding; NaN stays
  r.saved[kStudentMax] = max_s, r.saved[kStudentLog] = static_cast<A>(log_s);
  r.saved[kTeacherMax] = max_t, r.saved[kTeacherLog] = static_cast<A>(log_t);
  r.saved[kValue] = static_cast<A>(value);
  if constexpr (kNkd) {
    const double plain_s = kPlain ? __builtin_log2(sums.plain_s) : log_s;
    const double plain_t = kPlain ? __builtin_log2(sums.plain_t) : log_t;
    r.saved[kPlainLog] = static_cast<A>(plain_s);
    r.saved[kTargetWeight] =
        static_cast<A>(sigmoid(load_one(r.call.teacher, r.t, r.target) - max_t - plain_t * kLn2));
  }
  return value;
}

// The target's part of the loss, before its factor; from what a row saved.
template <class A>
double target_term(const RowPair<A>& r) {
  if (r.call.kind == LogitsKind::nkd) return r.saved[kTargetWeight] * softplus(-r.plain_odds());
  if (r.call.kind != LogitsKind::dkd) return 0;
  const double student = r.odds(false), teacher = r.odds(true);
  const double term = sigmoid(teacher) * (softplus(-student) - softplus(-teacher)) +
                      sigmoid(-teacher) * (softplus(student) - softplus(teacher));
  return term < 0 ? 0 : term;
}

template <class A>
double forward_row(const RowPair<A>& r) {
  const LogitsCall<A>& call = r.call;
  double value;
  if (call.kind == LogitsKind::nkd) {
    value = call.temperature == 1 ? forward_row<A, true, false>(r) : forward_row<A, true, true>(r);
  } else {
    value = forward_row<A, false, false>(r);
  }
  return call.beta * value + call.alpha * target_term(r);
}

// Gradient of a row: `both` (p - q) + `own` p + `plain` p¹ for the student, `both` q (log(q / p) - value) +
// `own` q for the teacher, over the classes but the target, whose gradient is `target`.
struct RowFactors {
  double both, own = 0, plain = 0, target = 0;
};

template <class A>
RowFactors row_factors(const RowPair<A>& r, const LogitsGradient<A>& g) {
  const LogitsCall<A>& call = r.call;
  RowFactors f{g.scale * call.beta / call.temperature};
  if (call.kind == LogitsKind::dkd) {
    const double student = r.odds(false), teacher = r.odds(true);
    const double by = g.scale * call.alpha / call.temperature;
    if (g.teacher) {
      f.target = by * sigmoid(teacher) * sigmoid(-teacher) * (teacher - student);
    } else {  // p_y - q_y, from whichever side of 1/2 keeps its digits
      f.target = by * (student > 0 && teacher > 0 ? sigmoid(-teacher) - sigmoid(-student)
                                                  : sigmoid(student) - sigmoid(teacher));
    }
    f.own = -f.target;
  } else if (call.kind == LogitsKind::nkd && !g.teacher) {
    f.target = -g.scale * call.alpha * r.saved[kTargetWeight] * sigmoid(-r.plain_odds());
    (call.temperature == 1 ? f.own : f.plain) = -f.target;
  }
  return f;
}

template <class A, bool kTeacher, bool kNkd, bool kPlain>
void backward_row(const RowPair<A>& r, const LogitsGradient<A>& g, const RowFactors& f) {
  alignas(64) A buffer_s[kBlock], buffer_t[kBlock], buffer_out[kBlock];
  char* to = row_data(g.to, r.row);
  const A c = static_cast<A>(r.c), log2e = static_cast<A>(kLog2E), ln2 = static_cast<A>(kLn2);
  const A both = static_cast<A>(f.both), own = static_cast<A>(f.own), plain = static_cast<A>(f.plain);
  const A *saved = r.saved, value = saved[kValue];
  const A plain_log = kPlain ? saved[kPlainLog] : A(0);
  // Where the gradient is streamed, the first block ends where whole vectors of it begin.
  const bool streams = g.streams && g.to.dtype == kDtypeOf<A> && g.to.stride == 1;
  const int64_t head = streams ? to_vector<A>(to) : 0;
  for (int64_t first = 0, count; first < r.call.classes; first += count) {
    count = first == 0 && head ? head : kBlock;
    if (count > r.call.classes - first) count = r.call.classes - first;
    const A* s = load_block(r.call.student, r.s, first, count, r.target, buffer_s);
    const A* t = load_block(r.call.teacher, r.t, first, count, r.target, buffer_t);
    const bool direct = in_place<A>(g.to, count);
    A* out = direct ? reinterpret_cast<A*>(to) + first : buffer_out;
    const Ahead next_s(r.call.student, r.s, first + count), next_t(r.call.teacher, r.t, first + count);
    for (int64_t i = 0; i < padded<A>(count); i += kLanes<A>) {
      next_s.fetch(i), next_t.fetch(i);
      const Vec<A> ds = load_vec(s + i) - saved[kStudentMax];
      const Vec<A> log_p = ds * c - saved[kStudentLog];
      const Vec<A> log_q = (load_vec(t + i) - saved[kTeacherMax]) * c - saved[kTeacherLog];
      const Vec<A> q = exp2_vec<A>(log_q);
      Vec<A> gradient;
      if constexpr (kTeacher) {
        gradient = q * (both * (ln2 * (kNkd ? -log_p : log_q - log_p) - value) + own);
        gradient = q == Vec<A>{} ? Vec<A>{} : gradient;
      } else {
        const Vec<A> p = exp2_vec<A>(log_p);
        gradient = both * (p - q) + own * p;
        if constexpr (kPlain) gradient += plain * exp2_vec<A>(ds * log2e - plain_log);
      }
      if (streams && direct) {
        stream_vec(out + i, gradient);
      } else {
        store_vec(out + i, gradient);
      }
    }
    if (!direct) store_block(g.to, to, first, count, out);
  }
  if (r.target >= 0) store_one(g.to, to, r.target, f.target);
}

template <class A>
void backward_row(const RowPair<A>& r, const LogitsGradient<A>& g) {
  const RowFactors f = row_factors(r, g);
  const bool nkd = r.call.kind == LogitsKind::nkd;
  if (g.teacher) {
    nkd ? backward_row<A, true, true, false>(r, g, f) : backward_row<A, true, false, false>(r, g, f);
  } else if (nkd && r.call.temperature != 1) {
    backward_row<A, false, true, true>(r, g, f);
  } else {
    backward_row<A, false, false, false>(r, g, f);
  }
}

// Whether a row and its exponentials fit one block.
template <class A>
bool is_short(const LogitsCall<A>& call, const LogitsGradient<A>& g) {
  const bool plain = call.kind == LogitsKind::nkd && call.temperature != 1;
  return call.classes <= kBlock && !plain && !g.streams;
}

// forward_row and backward_row of the student at once: each exponential is computed once.
template <class A>
double short_row(const RowPair<A>& r, const LogitsGradient<A>& g) {
  const LogitsCall<A>& call = r.call;
  const bool nkd = call.kind == LogitsKind::nkd;
  alignas(64) A exp_s[kBlock], exp_t[kBlock];
  const int64_t classes = call.classes, width = padded<A>(classes);
  const A* s = load_block(call.student, r.s, 0, classes, r.target, exp_s);
  const A* t = load_block(call.teacher, r.t, 0, classes, r.target, exp_t);
  const A max_s = block_max(s, width), max_t = block_max(t, width), c = static_cast<A>(r.c);
  Vec<A> sum_s = {}, sum_t = {}, cross = {};
  for (int64_t i = 0; i < width; i += kLanes<A>) {
    const Vec<A> b = (load_vec(s + i) - max_s) * c, a = (load_vec(t + i) - max_t) * c;
    const Vec<A> es = exp2_vec<A>(b), et = exp2_vec<A>(a), term = et * (nkd ? -b : a - b);
    sum_s += es, sum_t += et;
    cross += et == Vec<A>{} ? Vec<A>{} : term;  // as in add_block
    store_vec(exp_s + i, es), store_vec(exp_t + i, et);
  }
  const double total_s = lanes_sum<A>(sum_s), total_t = lanes_sum<A>(sum_t);
  double value = lanes_sum<A>(cross) / total_t;
  if (call.kind == LogitsKind::kl) {
    value = kLn2 * (value + __builtin_log2(total_s / total_t));
  } else {
    const double log_s = __builtin_log2(total_s), log_t = __builtin_log2(total_t);
    value = kLn2 * (value + log_s - (nkd ? 0 : log_t));
    r.saved[kStudentMax] = max_s, r.saved[kStudentLog] = static_cast<A>(log_s);
    r.saved[kTeacherMax] = max_t, r.saved[kTeacherLog] = static_cast<A>(log_t);
    if (nkd) {
      r.saved[kPlainLog] = static_cast<A>(log_s);
      r.saved[kTargetWeight] =
          static_cast<A>(sigmoid(load_one(call.teacher, r.t, r.target) - max_t - log_t * kLn2));
    }
  }
  const RowFactors f = row_factors(r, g);
  const A of_s = static_cast<A>(1 / total_s), of_t = static_cast<A>(1 / total_t);
  const A both = static_cast<A>(f.both), own = static_cast<A>(f.own);
  char* to = row_data(g.to, r.row);
  const bool direct = is_plain<A>(g.to);
  A* out = direct ? reinterpret_cast<A*>(to) : exp_s;
  // In a loop of its own: of products in one expression with p - q, FMA rounds one only, and equal logits
  // have a gradient.
  for (int64_t i = 0; i < width; i += kLanes<A>) {
    store_vec(exp_s + i, load_vec(exp_s + i) * of_s), store_vec(exp_t + i, load_vec(exp_t + i) * of_t);
  }
  for (int64_t i = 0; i < width; i += kLanes<A>) {
    const Vec<A> p = load_vec(exp_s + i), q = load_vec(exp_t + i);
    const Vec<A> gradient = both * (p - q) + own * p;
    if (direct && classes - i < kLanes<A>) {
      store_part<A>(out + i, classes - i, gradient);
    } else {
      store_vec(out + i, gradient);
    }
  }
  if (!direct) store_block(g.to, to, 0, classes, out);
  if (r.target >= 0) store_one(g.to, to, r.target, f.target);
  return call.beta * (value < 0 ? 0 : value) + call.alpha * target_term(r);  // rounding; NaN stays
}

template <class A>
void forward(const LogitsCall<A>& call, int64_t begin, int64_t end, double* values) {
  for (int64_t row = begin; row < end; ++row) {
    values[row] =
        is_ignored(call, row) ? 0 : forward_row(RowPair<A>(call, row, call.saved + row * call.saved_width));
  }
}

template <class A>
void backward(const LogitsCall<A>& call, const LogitsGradient<A>& g, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (is_ignored(call, row)) {
      zero_row(call, g.to, row);
    } else {
      backward_row(RowPair<A>(call, row, call.saved + row * call.saved_width), g);
    }
  }
  end_streams();
}

template <class A>
void with_gradient(const LogitsCall<A>& call, const LogitsGradient<A>& g, int64_t begin, int64_t end,
                   double* values) {
  for (int64_t row = begin; row < end; ++row) {
    values[row] = 0;
    if (is_ignored(call, row)) {
      zero_row(call, g.to, row);
      continue;
    }
    A saved[kTargetWeight + 1];
    const RowPair<A> r(call, row, saved);
    if (is_short(call, g)) {
      values[row] = short_row(r, g);
      continue;
    }
    values[row] = forward_row(r);
    backward_row(r, g);
  }
  end_streams();
}

template <class A>
constexpr LogitsKernels<A> table() {
  return {.forward = forward<A>,
          .backward = backward<A>,
          .with_gradient = with_gradient<A>,
          .dist_forward = dist_forward<A>,
          .dist_backward = dist_backward<A>,
          .lanes = kLanes<A>};
}

}  // namespace

extern const LogitsKernels<float> logits_float = table<float>();
extern const LogitsKernels<double> logits_double = table<double>();

}  // namespace kd::KD_ISA
