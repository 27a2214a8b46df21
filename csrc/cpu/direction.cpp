// Op direction on the CPU: threads over rows, and from the sums of each row to the loss, its weights and the
// factors of the backward. Formulas: kdfast/reference/direction.py.

#include "cpu/direction.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/direction_ops.h"
#include "common/dtype.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "cpu/result.h"

namespace kd {

KD_DECLARE_ISA(extern const DirectionKernels<float> direction_float;
               extern const DirectionKernels<double> direction_double;)

namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr double kNormFloor = 1e-12;      // NORM_FLOOR of the reference
constexpr int64_t kStreamed = 16 << 20;   // bytes of a gradient from which it is not left in the caches
constexpr int64_t kTaskElements = 32768;  // of one input, for a thread to be worth its start

// Rows whose columns are neighbours: the tensor's own, or those of a copy that it keeps alive.
class Rows {
 public:
  Rows(const Tensor& x, const char* name) : tensor_(x) {
    KD_CHECK(x.dim() == 2, "direction: ", name, " must be [rows, columns], got ", x.dim(), " axes");
    if (x.size(1) > 1 && x.stride(1) != 1) tensor_ = torch::stable::contiguous(x);
    rows_ = {const_cast<void*>(tensor_.const_data_ptr()), dtype_of(x.scalar_type(), name), tensor_.stride(0)};
  }
  const DirectionRows& get() const { return rows_; }

 private:
  Tensor tensor_;
  DirectionRows rows_;
};

// The centre of each row; -1 where the row does not count.
class Centers {
 public:
  Centers(const OptionalTensor& labels, int64_t rows, int64_t classes, int64_t ignore_index) {
    if (!labels) {
      KD_CHECK(classes == rows, "direction: without labels, centers need one row per sample: got ", classes,
               " for ", rows);
      return;
    }
    KD_CHECK(labels->scalar_type() == ScalarType::Long && labels->dim() == 1 && labels->size(0) == rows,
             "direction: labels must be int64 [", rows, "]");
    const auto* data = static_cast<const int64_t*>(labels->const_data_ptr());
    const int64_t stride = labels->stride(0);
    of_row_.resize(rows);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t label = data[i * stride];
      KD_CHECK(label == ignore_index || (0 <= label && label < classes), "labels: need values in [0, ",
               classes, ") or ignore_index ", ignore_index, ", got ", label, " at row ", i);
      of_row_[i] = label == ignore_index ? -1 : label;
    }
  }
  int64_t operator[](int64_t row) const { return of_row_.empty() ? row : of_row_[row]; }
  bool by_label() const { return !of_row_.empty(); }

 private:
  std::vector<int64_t> of_row_;
};

void check_shapes(const Tensor& student, const OptionalTensor& teacher, const Tensor& centers) {
  KD_CHECK(student.dim() == 2 && centers.dim() == 2 && student.size(1) == centers.size(1),
           "direction: student and centers need equally many columns");
  KD_CHECK(!teacher || (teacher->dim() == 2 && teacher->size(0) == student.size(0) &&
                        teacher->size(1) == student.size(1)),
           "direction: teacher needs the shape of student");
}

// f(row) for every row, then done() on the same thread.
template <class F, class G>
void for_rows(int64_t rows, int64_t columns, const F& f, const G& done) {
  parallel_for(0, rows, std::max<int64_t>(1, kTaskElements / std::max<int64_t>(columns, 1)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) f(i);
                 done();
               });
}

bool is_wide(const Tensor& student, const OptionalTensor& teacher, const Tensor& centers) {
  const auto wide = [](const Tensor& x) { return x.scalar_type() == ScalarType::Double; };
  return wide(student) || wide(centers) || (teacher && wide(*teacher));
}

Tensor empty(const Tensor& like, std::vector<int64_t> size, bool wide) {
  return torch::stable::new_empty(like, size, wide ? ScalarType::Double : ScalarType::Float);
}

// One row: its distance, whether it counts, and the factors of a weight of 1.
struct RowResult {
  double distance = 0, center_factor = 0, student_factor = 0, teacher_factor = 0;
  bool counts = false;
};

double length(double square) {
  return square <= kNormFloor * kNormFloor ? 0.0 : std::sqrt(square);  // NaN stays NaN
}

RowResult compare(const DirectionSums& sums) {
  const double center = length(sums.center), student = length(sums.student), teacher = length(sums.teacher);
  RowResult r;
  r.counts = !(center == 0);
  if (!r.counts) return r;
  const double longest = student >= teacher ? student : teacher;
  r.distance = 1;
  if (longest == 0) return r;
  const double scale = 1 / (center * longest), cosine = sums.dot * scale;
  r.distance = 1 - cosine;
  r.center_factor = -scale;
  (student >= teacher ? r.student_factor : r.teacher_factor) = cosine / (longest * longest);
  return r;
}

