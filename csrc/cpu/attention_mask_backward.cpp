// The backward of the op attention_mask on the CPU: one pass over the maps, which writes the gradient with
// all its parts. Formulas: kdfast/reference/attention_mask.py.

#include "common/gradient.h"
#include "cpu/attention_map.h"

namespace kd {

using namespace attention;

namespace {

constexpr int64_t kRowElements = 1 << 14;  // of the rows that one task takes, at least

template <class A>
struct Parts {
  A grad_loss = 0;
  Small<A> terms, spatial, channel, spatial_mask, channel_mask, grad_spatial, grad_channel;
  int64_t maps;  // 2: spatial and channel hold both maps' attention, 1: student minus teacher
  int64_t side;
  bool with_signed;
};

// Terms of all pixels, or of all channels, `all` of them in the batch. What the forward kept is read in
// place; sums of several parts are in memory of their own.
template <class A>
class Terms {
 public:
  Terms(const Parts<A>& parts, const Small<A>& pooled, const Small<A>& mask, const Small<A>& given,
        double transfer, double weight, int64_t all, double mean) {
    const int64_t last = parts.with_signed;
    const auto factor = static_cast<A>(parts.side ? -transfer * mean : transfer * mean);
    if (pooled.get()) {
      const A* const own = pooled.get() + (pooled.count - parts.maps) * all;
      if (parts.maps == 1 && given.count == 0) {
        found_.values[last] = own, found_.factors[last] = factor;
      } else {
        A* const to = sums(last, all);
        for (int64_t i = 0; i < all; ++i) to[i] = factor * (own[i] - (parts.maps == 2 ? own[all + i] : A(0)));
      }
    }
    for (int64_t k = 0; k < given.count; ++k) {
      A* const to = sums(last + 1 - given.count + k, all);
      for (int64_t i = 0; i < all; ++i) to[i] += given.get()[k * all + i] * static_cast<A>(mean);
    }
    found_.values[2] = mask.get(), found_.factors[2] = static_cast<A>(weight);
  }
  GradientTerms<A> from(int64_t first) const {
    GradientTerms<A> terms = found_;
    for (auto& values : terms.values) values = values ? values + first : nullptr;
    return terms;
  }

 private:
  A* sums(int64_t term, int64_t all) {
    if (sums_[term].empty()) sums_[term].resize(all);
    found_.values[term] = sums_[term].data(), found_.factors[term] = A(1);
    return sums_[term].data();
  }

  GradientTerms<A> found_ = {};
  std::vector<A> sums_[2];
};

// Rows are written one after the other, which page faults and prefetchers like best; nothing is summed here.
template <class A>
void backward(const Tensor& x, const Tensor& other, const Parts<A>& parts, bool masked, const Tensor& out) {
  const Shape s(out);
  const Dtype dtype = dtype_of(x.scalar_type(), "x");
  const Map xs(x, s), ys(other, s), to(out, s);
  const Small<A> none(std::nullopt, "", 0);
  double scale[3] = {};
  for (int i = 0; i < 3 && parts.terms.get(); ++i) {
    scale[i] = static_cast<double>(parts.grad_loss) * parts.terms.get()[3 + i];
  }
  const Terms<A> pixels(parts, parts.spatial, masked ? parts.spatial_mask : none, parts.grad_spatial,
                        scale[0], scale[2], s.batch * s.pixels, 1 / static_cast<double>(s.channels)),
      channels(parts, parts.channel, masked ? parts.channel_mask : none, parts.grad_channel, scale[1], 1.0,
               s.batch * s.channels, 1 / static_cast<double>(s.pixels));
  const int64_t rows = s.planar ? s.channels : s.pixels, columns = s.planar ? s.pixels : s.channels;
  const Terms<A>&of_rows = s.planar ? channels : pixels, &of_columns = s.planar ? pixels : channels;
  const int64_t step = std::max<int64_t>(kRowElements / columns / 4, 1) * 4, steps = ceil_div(rows, step);
  parallel_for(0, s.batch * steps, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / steps, row = task % steps * step;
      const MapTile tile = to.tile(image, 0, row);
      kernels<A>().gradient(dtype, xs.tile(image, 0, row), ys.tile(image, 0, row), std::min(step, rows - row),
                            columns, of_rows.from(image * rows + row), of_columns.from(image * columns),
                            const_cast<void*>(tile.data), tile.row_stride);
    }
  });
}

}  // namespace

Tensor attention_mask_backward_cpu(const Tensor& x, std::optional<Tensor> other,
                                   std::optional<Tensor> grad_loss, std::optional<Tensor> terms,
                                   std::optional<Tensor> spatial, std::optional<Tensor> channel,
                                   std::optional<Tensor> spatial_mask, std::optional<Tensor> channel_mask,
                                   std::optional<Tensor> grad_spatial, std::optional<Tensor> grad_channel,
                                   int64_t side, bool with_signed) {
  check_map(x, "x");
  if (other.has_value()) check_same(x, *other, "x and other");
  KD_CHECK(!(other.has_value() || spatial.has_value()) || (grad_loss.has_value() && terms.has_value()),
           "attention_mask_backward: other, spatial and channel need grad_loss and terms");
  const int64_t maps = spatial.has_value() ? spatial->size(1) : 1;
  const int64_t given = grad_spatial.has_value() ? grad_spatial->size(0) : 0;
  KD_CHECK(given <= 1 + with_signed, "attention_mask_backward: grad_spatial has ", given,
           " kinds of means, at most ", 1 + with_signed, " are compared");
  Tensor out = new_gradient(x);
  with_accumulator(x, [&](auto zero) {
    using A = decltype(zero);
    const int64_t pixels = x.size(0) * x.size(2) * x.size(3), channels = x.size(0) * x.size(1);
    const Small<A> gradient(grad_loss, "grad_loss", 1);
    const Parts<A> parts{gradient.get() ? *gradient.get() : A(0),
                         {terms, "terms", 6},
                         {spatial, "spatial", pixels},
                         {channel, "channel", channels},
                         {spatial_mask, "spatial_mask", pixels},
                         {channel_mask, "channel_mask", channels},
                         {grad_spatial, "grad_spatial", pixels},
                         {grad_channel, "grad_channel", channels},
                         maps,
                         side,
                         with_signed};
    const bool fits = reads_planar(out) || reads_by_pixel(out);
    Tensor written = fits ? out : torch::stable::contiguous(out);
    backward<A>(x, other.value_or(x), parts, other.has_value(), written);
    if (!fits) torch::stable::copy_(out, written);
  });
  return out;
}

}  // namespace kd
