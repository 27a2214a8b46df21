// Op logits on a GPU. Formulas: kdfast/reference/logits.py.
//
//   forward   forward_small                     1 launch on GPUs that have clusters, for small problems
//             forward_rows, finish              2 launches (dist: dist_rows, dist_columns, finish: 3)
//   backward  backward_rows or dist_gradient    1 launch for both sides
//
// Bytes: forward 2 R K elements (dist: 7 R K, all but the first from the caches), backward 2 R K read (dist
// twice) and R K written for each side; about 4 exponentials per logit. Meant for inputs that fit the L2
// cache.

#include <algorithm>

#include "common/rounding.h"
#include "logits.h"
#include "logits_dist.cuh"
#include "logits_rows.cuh"
#include "logits_small.cuh"

namespace kd::logits {
namespace {

template <class T>
dim3 row_threads(int64_t classes) {
  return whole_warps((classes + kPack<T> - 1) / kPack<T>);
}

template <class T>
cudaError_t forward_small(const kd_logits_problem& p, const Call<T>& call, accumulator<T>* loss,
                          cudaStream_t stream) {
  switch (p.kind) {
    case KD_LOGITS_KL:
      return launch_small<T, KD_LOGITS_KL>(call, loss, stream);
    case KD_LOGITS_DKD:
      return launch_small<T, KD_LOGITS_DKD>(call, loss, stream);
    case KD_LOGITS_NKD:
      return launch_small<T, KD_LOGITS_NKD>(call, loss, stream);
    default:
      return launch_small<T, KD_LOGITS_DIST>(call, loss, stream);
  }
}

template <class T>
cudaError_t forward(const kd_logits_problem& p, void* loss_, void* saved, void* values, cudaStream_t stream) {
  const Call<T> call(p, saved, values);
  auto* const loss = static_cast<accumulator<T>*>(loss_);
  if constexpr (sizeof(T) < 8) {
    if (is_small(p)) return forward_small(p, call, loss, stream);
  }
  const dim3 rows(static_cast<unsigned>(p.rows)), threads = row_threads<T>(p.classes);
  const bool dist = p.kind == KD_LOGITS_DIST;
  if (p.rows > 0) {
    const auto kernel = dist                      ? dist_rows<T>
                        : p.kind == KD_LOGITS_KL  ? forward_rows<T, false, false>
                        : p.kind == KD_LOGITS_DKD ? forward_rows<T, true, false>
                                                  : forward_rows<T, true, true>;
    const cudaError_t error = KD_LAUNCH(kernel, rows, threads, 0, stream, call);
    if (error != cudaSuccess) return error;
  }
  if (dist) {
    const dim3 tiles(static_cast<unsigned>(column_tiles(p.classes)));
    const int64_t lanes = ceil_div(p.rows, kHeldRows);  // of the rows of a tile
    const cudaError_t error =
        KD_LAUNCH(dist_columns<T>, tiles, whole_warps(kColumns * lanes, kColumnThreads<T>), 0, stream, call);
    if (error != cudaSuccess) return error;
  }
  return KD_LAUNCH(finish<T>, dim3(1), whole_warps(std::max(p.rows, dist ? p.classes : 0), kLargestBlock), 0,
                   stream, call, loss);
}

template <class T>
cudaError_t backward(const kd_logits_problem& p, const void* grad, const void* saved,
                     const kd_rows& grad_student, const kd_rows& grad_teacher, cudaStream_t stream) {
  const Call<T> call(p, const_cast<void*>(saved), nullptr);
  const int sides = (grad_student.data != nullptr) + (grad_teacher.data != nullptr);
  if (p.rows == 0 || sides == 0) return cudaSuccess;
  const auto kernel = p.kind == KD_LOGITS_DIST  ? dist_gradient<T>
                      : p.kind == KD_LOGITS_KL  ? backward_rows<T, false, false>
                      : p.kind == KD_LOGITS_DKD ? backward_rows<T, true, false>
                                                : backward_rows<T, true, true>;
  return KD_LAUNCH(kernel, dim3(static_cast<unsigned>(p.rows), sides), row_threads<T>(p.classes), 0, stream,
                   call, static_cast<const accumulator<T>*>(grad), Rows<T>(grad_student),
                   Rows<T>(grad_teacher));
}

template <class F>
cudaError_t dispatch(const kd_logits_problem& p, const F& f) {
  if (p.kind < KD_LOGITS_KL || p.kind > KD_LOGITS_DIST) return cudaErrorInvalidValue;
  switch (p.dtype) {
    case KD_F32:
      return f(float{});
    case KD_F64:
      return f(double{});
    case KD_F16:
      return f(__half{});
    case KD_BF16:
      return f(__nv_bfloat16{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace kd::logits

extern "C" {

int64_t kd_logits_saved(const kd_logits_problem* problem) {
  const int64_t columns = problem->kind == KD_LOGITS_DIST ? 5 * problem->classes : 0;
  return problem->rows * kd::logits::row_width(problem->kind) + columns + 1;
}

int64_t kd_logits_values(const kd_logits_problem* problem) {
  return problem->rows + (problem->kind == KD_LOGITS_DIST ? problem->classes : 0);
}

int32_t kd_logits_forward(const kd_logits_problem* problem, void* loss, void* saved, void* values,
                          void* stream) {
  return kd::logits::dispatch(*problem, [&](auto zero) {
    return kd::logits::forward<decltype(zero)>(*problem, loss, saved, values,
                                               static_cast<cudaStream_t>(stream));
  });
}

int32_t kd_logits_backward(const kd_logits_problem* problem, const void* grad, const void* saved,
                           const kd_rows* grad_student, const kd_rows* grad_teacher, void* stream) {
  return kd::logits::dispatch(*problem, [&](auto zero) {
    return kd::logits::backward<decltype(zero)>(*problem, grad, saved, *grad_student, *grad_teacher,
                                                static_cast<cudaStream_t>(stream));
  });
}
}
