// Op feature_augment on the CPU: one thread takes a channel of an image through the whole chain in its cache,
// so that memory is read once and written once. Chains: kdfast/reference/feature_augment.py.
//
// Memory beside the result: two planes per thread, and for each warp the places and weights of its taps, four
// per pixel forward and as many as reach a pixel backward.

#include "cpu/feature_augment.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "common/dtype.h"
#include "common/gradient.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "cpu/feature_augment_ops.h"

namespace kd {

KD_DECLARE_ISA(extern const AugmentKernels<float> augment_float;
               extern const AugmentKernels<double> augment_double;)

namespace {

using torch::stable::Tensor;

enum Kind : int { kWarp, kCutout, kNoise, kChannels };  // as in the reference
constexpr int64_t kNumbers = 7;
constexpr int64_t kTaskPixels = 16384;  // for a thread to be worth its start

// The taps of every pixel of a result, gathered pixel by pixel, then laid out with pixels last.
template <class A>
class Table {
 public:
  Table(int64_t pixels, const std::vector<std::vector<std::pair<int32_t, A>>>& taps) {
    padded_ = (pixels + kAugmentPadding - 1) / kAugmentPadding * kAugmentPadding;
    for (const auto& of_pixel : taps) taps_ = std::max(taps_, static_cast<int64_t>(of_pixel.size()));
    place_.resize(taps_ * padded_);
    weight_.resize(taps_ * padded_);
    for (int64_t p = 0; p < pixels; ++p) {
      for (size_t k = 0; k < taps[p].size(); ++k) {
        place_[static_cast<int64_t>(k) * padded_ + p] = taps[p][k].first;
        weight_[static_cast<int64_t>(k) * padded_ + p] = taps[p][k].second;
      }
    }
  }
  AugmentTable<A> get() const { return {place_.data(), weight_.data(), taps_, padded_}; }

 private:
  std::vector<int32_t> place_;
  std::vector<A> weight_;
  int64_t taps_ = 0, padded_ = 0;
};

struct Step {
  Kind kind;
  double numbers[kNumbers - 1];
};

struct Size {
  int64_t batch, channels, height, width;
  int64_t pixels() const { return height * width; }
};

// f(pixel of the result, pixel of the input, weight) for every tap that lies inside the map.
template <class F>
void for_taps(const double* m, const Size& size, const F& f) {
  const double cx = 0.5 * static_cast<double>(size.width - 1),
               cy = 0.5 * static_cast<double>(size.height - 1);
  for (int64_t i = 0; i < size.height; ++i) {
    for (int64_t j = 0; j < size.width; ++j) {
      const double x = static_cast<double>(j) - cx, y = static_cast<double>(i) - cy;
      const double u = m[0] * x + m[1] * y + m[2] + cx, v = m[3] * x + m[4] * y + m[5] + cy;
      // Far outside (or NaN): no tap, and no conversion to an integer that it does not fit.
      if (!(u > -1 && u < static_cast<double>(size.width) && v > -1 &&
            v < static_cast<double>(size.height))) {
        continue;
      }
      const double u0 = std::floor(u), v0 = std::floor(v);
      for (int64_t k = 0; k < 4; ++k) {
        const int64_t column = static_cast<int64_t>(u0) + k % 2, row = static_cast<int64_t>(v0) + k / 2;
        if (column < 0 || column >= size.width || row < 0 || row >= size.height) continue;
        const double weight = (k % 2 ? u - u0 : 1 - (u - u0)) * (k / 2 ? v - v0 : 1 - (v - v0));
        if (weight != 0) f(i * size.width + j, row * size.width + column, weight);
      }
    }
  }
}

template <class A>
Table<A> table(const double* matrix, const Size& size, bool adjoint) {
  std::vector<std::vector<std::pair<int32_t, A>>> taps(size.pixels());
  for_taps(matrix, size, [&](int64_t result, int64_t input, double weight) {
    if (adjoint) std::swap(result, input);
    taps[result].emplace_back(static_cast<int32_t>(input), static_cast<A>(weight));
  });
  return Table<A>(size.pixels(), taps);
}

// The chain, and for each of its results the channel that every channel of the last result showed there.
class Chain {
 public:
  Chain(const Tensor& steps, const Tensor& channels, const Size& size) : size_(size) {
    KD_CHECK(steps.dim() == 2 && steps.size(1) == kNumbers && steps.scalar_type() == ScalarType::Double &&
                 steps.is_contiguous(),
             "feature_augment: steps must be contiguous float64 [S, ", kNumbers, "]");
    KD_CHECK(channels.dim() == 2 && channels.size(1) == size.channels &&
                 channels.scalar_type() == ScalarType::Int && channels.is_contiguous(),
             "feature_augment: channels must be contiguous int32 [K, ", size.channels, "]");
    const auto* numbers = static_cast<const double*>(steps.const_data_ptr());
    for (int64_t s = 0; s < steps.size(0); ++s, numbers += kNumbers) {
      Step step{static_cast<Kind>(static_cast<int>(numbers[0])), {}};
      std::copy(numbers + 1, numbers + kNumbers, step.numbers);
      steps_.push_back(step);
    }
    trace(channels);
  }

