#pragma once

// What the kernels of logits.cu share, and those of kl, dkd and nkd: a block has a row.

#include "logits.h"
#include "rows.cuh"

namespace kd::logits {
namespace {

// Of a row of `saved`, natural logarithms. kl, dkd and nkd: over the classes but the target, if there is one.
enum Saved : int {
  kMaxS,
  kLogS,  // dist: 1 over the sum
  kMaxT,
  kLogT,
  kValue,         // the divergence; nkd: the cross-entropy
  kPlainLog,      // nkd: the student's at T = 1
  kTargetWeight,  // nkd: the teacher's probability of the target at T = 1
  kNormS = 4,
  kNormT = 5,
  kProduct = 6,  // dist: of the probabilities minus 1 / K
};

__host__ __device__ constexpr int row_width(int kind) {
  return kind == KD_LOGITS_KL || kind == KD_LOGITS_DKD ? 5 : 7;
}

template <class T>
struct Call {
  using A = accumulator<T>;
  Rows<T> student, teacher;
  const int64_t* labels;
  int64_t rows, classes, ignore_index;
  A alpha, beta, scale;  // scale: 1 / temperature
  int kind;
  bool plain;  // nkd at T != 1: sums at T = 1 too
  A* saved;    // [rows, row_width], dist: and [5, classes]; then the share: 1 / (rows that count)
  A* values;   // [rows], dist: and [classes]

  Call(const kd_logits_problem& p, void* saved, void* values)
      : student(p.student),
        teacher(p.teacher),
        labels(p.labels),
        rows(p.rows),
        classes(p.classes),
        ignore_index(p.ignore_index),
        alpha(static_cast<A>(p.alpha)),
        beta(static_cast<A>(p.beta)),
        scale(static_cast<A>(1 / p.temperature)),
        kind(p.kind),
        plain(p.kind == KD_LOGITS_NKD && p.temperature != 1),
        saved(static_cast<A*>(saved)),
        values(static_cast<A*>(values)) {}

