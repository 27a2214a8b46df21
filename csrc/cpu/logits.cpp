// Op logits on the CPU: checks, threads, and sums over rows in a fixed order. Formulas:
// kdfast/reference/logits.py.

#include "cpu/logits.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/logits_ops.h"
#include "common/parallel.h"
#include "common/rounding.h"
#include "cpu/result.h"

namespace kd {

KD_DECLARE_ISA(extern const LogitsKernels<float> logits_float;
               extern const LogitsKernels<double> logits_double;)

namespace {

using torch::stable::Tensor;

constexpr int64_t kGrain =
    1 << 14;                        // logits of one side below which a second thread costs more than it saves
constexpr int64_t kRowLogits = 64;  // whose time a row takes beyond that of its logits
constexpr int64_t kDistLogits = 1 << 15;  // of one side that DIST holds at a time: 256 KB of both
constexpr int64_t kStreamed = 16 << 20;   // bytes of a gradient from which it is not left in the caches
constexpr double kPearsonEps = 1e-8;

template <class A>
const LogitsKernels<A>& kernels() {
  if constexpr (sizeof(A) == 4) {
    return KD_DISPATCH_ISA(logits_float);
  } else {
    return KD_DISPATCH_ISA(logits_double);
  }
}

LogitsMatrix matrix_of(const Tensor& x, const char* argument) {
  LogitsMatrix m{static_cast<char*>(const_cast<void*>(x.const_data_ptr())), Dtype::f32, 1, 0, {}, {}};
  m.dtype = dtype_of(x.scalar_type(), argument);
  const int64_t last = x.dim() - 1;
  if (x.size(last) > 1) m.stride = x.stride(last);
  for (int64_t a = last; a-- > 0;) {
    const int64_t size = x.size(a), step = x.stride(a);
    if (size == 1) continue;
    if (m.axes && step == m.size[m.axes - 1] * m.step[m.axes - 1]) {
      m.size[m.axes - 1] *= size;
      continue;
    }
    KD_CHECK(m.axes < kMostAxes, "logits: ", argument, " has more than ", kMostAxes, " strided axes");
    m.size[m.axes] = size, m.step[m.axes++] = step;
  }
  return m;
}

template <class A>
struct Problem {
  LogitsCall<A> call;
  Tensor labels;
  int64_t saved_elements, counted;
  int64_t grain;  // rows

  Problem(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& given,
          const Tensor* saved, int64_t kind, double alpha, double beta, double temperature,
          int64_t ignore_index)
      : call{} {
    KD_CHECK(0 <= kind && kind <= static_cast<int64_t>(LogitsKind::dist), "logits: unknown kind ", kind);
    KD_CHECK(student.dim() >= 1 && student.dim() == teacher.dim(), "logits: student has ", student.dim(),
             " axes, teacher ", teacher.dim());
    for (int64_t a = 0; a < student.dim(); ++a) {
      KD_CHECK(student.size(a) == teacher.size(a), "logits: axis ", a, " of student has ", student.size(a),
               ", of teacher ", teacher.size(a));
    }
    const int64_t classes = student.size(student.dim() - 1);
    KD_CHECK(classes > 0, "logits: need at least one class");
    call.kind = static_cast<LogitsKind>(kind);
    call.alpha = alpha, call.beta = beta, call.temperature = temperature;
    call.rows = student.numel() / classes, call.classes = classes, call.ignore_index = ignore_index;
    call.student = matrix_of(student, "student"), call.teacher = matrix_of(teacher, "teacher");
    call.saved = saved ? static_cast<A*>(const_cast<void*>(saved->const_data_ptr())) : nullptr;
    call.saved_width = call.kind == LogitsKind::kl || call.kind == LogitsKind::dkd ? 5 : 7;
    saved_elements = saved ? saved->numel() : 0;
    counted = call.rows;
    grain = std::max<int64_t>(1, kGrain / (classes + kRowLogits));
    const bool targets = call.kind == LogitsKind::dkd || call.kind == LogitsKind::nkd;
    KD_CHECK(given.has_value() || !targets, "logits: this kind needs labels");
    if (!given.has_value()) return;
    KD_CHECK(given->scalar_type() == ScalarType::Long && given->numel() == call.rows,
             "logits: labels must be int64, one for each of ", call.rows, " rows, got ", given->numel(),
             " of ", toString(given->scalar_type()));
    labels = torch::stable::contiguous(*given);
    call.labels = static_cast<const int64_t*>(labels.const_data_ptr());
    for (int64_t row = 0; row < call.rows; ++row) {
      const int64_t label = call.labels[row];
      counted -= label == ignore_index;
      KD_CHECK(!targets || label == ignore_index || (0 <= label && label < classes), "logits: label ", label,
               " of row ", row, " is neither a class, 0 to ", classes - 1, ", nor ignore_index ",
               ignore_index);
    }
  }