  const std::vector<Step>& steps() const { return steps_; }
  int64_t count() const { return static_cast<int64_t>(steps_.size()); }
  // -1: that channel is 0 there, whatever came before.
  int64_t channel(int64_t before_step, int64_t of_result) const {
    return shown_[before_step * size_.channels + of_result];
  }
  // Where channel c of the result stops being 0: the step from which it has to be computed.
  int64_t first(int64_t of_result) const {
    int64_t s = count();
    while (s > 0 && channel(s - 1, of_result) >= 0) --s;
    return s;
  }

 private:
  void trace(const Tensor& channels) {
    const auto* rows = static_cast<const int32_t*>(channels.const_data_ptr());
    shown_.resize((count() + 1) * size_.channels);
    for (int64_t c = 0; c < size_.channels; ++c) shown_[count() * size_.channels + c] = c;
    for (int64_t s = count() - 1; s >= 0; --s) {
      const Step& step = steps_[s];
      KD_CHECK(kWarp <= step.kind && step.kind <= kChannels, "feature_augment: steps: unknown kind ",
               static_cast<int>(step.kind));
      const auto row = static_cast<int64_t>(step.numbers[0]);
      KD_CHECK(step.kind != kChannels || (0 <= row && row < channels.size(0)),
               "feature_augment: steps name row ", row, " of ", channels.size(0), " rows of channels");
      for (int64_t c = 0; c < size_.channels; ++c) {
        int64_t shown = shown_[(s + 1) * size_.channels + c];
        if (step.kind == kChannels && shown >= 0) shown = rows[row * size_.channels + shown];
        KD_CHECK(-1 <= shown && shown < size_.channels, "feature_augment: channels: got ", shown, " of ",
                 size_.channels);
        shown_[s * size_.channels + c] = shown;
      }
    }
  }

  Size size_;
  std::vector<Step> steps_;
  std::vector<int64_t> shown_;  // [S + 1, C]
};

// The planes of a tensor [B, C, H, W]; asks it for its strides once.
class Maps {
 public:
  explicit Maps(const Tensor& x)
      : data_(const_cast<char*>(static_cast<const char*>(x.const_data_ptr()))),
        image_(x.stride(0) * static_cast<int64_t>(x.element_size())),
        channel_(x.stride(1) * static_cast<int64_t>(x.element_size())),
        plane_{nullptr, dtype_of(x.scalar_type(), "x"), x.size(2), x.size(3), x.stride(2), x.stride(3)} {}
  AugmentPlane operator()(int64_t image, int64_t channel) const {
    AugmentPlane plane = plane_;
    plane.data = data_ + image * image_ + channel * channel_;
    return plane;
  }

 private:
  char* data_;
  int64_t image_, channel_;
  AugmentPlane plane_;
};

template <class A>
void cut(A* values, const double* box, int64_t width) {
  const auto top = static_cast<int64_t>(box[0]), left = static_cast<int64_t>(box[1]),
             bottom = static_cast<int64_t>(box[2]), right = static_cast<int64_t>(box[3]);
  for (int64_t r = top; r < bottom; ++r)
    std::fill(values + r * width + left, values + r * width + right, A{});
}

// Two planes of a thread; a warp goes from one to the other.
template <class A>
class Planes {
 public:
  explicit Planes(int64_t pixels)
      : padded_((pixels + kAugmentPadding - 1) / kAugmentPadding * kAugmentPadding), data_(2 * padded_) {}
  A* get() { return data_.data() + side_ * padded_; }
  void warp(const AugmentKernels<A>& kernels, const Table<A>& table) {
    const A* from = get();
    side_ = 1 - side_;
    kernels.resample(table.get(), from, get());
  }

