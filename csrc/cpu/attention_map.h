#pragma once

// Maps of the op attention_mask on the CPU, cut into (image, chunk of pixels). Chunks depend on the shape
// alone, so results do not depend on the number of threads. Maps are read in place when they are NCHW
// (planar) or channels_last with any stride between images and between channels or pixels; others are copied
// first.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/check.h"
#include "common/dtype.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/rounding.h"
#include "cpu/attention_mask.h"
#include "cpu/attention_mask_ops.h"

namespace kd {

KD_DECLARE_ISA(extern const AttentionKernels<float> attention_float;
               extern const AttentionKernels<double> attention_double;
               extern const MaskKernels<float> mask_float; extern const MaskKernels<double> mask_double;)

namespace attention {

// Pixels of a chunk: long rows please the prefetcher, short ones give every thread some.
constexpr int64_t kShortest = 1024, kLongest = 4096, kChunks = 16;

template <class A>
const AttentionKernels<A>& kernels() {
  if constexpr (std::is_same_v<A, float>) {
    return KD_DISPATCH_ISA(attention_float);
  } else {
    return KD_DISPATCH_ISA(attention_double);
  }
}

template <class A>
const MaskKernels<A>& mask_kernels() {
  if constexpr (std::is_same_v<A, float>) {
    return KD_DISPATCH_ISA(mask_float);
  } else {
    return KD_DISPATCH_ISA(mask_double);
  }
}

inline int64_t padded(int64_t n) { return round_up(n, kColumnPadding); }

inline bool is_wide(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

inline void check_map(const Tensor& x, const char* name) {
  KD_CHECK(x.dim() == 4 && x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, "attention_mask: ", name,
           " must be a map [B, C, H, W] with channels and pixels, got ", x.dim(), " axes");
  dispatch_float(x.scalar_type(), name, [](auto) {});
}

inline void check_same(const Tensor& x, const Tensor& y, const char* names) {
  KD_CHECK(x.scalar_type() == y.scalar_type(), "attention_mask: ", names, " must have one dtype");
  for (int a = 0; a < 4; ++a) {
    KD_CHECK(x.size(a) == y.size(a), "attention_mask: ", names, " must have one shape, axis ", a, " has ",
             x.size(a), " and ", y.size(a));
  }
}

// Elements from one pixel to the next, or 0 where pixels do not lie along one stride.
inline int64_t pixel_stride(const Tensor& x) {
  const int64_t h = x.size(2), w = x.size(3);
  if (h == 1 && w == 1) return 1;
  if (w == 1) return x.stride(2);
  if (h == 1 || x.stride(2) == w * x.stride(3)) return x.stride(3);
  return 0;
}
inline bool reads_planar(const Tensor& x) { return pixel_stride(x) == 1; }
inline bool reads_by_pixel(const Tensor& x) {
  return pixel_stride(x) > 0 && (x.size(1) == 1 || x.stride(1) == 1);
}

// Sizes that all maps of a call share, and the layout that they are read in.
struct Shape {
  int64_t batch, channels, pixels, chunks, chunk;
  bool planar;

  explicit Shape(const Tensor& x) : batch(x.size(0)), channels(x.size(1)), pixels(x.size(2) * x.size(3)) {
    chunks = ceil_div(pixels, std::clamp(batch * pixels / kChunks, kShortest, kLongest));
    chunk = padded(ceil_div(pixels, chunks));
    chunks = ceil_div(pixels, chunk);
    planar = reads_planar(x) && !(pixels == 1 && reads_by_pixel(x));
    if (!reads_planar(x) && !reads_by_pixel(x)) planar = true;
  }
  int64_t tasks() const { return batch * chunks; }
};

class Map {
 public:
  // Copies x where it does not fit the layout; `planar` of the shape decides, whichever map it was taken
  // from.
  Map(const Tensor& x, const Shape& shape) : tensor_(fitting(x, shape.planar)), planar_(shape.planar) {
    data_ = static_cast<char*>(tensor_.data_ptr());
    size_ = is_wide(x) ? 8 : x.scalar_type() == ScalarType::Float ? 4 : 2;
    image_ = tensor_.stride(0);
    pixel_ = pixel_stride(tensor_);
    row_ = planar_ ? tensor_.stride(1) : pixel_;
  }
  void* at(int64_t image, int64_t pixel) const { return data_ + (image * image_ + pixel * pixel_) * size_; }
  // From row `row` on, which is a channel (planar) or a pixel of the chunk.
  MapTile tile(int64_t image, int64_t pixel, int64_t row = 0) const {
    return {static_cast<char*>(at(image, pixel)) + row * row_ * size_, row_};
  }
  int64_t row_stride() const { return row_; }

 private:
  static Tensor fitting(const Tensor& x, bool planar) {
    if (planar) return reads_planar(x) ? x : torch::stable::contiguous(x);
    if (reads_by_pixel(x)) return x;
    return torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
  }

  Tensor tensor_;
  bool planar_;
  char* data_;
  int64_t size_, image_, pixel_, row_;
};

// One chunk of an image: arrays over its channels and over its pixels, as the rows and columns that kernels
// take.
struct Chunk {
  int64_t image, first, count;
};

inline Chunk chunk_of(const Shape& s, int64_t task) {
  const int64_t first = task % s.chunks * s.chunk;
  return {task / s.chunks, first, std::min(s.chunk, s.pixels - first)};
}

template <class F>
void for_chunks(const Shape& s, const F& f) {
  parallel_for(0, s.tasks(), 1, [&](int64_t begin, int64_t end) { f(begin, end); });
}

template <class A>
A* data(const Tensor& x) {
  return static_cast<A*>(x.data_ptr());
}

template <class F>
void with_accumulator(const Tensor& x, const F& f) {
  if (is_wide(x)) {
    f(double{});
  } else {
    f(float{});
  }
}

// A small input, contiguous; null where not given.
template <class A>
class Small {
 public:
  Small(const std::optional<Tensor>& x, const char* name, int64_t multiple_of) {
    if (!x.has_value()) return;
    const auto expected = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;
    KD_CHECK(x->scalar_type() == expected, "attention_mask_backward: ", name,
             " must be float32 (float64 for float64 maps)");
    KD_CHECK(x->numel() % std::max<int64_t>(multiple_of, 1) == 0, "attention_mask_backward: ", name, " has ",
             x->numel(), " elements, which do not fit the map");
    tensor_ = torch::stable::contiguous(*x);
    count = multiple_of ? x->numel() / multiple_of : 0;
  }
  const A* get() const { return tensor_.has_value() ? data<A>(*tensor_) : nullptr; }
  int64_t count = 0;

 private:
  std::optional<Tensor> tensor_;
};

}  // namespace attention
}  // namespace kd