  int64_t width() const {
    return (call.classes + kernels<A>().lanes - 1) / kernels<A>().lanes * kernels<A>().lanes;
  }
  A* columns() const { return call.saved + call.rows * call.saved_width; }  // [5, K], dist only
  // 1 over the number of rows that count; the mean over no row is 0.
  double share() const { return counted ? 1 / static_cast<double>(counted) : 0; }
};

// Storage of vectors, aligned and not initialised.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<A*>(std::aligned_alloc(64, round_up(count * sizeof(A), 64)))) {
    KD_CHECK(data_, "logits: out of memory");
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* get() const { return data_; }

 private:
  A* data_;
};

// The mean over columns of 1 - correlation, and what the backward needs, from moments of parts [parts, 5,
// width].
template <class A>
double column_distance(const Problem<A>& p, const double* moments, const std::vector<int64_t>& counts) {
  const int64_t width = p.width(), classes = p.call.classes;
  double total = 0;
  for (int64_t k = 0; k < classes; ++k) {
    double m[kColumnMoments] = {}, count = 0;
    for (size_t part = 0; part < counts.size(); ++part) {
      if (!counts[part]) continue;
      const double* from = moments + static_cast<int64_t>(part) * kColumnMoments * width + k;
      const double more = static_cast<double>(counts[part]), step = more / (count + more);
      const double ds = from[kMeanS * width] - m[kMeanS], dt = from[kMeanT * width] - m[kMeanT];
      m[kMeanS] += ds * step, m[kMeanT] += dt * step;
      m[kMomentSS] += from[kMomentSS * width] + ds * ds * count * step;
      m[kMomentTT] += from[kMomentTT * width] + dt * dt * count * step;
      m[kMomentST] += from[kMomentST * width] + ds * dt * count * step;
      count += more;
    }
    const double norm_s = std::sqrt(m[kMomentSS]), norm_t = std::sqrt(m[kMomentTT]);
    const double distance = 1 - m[kMomentST] / (norm_s * norm_t + kPearsonEps);
    total += distance < 0 ? 0 : distance;
    A* to = p.columns() + k;
    to[kMeanS * classes] = static_cast<A>(m[kMeanS]);
    to[kMeanT * classes] = static_cast<A>(m[kMeanT]);
    to[kNormS * classes] = static_cast<A>(norm_s);
    to[kNormT * classes] = static_cast<A>(norm_t);
    to[kProductST * classes] = static_cast<A>(m[kMomentST]);
  }
  return total / static_cast<double>(classes);
}

// Fills values with the rows' terms; returns beta times the columns' term.
template <class A>
double dist(const Problem<A>& p, double* values) {
  const LogitsCall<A>& call = p.call;
  if (!p.counted) return 0;
  const int64_t width = p.width(), size = kColumnMoments * width;
  // The split is fixed by the shape, so that sums do not depend on the number of threads.
  const int64_t parts = std::clamp<int64_t>(call.rows / 32, 1, 16);
  const int64_t held = std::clamp<int64_t>(kDistLogits / width, 1, 32);
  std::vector<double> moments(parts * size, 0.0);
  std::vector<int64_t> counts(parts);
  const int64_t grain = kGrain * parts / std::max<int64_t>(1, call.rows * call.classes);
  parallel_for(0, parts, std::max<int64_t>(1, grain), [&](int64_t begin, int64_t end) {
    Scratch<A> scratch(2 * held * width);
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * call.rows / parts, last = (part + 1) * call.rows / parts;
      counts[part] = kernels<A>().dist_forward(call, first, last, held, scratch.get(),
                                               moments.data() + part * size, values);
    }
  });
  return call.beta * column_distance(p, moments.data(), counts);
}

template <class A>
double forward(const Problem<A>& p) {
  std::vector<double> values(p.call.rows, 0.0);
  if (p.counted < p.call.rows)
    std::fill_n(p.call.saved, p.saved_elements, A(0));  // ignored rows write nothing
  double columns = 0;
  if (p.call.kind == LogitsKind::dist) {
    columns = dist(p, values.data());
  } else {
    parallel_for(0, p.call.rows, p.grain, [&](int64_t begin, int64_t end) {
      kernels<A>().forward(p.call, begin, end, values.data());
    });
  }
  double total = 0;
  for (const double value : values) total += value;
  return total * p.share() + columns;
}

// For dist_backward: [4, width].
template <class A>
std::vector<A> column_factors(const Problem<A>& p, double grad, bool teacher) {
  const int64_t classes = p.call.classes, width = p.width();
  std::vector<A> result(4 * width, A(0));
  const A* from = p.columns();
  const int own = teacher, other = 1 - own;
  const double by = -grad * p.call.beta / (static_cast<double>(classes) * p.call.temperature);
  for (int64_t k = 0; k < classes; ++k) {
    const double norm_own = from[(kNormS + own) * classes + k],
                 norm_other = from[(kNormS + other) * classes + k];
    const double d = norm_own * norm_other + kPearsonEps;
    result[k] = static_cast<A>(by / d);
    if (norm_own > 0) {
      result[width + k] =
          static_cast<A>(-by * from[kProductST * classes + k] * norm_other / (d * d * norm_own));
    }
    result[2 * width + k] = from[(kMeanS + own) * classes + k];
    result[3 * width + k] = from[(kMeanS + other) * classes + k];
  }
  return result;
}

