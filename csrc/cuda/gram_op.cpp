// torch's side of the CUDA gram op: checks, views as [groups, rows, features], outputs, workspace, stream.

#include <torch/csrc/stable/ops.h>

#include <array>
#include <vector>

#include "common/cuda_stream.h"
#include "common/dtype.h"
#include "cuda/gram.h"
#include "cuda/gram_ops.h"

namespace kd {
namespace {

using torch::stable::Tensor;

// kdfast/kernels/gram_cuda.py holds the same numbers.
constexpr int64_t kMaxGroups = 64, kMaxRows = 1024, kMaxElements = 1 << 20;

int32_t dtype_code(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return KD_GRAM_F32;
    case ScalarType::Half:
      return KD_GRAM_F16;
    case ScalarType::BFloat16:
      return KD_GRAM_BF16;
    default:
      KD_CHECK(false, "gram: the cuda backend takes float32, float16 or bfloat16, got x of ",
               toString(x.scalar_type()));
  }
  return KD_GRAM_F32;
}

// The stride of axes [first, last) as one axis.
int64_t joint_stride(const Tensor& v, int first, int last, const char* name) {
  int64_t stride = 1, expected = -1;
  for (int a = last - 1; a >= first; --a) {
    if (v.size(a) == 1) continue;
    if (expected < 0) {
      stride = v.stride(a);
    } else {
      KD_CHECK(v.stride(a) == expected, "gram: the cuda backend needs the ", first == 1 ? "rows" : "features",
               " of ", name, " evenly spaced in memory; axes ", first, " to ", last - 1, " are not");
    }
    expected = v.stride(a) * v.size(a);
  }
  return stride;
}

kd_gram_matrix matrix(const Tensor& v, void* data, const char* name) {
  return {data, v.stride(0), joint_stride(v, 1, 3, name), joint_stride(v, 3, 6, name),
          v.size(3) * v.size(4) * v.size(5)};
}

// The kernels only read x and y.
void* read_only(const Tensor& v) { return const_cast<void*>(v.const_data_ptr()); }

kd_gram_problem make_problem(const Tensor& x, const Tensor& y, int64_t compare, bool centered, bool cosine,
                             bool inter, bool feature_side) {
  KD_CHECK(compare == 0 && !cosine && !feature_side,
           "gram: the cuda backend computes compare=\"cka\" on the Gram side without cosine, got compare=",
           compare, ", cosine=", cosine, ", feature_side=", feature_side);
  KD_CHECK(x.dim() == 6 && y.dim() == 6, "gram: x and y must have 6 axes, got ", x.dim(), " and ", y.dim());
  KD_CHECK(y.is_cuda() && x.get_device_index() == y.get_device_index(),
           "gram: x and y must be on one device");
  KD_CHECK(x.scalar_type() == y.scalar_type(), "gram: the cuda backend needs x and y of one dtype, got ",
           toString(x.scalar_type()), " and ", toString(y.scalar_type()));
  kd_gram_problem problem{matrix(x, read_only(x), "x"),
                          matrix(y, read_only(y), "y"),
                          x.size(0),
                          x.size(1) * x.size(2),
                          dtype_code(x),
                          centered,
                          inter};
  const int64_t dx = problem.x.features, dy = problem.y.features, groups = problem.groups,
                rows = problem.rows;
  KD_CHECK(y.size(0) == groups && y.size(1) * y.size(2) == rows,
           "gram: x and y must have the same groups and rows, got ", groups, " x ", rows, " and ", y.size(0),
           " x ", y.size(1) * y.size(2));
  KD_CHECK(!inter || dx == dy, "gram: inter needs x and y of the same features, got ", dx, " and ", dy);
  KD_CHECK(groups > 0 && rows > 0 && dx > 0 && dy > 0, "gram: the cuda backend needs non-empty x and y");
  KD_CHECK(groups <= kMaxGroups && rows <= kMaxRows && groups * rows * (dx > dy ? dx : dy) <= kMaxElements,
           "gram: the cuda backend is for small inputs (at most ", kMaxGroups, " groups, ", kMaxRows,
           " rows, ", kMaxElements, " elements), got ", groups, " groups of ", rows, " rows and ", dx,
           " and ", dy, " features");
  return problem;
}

Tensor empty(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

float* floats(const Tensor& v) { return static_cast<float*>(v.mutable_data_ptr()); }

template <int kAxes>
std::array<int64_t, kAxes> strides_of(const Tensor& v) {
  std::array<int64_t, kAxes> strides;
  for (int a = 0; a < kAxes; ++a) strides[a] = v.stride(a);
  return strides;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> gram_cuda(const Tensor& x, const Tensor& y, int64_t compare, bool centered,
                                             bool cosine, bool inter, bool feature_side, bool save) {
  const kd_gram_problem problem = make_problem(x, y, compare, centered, cosine, inter, feature_side);
  const DeviceGuard guard(x.get_device_index());
  const int64_t groups = problem.groups, terms = inter ? 2 : 1, n = problem.rows + inter;
  const Tensor products = empty(x, {terms, 3, groups}), distance = empty(x, {terms, groups});
  const Tensor saved = save ? empty(x, {groups, (inter ? 3 : 2) * n * n}) : empty(x, {0});
  const Tensor workspace = empty(x, {kd_gram_workspace(&problem, KD_GRAM_FORWARD)});
  KD_CUDA_CHECK(static_cast<cudaError_t>(kd_gram_forward(&problem, floats(products), floats(distance),
                                                         save ? floats(saved) : nullptr, floats(workspace),
                                                         current_stream(x.get_device_index()))));
  return {products, distance, saved};
}

std::tuple<Tensor, Tensor> gram_backward_cuda(const Tensor& grad_products, const Tensor& grad_distance,
                                              const Tensor& x, const Tensor& y, const Tensor& saved,
                                              int64_t compare, bool centered, bool cosine, bool inter,
                                              bool feature_side, bool need_x, bool need_y) {
  const kd_gram_problem problem = make_problem(x, y, compare, centered, cosine, inter, feature_side);
  KD_CHECK(
      grad_products.dim() == 3 && grad_products.scalar_type() == ScalarType::Float &&
          grad_distance.dim() == 2 && grad_distance.scalar_type() == ScalarType::Float,
      "gram_backward: grad_products [terms, 3, groups] and grad_distance [terms, groups] must be float32");
  const DeviceGuard guard(x.get_device_index());
  const bool kept = saved.numel() > 0;
  const Tensor grad_x = need_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  const Tensor grad_y = need_y ? torch::stable::empty_like(y) : torch::stable::new_empty(y, {0});
  const kd_gram_matrix none{};
  const kd_gram_matrix to_x = need_x ? matrix(grad_x, grad_x.mutable_data_ptr(), "grad_x") : none;
  const kd_gram_matrix to_y = need_y ? matrix(grad_y, grad_y.mutable_data_ptr(), "grad_y") : none;
  const Tensor workspace =
      empty(x, {kd_gram_workspace(&problem, kept ? KD_GRAM_BACKWARD_SAVED : KD_GRAM_BACKWARD_AGAIN)});
  KD_CUDA_CHECK(static_cast<cudaError_t>(kd_gram_backward(
      &problem, static_cast<const float*>(grad_products.const_data_ptr()),
      strides_of<3>(grad_products).data(), static_cast<const float*>(grad_distance.const_data_ptr()),
      strides_of<2>(grad_distance).data(), kept ? floats(saved) : nullptr, &to_x, &to_y, floats(workspace),
      current_stream(x.get_device_index()))));
  return {grad_x, grad_y};
}

}  // namespace kd