// Weights of the rows by which the loss is a mean; they are 0 or 1 before. `center_of` has labels where
// balanced.
template <class W>
double balance(std::vector<W>& weight, const Centers& center_of, int64_t classes, bool balanced) {
  const int64_t rows = static_cast<int64_t>(weight.size());
  if (balanced) {
    std::vector<int64_t> size(classes);
    for (int64_t i = 0; i < rows; ++i) {
      if (weight[i] > 0) ++size[center_of[i]];
    }
    for (int64_t i = 0; i < rows; ++i) {
      if (weight[i] > 0) weight[i] = 1.0 / static_cast<double>(size[center_of[i]]);
    }
  }
  double total = 0;
  for (int64_t i = 0; i < rows; ++i) total += weight[i];
  return total == 0 ? 1 : total;
}

double weighted_mean(const std::vector<double>& distance, const std::vector<double>& weight, double total) {
  double sum = 0;
  for (size_t i = 0; i < weight.size(); ++i) sum += weight[i] * distance[i];
  const double mean = sum / total;
  return mean < 0 ? 0.0 : mean;
}

template <class A>
void forward(const DirectionKernels<A>& kernels, const Tensor& student, const OptionalTensor& teacher,
             const Tensor& centers, const OptionalTensor& labels, int64_t ignore_index, bool balanced,
             Tensor& loss, Tensor& factors, Tensor& total) {
  const int64_t rows = student.size(0), columns = student.size(1), classes = centers.size(0);
  const Rows s(student, "student"), c(centers, "centers"), t(teacher ? *teacher : student, "teacher");
  const DirectionRows no_teacher = {nullptr, Dtype::f32, 0};
  const Centers center_of(labels, rows, classes, ignore_index);
  KD_CHECK(!balanced || center_of.by_label() || rows == 0, "direction: balanced needs labels");
  A* f = static_cast<A*>(factors.data_ptr());
  std::vector<double> distance(rows), weight(rows);
  for_rows(
      rows, columns,
      [&](int64_t i) {
        RowResult r;
        if (center_of[i] >= 0) {
          r = compare(
              kernels.sums(s.get(), teacher ? t.get() : no_teacher, c.get(), i, center_of[i], columns));
        }
        f[3 * i] = static_cast<A>(r.center_factor), f[3 * i + 1] = static_cast<A>(r.student_factor),
              f[3 * i + 2] = static_cast<A>(r.teacher_factor);
        distance[i] = r.distance, weight[i] = r.counts;
      },
      [] {});
  const double weights = balance(weight, center_of, classes, balanced);
  for (int64_t i = 0; balanced && i < rows; ++i) {
    for (int64_t j = 0; j < 3; ++j) f[3 * i + j] *= static_cast<A>(weight[i]);
  }
  *static_cast<A*>(total.data_ptr()) = static_cast<A>(weights);
  *static_cast<A*>(loss.data_ptr()) = static_cast<A>(weighted_mean(distance, weight, weights));
}

DirectionRows rows_of(Tensor* x) {
  if (!x) return {nullptr, Dtype::f32, 0};
  return {x->data_ptr(), dtype_of(x->scalar_type(), "gradient"), x->stride(0)};
}

bool is_streamed(const Tensor& x) { return x.numel() * static_cast<int64_t>(x.element_size()) >= kStreamed; }

// `factor` times the loss, and its gradient for the student: row by row, while the row is in the cache. What
// the rows weigh follows from the labels, unless a centre is 0: then all is done again without its rows.
template <class A>
double with_gradient(const DirectionKernels<A>& kernels, const Tensor& student, const OptionalTensor& teacher,
                     const Tensor& centers, const OptionalTensor& labels, int64_t ignore_index, bool balanced,
                     double factor, Tensor& gradient) {
  const int64_t rows = student.size(0), columns = student.size(1), classes = centers.size(0);
  const Rows s(student, "student"), c(centers, "centers"), t(teacher ? *teacher : student, "teacher");
  const DirectionRows no_teacher = {nullptr, Dtype::f32, 0}, to = rows_of(&gradient);
  const Centers center_of(labels, rows, classes, ignore_index);
  KD_CHECK(!balanced || center_of.by_label() || rows == 0, "direction: balanced needs labels");
  const bool streams = is_streamed(gradient);
  std::vector<char> counts(rows), counted(rows);
  for (int64_t i = 0; i < rows; ++i) counts[i] = center_of[i] >= 0;
  std::vector<double> distance(rows), weight(rows);
  while (true) {
    weight.assign(counts.begin(), counts.end());
    const double total = balance(weight, center_of, classes, balanced);
    const auto row = [&](int64_t i) {
      RowResult r;
      if (counts[i]) {
        r = compare(kernels.sums(s.get(), teacher ? t.get() : no_teacher, c.get(), i, center_of[i], columns));
      }
      counted[i] = r.counts, distance[i] = r.distance;
      const double scale = factor * weight[i] / total;
      kernels.mix(scale * r.center_factor, c.get(), center_of[i], scale * r.student_factor, s.get(), to, i,
                  columns, streams);
    };
    for_rows(rows, columns, row, kernels.end_streams);
    if (counted == counts) return factor * weighted_mean(distance, weight, total);
    counts = counted;
  }
}

