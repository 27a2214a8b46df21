// Op direction on a GPU. Formulas: kdfast/reference/direction.py.
//
//   forward   direction_small                  1 launch of a cluster, for small problems
//             direction_rows, direction_mean   2 launches
//             reads 3 B D elements once (class means from caches)
//   backward  direction_gradient               1 launch: reads 2 B D (1 per side and the centres), writes
//             B D per side
//
// A warp has a row. The balanced weight 1 / (rows of the same class) is counted by every warp over all
// labels.

#include <algorithm>

#include "cluster.h"
#include "common/rounding.h"
#include "direction.h"
#include "rows.cuh"

namespace kd::direction {
namespace {

constexpr int kSmallThreads = 512;
constexpr int64_t kSmallRows = 1024, kSmallElements = 1 << 18;
constexpr int kRowWarps = 4;            // few rows per block, to spread few rows over many multiprocessors
constexpr double kSquareFloor = 1e-24;  // NORM_FLOOR of the reference, squared

template <class T, class C>
struct Inputs {
  Rows<T> student, teacher;
  Rows<C> centers;
  const int64_t* labels;
  int64_t label_stride, rows, columns, classes, ignore_index;
  bool has_teacher, balanced;

  explicit Inputs(const kd_direction_problem& p)
      : student(p.student),
        teacher(p.teacher),
        centers(p.centers),
        labels(p.labels),
        label_stride(p.label_stride),
        rows(p.rows),
        columns(p.columns),
        classes(p.classes),
        ignore_index(p.ignore_index),
        has_teacher(p.teacher.data != nullptr),
        balanced(p.balanced) {}
};

template <class A>
__device__ A length(A square) {
  return square <= static_cast<A>(kSquareFloor) ? A(0) : root(square);  // of NaN: NaN
}

__device__ inline int64_t row_of_warp() { return int64_t{blockIdx.x} * (blockDim.x / 32) + threadIdx.x / 32; }

// Factors [3] of the gradients of a row, and parts [2]: its weight and its weighted distance. By a warp.
template <class T, class C, int kSteps>
__device__ void direction_row(const Inputs<T, C>& in, int64_t row, accumulator<T>* factors,
                              accumulator<T>* parts) {
  using A = accumulator<T>;
  constexpr int kCount = kPack<T>;
  const int lane = threadIdx.x % 32;
  const int64_t label = in.labels ? in.labels[row * in.label_stride] : row;
  const T *s_row = in.student.row(row), *t_row = in.has_teacher ? in.teacher.row(row) : nullptr;
  A dot = 0, ss = 0, tt = 0, cc = 0;
  const bool present = !in.labels || label != in.ignore_index;
  const bool wrong = present && (label < 0 || label >= in.classes), known = present && !wrong;
  const C* c_row = in.centers.row(known ? label : 0);
  constexpr int kStep = 32 * kCount;
  for (int64_t k = lane * kCount; k < in.columns; k += kSteps * kStep) {
    // Only the centre waits for the label; rows that do not count are read for nothing.
    A s[kSteps][kCount], c[kSteps][kCount] = {}, t[kSteps][kCount] = {};
    in.student.load(s_row, k, kStep, in.columns, A(0), s);
    if (in.has_teacher) in.teacher.load(t_row, k, kStep, in.columns, A(0), t);
    if (known) in.centers.load(c_row, k, kStep, in.columns, A(0), c);
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        dot += s[u][j] * c[u][j], ss += s[u][j] * s[u][j];
        tt += t[u][j] * t[u][j], cc += c[u][j] * c[u][j];
      }
    }
  }
  A sums[4] = {known ? dot : A(0), known ? ss : A(0), known ? tt : A(0), cc};
  warp_join(sums, Sum{});
  const A student = length(sums[1]), teacher = length(sums[2]), center = length(sums[3]);
  int same = 1;
  if (in.balanced) {
    same = 0;
    for (int64_t i = lane; i < in.rows; i += 32) same += in.labels[i * in.label_stride] == label;
    same = warp_sum(same);
  }
  if (lane != 0) return;
  const bool counts = present && (wrong || center != 0);
  const bool of_student = !(student < teacher);
  const A longest = of_student ? student : teacher, weight = counts ? A(1) / static_cast<A>(same) : A(0);
  const bool dead = longest == 0 || center == 0;
  const A inverse = dead ? A(0) : 1 / longest, center_inverse = dead ? A(0) : 1 / center;
  const A cosine = sums[0] * center_inverse * inverse, own = cosine * inverse * inverse * weight;
  factors[3 * row] = -center_inverse * inverse * weight;
  factors[3 * row + 1] = of_student ? own : A(0);
  factors[3 * row + 2] = of_student ? A(0) : own;
  parts[2 * row] = weight;
  parts[2 * row + 1] = wrong ? static_cast<A>(NAN) : counts ? weight * (1 - cosine) : A(0);
}

