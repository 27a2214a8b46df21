#pragma once

// The forward of small problems, where launches are most of the time: a warp has a row, and the phases of all
// rows, of columns (dist) and of the sum are one launch where they fit a cluster.

#include <algorithm>

#include "cluster.h"
#include "common/rounding.h"
#include "logits_dist.cuh"
#include "logits_rows.cuh"

namespace kd::logits {
namespace {

template <int kKind>
constexpr int kSmallThreads = kKind == KD_LOGITS_DIST ? 512 : kLargestBlock;  // dist needs more registers
constexpr int64_t kSmallRows = 1024, kSmallClasses = 1024, kSmallLogits = 1 << 18;
constexpr int64_t kSmallColumns = 256;  // dist: a block has two tiles of them

enum Phase : int { kRowPhase, kColumnPhase, kSumPhase };

template <class T, int kKind>
__global__ __launch_bounds__(kSmallThreads<kKind>, 1) void forward_small(Call<T> call, accumulator<T>* loss,
                                                                         int first, int last) {
  if (first == kRowPhase) {
    const int64_t warps = blockDim.x / 32;
    for (int64_t row = blockIdx.x * warps + threadIdx.x / 32; row < call.rows; row += gridDim.x * warps) {
      if constexpr (kKind == KD_LOGITS_DIST) {
        dist_row(call, row, WarpTeam{});
      } else {
        forward_row<T, kKind != KD_LOGITS_KL, kKind == KD_LOGITS_NKD, sizeof(T) == 4 ? 2 : 1>(call, row,
                                                                                              WarpTeam{});
      }
    }
    if (last > first) cluster_barrier();
  }
  if (kKind == KD_LOGITS_DIST && first <= kColumnPhase && last >= kColumnPhase) {
    for (int64_t tile = blockIdx.x; tile < column_tiles(call.classes); tile += gridDim.x) {
      dist_tile(call, tile);
    }
    if (last > kColumnPhase) cluster_barrier();
  }
  if (last == kSumPhase && blockIdx.x == gridDim.x - 1) add_up(call, loss);
}

inline bool is_small(const kd_logits_problem& p) {
  const int64_t classes = p.kind == KD_LOGITS_DIST ? kSmallColumns : kSmallClasses;
  return p.dtype != KD_F64 && 0 < p.rows && p.rows <= kSmallRows && p.classes <= classes &&
         p.rows * p.classes <= kSmallLogits;
}

template <class T, int kKind>
cudaError_t launch_small(const Call<T>& call, accumulator<T>* loss, cudaStream_t stream) {
  constexpr auto kernel = forward_small<T, kKind>;
  const int cluster = cluster_blocks<kernel>(kSmallThreads<kKind>);
  const int64_t each = ceil_div(call.rows, cluster),
                warps = std::min<int64_t>(each, kSmallThreads<kKind> / 32);
  const dim3 threads(static_cast<unsigned>(32 * warps));
  const auto blocks = static_cast<unsigned>(ceil_div(call.rows, warps));
  if (cluster > 1 || blocks == 1) {
    return KD_LAUNCH_CLUSTER(kernel, dim3(blocks == 1 ? 1 : cluster), threads, 0, stream, call, loss,
                             int{kRowPhase}, int{kSumPhase});
  }
  for (int phase = kRowPhase; phase <= kSumPhase; ++phase) {
    if (phase == kColumnPhase && kKind != KD_LOGITS_DIST) continue;
    const cudaError_t error = KD_LAUNCH(kernel, dim3(phase == kSumPhase ? 1 : blocks), threads, 0, stream,
                                        call, loss, phase, phase);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace
}  // namespace kd::logits
