// Op feature_augment on the CPU. Chains: kdfast/reference/feature_augment.py.
//
// Without warp and noise a chain copies rows under a mask: channels where a map is NCHW, pixels where it is
// channels_last. Else a thread takes 16 channels of an image through the whole chain in its cache, so that
// memory is read once and written once; beside the result it then has these planes a second time, side by
// side, and all threads share the taps of each warp, four per pixel.

#include "cpu/feature_augment.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/rounding.h"
#include "cpu/feature_augment_chain.h"
#include "cpu/feature_augment_ops.h"
#include "cpu/result.h"

namespace kd {

KD_DECLARE_ISA(extern const AugmentKernels<float> augment_float;
               extern const AugmentKernels<double> augment_double;
               void augment_rows(const AugmentRows& rows, int64_t begin, int64_t end);)

namespace {

using namespace augment;

constexpr int64_t kTaskElements = 16384;  // for a thread to be worth its start
constexpr int64_t kTaskBytes = 1 << 17;   // the same, of copies
constexpr int64_t kPastCache =
    12 << 20;  // bytes of a result that, with what it is made of, fill a last cache

// The planes of a tensor [B, C, H, W]; asks it for its strides once.
class Maps {
 public:
  explicit Maps(const Tensor& x)
      : data_(const_cast<char*>(static_cast<const char*>(x.const_data_ptr()))),
        size_(static_cast<int64_t>(x.element_size())),
        image_(x.stride(0) * size_),
        channel_(x.stride(1) * size_),
        plane_{nullptr, dtype_of(x.scalar_type(), "x"), x.size(2), x.size(3), x.stride(2), x.stride(3)} {}
  char* image(int64_t image) const { return data_ + image * image_; }
  AugmentPlane operator()(int64_t image, int64_t channel) const {
    AugmentPlane plane = plane_;
    plane.data = this->image(image) + channel * channel_;
    return plane;
  }
  int64_t element_size() const { return size_; }
  int64_t channel_bytes() const { return channel_; }
  int64_t pixel_bytes() const { return plane_.column_stride * size_; }
  bool dense_planes() const { return plane_.column_stride == 1 && plane_.row_stride == plane_.width; }
  bool dense_pixels() const {
    return channel_ == size_ && plane_.row_stride == plane_.width * plane_.column_stride;
  }
  // The plane itself where kernels can read and write it, else null.
  template <class A>
  A* direct(int64_t image, int64_t channel) const {
    const bool direct = dense_planes() && plane_.dtype == (sizeof(A) == 8 ? Dtype::f64 : Dtype::f32);
    return direct ? static_cast<A*>((*this)(image, channel).data) : nullptr;
  }