// By one block.
template <class A>
__device__ void add_up(const A* parts, int64_t rows, A* loss, A* total) {
  double sums[2] = {};
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < rows; i += blockDim.x) {
    sums[0] += static_cast<double>(__ldcg(parts + 2 * i));  // perhaps written by this launch
    sums[1] += static_cast<double>(__ldcg(parts + 2 * i + 1));
  }
  block_join(sums, Sum{});
  if (threadIdx.x != 0) return;
  const double weights = sums[0] == 0 ? 1 : sums[0];
  *total = static_cast<A>(weights);
  *loss = static_cast<A>(not_negative(sums[1] / weights));
}

template <class T, class C>
__global__ __launch_bounds__(32 * kRowWarps) void direction_rows(Inputs<T, C> in, accumulator<T>* factors,
                                                                 accumulator<T>* parts) {
  const int64_t row = row_of_warp();
  if (row < in.rows) direction_row<T, C, sizeof(T) == 2 ? 2 : 4>(in, row, factors, parts);
}

template <class A>
__global__ __launch_bounds__(kLargestBlock) void direction_mean(const A* parts, int64_t rows, A* loss,
                                                                A* total) {
  add_up(parts, rows, loss, total);
}

// Both in one launch of a cluster.
template <class T, class C>
__global__ __launch_bounds__(kSmallThreads) void direction_small(Inputs<T, C> in, accumulator<T>* factors,
                                                                 accumulator<T>* parts, accumulator<T>* loss,
                                                                 accumulator<T>* total) {
  for (int64_t row = row_of_warp(); row < in.rows; row += int64_t{gridDim.x} * (blockDim.x / 32)) {
    direction_row<T, C, sizeof(T) == 4 ? 2 : 1>(in, row, factors, parts);
  }
  cluster_barrier();
  if (blockIdx.x == gridDim.x - 1) add_up(parts, in.rows, loss, total);
}

template <class T, class C>
__global__ __launch_bounds__(32 * kRowWarps) void direction_gradient(Inputs<T, C> in,
                                                                     const accumulator<T>* grad,
                                                                     const accumulator<T>* factors,
                                                                     const accumulator<T>* total,
                                                                     Rows<T> to_student, Rows<T> to_teacher) {
  using A = accumulator<T>;
  constexpr int kCount = kPack<T>, kStep = 32 * kCount, kSteps = sizeof(T) == 2 ? 1 : 4;
  const int64_t row = row_of_warp();
  if (row >= in.rows) return;
  const A scale = *grad / *total;
  const A f0 = scale * factors[3 * row], f1 = scale * factors[3 * row + 1], f2 = scale * factors[3 * row + 2];
  const int64_t label = in.labels ? in.labels[row * in.label_stride] : row;
  const bool known = label >= 0 && label < in.classes;
  const C* c_row = in.centers.row(known ? label : 0);
  // A factor that is 0 leaves its row unread.
  const bool reads_center = f0 != 0 && known, reads_student = f1 != 0, reads_teacher = f2 != 0;
  for (int64_t k = threadIdx.x % 32 * kCount; k < in.columns; k += kSteps * kStep) {
    if (to_student.data) {
      A s[kSteps][kCount] = {}, c[kSteps][kCount] = {};
      if (reads_center) in.centers.load(c_row, k, kStep, in.columns, A(0), c);
      if (reads_student) in.student.load(in.student.row(row), k, kStep, in.columns, A(0), s);
#pragma unroll
      for (int u = 0; u < kSteps; ++u) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) s[u][j] = f0 * c[u][j] + f1 * s[u][j];
        to_student.store(to_student.row(row), k + u * kStep, in.columns, s[u]);
      }
    }
    if (to_teacher.data) {
      A t[kSteps][kCount] = {};
      if (reads_teacher) in.teacher.load(in.teacher.row(row), k, kStep, in.columns, A(0), t);
#pragma unroll
      for (int u = 0; u < kSteps; ++u) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) t[u][j] *= f2;
        to_teacher.store(to_teacher.row(row), k + u * kStep, in.columns, t[u]);
      }
    }
  }
}

