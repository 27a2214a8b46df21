#pragma once

// Kernels of attention_mask.cu.

#include "attention_mask.cuh"
#include "attention_mask.h"

namespace kd::attention {
namespace {

constexpr int kRowsPerChunk = 64;  // pixels of a chunk where channels are neighbours
constexpr int kGradientRows = 32;  // of a block of the backward
template <class T>
constexpr int kBatch = 32 / kVector<T>;  // rows that a warp loads before it stores anything
constexpr int kFactor = 3;               // terms: distances, then what their gradients are multiplied by

struct Sizes {
  int64_t batch, channels, pixels, chunks;
  bool planar;
};

struct Tile {
  int64_t first_row, rows, first_column, columns;  // `columns`: the end of them
};

template <class T>
constexpr int kColumns = 32 * kVector<T>;  // that a warp reads at once

template <class T>
__device__ Tile tile_of(const Sizes& s, int64_t chunk) {
  if (s.planar) {
    const int64_t first = chunk * kColumns<T>;
    return {0, s.channels, first, min(s.pixels, first + kColumns<T>)};
  }
  const int64_t first = chunk * kRowsPerChunk;
  return {first, min(s.pixels - first, int64_t{kRowsPerChunk}), 0, s.channels};
}

// Means of |x| and of x of student and teacher, [B, n] each; where x is not asked for they are the same.
struct Pooled {
  float *absolute[2], *plain[2];
};

struct PoolPlan {
  Sizes sizes;
  Matrix maps[2];
  Pooled spatial;
  float* parts;  // [kinds, maps, B, chunks, C]
  int* counter;
};

template <class T, bool kSigned>
__global__ void __launch_bounds__(kThreads) attention_pool(const __grid_constant__ PoolPlan p) {
  constexpr int kV = kVector<T>;
  const Sizes& s = p.sizes;
  const int64_t chunk = blockIdx.x, image = blockIdx.y;
  const int map = blockIdx.z, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0 && blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0) *p.counter = 0;
  const Matrix& x = p.maps[map];
  const Tile t = tile_of<T>(s, chunk);
  const float by_channels = 1.0f / s.channels, by_pixels = 1.0f / s.pixels;
  float *rows[2], *columns[2];
#pragma unroll
  for (int k = 0; k < 1 + kSigned; ++k) {
    float* const pixels = (k ? p.spatial.plain : p.spatial.absolute)[map] + image * s.pixels;
    float* const part =
        p.parts + (((k * int64_t{gridDim.z} + map) * s.batch + image) * s.chunks + chunk) * s.channels;
    rows[k] = s.planar ? part : pixels + t.first_row;
    columns[k] = s.planar ? pixels : part;
  }
  const float row_factor = s.planar ? by_pixels : by_channels,
              column_factor = s.planar ? by_channels : by_pixels;
  for (int64_t c = t.first_column; c < t.columns; c += kColumns<T>) {
    float sums[2][kV] = {};
    const bool first = c == t.first_column;
    for (int64_t r = warp; r < t.rows; r += kWarps * kBatch<T>) {
      Vector<T> v[kBatch<T>] = {};
#pragma unroll
      for (int k = 0; k < kBatch<T>; ++k) {
        const int64_t row = r + k * kWarps;
        if (row < t.rows) load<T>(x, image, t.first_row + row, c + lane * kV, t.columns, v[k]);
      }
#pragma unroll
      for (int k = 0; k < kBatch<T>; ++k) {
        const int64_t row = r + k * kWarps;
        float absolute = 0, plain = 0;
#pragma unroll
        for (int i = 0; i < kV; ++i) {
          const float value = to_float(v[k].v[i]);
          absolute += fabsf(value), sums[0][i] += fabsf(value);
          if (kSigned) plain += value, sums[1][i] += value;
        }
        absolute = warp_sum(absolute);
        if (kSigned) plain = warp_sum(plain);
        if (lane == 0 && row < t.rows) {  // of one row always the same thread
          rows[0][row] = (first ? 0.0f : rows[0][row]) + absolute * row_factor;
          if (kSigned) rows[1][row] = (first ? 0.0f : rows[1][row]) + plain * row_factor;
        }
      }
    }
#pragma unroll
    for (int k = 0; k < 1 + kSigned; ++k) write_columns(sums[k], columns[k], c, t.columns, column_factor);
  }
}

// channel [kinds, maps, B, C] of attention_pool's parts; grid: (B, maps, kinds).
__global__ void __launch_bounds__(kThreads)
    attention_channels(const Sizes s, const float* parts, float* channel) {
  const int64_t slot = (int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * s.batch + blockIdx.x;
  for (int64_t c = threadIdx.x; c < s.channels; c += kThreads) {
    float sum = 0;
    for (int64_t k = 0; k < s.chunks; ++k) sum += parts[(slot * s.chunks + k) * s.channels + c];
    channel[slot * s.channels + c] = sum;
  }
}

struct MaskPlan {
  Sizes sizes;
  Pooled pooled[2];                // spatial, channel
  float *difference[2], *mask[2];  // [B, n]; difference null: both maps are kept
  float* squares;                  // [2, B]
  const float* parts;
  float temperature;
  bool softmax_of_sum, channel_mask, with_signed;
};

// Masks, and differences of what L_AT compares with their squares; grid: (B, 2), spatial and channel
// attention.
__global__ void __launch_bounds__(kThreads) attention_masks(const __grid_constant__ MaskPlan p) {
  const Sizes& s = p.sizes;
  const int64_t image = blockIdx.x;
  const int which = blockIdx.y;
  const int64_t n = which ? s.channels : s.pixels;
  if (which) {
    for (int k = 0; k < 1 + p.with_signed; ++k) {
      for (int m = 0; m < 2; ++m) {
        float* const to = (k ? p.pooled[1].plain : p.pooled[1].absolute)[m] + image * n;
        const float* from = p.parts + ((k * 2 + m) * s.batch + image) * s.chunks * n;
        for (int64_t c = threadIdx.x; c < n; c += kThreads) {
          float sum = 0;
#pragma unroll 8
          for (int64_t chunk = 0; chunk < s.chunks; ++chunk) sum += from[chunk * n + c];
          to[c] = sum;
        }
      }
    }
    __syncthreads();
  }
  const float *student = p.pooled[which].absolute[0] + image * n,
              *teacher = p.pooled[which].absolute[1] + image * n;
  const float inverse = 1.0f / p.temperature;
  const bool together = p.softmax_of_sum;
  float most[2] = {-1.0f, -1.0f}, total[2] = {};  // attention is never negative
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    most[0] = larger(together ? student[i] + teacher[i] : student[i], most[0]);
    most[1] = larger(teacher[i], most[1]);
  }
  most[0] = block_reduce<true>(most[0]), most[1] = block_reduce<true>(most[1]);
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    total[0] += expf(((together ? student[i] + teacher[i] : student[i]) - most[0]) * inverse);
    if (!together) total[1] += expf((teacher[i] - most[1]) * inverse);
  }
  total[0] = block_reduce<false>(total[0]), total[1] = block_reduce<false>(total[1]);
  const float share = (together ? 1.0f : 0.5f) * n;
  const float *own = p.pooled[which].plain[0] + image * n, *other = p.pooled[which].plain[1] + image * n;
  float square = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    float weight =
        share / total[0] * expf(((together ? student[i] + teacher[i] : student[i]) - most[0]) * inverse);
    if (!together) weight += share / total[1] * expf((teacher[i] - most[1]) * inverse);
    p.mask[which][image * n + i] = which && !p.channel_mask ? 1.0f : weight;
    const float d = own[i] - other[i];
    if (p.difference[which]) p.difference[which][image * n + i] = d;
    square += d * d;
  }
  square = block_reduce<false>(square);
  if (threadIdx.x == 0) p.squares[which * s.batch + image] = square;
}

