#pragma once

// What projector.cpp (checks, threads) and projector.simd.cpp (arithmetic, once per instruction set) share.
// Plain data only, see gram.h.

#include <cstdint>

namespace kd {

constexpr int64_t kProjectorWidth = 16;  // widths are multiples of it: whole vectors of every instruction set

// Embeddings [rows, in], contiguous, and the norm's parameters [in].
struct ProjectorInputs {
  int64_t rows, in, out;
  const float *x, *noise;  // noise may be null
  const float *gamma, *beta, *mean, *scale;
};

struct ProjectorKernels {
  // sums [in] += those of x - ref, and of (x - ref)^2; all rows.
  void (*moments)(const float* x, int64_t rows, int64_t in, const float* ref, double* sums, double* squares);
  // Rows [begin, end) of z [rows, in], what the linear layer sees.
  void (*normalise)(const ProjectorInputs&, int64_t begin, int64_t end, float* z);
  // to [rows, width] = start [width], or 0 where it is null, + m [rows, columns], of any strides, times tile
  // [columns, width].
  void (*multiply)(const float* m, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns,
                   const float* tile, int64_t width, const float* start, float* to);
  // sums [width] += those of m's rows.
  void (*column_sums)(const float* m, int64_t rows, int64_t width, double* sums);
  // Of g [rows, in], rows [begin, end): times noise, in place; then by_beta += g, by_gamma += g (x - mean)
  // scale.
  void (*norm_sums)(const ProjectorInputs&, int64_t begin, int64_t end, float* g, double* by_beta,
                    double* by_gamma);
  // g = factor (g - offset - (x - mean) slope), rows [begin, end), in place.
  void (*norm_backward)(const ProjectorInputs&, int64_t begin, int64_t end, const float* factor,
                        const float* offset, const float* slope, float* g);
};

}  // namespace kd