dim3 row_blocks(int64_t rows) { return dim3(static_cast<unsigned>(ceil_div(rows, kRowWarps))); }

// f(T{}, C{}) with the types of the sides and of the centres.
template <class F>
cudaError_t dispatch(const kd_direction_problem& p, const F& f) {
  const bool same = p.center_dtype == p.dtype;
  if (!same && p.center_dtype != KD_F32) return cudaErrorInvalidValue;
  switch (p.dtype) {
    case KD_F32:
      return f(float{}, float{});
    case KD_F64:
      return same ? f(double{}, double{}) : cudaErrorInvalidValue;
    case KD_F16:
      return same ? f(__half{}, __half{}) : f(__half{}, float{});
    case KD_BF16:
      return same ? f(__nv_bfloat16{}, __nv_bfloat16{}) : f(__nv_bfloat16{}, float{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace kd::direction

extern "C" {

int32_t kd_direction_forward(const kd_direction_problem* problem, void* loss, void* factors, void* total,
                             void* parts, void* stream_) {
  namespace d = kd::direction;
  const auto stream = static_cast<cudaStream_t>(stream_);
  return d::dispatch(*problem, [&](auto side, auto center) -> cudaError_t {
    using T = decltype(side);
    using C = decltype(center);
    using A = kd::accumulator<T>;
    const int64_t rows = problem->rows;
    if constexpr (sizeof(T) < 8) {
      if (0 < rows && rows <= d::kSmallRows && rows * problem->columns <= d::kSmallElements) {
        constexpr auto kernel = d::direction_small<T, C>;
        const int cluster = kd::cluster_blocks<kernel>(d::kSmallThreads);
        const int64_t each = kd::ceil_div(rows, cluster),
                      warps = std::min<int64_t>(each, d::kSmallThreads / 32);
        const auto blocks = static_cast<unsigned>(kd::ceil_div(rows, warps));
        if (cluster > 1 || blocks == 1) {
          return KD_LAUNCH_CLUSTER(kernel, dim3(blocks == 1 ? 1 : cluster),
                                   dim3(static_cast<unsigned>(32 * warps)), 0, stream,
                                   d::Inputs<T, C>(*problem), static_cast<A*>(factors),
                                   static_cast<A*>(parts), static_cast<A*>(loss), static_cast<A*>(total));
        }
      }
    }
    if (problem->rows > 0) {
      const auto kernel = d::direction_rows<T, C>;
      const cudaError_t error =
          KD_LAUNCH(kernel, d::row_blocks(problem->rows), dim3(32 * d::kRowWarps), 0, stream,
                    d::Inputs<T, C>(*problem), static_cast<A*>(factors), static_cast<A*>(parts));
      if (error != cudaSuccess) return error;
    }
    return KD_LAUNCH(d::direction_mean<A>, dim3(1), kd::whole_warps(problem->rows, kd::kLargestBlock), 0,
                     stream, static_cast<const A*>(parts), problem->rows, static_cast<A*>(loss),
                     static_cast<A*>(total));
  });
}

int32_t kd_direction_backward(const kd_direction_problem* problem, const void* grad, const void* factors,
                              const void* total, const kd_rows* grad_student, const kd_rows* grad_teacher,
                              void* stream) {
  namespace d = kd::direction;
  if (problem->rows == 0 || (!grad_student->data && !grad_teacher->data)) return cudaSuccess;
  return d::dispatch(*problem, [&](auto side, auto center) -> cudaError_t {
    using T = decltype(side);
    using C = decltype(center);
    using A = kd::accumulator<T>;
    const auto kernel = d::direction_gradient<T, C>;
    return KD_LAUNCH(kernel, d::row_blocks(problem->rows), dim3(32 * d::kRowWarps), 0,
                     static_cast<cudaStream_t>(stream), d::Inputs<T, C>(*problem),
                     static_cast<const A*>(grad), static_cast<const A*>(factors),
                     static_cast<const A*>(total), kd::Rows<T>(*grad_student), kd::Rows<T>(*grad_teacher));
  });
}
}
