#pragma once

// Chains of the op feature_augment: what a plan's steps and channels say, and the taps of its warps.

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/check.h"
#include "common/dtype.h"
#include "common/rounding.h"
#include "cpu/feature_augment.h"

namespace kd::augment {

using torch::stable::Tensor;

enum Kind : int { kWarp, kCutout, kNoise, kChannels };  // as in the reference
constexpr int64_t kNumbers = 7;

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

// The taps of a warp, or of its adjoint, in the order that kernels read them.
template <class A>
class Table {
 public:
  Table(const double* matrix, const Size& size, bool adjoint) : pixels_(size.pixels()) {
    struct Found {
      int64_t result, input;
      double weight;
    };
    std::vector<Found> found;
    found.reserve(4 * pixels_);
    for_taps(matrix, size, [&](int64_t result, int64_t input, double weight) {
      if (adjoint) std::swap(result, input);
      found.push_back({result, input, weight});
    });
    const int64_t groups = ceil_div(pixels_, kAugmentGroup);
    std::vector<int64_t> counts(groups * kAugmentGroup);
    for (const Found& f : found) ++counts[f.result];
    begin_.resize(groups + 1);
    for (int64_t g = 0; g < groups; ++g) {
      const auto first = counts.begin() + g * kAugmentGroup;
      begin_[g + 1] = begin_[g] + kAugmentGroup * *std::max_element(first, first + kAugmentGroup);
    }
    taps_.assign(begin_[groups], {static_cast<int32_t>(kAugmentLanes * pixels_), A{}});
    std::fill(counts.begin(), counts.end(), 0);
    for (const Found& f : found) {
      const int64_t g = f.result / kAugmentGroup, taps = (begin_[g + 1] - begin_[g]) / kAugmentGroup;
      taps_[begin_[g] + f.result % kAugmentGroup * taps + counts[f.result]++] = {
          static_cast<int32_t>(kAugmentLanes * f.input), static_cast<A>(f.weight)};
    }
  }
  AugmentTable<A> get() const { return {taps_.data(), begin_.data(), pixels_}; }

 private:
  std::vector<AugmentTap<A>> taps_;
  std::vector<int64_t> begin_;
  int64_t pixels_;
};

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
  bool has(Kind kind) const {
    return std::any_of(steps_.begin(), steps_.end(), [&](const Step& s) { return s.kind == kind; });
  }
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

}  // namespace kd::augment