template <class A>
LogitsGradient<A> gradient_of(const Problem<A>& p, double grad, const Tensor& to, bool teacher) {
  const bool streams = to.numel() * static_cast<int64_t>(to.element_size()) >= kStreamed;
  return {grad * p.share(), matrix_of(to, "the gradient"), teacher, streams};
}

template <class A>
void backward(const Problem<A>& p, double grad, const Tensor& to, bool teacher) {
  const LogitsGradient<A> g = gradient_of(p, grad, to, teacher);
  if (p.call.kind != LogitsKind::dist) {
    parallel_for(0, p.call.rows, p.grain,
                 [&](int64_t begin, int64_t end) { kernels<A>().backward(p.call, g, begin, end); });
    return;
  }
  const std::vector<A> columns =
      p.counted ? column_factors(p, grad, teacher) : std::vector<A>();  // where no row counts all are ignored
  parallel_for(0, p.call.rows, p.grain, [&](int64_t begin, int64_t end) {
    Scratch<A> scratch(2 * p.width());
    kernels<A>().dist_backward(p.call, g, begin, end, columns.data(), scratch.get());
  });
}

template <class A>
double with_gradient(Problem<A>& p, const Tensor& to) {
  if (p.call.kind == LogitsKind::dist) {  // the gradient waits for sums over all rows
    std::vector<A> saved(p.call.rows * p.call.saved_width + 5 * p.call.classes, A(0));
    p.call.saved = saved.data();
    const double value = forward(p);
    backward(p, 1, to, false);
    return value;
  }
  std::vector<double> values(p.call.rows, 0.0);
  const LogitsGradient<A> g = gradient_of(p, 1, to, false);
  parallel_for(0, p.call.rows, p.grain, [&](int64_t begin, int64_t end) {
    kernels<A>().with_gradient(p.call, g, begin, end, values.data());
  });
  double total = 0;
  for (const double value : values) total += value;
  return total * p.share();
}

bool is_wide(const Tensor& student, const Tensor& teacher) {
  return student.scalar_type() == ScalarType::Double || teacher.scalar_type() == ScalarType::Double;
}

template <class A>
A& scalar(const Tensor& x) {
  return *static_cast<A*>(const_cast<void*>(x.const_data_ptr()));
}

}  // namespace

std::tuple<Tensor, Tensor> logits_cpu(const Tensor& student, const Tensor& teacher,
                                      const std::optional<Tensor>& labels, int64_t kind, double alpha,
                                      double beta, double temperature, int64_t ignore_index) {
  KD_CHECK(student.dim() > 0, "logits: student has no axis of classes");
  const bool wide = is_wide(student, teacher);
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  const int64_t classes = student.size(student.dim() - 1), rows = classes ? student.numel() / classes : 0;
  const bool is_dist = kind == static_cast<int64_t>(LogitsKind::dist);
  const int64_t width = kind < static_cast<int64_t>(LogitsKind::nkd) ? 5 : 7;
  Tensor loss = torch::stable::new_empty(student, {}, dtype);
  Tensor saved = new_result(student, {rows * width + (is_dist ? 5 * classes : 0)}, dtype);
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    const Problem<A> p(student, teacher, labels, &saved, kind, alpha, beta, temperature, ignore_index);
    scalar<A>(loss) = static_cast<A>(forward(p));
  };
  wide ? run(double{}) : run(float{});
  return {loss, saved};
}

std::tuple<Tensor, Tensor> logits_with_gradient_cpu(const Tensor& student, const Tensor& teacher,
                                                    const std::optional<Tensor>& labels, int64_t kind,
                                                    double alpha, double beta, double temperature,
                                                    int64_t ignore_index) {
  KD_CHECK(student.dim() > 0, "logits: student has no axis of classes");
  const bool wide = is_wide(student, teacher);
  Tensor loss = torch::stable::new_empty(student, {}, wide ? ScalarType::Double : ScalarType::Float);
  Tensor gradient = new_gradient(student);
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    Problem<A> p(student, teacher, labels, nullptr, kind, alpha, beta, temperature, ignore_index);
    scalar<A>(loss) = static_cast<A>(with_gradient(p, gradient));
  };
  wide ? run(double{}) : run(float{});
  return {loss, gradient};
}

std::tuple<Tensor, Tensor> logits_backward_cpu(const Tensor& grad, const Tensor& student,
                                               const Tensor& teacher, const std::optional<Tensor>& labels,
                                               const Tensor& saved, int64_t kind, double alpha, double beta,
                                               double temperature, int64_t ignore_index, bool need_student,
                                               bool need_teacher) {
  Tensor grad_student = new_gradient(student, need_student),
         grad_teacher = new_gradient(teacher, need_teacher);
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    const Problem<A> p(student, teacher, labels, &saved, kind, alpha, beta, temperature, ignore_index);
    if (need_student) backward(p, scalar<A>(grad), grad_student, false);
    if (need_teacher) backward(p, scalar<A>(grad), grad_teacher, true);
  };
  is_wide(student, teacher) ? run(double{}) : run(float{});
  return {grad_student, grad_teacher};
}

}  // namespace kd