 private:
  int64_t padded_, side_ = 0;
  std::vector<A> data_;
};

template <class A>
std::vector<Table<A>> tables(const Chain& chain, const Size& size, bool adjoint) {
  std::vector<Table<A>> found;
  for (const Step& step : chain.steps()) {
    if (step.kind == kWarp) found.push_back(table<A>(step.numbers, size, adjoint));
  }
  return found;
}

// f(image, channel of the result, planes) on torch's threads.
template <class A, class F>
void for_planes(const Size& size, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kTaskPixels / std::max<int64_t>(size.pixels(), 1));
  parallel_for(0, size.batch * size.channels, grain, [&](int64_t begin, int64_t end) {
    Planes<A> planes(size.pixels());
    for (int64_t i = begin; i < end; ++i) f(i / size.channels, i % size.channels, planes);
  });
}

template <class A>
void forward(const AugmentKernels<A>& kernels, const Chain& chain, const Size& size, const Maps& x,
             const Maps& out) {
  const std::vector<Table<A>> warps = tables<A>(chain, size, false);
  for_planes<A>(size, [&](int64_t image, int64_t c, Planes<A>& planes) {
    const int64_t first = chain.first(c);
    if (first == 0) {
      kernels.load(x(image, chain.channel(0, c)), planes.get());
    } else {
      std::fill_n(planes.get(), size.pixels(), A{});
    }
    size_t warp = 0;
    for (int64_t s = 0; s < chain.count(); ++s) {
      const Step& step = chain.steps()[s];
      const bool skipped = s < first;
      if (step.kind == kWarp) {
        if (!skipped) planes.warp(kernels, warps[warp]);
        ++warp;
      } else if (skipped) {
        continue;
      } else if (step.kind == kCutout) {
        cut(planes.get(), step.numbers, size.width);
      } else if (step.kind == kNoise) {
        const int64_t place = (image * size.channels + chain.channel(s, c)) * size.pixels();
        kernels.add_noise(planes.get(), size.pixels(), place, static_cast<A>(step.numbers[0]),
                          static_cast<uint32_t>(step.numbers[1]), static_cast<uint32_t>(step.numbers[2]));
      }
    }
    kernels.store(planes.get(), out(image, c));
  });
}

template <class A>
void backward(const AugmentKernels<A>& kernels, const Chain& chain, const Size& size, const Maps& grad,
              const Maps& to) {
  const std::vector<Table<A>> warps = tables<A>(chain, size, true);
  std::vector<int64_t> shown_by(size.channels, -1);  // the channel of the result that shows one of the input
  for (int64_t c = 0; c < size.channels; ++c) {
    const int64_t from = chain.channel(0, c);
    if (from < 0) continue;
    KD_CHECK(shown_by[from] < 0, "feature_augment: channels: ", from, " is shown twice");
    shown_by[from] = c;
  }
  for_planes<A>(size, [&](int64_t image, int64_t from, Planes<A>& planes) {
    if (shown_by[from] < 0) {
      std::fill_n(planes.get(), size.pixels(), A{});
    } else {
      kernels.load(grad(image, shown_by[from]), planes.get());
      size_t warp = warps.size();
      for (int64_t s = chain.count() - 1; s >= 0; --s) {
        const Step& step = chain.steps()[s];
        if (step.kind == kWarp) planes.warp(kernels, warps[--warp]);
        if (step.kind == kCutout) cut(planes.get(), step.numbers, size.width);
      }
    }
    kernels.store(planes.get(), to(image, from));
  });
}

template <bool kForward>
Tensor run(const Tensor& x, const Tensor& steps, const Tensor& channels) {
  KD_CHECK(x.dim() == 4, "feature_augment: x must be [B, C, H, W], got ", x.dim(), " axes");
  const Size size{x.size(0), x.size(1), x.size(2), x.size(3)};
  KD_CHECK(size.pixels() < INT32_MAX, "feature_augment: need fewer than 2^31 pixels");
  const Chain chain(steps, channels, size);
  Tensor out = new_gradient(x);
  if (out.numel() == 0) return out;
  const auto call = [&](const auto& kernels) {
    if constexpr (kForward) {
      forward(kernels, chain, size, Maps(x), Maps(out));
    } else {
      backward(kernels, chain, size, Maps(x), Maps(out));
    }
  };
  x.scalar_type() == ScalarType::Double ? call(KD_DISPATCH_ISA(augment_double))
                                        : call(KD_DISPATCH_ISA(augment_float));
  return out;
}

}  // namespace

Tensor feature_augment_cpu(const Tensor& x, const Tensor& steps, const Tensor& channels) {
  return run<true>(x, steps, channels);
}

Tensor feature_augment_backward_cpu(const Tensor& grad, const Tensor& steps, const Tensor& channels) {
  return run<false>(grad, steps, channels);
}

}  // namespace kd
