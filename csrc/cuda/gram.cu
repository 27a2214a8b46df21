// Linear CKA of small inputs (logits), centred or not, alone or with the comparison of the transposes, in few
// launches:
//   forward   gram_statistics, gram_products                     2 launches
//   backward  gram_statistics, [gram_products,] gram_gradient    2 launches, 3 where the Grams were not saved
//
// Notation (kdfast/reference/gram.py): N rows, D features; K = Xc Xc^T, L = Yc Yc^T with columns centred;
// with `inter` also Kr, Lr, M = Xr Yr^T with rows centred, since |Xr^T Yr|^2-like products of the D x D side
// are those of the N x N side. Grams are divided by their trace first, so their squares neither overflow nor
// vanish: A = K / tr K, B = L / tr L. The distance is computed in one pass and keeps its digits near 0: with
// a = |A|, b = |B|,
//   1 - <A,B>/(a b) = (|A - B|^2 - (a - b)^2) / (2 a b),   a - b = <A - B, A + B> / (a + b).
//
// Counts per group; x and y have N x D elements of e bytes. Factors are for (no inter | inter | centred
// inter):
//   statistics  reads 2 N D e (1 | 1 | 2) bytes; 4 operations per value
//   products    N^2 D (1 | 2 | 3) multiply-adds; every tile of rows is read N / tile times from the caches;
//               moves 4 N^2 (1 | 2 | 3) bytes per split to the cache and back, keeps as many floats at most
//   gradient    N^2 D (1 | 2 | 3) multiply-adds per side, writes N D e bytes per side

#include <algorithm>

#include "common/rounding.h"
#include "gram.h"
#include "gram_gradient.cuh"
#include "gram_products.cuh"