  __device__ bool ignored(int64_t row) const { return labels && labels[row] == ignore_index; }
  __device__ A* row_saved(int64_t row) const { return saved + row * row_width(kind); }
  __device__ A* columns() const { return saved + rows * row_width(kind); }
  __device__ A* share() const { return columns() + (kind == KD_LOGITS_DIST ? 5 * classes : 0); }
};

template <class A>
__device__ A sigmoid(A x) {
  const A e = exponential(x < 0 ? x : -x);
  return (x < 0 ? e : A(1)) / (1 + e);
}
template <class A>
__device__ A softplus(A x) {
  return (x > 0 ? x : A(0)) + logarithm_1p(exponential(x > 0 ? -x : x));
}

template <class A>
constexpr A kLowest = static_cast<A>(-1e30);
template <class A>
constexpr A kMinusInfinity = static_cast<A>(-INFINITY);

// A row that does not count.
template <class T>
__device__ void forget_row(const Call<T>& call, int64_t row, int lane) {
  if (lane < row_width(call.kind)) call.row_saved(row)[lane] = 0;
  if (lane == 0) call.values[row] = 0;
}

// One row of the forward by a team. Each thread's sums run on its own maximum, and are joined at the end.
template <class T, bool kTarget, bool kCross, int kSteps, class Team>
__device__ void forward_row(const Call<T>& call, int64_t row, const Team& team) {
  using A = accumulator<T>;
  constexpr int kCount = kPack<T>;
  const int64_t classes = call.classes;
  A* saved = call.row_saved(row);
  if (call.ignored(row)) return forget_row(call, row, team.lane());
  const int64_t label = kTarget ? call.labels[row] : -1;
  const T *s_row = call.student.row(row), *t_row = call.teacher.row(row);
  const A scale = call.scale;
  A max_s = kLowest<A>, max_t = kLowest<A>, sum_s = 0, sum_t = 0, cross = 0, plain_s = 0, plain_t = 0;
  // cross: sum of exp(a) (a - b), with a, b the scaled distances of teacher and student to their maxima; nkd:
  // of exp(a) (-b).
  const auto move = [&](A new_s, A new_t) {
    const A step_s = (max_s - new_s) * scale, step_t = (max_t - new_t) * scale, shrink = exponential(step_t);
    cross = sum_t == 0 ? A(0) : shrink * (cross + sum_t * ((kCross ? A(0) : step_t) - step_s));
    sum_s *= exponential(step_s), sum_t *= shrink;
    if (kCross && call.plain) {
      plain_s *= exponential(max_s - new_s), plain_t *= exponential(max_t - new_t);
    }
    max_s = new_s, max_t = new_t;
  };
  const int64_t step = int64_t{team.size()} * kCount;
  for (int64_t k = int64_t{team.lane()} * kCount; k < classes; k += kSteps * step) {
    A s[kSteps][kCount], t[kSteps][kCount];
    call.student.load(s_row, k, step, classes, kMinusInfinity<A>, s);
    call.teacher.load(t_row, k, step, classes, kMinusInfinity<A>, t);
    A new_s = max_s, new_t = max_t;
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if (kTarget && k + u * step + j == label) s[u][j] = t[u][j] = kMinusInfinity<A>;
        new_s = larger(new_s, s[u][j]), new_t = larger(new_t, t[u][j]);
      }
    }
    move(new_s, new_t);
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      if (u > 0 && k + u * step >= classes) break;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const A a = (t[u][j] - max_t) * scale, b = (s[u][j] - max_s) * scale, e = exponential(a);
        cross += e == 0 ? A(0) : e * (kCross ? -b : a - b);
        sum_s += exponential(b), sum_t += e;
        if (kCross && call.plain) {
          plain_s += exponential(s[u][j] - max_s), plain_t += exponential(t[u][j] - max_t);
        }
      }
    }
  }
  A tops[2] = {max_s, max_t};
  team.join(tops, Largest{});
  move(tops[0], tops[1]);
  A sums[5] = {sum_s, sum_t, cross, plain_s, plain_t};
  team.join(sums, Sum{});
  if (team.lane() != 0) return;
  A log_s = logarithm(sums[0]), log_t = logarithm(sums[1]);
  const A value = not_negative(sums[2] / sums[1] + log_s - (kCross ? A(0) : log_t));
  saved[kMaxS] = max_s, saved[kLogS] = log_s, saved[kMaxT] = max_t, saved[kLogT] = log_t;
  saved[kValue] = value;
  A result = call.beta * value;
  if (kTarget) {
    const bool known = label >= 0 && label < classes;
    const int64_t at = known ? label : 0;
    const A ys = static_cast<A>(widen(s_row[at * call.student.stride])) - max_s,
            yt = static_cast<A>(widen(t_row[at * call.teacher.stride])) - max_t;
    A target;
    if (kCross) {
      if (call.plain) log_s = logarithm(sums[3]), log_t = logarithm(sums[4]);
      const A weight = sigmoid(yt - log_t);
      saved[kPlainLog] = log_s, saved[kTargetWeight] = weight;
      target = weight * softplus(log_s - ys);
    } else {
      const A odds_s = ys * scale - log_s, odds_t = yt * scale - log_t;
      target = not_negative(sigmoid(odds_t) * (softplus(-odds_s) - softplus(-odds_t)) +
                            sigmoid(-odds_t) * (softplus(odds_s) - softplus(odds_t)));
    }
    result += call.alpha * target;
    if (!known) result = static_cast<A>(NAN);
  }
  call.values[row] = result;
}

template <class T, bool kTarget, bool kCross>
__global__ __launch_bounds__(kMostThreads, 1) void forward_rows(Call<T> call) {
  forward_row<T, kTarget, kCross, sizeof(T) == 4 ? 4 : 2>(call, blockIdx.x, BlockTeam{});
}

// The gradient of a row is, for the student, both (p - q) + own p [+ plain exp(z - plain_log)], for the
// teacher q (both (difference - value) + own); at_target at the target.
template <class A>
struct Factors {
  A both, own, plain, at_target;
};

template <class T, bool kTarget, bool kCross>
__device__ Factors<accumulator<T>> factors_of(const Call<T>& call, const T* s_row, const T* t_row,
                                              const accumulator<T>* saved, accumulator<T> upstream,
                                              int64_t label, bool teacher) {
  using A = accumulator<T>;
  Factors<A> f{upstream * call.beta * call.scale, 0, 0, 0};
  if (!kTarget) return f;
  if (label < 0 || label >= call.classes) {
    f.both = static_cast<A>(NAN);
    return f;
  }
  const A ys = static_cast<A>(widen(s_row[label * call.student.stride])) - saved[kMaxS],
          yt = static_cast<A>(widen(t_row[label * call.teacher.stride])) - saved[kMaxT];
  if (!kCross) {
    const A odds_s = ys * call.scale - saved[kLogS], odds_t = yt * call.scale - saved[kLogT],
            by = upstream * call.alpha * call.scale;
    if (teacher) {
      f.at_target = by * sigmoid(odds_t) * sigmoid(-odds_t) * (odds_t - odds_s);
    } else {  // of the two equal differences the one that keeps its digits
      const A sign = odds_s > 0 && odds_t > 0 ? A(-1) : A(1);
      f.at_target = by * sign * (sigmoid(sign * odds_s) - sigmoid(sign * odds_t));
    }
    f.own = -f.at_target;
  } else if (!teacher) {
    f.at_target = -upstream * call.alpha * saved[kTargetWeight] * sigmoid(saved[kPlainLog] - ys);
    (call.plain ? f.plain : f.own) = -f.at_target;
  }
  return f;
}