template <class A>
void backward(const DirectionKernels<A>& kernels, const Tensor& grad, const Tensor& student,
              const OptionalTensor& teacher, const Tensor& centers, const OptionalTensor& labels,
              const Tensor& factors, const Tensor& total, int64_t ignore_index, Tensor* grad_student,
              Tensor* grad_teacher) {
  const int64_t rows = student.size(0), columns = student.size(1);
  const Rows s(student, "student"), c(centers, "centers"), t(teacher ? *teacher : student, "teacher");
  const Centers center_of(labels, rows, centers.size(0), ignore_index);
  const A* f = static_cast<const A*>(factors.const_data_ptr());
  const double scale = static_cast<double>(*static_cast<const A*>(grad.const_data_ptr())) /
                       static_cast<double>(*static_cast<const A*>(total.const_data_ptr()));
  const DirectionRows to_student = rows_of(grad_student), to_teacher = rows_of(grad_teacher);
  const bool streams = is_streamed(grad_student ? *grad_student : student);
  const auto row = [&](int64_t i) {
    const double f0 = scale * static_cast<double>(f[3 * i]), f1 = scale * static_cast<double>(f[3 * i + 1]),
                 f2 = scale * static_cast<double>(f[3 * i + 2]);
    if (grad_student) kernels.mix(f0, c.get(), center_of[i], f1, s.get(), to_student, i, columns, streams);
    if (grad_teacher) kernels.mix(0, c.get(), 0, f2, t.get(), to_teacher, i, columns, streams);
  };
  for_rows(rows, columns, row, kernels.end_streams);
}

// Kernels write rows whose columns are neighbours; laid_out_like gives them the layout that the fake
// promises.
Tensor gradient_like(const Tensor& x) { return new_result(x, {x.size(0), x.size(1)}); }

Tensor laid_out_like(const Tensor& x, const Tensor& gradient) {
  if (x.is_contiguous()) return gradient;
  Tensor result = torch::stable::empty_like(x);
  if (result.stride(1) == gradient.stride(1) && result.stride(0) == gradient.stride(0)) return gradient;
  return torch::stable::copy_(result, gradient);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> direction_cpu(const Tensor& student, const OptionalTensor& teacher,
                                                 const Tensor& centers, const OptionalTensor& labels,
                                                 int64_t ignore_index, bool balanced) {
  check_shapes(student, teacher, centers);
  const bool wide = is_wide(student, teacher, centers);
  Tensor loss = empty(student, {}, wide), total = empty(student, {}, wide);
  Tensor factors = empty(student, {student.size(0), 3}, wide);
  const auto run = [&](const auto& kernels) {
    forward(kernels, student, teacher, centers, labels, ignore_index, balanced, loss, factors, total);
  };
  wide ? run(KD_DISPATCH_ISA(direction_double)) : run(KD_DISPATCH_ISA(direction_float));
  return {loss, factors, total};
}

std::tuple<Tensor, Tensor> direction_with_gradient_cpu(const Tensor& student, const OptionalTensor& teacher,
                                                       const Tensor& centers, const OptionalTensor& labels,
                                                       int64_t ignore_index, bool balanced, double weight) {
  check_shapes(student, teacher, centers);
  const bool wide = is_wide(student, teacher, centers);
  Tensor loss = empty(student, {}, wide), gradient = gradient_like(student);
  const auto run = [&](const auto& kernels, auto zero) {
    *static_cast<decltype(zero)*>(loss.data_ptr()) = static_cast<decltype(zero)>(
        with_gradient(kernels, student, teacher, centers, labels, ignore_index, balanced, weight, gradient));
  };
  wide ? run(KD_DISPATCH_ISA(direction_double), double{}) : run(KD_DISPATCH_ISA(direction_float), float{});
  return {loss, laid_out_like(student, gradient)};
}

std::tuple<Tensor, Tensor> direction_backward_cpu(const Tensor& grad, const Tensor& student,
                                                  const OptionalTensor& teacher, const Tensor& centers,
                                                  const OptionalTensor& labels, const Tensor& factors,
                                                  const Tensor& total, int64_t ignore_index,
                                                  bool /*balanced*/, bool need_student, bool need_teacher) {
  check_shapes(student, teacher, centers);
  need_teacher = need_teacher && teacher;
  Tensor grad_student = need_student ? gradient_like(student) : torch::stable::new_empty(student, {0});
  Tensor grad_teacher = need_teacher ? gradient_like(*teacher) : torch::stable::new_empty(student, {0});
  const auto run = [&](const auto& kernels) {
    backward(kernels, grad, student, teacher, centers, labels, factors, total, ignore_index,
             need_student ? &grad_student : nullptr, need_teacher ? &grad_teacher : nullptr);
  };
  is_wide(student, teacher, centers) ? run(KD_DISPATCH_ISA(direction_double))
                                     : run(KD_DISPATCH_ISA(direction_float));
  if (need_student) grad_student = laid_out_like(student, grad_student);
  if (need_teacher) grad_teacher = laid_out_like(*teacher, grad_teacher);
  return {grad_student, grad_teacher};
}

}  // namespace kd