struct ErrorPlan {
  Sizes sizes;
  Matrix x, y;
  const float *spatial_mask, *channel_mask;
  float *sums, *parts;                   // per block; [B, chunks, C] with `spatial_error`
  float *spatial_error, *channel_error;  // what each mask multiplies, [B, n], or null
  const float* squares;                  // null: no L_AT
  float *loss, *terms;                   // loss null: not wanted
  float transfer_weight, masked_weight;
  int* counter;
};

__device__ float factor(float weight, float distance) { return distance > 0.0f ? weight / distance : 0.0f; }

// The last block's part: distances, what their gradients are multiplied by, the loss.
__device__ void finish(const ErrorPlan& p) {
  const Sizes& s = p.sizes;
  float error = 0, squares[2] = {};
  for (int64_t i = threadIdx.x; i < s.batch * s.chunks; i += kThreads) error += __ldcg(p.sums + i);
  for (int64_t b = threadIdx.x; p.squares && b < s.batch; b += kThreads) {
    squares[0] += p.squares[b], squares[1] += p.squares[s.batch + b];
  }
  error = block_reduce<false>(error);
  const float spatial = sqrtf(block_reduce<false>(squares[0])),
              channel = sqrtf(block_reduce<false>(squares[1]));
  if (threadIdx.x == 0) {
    const float masked = sqrtf(error);
    const float values[2 * kFactor] = {spatial,
                                       channel,
                                       masked,
                                       factor(p.transfer_weight, spatial),
                                       factor(p.transfer_weight, channel),
                                       factor(p.masked_weight, masked)};
    for (int i = 0; i < 2 * kFactor; ++i) p.terms[i] = values[i];
    if (p.loss) *p.loss = p.transfer_weight * (spatial + channel) + p.masked_weight * masked;
  }
  for (int64_t i = threadIdx.x; p.channel_error && i < s.batch * s.channels; i += kThreads) {
    const float* from = p.parts + i / s.channels * s.chunks * s.channels + i % s.channels;
    float sum = 0;
    for (int64_t k = 0; k < s.chunks; ++k) sum += __ldcg(from + k * s.channels);
    p.channel_error[i] = sum;
  }
}