template <class T>
__device__ void clear_row(const Rows<T>& to, int64_t row, int64_t classes) {
  constexpr int kCount = kPack<T>;
  const accumulator<T> zeros[kCount] = {};
  for (int64_t k = int64_t{threadIdx.x} * kCount; k < classes; k += int64_t{blockDim.x} * kCount) {
    to.store(to.row(row), k, classes, zeros);
  }
}

// blockIdx.y: which of the sides that need a gradient.
template <class T>
__device__ bool of_teacher(const Rows<T>& to_student) {
  return blockIdx.y == 1 || !to_student.data;
}

template <class T, bool kTarget, bool kCross>
__global__ __launch_bounds__(kMostThreads, 1) void backward_rows(Call<T> call, const accumulator<T>* grad,
                                                                 Rows<T> to_student, Rows<T> to_teacher) {
  using A = accumulator<T>;
  constexpr int kCount = kPack<T>;
  const bool teacher = of_teacher(to_student);
  const Rows<T> to = teacher ? to_teacher : to_student;
  const int64_t row = blockIdx.x, classes = call.classes;
  if (call.ignored(row)) return clear_row(to, row, classes);
  const int64_t label = kTarget ? call.labels[row] : -1;
  const T *s_row = call.student.row(row), *t_row = call.teacher.row(row);
  T* to_row = to.row(row);
  const A* saved = call.row_saved(row);
  const Factors<A> f =
      factors_of<T, kTarget, kCross>(call, s_row, t_row, saved, *grad * *call.share(), label, teacher);
  const A max_s = saved[kMaxS], log_s = saved[kLogS], max_t = saved[kMaxT], log_t = saved[kLogT],
          value = saved[kValue], plain_log = kCross ? saved[kPlainLog] : A(0);
  for (int64_t k = int64_t{threadIdx.x} * kCount; k < classes; k += int64_t{blockDim.x} * kCount) {
    A s[kCount], t[kCount], out[kCount];
    call.student.load(s_row, k, classes, kMinusInfinity<A>, s);
    call.teacher.load(t_row, k, classes, kMinusInfinity<A>, t);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const A z = s[j] - max_s, log_p = z * call.scale - log_s, log_q = (t[j] - max_t) * call.scale - log_t,
              q = exponential(log_q);
      if (teacher) {
        out[j] = q == 0 ? A(0) : q * (f.both * ((kCross ? A(0) : log_q) - log_p - value) + f.own);
      } else {
        const A p = exponential(log_p);
        out[j] = f.both * (p - q) + f.own * p;
        if (kCross && call.plain) out[j] += f.plain * exponential(z - plain_log);
      }
      if (kTarget && k + j == label) out[j] = f.at_target;
    }
    to.store(to_row, k, classes, out);
  }
}

// The mean of values over the rows that count, plus the values of columns; by one block.
template <class T>
__device__ void add_up(const Call<T>& call, accumulator<T>* loss) {
  double sums[3] = {};  // of rows, rows that count, of columns
  for (int64_t i = threadIdx.x; i < call.rows; i += blockDim.x) {
    sums[0] += static_cast<double>(__ldcg(call.values + i));  // perhaps written by this launch
    sums[1] += call.ignored(i) ? 0 : 1;
  }
  if (call.kind == KD_LOGITS_DIST) {
    for (int64_t k = threadIdx.x; k < call.classes; k += blockDim.x) {
      sums[2] += static_cast<double>(__ldcg(call.values + call.rows + k));
    }
  }
  block_join(sums, Sum{});
  if (threadIdx.x != 0) return;
  const double share = sums[1] > 0 ? 1 / sums[1] : 0;
  *loss = static_cast<accumulator<T>>(sums[0] * share + sums[2]);
  *call.share() = static_cast<accumulator<T>>(share);
}

template <class T>
__global__ __launch_bounds__(kLargestBlock) void finish(Call<T> call, accumulator<T>* loss) {
  add_up(call, loss);
}

}  // namespace
}  // namespace kd::logits