 private:
  char* data_;
  int64_t size_, image_, channel_;
  AugmentPlane plane_;
};

// f(row, column begin, column end) for the rows of a box.
template <class F>
void for_box(const double* box, const F& f) {
  const auto top = static_cast<int64_t>(box[0]), left = static_cast<int64_t>(box[1]),
             bottom = static_cast<int64_t>(box[2]), right = static_cast<int64_t>(box[3]);
  for (int64_t r = top; r < bottom; ++r) f(r, left, right);
}

template <class A>
void cut(A* values, const double* box, int64_t width, A value = {}) {
  for_box(box, [&](int64_t r, int64_t left, int64_t right) {
    std::fill(values + r * width + left, values + r * width + right, value);
  });
}

// A chain without warp, and without noise where that counts: copies; source[c] is the channel that c shows,
// or -1. False where rows of the two maps are not contiguous.
bool copy_rows(const Chain& chain, const Size& size, const std::vector<int32_t>& source, const Maps& from,
               const Maps& to) {
  const int64_t item = from.element_size();
  std::vector<uint8_t> kept(size.pixels(), 0xFF);
  for (const Step& step : chain.steps()) {
    if (step.kind == kCutout) cut<uint8_t>(kept.data(), step.numbers, size.width);
  }
  std::vector<uint8_t> mask;  // of a row
  std::vector<int32_t> rows;  // that each row shows
  AugmentRows copied{};
  if (from.dense_planes() && to.dense_planes()) {
    rows = source;
    copied.from_stride = from.channel_bytes(), copied.to_stride = to.channel_bytes();
    if (chain.has(kCutout)) {
      for (uint8_t keep : kept) mask.insert(mask.end(), item, keep);
    }
    copied.bytes = size.pixels() * item;
  } else if (from.dense_pixels() && to.dense_pixels()) {
    for (int64_t c = 0; c < size.channels; ++c) {
      if (source[c] >= 0 && source[c] != c) return false;
      mask.insert(mask.end(), item, source[c] < 0 ? 0 : 0xFF);
    }
    for (int64_t p = 0; p < size.pixels(); ++p) rows.push_back(kept[p] ? static_cast<int32_t>(p) : -1);
    copied.from_stride = from.pixel_bytes(), copied.to_stride = to.pixel_bytes();
    copied.bytes = size.channels * item;
  } else {
    return false;
  }
  copied.source = rows.data();
  copied.keep = mask.empty() ? nullptr : mask.data();
  const auto count = static_cast<int64_t>(rows.size());
  copied.past_cache = size.batch * count * copied.bytes >= kPastCache;
  parallel_for(0, size.batch * count, std::max<int64_t>(1, kTaskBytes / copied.bytes),
               [&](int64_t begin, int64_t end) {
                 while (begin < end) {
                   const int64_t image = begin / count, first = image * count;
                   const int64_t last = std::min(end, first + count);
                   AugmentRows of_image = copied;
                   of_image.from = from.image(image), of_image.to = to.image(image);
                   KD_DISPATCH_ISA(augment_rows(of_image, begin - first, last - first));
                   begin = last;
                 }
               });
  return true;
}

// A channel on its way through the chain: where it comes from (-1: zeros) and goes to, and from which step on
// it is not all 0.
struct Member {
  int64_t from, to, first;
};

// Takes up to 16 channels through the chain, or back through its adjoint; one per thread.
template <class A, bool kForward>
class Worker {
 public:
  Worker(const AugmentKernels<A>& kernels, const Chain& chain, const Size& size,
         const std::vector<Table<A>>& warps, const Maps& from, const Maps& to)
      : kernels_(kernels), chain_(chain), size_(size), warps_(warps), from_(from), to_(to) {
    const int64_t pixels = size.pixels();
    if (!warps.empty()) lanes_.reset(new A[(pixels + 1) * kAugmentLanes]);
    if (!to.template direct<A>(0, 0)) planes_.reset(new A[pixels * kAugmentLanes]);
  }