namespace kd::gram {
namespace {

// Two blocks on each multiprocessor of a large GPU; fixed, so results do not depend on the GPU.
constexpr int kTargetBlocks = 264;
constexpr int kMaxSplits = 8, kMinSplitFeatures = 32;

int element_size(int32_t dtype) { return dtype == KD_GRAM_F32 ? 4 : 2; }

Operand operand(const kd_gram_matrix& m, int32_t dtype) {
  Operand out{};
  out.data = m.data;
  out.group_stride = m.group_stride, out.row_stride = m.row_stride, out.feature_stride = m.feature_stride;
  out.features = static_cast<int>(m.features);
  out.along_rows = m.row_stride == 1 && m.feature_stride != 1;
  const int64_t far = out.along_rows ? m.feature_stride : m.row_stride;
  out.quads = (out.along_rows || m.feature_stride == 1) && far % 4 == 0 && m.group_stride % 4 == 0 &&
              reinterpret_cast<uintptr_t>(m.data) % (4 * element_size(dtype)) == 0;
  return out;
}

int micro(const kd_gram_problem& p) { return p.rows <= 128 ? 2 : 4; }

// Fills a plan's sizes and offsets; returns the floats of the workspace.
int64_t make_plan(const kd_gram_problem& p, int32_t phase, Plan* plan) {
  plan->x = operand(p.x, p.dtype), plan->y = operand(p.y, p.dtype);
  plan->rows = static_cast<int>(p.rows), plan->centered = p.centered, plan->inter = p.inter;
  const int tile = 16 * micro(p), tiles = ceil_div(p.rows, tile);
  plan->tile = tile;
  plan->pairs = tiles * (tiles + 1) / 2;
  plan->kinds = p.inter ? (p.centered ? 6 : 4) : 2;
  const int64_t features = std::max(p.x.features, p.y.features),
                blocks = p.groups * plan->pairs * plan->kinds;
  const int wanted =
      std::min<int64_t>({ceil_div(kTargetBlocks, blocks), kMaxSplits, ceil_div(features, kMinSplitFeatures)});
  plan->split_features = round_up(ceil_div(features, wanted), kMinSplitFeatures);
  plan->splits = ceil_div(features, plan->split_features);

  int64_t floats = 0;
  const auto take = [&](int64_t count) {
    const int64_t at = floats;
    floats += round_up(count, 4);
    return at;
  };
  for (Operand* side : {&plan->x, &plan->y}) {
    side->columns = take(2 * side->features);
    side->column_powers = take(side->features);
    side->rows = take(2 * p.rows);
    side->row_powers = take(p.rows);
  }
  plan->sums = take(plan->pairs * kSums);
  plan->counters = take(plan->pairs + 1);
  const bool multiplies = phase != KD_GRAM_BACKWARD_SAVED;
  plan->partial = take(multiplies ? int64_t{plan->pairs} * plan->kinds * plan->splits * tile * tile : 0);
  plan->matrices_stride = (p.inter ? 3 : 2) * (p.rows + p.inter) * (p.rows + p.inter);
  plan->workspace_stride = floats;
  return p.groups * floats + (phase == KD_GRAM_BACKWARD_AGAIN ? p.groups * plan->matrices_stride : 0);
}

template <class T>
cudaError_t launch_statistics(const kd_gram_problem& p, const Plan& plan, bool sum_saved,
                              cudaStream_t stream) {
  int blocks = ceil_div(p.x.features, kItems) + ceil_div(p.y.features, kItems);
  if (p.centered && p.inter) blocks += 2 * ceil_div(p.rows, kItems);
  if (sum_saved) blocks += plan.pairs;
  const dim3 grid(blocks, 1, static_cast<unsigned>(p.groups));
  return KD_LAUNCH(gram_statistics<T>, grid, dim3(kThreads), 0, stream, plan, sum_saved);
}

template <class T>
cudaError_t launch_products(const kd_gram_problem& p, const Plan& plan, float* products, float* distance,
                            cudaStream_t stream) {
  const dim3 grid(plan.pairs * plan.kinds, plan.splits, static_cast<unsigned>(p.groups));
  const auto kernel = micro(p) == 2 ? gram_products<T, 2> : gram_products<T, 4>;
  return KD_LAUNCH(kernel, grid, dim3(kThreads), 0, stream, plan, products, distance);
}

template <class T>
cudaError_t launch_gradient(const kd_gram_problem& p, const Plan& plan, const Upstream& upstream,
                            const Gradient& grad_x, const Gradient& grad_y, cudaStream_t stream) {
  const int sides = (grad_x.data != nullptr) + (grad_y.data != nullptr);
  const int64_t features = std::max(p.x.features, p.y.features);
  const auto blocks = [&](int m) { return ceil_div(p.rows, 16 * m) * ceil_div(features, 16 * m); };
  const bool large = p.groups * sides * blocks(4) >= kTargetBlocks / 2;
  const dim3 grid(blocks(large ? 4 : 2), sides, static_cast<unsigned>(p.groups));
  const auto kernel = large ? gram_gradient<T, 4> : gram_gradient<T, 2>;
  return KD_LAUNCH(kernel, grid, dim3(kThreads), 0, stream, plan, upstream, grad_x, grad_y);
}

template <class T>
cudaError_t forward(const kd_gram_problem& p, const Plan& plan, float* products, float* distance,
                    cudaStream_t stream) {
  const cudaError_t error = launch_statistics<T>(p, plan, false, stream);
  return error != cudaSuccess ? error : launch_products<T>(p, plan, products, distance, stream);
}

template <class T>
cudaError_t backward(const kd_gram_problem& p, const Plan& plan, bool saved, const Upstream& upstream,
                     const Gradient& grad_x, const Gradient& grad_y, cudaStream_t stream) {
  cudaError_t error = launch_statistics<T>(p, plan, saved, stream);
  if (error == cudaSuccess && !saved) error = launch_products<T>(p, plan, nullptr, nullptr, stream);
  return error != cudaSuccess ? error : launch_gradient<T>(p, plan, upstream, grad_x, grad_y, stream);
}

template <class F>
cudaError_t dispatch(int32_t dtype, const F& run) {
  switch (dtype) {
    case KD_GRAM_F32:
      return run(float{});
    case KD_GRAM_F16:
      return run(__half{});
    case KD_GRAM_BF16:
      return run(__nv_bfloat16{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace kd::gram

extern "C" {

int64_t kd_gram_workspace(const kd_gram_problem* problem, int32_t phase) {
  kd::gram::Plan plan{};
  return kd::gram::make_plan(*problem, phase, &plan);
}

int32_t kd_gram_forward(const kd_gram_problem* problem, float* products, float* distance, float* saved,
                        float* workspace, void* stream) {
  kd::gram::Plan plan{};
  kd::gram::make_plan(*problem, KD_GRAM_FORWARD, &plan);
  plan.workspace = workspace;
  plan.matrices = saved;
  return kd::gram::dispatch(problem->dtype, [&](auto zero) {
    return kd::gram::forward<decltype(zero)>(*problem, plan, products, distance,
                                             static_cast<cudaStream_t>(stream));
  });
}

int32_t kd_gram_backward(const kd_gram_problem* problem, const float* grad_products,
                         const int64_t products_strides[3], const float* grad_distance,
                         const int64_t distance_strides[2], const float* saved, const kd_gram_matrix* grad_x,
                         const kd_gram_matrix* grad_y, float* workspace, void* stream) {
  if (grad_x->data == nullptr && grad_y->data == nullptr) return cudaSuccess;
  kd::gram::Plan plan{};
  kd::gram::make_plan(*problem, saved ? KD_GRAM_BACKWARD_SAVED : KD_GRAM_BACKWARD_AGAIN, &plan);
  plan.workspace = workspace;
  plan.matrices = saved ? const_cast<float*>(saved) : workspace + problem->groups * plan.workspace_stride;
  const kd::gram::Upstream upstream = {grad_products,
                                       grad_distance,
                                       {products_strides[0], products_strides[1], products_strides[2]},
                                       {distance_strides[0], distance_strides[1]}};
  const auto gradient = [](const kd_gram_matrix& m) {
    return kd::gram::Gradient{m.data, m.group_stride, m.row_stride, m.feature_stride};
  };
  return kd::gram::dispatch(problem->dtype, [&](auto zero) {
    return kd::gram::backward<decltype(zero)>(*problem, plan, saved != nullptr, upstream, gradient(*grad_x),
                                              gradient(*grad_y), static_cast<cudaStream_t>(stream));
  });
}
}