template <class T, bool kThrough>
__global__ void __launch_bounds__(kThreads) attention_errors(const __grid_constant__ ErrorPlan p) {
  constexpr int kV = kVector<T>;
  constexpr int kLoads = kThrough && sizeof(T) == 2 ? kBatch<T> / 2 : kBatch<T>;  // registers end
  const Sizes& s = p.sizes;
  const int64_t chunk = blockIdx.x, image = blockIdx.y, block = image * s.chunks + chunk;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Tile t = tile_of<T>(s, chunk);
  const float *pixels = p.spatial_mask + image * s.pixels, *channels = p.channel_mask + image * s.channels;
  const float *row_weights = s.planar ? channels : pixels + t.first_row,
              *column_weights = s.planar ? pixels : channels;
  float* const part = p.parts + block * s.channels;
  float* const of_pixels = p.spatial_error + image * s.pixels;
  float *const rows = s.planar ? part : of_pixels + t.first_row, *const columns = s.planar ? of_pixels : part;
  float total = 0;
  for (int64_t c = t.first_column; c < t.columns; c += kColumns<T>) {
    float weights[kV], sums[kV] = {};
    const int64_t column = c + lane * kV;
#pragma unroll
    for (int i = 0; i < kV; ++i) weights[i] = column + i < t.columns ? column_weights[column + i] : 0.0f;
    for (int64_t r = warp; r < t.rows; r += kWarps * kLoads) {
      Vector<T> a[kLoads] = {}, b[kLoads] = {};
      float weight[kLoads] = {};
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        const int64_t row = r + k * kWarps;
        if (row >= t.rows) continue;
        load<T>(p.x, image, t.first_row + row, column, t.columns, a[k]);
        load<T>(p.y, image, t.first_row + row, column, t.columns, b[k]);
        weight[k] = row_weights[row];
      }
#pragma unroll
      for (int k = 0; k < kLoads; ++k) {
        const int64_t row = r + k * kWarps;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kV; ++i) {
          const float d = to_float(a[k].v[i]) - to_float(b[k].v[i]), square = d * d;
          sum += weights[i] * square;
          if (kThrough) sums[i] += weight[k] * square;
        }
        total += weight[k] * sum;
        if (kThrough) {
          sum = warp_sum(sum);
          if (lane == 0 && row < t.rows) rows[row] = (c == t.first_column ? 0.0f : rows[row]) + sum;
        }
      }
    }
    if (kThrough) write_columns(sums, columns, c, t.columns, 1.0f);
  }
  total = block_reduce<false>(total);
  __shared__ int is_last;
  if (threadIdx.x == 0) p.sums[block] = total;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(p.counter, 1) == static_cast<int>(gridDim.x * gridDim.y) - 1;
  __syncthreads();
  if (is_last) {
    __threadfence();
    finish(p);
  }
}