  void run(int64_t image, const Member* members, int64_t count) {
    const int64_t pixels = size_.pixels();
    for (int64_t i = 0; i < count; ++i) {
      const Member& m = members[i];
      work_[i] = planes_ ? planes_.get() + i * pixels : to_.template direct<A>(image, m.to);
      now_[i] = m.from < 0 ? nullptr : from_.template direct<A>(image, m.from);
      if (now_[i]) continue;
      now_[i] = work_[i];
      if (m.from < 0) {
        std::fill_n(work_[i], pixels, A{});
      } else {
        kernels_.load(from_(image, m.from), work_[i]);
      }
    }
    std::fill(now_ + count, now_ + kAugmentLanes, now_[0]);
    size_t warp = kForward ? 0 : warps_.size();
    for (int64_t k = 0; k < chain_.count(); ++k) {
      const int64_t s = kForward ? k : chain_.count() - 1 - k;
      const Step& step = chain_.steps()[s];
      if (step.kind == kWarp) {
        const Table<A>& table = warps_[kForward ? warp++ : --warp];
        kernels_.interleave(now_, pixels, lanes_.get());
        kernels_.resample(table.get(), lanes_.get(), work_, count);
        std::copy_n(work_, count, now_);
        std::fill(now_ + count, now_ + kAugmentLanes, now_[0]);
        continue;
      }
      for (int64_t i = 0; i < count; ++i) {
        if (s < members[i].first) continue;  // 0 whatever happens
        if (step.kind == kCutout) {
          own(i);
          cut(work_[i], step.numbers, size_.width);
        } else if (step.kind == kNoise && kForward) {
          own(i);
          const int64_t place = (image * size_.channels + chain_.channel(s, members[i].to)) * pixels;
          kernels_.add_noise(work_[i], pixels, place, static_cast<A>(step.numbers[0]),
                             static_cast<uint32_t>(step.numbers[1]), static_cast<uint32_t>(step.numbers[2]));
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      own(i);
      if (planes_) kernels_.store(work_[i], to_(image, members[i].to));
    }
  }

 private:
  // Before a plane is changed in place, or kept.
  void own(int64_t i) {
    if (now_[i] == work_[i]) return;
    std::copy_n(now_[i], size_.pixels(), work_[i]);
    now_[i] = work_[i];
  }

  const AugmentKernels<A>& kernels_;
  const Chain& chain_;
  const Size& size_;
  const std::vector<Table<A>>& warps_;
  const Maps &from_, &to_;
  std::unique_ptr<A[]> lanes_;   // side by side, and a pixel of zeros
  std::unique_ptr<A[]> planes_;  // where the result's own cannot be worked in
  A* work_[kAugmentLanes];
  const A* now_[kAugmentLanes];
};

template <class A, bool kForward>
void compute(const AugmentKernels<A>& kernels, const Chain& chain, const Size& size,
             const std::vector<Member>& members, const Maps& from, const Maps& to) {
  std::vector<Table<A>> warps;
  for (const Step& step : chain.steps()) {
    if (step.kind == kWarp) warps.emplace_back(step.numbers, size, !kForward);
  }
  const int64_t groups = ceil_div(size.channels, kAugmentLanes);
  const int64_t grain = std::max<int64_t>(1, kTaskElements / (kAugmentLanes * size.pixels()));
  parallel_for(0, size.batch * groups, grain, [&](int64_t begin, int64_t end) {
    Worker<A, kForward> worker(kernels, chain, size, warps, from, to);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % groups * kAugmentLanes;
      worker.run(i / groups, members.data() + first, std::min(kAugmentLanes, size.channels - first));
    }
  });
}

template <bool kForward>
Tensor run(const Tensor& x, const Tensor& steps, const Tensor& channels) {
  KD_CHECK(x.dim() == 4, "feature_augment: x must be [B, C, H, W], got ", x.dim(), " axes");
  const Size size{x.size(0), x.size(1), x.size(2), x.size(3)};
  KD_CHECK(size.pixels() < INT32_MAX / kAugmentLanes, "feature_augment: need fewer than 2^27 pixels");
  const Chain chain(steps, channels, size);
  Tensor out = new_gradient(x);
  if (out.numel() == 0) return out;
  std::vector<Member> members(size.channels);
  for (int64_t c = 0; c < size.channels; ++c) {
    members[c] = kForward ? Member{chain.first(c) ? -1 : chain.channel(0, c), c, chain.first(c)}
                          : Member{-1, c, chain.count()};
  }
  for (int64_t c = 0; c < size.channels && !kForward; ++c) {
    const int64_t shown = chain.channel(0, c);
    if (shown < 0) continue;
    KD_CHECK(members[shown].from < 0, "feature_augment: channels: ", shown, " is shown twice");
    members[shown] = {c, shown, 0};
  }
  const Maps from(x), to(out);
  if (!chain.has(kWarp) && !(kForward && chain.has(kNoise))) {
    std::vector<int32_t> source;
    for (const Member& m : members) source.push_back(static_cast<int32_t>(m.from));
    if (copy_rows(chain, size, source, from, to)) return out;
  }
  if (x.scalar_type() == ScalarType::Double) {
    compute<double, kForward>(KD_DISPATCH_ISA(augment_double), chain, size, members, from, to);
  } else {
    compute<float, kForward>(KD_DISPATCH_ISA(augment_float), chain, size, members, from, to);
  }
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
