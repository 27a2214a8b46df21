// Op gram on the CPU. Formulas of one group: gram_terms.h; plan and threads: gram_problem.h.

#include <torch/csrc/stable/ops.h>

#include "cpu/gram_ops.h"
#include "cpu/gram_run.h"
#include "cpu/result.h"

namespace kd {

namespace {

void check_axes(const GramAxes& x, const GramAxes& y, bool inter) {
  for (int a = 0; a < 3; ++a) {
    KD_CHECK(x.size(a) == y.size(a), "gram: x and y must share groups and rows, axis ", a, " has ", x.size(a),
             " and ", y.size(a));
  }
  for (int a = 3; a < 6 && inter; ++a) {
    KD_CHECK(x.size(a) == y.size(a), "gram: inter needs equal features, axis ", a, " has ", x.size(a),
             " and ", y.size(a));
  }
}

}  // namespace

GramFlags gram_flags(const Tensor& x, const Tensor& y, int64_t compare, bool centered, bool cosine,
                     bool inter, bool feature_side) {
  KD_CHECK(x.dim() == 6 && y.dim() == 6, "gram: x and y must be views [G, R1, R2, F1, F2, F3], got ", x.dim(),
           " and ", y.dim(), " axes");
  check_axes(x, y, inter);
  return gram_flags(compare, centered, cosine, inter, feature_side);
}

GramFlags gram_flags(int64_t compare, bool centered, bool cosine, bool inter, bool feature_side) {
  KD_CHECK(0 <= compare && compare <= static_cast<int64_t>(Compare::difference), "gram: unknown comparison ",
           compare);
  const auto c = static_cast<Compare>(compare);
  KD_CHECK(!inter || (c == Compare::cka && !cosine && !feature_side), "gram: inter goes with plain cka only");
  KD_CHECK(!feature_side || c == Compare::cka || c == Compare::difference,
           "gram: no feature side for comparison ", compare);
  KD_CHECK(!(feature_side && cosine && centered),
           "gram: the feature side of centred unit rows is not implemented");
  // U-centred Grams do not depend on the features' means, which would cost them digits.
  return {c, centered || c == Compare::unbiased, cosine, inter, feature_side};
}

int64_t saved_elements(int64_t n, int64_t dx, int64_t dy, bool inter, bool feature_side) {
  if (feature_side) return dx * (dx + 1) / 2 + dy * (dy + 1) / 2 + dx * dy + 2 * (dx + dy);
  const int64_t rows = n + inter;
  return rows * (rows + 1) + inter * (rows * rows + 4 * n);
}

namespace {

Tensor empty(const Tensor& like, std::vector<int64_t> size, bool wide) {
  return new_result(like, size, wide ? ScalarType::Double : ScalarType::Float);
}

bool is_wide(const Tensor& x, const Tensor& y) {
  return x.scalar_type() == ScalarType::Double || y.scalar_type() == ScalarType::Double;
}

// Views of the inputs in their own shapes (kdfast/ops/gram.py): samples [N, ...], columns [N, K] whose rows
// are K, pixels [B, C, H, W] whose rows are H W.
enum class Layout : int { samples, columns, pixels };

GramAxes axes_of(const Tensor& x, Layout layout) {
  const int dim = static_cast<int>(x.dim());
  switch (layout) {
    case Layout::samples:
      KD_CHECK(1 < dim && dim <= 4, "gram: samples need 2 to 4 axes, got ", dim);
      return {x, {-1, 0, -1, dim > 3 ? 1 : -1, dim > 2 ? dim - 2 : -1, dim - 1}};
    case Layout::columns:
      KD_CHECK(dim == 2, "gram: columns need 2 axes, got ", dim);
      return {x, {-1, 1, -1, -1, -1, 0}};
    case Layout::pixels:
      KD_CHECK(dim == 4, "gram: pixels need 4 axes, got ", dim);
      return {x, {0, 2, 3, -1, -1, 1}};
  }
  KD_CHECK(false, "gram: unknown layout ", static_cast<int>(layout));
}

template <class A>
void with_gradient(const GramAxes& x, const GramAxes& y, const GramAxes& gradient, const GramFlags& flags,
                   const double (&weights)[2], Tensor& loss) {
  const GramProblem<A> problem(view_sides<A>(x, y, &gradient, nullptr, flags), x.size(0), flags);
  *static_cast<A*>(loss.data_ptr()) = static_cast<A>(run_with_gradient(problem, weights));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> gram_cpu(const Tensor& x, const Tensor& y, int64_t compare, bool centered,
                                            bool cosine, bool inter, bool feature_side, bool save) {
  const Workspaces::Call call;
  const GramFlags flags = gram_flags(x, y, compare, centered, cosine, inter, feature_side);
  KD_CHECK(!(save && cosine),
           "gram: save must be False with cosine, whose backward also needs the row norms");
  const bool wide = is_wide(x, y);
  const int64_t groups = x.size(0), terms = inter ? 2 : 1;
  const int64_t dx = x.size(3) * x.size(4) * x.size(5), dy = y.size(3) * y.size(4) * y.size(5);
  const int64_t per_group = saved_elements(x.size(1) * x.size(2), dx, dy, inter, feature_side);
  Tensor products = empty(x, {terms, 3, groups}, wide), distance = empty(x, {terms, groups}, wide);
  Tensor saved = save ? empty(x, {groups, per_group}, wide) : empty(x, {0}, wide);
  if (wide) {
    run_forward(GramProblem<double>(x, y, flags), products, distance, saved);
  } else {
    run_forward(GramProblem<float>(x, y, flags), products, distance, saved);
  }
  return {products, distance, saved};
}

std::tuple<Tensor, Tensor> gram_backward_cpu(const Tensor& grad_products, const Tensor& grad_distance,
                                             const Tensor& x, const Tensor& y, const Tensor& saved,
                                             int64_t compare, bool centered, bool cosine, bool inter,
                                             bool feature_side, bool need_x, bool need_y) {
  const Workspaces::Call call;
  const GramFlags flags = gram_flags(x, y, compare, centered, cosine, inter, feature_side);
  Tensor grad_x = new_gradient(x, need_x), grad_y = new_gradient(y, need_y);
  Tensor *to_x = need_x ? &grad_x : nullptr, *to_y = need_y ? &grad_y : nullptr;
  if (is_wide(x, y)) {
    run_backward(GramProblem<double>(x, y, flags, to_x, to_y), grad_products, grad_distance, saved);
  } else {
    run_backward(GramProblem<float>(x, y, flags, to_x, to_y), grad_products, grad_distance, saved);
  }
  return {grad_x, grad_y};
}

std::tuple<Tensor, Tensor> gram_with_gradient_cpu(const Tensor& student, const Tensor& teacher,
                                                  int64_t layout, int64_t compare, bool centered, bool cosine,
                                                  bool inter, bool feature_side, double weight,
                                                  double inter_weight) {
  const Workspaces::Call call;
  const auto seen = static_cast<Layout>(layout);
  const GramAxes x = axes_of(student, seen), y = axes_of(teacher, seen);
  check_axes(x, y, inter);
  const GramFlags flags = gram_flags(compare, centered, cosine, inter, feature_side);
  Tensor gradient = new_gradient(student);
  const bool wide = is_wide(student, teacher);
  Tensor loss = empty(student, {}, wide);
  const GramAxes written = axes_of(gradient, seen);
  const double weights[2] = {weight, inter_weight};
  wide ? with_gradient<double>(x, y, written, flags, weights, loss)
       : with_gradient<float>(x, y, written, flags, weights, loss);
  return {loss, gradient};
}

}  // namespace kd
