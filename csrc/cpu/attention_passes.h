#pragma once

// The passes of the op attention_mask over its maps on the CPU: pooling, of one map or of two at once, and
// the masked error.
//
// A chunk's sums over channels stay in cache and are final; its sums over pixels, C numbers, are added up
// over the chunks in order.

#include "cpu/attention_map.h"

namespace kd::attention {

constexpr int64_t kSteps = 64;  // pixels whose channels_last rows are added at once: more lose digits

// Divides: a product could be fused with a subtraction, and equal maps would then differ.
template <class A>
void put(A* to, const A* from, int64_t count, A divisor) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i] / divisor;
}

template <class A>
void add(A* to, const A* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// Where sums go; null: not wanted. Over channels: means [B, P]; over pixels: sums of every chunk
// [B, chunks, C].
template <class A>
struct Sums {
  A *spatial = nullptr, *parts = nullptr;
};

// Sums of |x|, and of x if `plain.spatial` is wanted.
template <class A>
void pool_map(const Shape& s, Dtype dtype, const Map& x, const Sums<A>& absolute, const Sums<A>& plain) {
  const int64_t width = padded(s.planar ? s.chunk : s.channels);
  const Sums<A> kinds[2] = {absolute, plain};
  const int count = plain.spatial ? 2 : 1;
  const auto channels = static_cast<A>(s.channels);
  for_chunks(s, [&](int64_t begin, int64_t end) {
    std::vector<A> columns(2 * width), rows(2 * std::max(s.channels, kSteps));
    A *const plain_columns = columns.data() + width, *const plain_rows = rows.data() + rows.size() / 2;
    const A *const of_rows[2] = {rows.data(), plain_rows}, *const of_columns[2] = {columns.data(),
                                                                                   plain_columns};
    for (int64_t task = begin; task < end; ++task) {
      const Chunk c = chunk_of(s, task);
      const int64_t at = c.image * s.pixels + c.first, part = task * s.channels;
      if (!s.planar) {
        for (int k = 0; k < count; ++k) {
          if (kinds[k].parts) std::fill_n(kinds[k].parts + part, s.channels, A(0));
        }
      }
      const int64_t row_count = s.planar ? s.channels : c.count, step = s.planar ? row_count : kSteps;
      for (int64_t r = 0; r < row_count; r += step) {
        const int64_t block = std::min(step, row_count - r);
        std::fill(columns.begin(), columns.end(), A(0));
        kernels<A>().pool(dtype, x.tile(c.image, c.first, r), block, s.planar ? c.count : s.channels,
                          rows.data(), columns.data(), count == 2 ? plain_rows : nullptr, plain_columns);
        for (int k = 0; k < count; ++k) {
          const auto [pixels, pixel_count, of_channels] = s.planar
                                                              ? std::tuple(of_columns[k], c.count, of_rows[k])
                                                              : std::tuple(of_rows[k], block, of_columns[k]);
          put(kinds[k].spatial + at + r * !s.planar, pixels, pixel_count, channels);
          if (!kinds[k].parts) continue;
          if (s.planar) {
            std::copy_n(of_channels, s.channels, kinds[k].parts + part);
          } else {
            add(kinds[k].parts + part, of_channels, s.channels);
          }
        }
      }
    }
  });
}

// Sums of |x|, |y|, x - y and (x - y)^2, the last not divided into means; what is not wanted, as the kernel
// allows it, is null.
template <class A>
void pool_pair(const Shape& s, Dtype dtype, const Map& x, const Map& y, const Sums<A> (&to)[kKinds]) {
  const int64_t width = padded(s.planar ? s.chunk : s.channels);
  for_chunks(s, [&](int64_t begin, int64_t end) {
    std::vector<A> memory(kKinds * width);
    for (int64_t task = begin; task < end; ++task) {
      const Chunk c = chunk_of(s, task);
      const int64_t at = c.image * s.pixels + c.first, part = task * s.channels;
      // Sums over columns go to memory, those over rows straight to their place.
      PairSums<A> sums = {};
      for (int k = 0; k < kKinds; ++k) {
        A *const in_rows = s.planar ? to[k].parts : to[k].spatial, *const in_columns =
                                                                       s.planar ? to[k].spatial : to[k].parts;
        sums.rows[k] = in_rows ? in_rows + (s.planar ? part : at) : nullptr;
        sums.columns[k] = in_columns ? memory.data() + k * width : nullptr;
        if (!s.planar && to[k].parts) std::fill_n(to[k].parts + part, s.channels, A(0));
      }
      const int64_t row_count = s.planar ? s.channels : c.count, step = s.planar ? row_count : kSteps;
      for (int64_t r = 0; r < row_count; r += step) {
        const int64_t block = std::min(step, row_count - r);
        std::fill(memory.begin(), memory.end(), A(0));
        kernels<A>().pool_pair(dtype, x.tile(c.image, c.first, r), y.tile(c.image, c.first, r), block,
                               s.planar ? c.count : s.channels, sums);
        if (s.planar) continue;
        for (int k = 0; k < kKinds; ++k) {
          if (to[k].parts) add(to[k].parts + part, sums.columns[k], s.channels);
          if (sums.rows[k]) sums.rows[k] += block;
        }
      }
      for (int k = 0; k < kKinds; ++k) {
        if (!to[k].spatial) continue;
        A* const pixels = to[k].spatial + at;
        put(pixels, s.planar ? sums.columns[k] : pixels, c.count, k < 3 ? static_cast<A>(s.channels) : A(1));
      }
    }
  });
}

// out [B, C] = factor * sum over chunks of parts [B, chunks, C]
template <class A>
void add_chunks(const Shape& s, const A* parts, double factor, A* out) {
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t c = 0; c < s.channels; ++c) {
      double sum = 0;
      for (int64_t k = 0; k < s.chunks; ++k) sum += parts[(b * s.chunks + k) * s.channels + c];
      out[b * s.channels + c] = static_cast<A>(factor * sum);
    }
  }
}