__global__ void attention_clear(int* counter) { *counter = 0; }

struct GradientPlan {
  Sizes sizes;
  Matrix x, other, out;
  kd_attention_parts parts;
  bool masked;
};

struct Terms {
  float sign, plain, weight;
};

// What one pixel (or channel) contributes: sign(x) sign + plain + weight (x - other), weights multiplied.
__device__ Terms terms_of(const GradientPlan& p, bool pixel, int64_t image, int64_t index,
                          const float (&scale)[3]) {
  const kd_attention_parts& parts = p.parts;
  const Sizes& s = p.sizes;
  const int64_t n = pixel ? s.pixels : s.channels, size = s.batch * n, at = image * n + index;
  const float mean = 1.0f / (pixel ? s.channels : s.pixels);
  const float *pooled = pixel ? parts.spatial : parts.channel,
              *given = pixel ? parts.grad_spatial : parts.grad_channel;
  Terms out = {};
  float& last = parts.with_signed ? out.plain : out.sign;
  if (pooled) {
    const float difference = pooled[at] - (parts.maps == 2 ? pooled[size + at] : 0.0f);
    last = scale[pixel ? 0 : 1] * mean * (parts.side ? -difference : difference);
  }
  if (given) {
    last += mean * given[(parts.given - 1) * size + at];
    if (parts.given == 2) out.sign += mean * given[at];
  }
  if (p.masked) out.weight = pixel ? scale[2] * parts.spatial_mask[at] : parts.channel_mask[at];
  return out;
}

template <class T>
__global__ void __launch_bounds__(kThreads) attention_gradient(const __grid_constant__ GradientPlan p) {
  constexpr int kV = kVector<T>;
  const Sizes& s = p.sizes;
  const int64_t image = blockIdx.z;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Tile t = tile_of<T>(s, blockIdx.x);
  const int64_t begin = int64_t{blockIdx.y} * kGradientRows, end = min(t.rows, begin + kGradientRows);
  float scale[3] = {};
  if (p.parts.grad_loss) {
#pragma unroll
    for (int i = 0; i < 3; ++i) scale[i] = *p.parts.grad_loss * p.parts.terms[kFactor + i];
  }
  __shared__ Terms of_rows[kGradientRows];
  if (threadIdx.x < kGradientRows && begin + threadIdx.x < end) {
    of_rows[threadIdx.x] = terms_of(p, !s.planar, image, t.first_row + begin + threadIdx.x, scale);
  }
  __syncthreads();
  for (int64_t c = t.first_column; c < t.columns; c += kColumns<T>) {
    const int64_t column = c + lane * kV;
    // All loads of the warp's rows come before its first store, which the compiler could not know to be
    // elsewhere.
    constexpr int kRows = kGradientRows / kWarps;
    Vector<T> x[kRows] = {}, y[kRows] = {};
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const int64_t r = begin + warp + k * kWarps, row = t.first_row + r;
      if (r >= end) continue;
      load<T>(p.x, image, row, column, t.columns, x[k]);
      if (p.masked) load<T>(p.other, image, row, column, t.columns, y[k]);
    }
    Terms of_columns[kV] = {};
#pragma unroll
    for (int i = 0; i < kV; ++i) {
      if (column + i < t.columns) of_columns[i] = terms_of(p, s.planar, image, column + i, scale);
    }
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const int64_t r = begin + warp + k * kWarps;
      const Terms of_row = of_rows[warp + k * kWarps];
      float g[kV];
#pragma unroll
      for (int i = 0; i < kV; ++i) {
        const float value = to_float(x[k].v[i]), sign = of_row.sign + of_columns[i].sign;
        g[i] = value > 0.0f ? sign : value < 0.0f ? -sign : 0.0f;
        g[i] += of_row.plain + of_columns[i].plain;
        if (p.masked) g[i] += of_row.weight * of_columns[i].weight * (value - to_float(y[k].v[i]));
      }
      if (r < end && column < t.columns) store<T>(p.out, image, t.first_row + r, column, t.columns, g);
    }
  }
}

}  // namespace
}  // namespace kd::attention
