#pragma once

// The passes of the op attention_mask over its maps on the CPU: pooling, of one map or of two at once, and
// the masked error.
//
// A chunk's sums over channels stay in cache and are final; its sums over pixels, C numbers, are added up
// over the chunks in order.

#include <cmath>
#include <memory>

#include "cpu/attention_map.h"

namespace kd::attention {

constexpr int64_t kSteps = 64;          // pixels whose channels_last rows are added at once: more lose digits
constexpr int64_t kBlockPixels = 1024;  // of all channels of NCHW maps, to stay in cache between two reads

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

// Memory for a while: of the block that is given, as far as it goes, then its own. A pointer that is given
// already takes no part.
template <class A>
class Scratch {
 public:
  explicit Scratch(void* block = nullptr, int64_t bytes = 0)
      : next_(static_cast<A*>(block)), left_(bytes / static_cast<int64_t>(sizeof(A))) {}
  A* operator()(A* given, int64_t count) {
    if (given) return given;
    if (count <= left_) {
      A* const found = next_;
      next_ += count, left_ -= count;
      return found;
    }
    blocks_.emplace_back(new A[count]);
    return blocks_.back().get();
  }

 private:
  A* next_;
  int64_t left_;
  std::vector<std::unique_ptr<A[]>> blocks_;
};

// The masked error of both maps in the pass that pools them: of every chunk, sums over its pixels of
// e (x - y)^2, with e = exp((G - most) / T) and `most` the largest attention G of the chunk, under student's
// and teacher's attention or under their sum. What is missing to a mask, its softmax's divisor and the
// weights of channels, are factors of these sums.
template <class A>
struct ChannelErrors {
  A scale;  // 1 / T
  bool softmax_of_sum;
  A* parts[2];                            // [B, chunks, C]
  std::vector<SoftmaxTerms<A>> terms[2];  // [B, chunks]

  ChannelErrors(const Shape& s, A scale, bool softmax_of_sum, Scratch<A>& scratch)
      : scale(scale), softmax_of_sum(softmax_of_sum) {
    for (int k = 0; k < count(); ++k) {
      parts[k] = scratch(nullptr, s.tasks() * s.channels);
      terms[k].resize(s.tasks());
    }
  }
  int count() const { return softmax_of_sum ? 1 : 2; }

  // The masked error of an image under its channel mask.
  double of_image(const Shape& s, int64_t image, const A* channel_mask) const {
    double error = 0;
    for (int k = 0; k < count(); ++k) {
      const SoftmaxTerms<A>* const own = terms[k].data() + image * s.chunks;
      A most = own[0].most;
      for (int64_t i = 1; i < s.chunks; ++i) most = larger(most, own[i].most);
      double total = 0, sum = 0;
      for (int64_t i = 0; i < s.chunks; ++i) {
        const A* const errors = parts[k] + (image * s.chunks + i) * s.channels;
        const double share = std::exp(static_cast<double>((own[i].most - most) * scale));
        double weighted = 0;
        for (int64_t c = 0; c < s.channels; ++c) weighted += static_cast<double>(channel_mask[c]) * errors[c];
        total += share * own[i].total, sum += share * weighted;
      }
      error += sum / total * static_cast<double>(s.pixels) / count();
    }
    return error;
  }
  static A larger(A a, A b) { return b > a || b != b ? b : a; }
};

// Adds a block of pixels, whose attention is student and teacher, to the errors of a chunk.
template <class A>
class BlockErrors {
 public:
  BlockErrors(const Shape& s, int64_t block)
      : shape_(s),
        weights_{std::vector<A>(padded(block)), std::vector<A>(padded(block))},
        errors_{std::vector<A>(padded(s.channels)), std::vector<A>(padded(s.channels))} {}

  void add(ChannelErrors<A>& to, int64_t task, bool first, Dtype dtype, MapTile x, MapTile y, int64_t pixels,
           const A* student, const A* teacher) {
    const bool two = !to.softmax_of_sum, planar = shape_.planar;
    SoftmaxTerms<A> found[2];
    for (int k = 0; k < to.count(); ++k) {
      found[k] = mask_kernels<A>().weights(k ? teacher : student, two ? nullptr : teacher, pixels, to.scale,
                                           weights_[k].data());
      if (!planar) std::fill(errors_[k].begin(), errors_[k].end(), A(0));
    }
    kernels<A>().channel_errors(
        dtype, x, y, planar ? shape_.channels : pixels, planar ? pixels : shape_.channels, !planar,
        {weights_[0].data(), two ? weights_[1].data() : nullptr}, {errors_[0].data(), errors_[1].data()});
    for (int k = 0; k < to.count(); ++k) {
      A* const parts = to.parts[k] + task * shape_.channels;
      SoftmaxTerms<A>& terms = to.terms[k][task];
      if (first) {
        std::copy_n(errors_[k].data(), shape_.channels, parts);
        terms = found[k];
        continue;
      }
      const A most = ChannelErrors<A>::larger(terms.most, found[k].most);
      const A share = std::exp((terms.most - most) * to.scale),
              added = std::exp((found[k].most - most) * to.scale);
      for (int64_t c = 0; c < shape_.channels; ++c) parts[c] = share * parts[c] + added * errors_[k][c];
      terms = {most, share * terms.total + added * found[k].total};
    }
  }