// Sum of spatial_mask * channel_mask * (x - y)^2. With pointers to them also, per pixel and per channel, the
// sums that a mask multiplies. From the last chunk to the first: what the pooling read last is still in
// cache.
template <class A>
double masked_error(const Shape& s, Dtype dtype, const Map& x, const Map& y, const A* spatial_mask,
                    const A* channel_mask, A* spatial_error, A* channel_error) {
  std::vector<double> sums(s.tasks());
  std::vector<A> parts(channel_error ? s.tasks() * s.channels : 0);
  for_chunks(s, [&](int64_t begin, int64_t end) {
    const int64_t width = padded(std::max(s.channels, s.chunk));
    std::vector<A> weights(width), columns(width), rows(width);
    for (int64_t task = end; task-- > begin;) {
      const Chunk c = chunk_of(s, task);
      const A *pixel_weights = spatial_mask + c.image * s.pixels + c.first,
              *channel_weights = channel_mask + c.image * s.channels;
      const A* row_weights = s.planar ? channel_weights : pixel_weights;
      const int64_t row_count = s.planar ? s.channels : c.count,
                    column_count = s.planar ? c.count : s.channels;
      std::fill(weights.begin(), weights.end(), A(0));
      std::copy_n(s.planar ? pixel_weights : channel_weights, column_count, weights.data());
      if (spatial_error) std::fill(columns.begin(), columns.end(), A(0));
      kernels<A>().errors(dtype, x.tile(c.image, c.first), y.tile(c.image, c.first), row_count, column_count,
                          row_weights, weights.data(), rows.data(), spatial_error ? columns.data() : nullptr);
      double sum = 0;
      for (int64_t r = 0; r < row_count; ++r) sum += static_cast<double>(row_weights[r]) * rows[r];
      sums[task] = sum;
      if (spatial_error) {
        const std::vector<A>&pixels = s.planar ? columns : rows, &channels = s.planar ? rows : columns;
        std::copy_n(pixels.data(), c.count, spatial_error + c.image * s.pixels + c.first);
        std::copy_n(channels.data(), s.channels, parts.data() + task * s.channels);
      }
    }
  });
  if (channel_error) add_chunks(s, parts.data(), 1.0, channel_error);
  double error = 0;
  for (double sum : sums) error += sum;
  return error;
}

}  // namespace kd::attention
