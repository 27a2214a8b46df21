// The backward of the op attention_mask on the CPU: one pass over the maps, which writes the gradient with
// all its parts. Formulas: kdfast/reference/attention_mask.py.

#include "cpu/attention_gradient.h"
#include "cpu/result.h"

namespace kd {

using namespace attention;

namespace {

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
  const GradientTerms<A>& all() const { return found_; }

 private:
  A* sums(int64_t term, int64_t all) {
    if (sums_[term].empty()) sums_[term].resize(all);
    found_.values[term] = sums_[term].data(), found_.factors[term] = A(1);
    return sums_[term].data();
  }

  GradientTerms<A> found_ = {};
  std::vector<A> sums_[2];
};

template <class A>
void backward(const Tensor& x, const Tensor& other, const Parts<A>& parts, bool masked, const Tensor& out) {
  const Shape s(out);
  const Small<A> none(std::nullopt, "", 0);
  double scale[3] = {};
  for (int i = 0; i < 3 && parts.terms.get(); ++i) {
    scale[i] = static_cast<double>(parts.grad_loss) * parts.terms.get()[3 + i];
  }
  const Terms<A> pixels(parts, parts.spatial, masked ? parts.spatial_mask : none, parts.grad_spatial,
                        scale[0], scale[2], s.batch * s.pixels, 1 / static_cast<double>(s.channels)),
      channels(parts, parts.channel, masked ? parts.channel_mask : none, parts.grad_channel, scale[1], 1.0,
               s.batch * s.channels, 1 / static_cast<double>(s.pixels));
  write_gradient<A>(s, dtype_of(x.scalar_type(), "x"), Map(x, s), Map(other, s), pixels.all(), channels.all(),
                    Map(out, s));
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
    in_place(out, [&](const Tensor& written) {
      backward<A>(x, other.value_or(x), parts, other.has_value(), written);
    });
  });
  return out;
}

}  // namespace kd
