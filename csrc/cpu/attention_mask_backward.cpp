// The backward of the op attention_mask on the CPU: one pass over the maps, which writes the gradient with
// all its parts. Formulas: kdfast/reference/attention_mask.py.

#include "common/gradient.h"
#include "cpu/attention_map.h"

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

// Sign, plain and weight term of `count` pixels (or channels) from `first` on, in the order of the kernel;
// `all`: how many one map has.
template <class A>
void terms_of(const Parts<A>& parts, const Small<A>& pooled, const Small<A>& mask, const Small<A>& given,
              double transfer, double weight, int64_t all, int64_t first, int64_t count, double mean,
              A* const to[3]) {
  for (int t = 0; t < 3; ++t) std::fill_n(to[t], padded(count), A(0));
  const int64_t last = parts.with_signed;
  if (pooled.get()) {
    const A* const student = pooled.get() + (pooled.count - parts.maps) * all + first;
    const A* const teacher = parts.maps == 2 ? student + all : nullptr;
    const auto factor = static_cast<A>(parts.side ? -transfer * mean : transfer * mean);
    for (int64_t i = 0; i < count; ++i) to[last][i] = factor * (student[i] - (teacher ? teacher[i] : A(0)));
  }
  for (int64_t k = 0; k < given.count; ++k) {
    A* const out = to[last + 1 - given.count + k];
    for (int64_t i = 0; i < count; ++i) out[i] += given.get()[k * all + first + i] * static_cast<A>(mean);
  }
  if (mask.get()) {
    for (int64_t i = 0; i < count; ++i) to[2][i] = static_cast<A>(weight) * mask.get()[first + i];
  }
}

template <class A>
void backward(const Tensor& x, const Tensor& other, const Parts<A>& parts, bool masked, const Tensor& out) {
  const Shape s(out);
  const Dtype dtype = dtype_of(x.scalar_type(), "x");
  const Map xs(x, s), ys(other, s), to(out, s);
  const Small<A> none(std::nullopt, "", 0);
  const A* terms = parts.terms.get();
  double scale[3] = {};
  for (int i = 0; i < 3 && terms; ++i) scale[i] = static_cast<double>(parts.grad_loss) * terms[3 + i];
  for_chunks(s, 1, [&](int64_t begin, int64_t end) {
    const int64_t wide_channels = padded(s.channels), wide_pixels = padded(s.chunk);
    std::vector<A> memory(3 * (wide_channels + wide_pixels));
    A *channels[3], *pixels[3];
    for (int t = 0; t < 3; ++t) {
      channels[t] = memory.data() + t * wide_channels;
      pixels[t] = memory.data() + 3 * wide_channels + t * wide_pixels;
    }
    for (int64_t task = begin; task < end; ++task) {
      const Chunk c = chunk_of(s, task);
      if (task == begin || c.first == 0) {
        terms_of(parts, parts.channel, masked ? parts.channel_mask : none, parts.grad_channel, scale[1], 1.0,
                 s.batch * s.channels, c.image * s.channels, s.channels, 1 / static_cast<double>(s.pixels),
                 channels);
      }
      terms_of(parts, parts.spatial, masked ? parts.spatial_mask : none, parts.grad_spatial, scale[0],
               scale[2], s.batch * s.pixels, c.image * s.pixels + c.first, c.count,
               1 / static_cast<double>(s.channels), pixels);
      const A* const rows[3] = {s.planar ? channels[0] : pixels[0], s.planar ? channels[1] : pixels[1],
                                s.planar ? channels[2] : pixels[2]};
      const A* const columns[3] = {s.planar ? pixels[0] : channels[0], s.planar ? pixels[1] : channels[1],
                                   s.planar ? pixels[2] : channels[2]};
      kernels<A>().gradient(dtype, xs.tile(c.image, c.first), ys.tile(c.image, c.first),
                            s.planar ? s.channels : c.count, s.planar ? c.count : s.channels, rows, columns,
                            to.at(c.image, c.first), to.row_stride());
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