 private:
  const Shape& shape_;
  std::vector<A> weights_[2], errors_[2];
};

// Sums of |x|, |y|, x - y and (x - y)^2, the last not divided into means; what is not wanted, as the kernel
// allows it, is null. With `errors`, blocks that stay in cache are read a second time for them.
template <class A>
void pool_pair(const Shape& s, Dtype dtype, const Map& x, const Map& y, const Sums<A> (&to)[kKinds],
               ChannelErrors<A>* errors) {
  const int64_t block = std::min(s.chunk, !s.planar ? kSteps : errors ? kBlockPixels : s.chunk);
  const int64_t row_count = padded(s.planar ? s.channels : block),
                column_count = padded(s.planar ? block : s.channels);
  int64_t kinds = 0;
  for (const Sums<A>& sums : to) kinds += sums.parts || sums.spatial;
  for_chunks(s, [&](int64_t begin, int64_t end) {
    std::vector<A> memory(kinds * (row_count + column_count));
    A *const columns = memory.data(), *row = columns + kinds * column_count, *column = columns;
    PairSums<A> sums = {};
    for (int k = 0; k < kKinds; ++k) {
      if (!to[k].parts && !to[k].spatial) continue;
      if (s.planar ? to[k].parts : to[k].spatial) sums.rows[k] = row;
      if (s.planar ? to[k].spatial : to[k].parts) sums.columns[k] = column;
      row += row_count, column += column_count;
    }
    std::optional<BlockErrors<A>> block_errors;
    if (errors) block_errors.emplace(s, block);
    for (int64_t task = begin; task < end; ++task) {
      const Chunk c = chunk_of(s, task);
      const int64_t part = task * s.channels;
      for (int k = 0; k < kKinds; ++k) {
        if (to[k].parts) std::fill_n(to[k].parts + part, s.channels, A(0));
      }
      for (int64_t first = 0; first < c.count; first += block) {
        const int64_t count = std::min(block, c.count - first), at = c.image * s.pixels + c.first + first;
        const MapTile tile_x = x.tile(c.image, c.first + first), tile_y = y.tile(c.image, c.first + first);
        std::fill_n(columns, kinds * column_count, A(0));
        kernels<A>().pool_pair(dtype, tile_x, tile_y, s.planar ? s.channels : count,
                               s.planar ? count : s.channels, sums);
        for (int k = 0; k < kKinds; ++k) {
          const A *const pixels = s.planar ? sums.columns[k] : sums.rows[k], *const channels =
                                                                                 s.planar ? sums.rows[k]
                                                                                          : sums.columns[k];
          if (to[k].spatial)
            put(to[k].spatial + at, pixels, count, k < 3 ? static_cast<A>(s.channels) : A(1));
          if (to[k].parts) add(to[k].parts + part, channels, s.channels);
        }
        if (errors) {
          block_errors->add(*errors, task, first == 0, dtype, tile_x, tile_y, count, to[0].spatial + at,
                            to[1].spatial + at);
        }
      }
    }
  });
}

// out [B, C] = factor * sum over chunks of parts [B, chunks, C]
template <class A>
void add_chunks(const Shape& s, const A* parts, double factor, A* out) {
  constexpr int64_t kAtOnce = 64;
  double sums[kAtOnce];
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t first = 0; first < s.channels; first += kAtOnce) {
      const int64_t count = std::min(kAtOnce, s.channels - first);
      std::fill_n(sums, count, 0.0);
      for (int64_t k = 0; k < s.chunks; ++k) {
        const A* const part = parts + (b * s.chunks + k) * s.channels + first;
        for (int64_t i = 0; i < count; ++i) sums[i] += part[i];
      }
      for (int64_t i = 0; i < count; ++i) out[b * s.channels + first + i] = static_cast<A>(factor * sums[i]);
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
