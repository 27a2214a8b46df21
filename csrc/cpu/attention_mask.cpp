// Op attention_mask on the CPU: layouts, threads and masks. Formulas: kdfast/reference/attention_mask.py.
//
// A map is cut into (image, chunk of pixels). A chunk's sums over channels stay in the L1 cache and are
// final; its sums over pixels, C numbers, are added up over the chunks in order. Chunks depend on the shape
// alone, so results do not depend on the number of threads. Maps are read in place when they are NCHW
// (planar) or channels_last with any stride between images and between channels or pixels; others are copied
// first.

#include "cpu/attention_mask.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/check.h"
#include "common/dtype.h"
#include "common/gradient.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "cpu/attention_mask_ops.h"

namespace kd {

KD_DECLARE_ISA(extern const AttentionKernels<float> attention_float;
               extern const AttentionKernels<double> attention_double;)

namespace {

constexpr int64_t kChunk = 1024;  // pixels at most
constexpr int64_t kSteps =
    64;  // pixels whose channels_last rows are added one after another: more lose digits

template <class A>
const AttentionKernels<A>& kernels() {
  if constexpr (std::is_same_v<A, float>) {
    return KD_DISPATCH_ISA(attention_float);
  } else {
    return KD_DISPATCH_ISA(attention_double);
  }
}

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
int64_t padded(int64_t n) { return ceil_div(n, kColumnPadding) * kColumnPadding; }

MapDtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return MapDtype::f64;
    case ScalarType::Half:
      return MapDtype::f16;
    case ScalarType::BFloat16:
      return MapDtype::bf16;
    default:
      return MapDtype::f32;
  }
}

bool is_wide(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

void check_map(const Tensor& x, const char* name) {
  KD_CHECK(x.dim() == 4 && x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, "attention_mask: ", name,
           " must be a map [B, C, H, W] with channels and pixels, got ", x.dim(), " axes");
  dispatch_float(x.scalar_type(), name, [](auto) {});
}

void check_same(const Tensor& x, const Tensor& y, const char* names) {
  KD_CHECK(x.scalar_type() == y.scalar_type(), "attention_mask: ", names, " must have one dtype");
  for (int a = 0; a < 4; ++a) {
    KD_CHECK(x.size(a) == y.size(a), "attention_mask: ", names, " must have one shape, axis ", a, " has ",
             x.size(a), " and ", y.size(a));
  }
}

// Elements from one pixel to the next, or 0 where pixels do not lie along one stride.
int64_t pixel_stride(const Tensor& x) {
  const int64_t h = x.size(2), w = x.size(3);
  if (h == 1 && w == 1) return 1;
  if (w == 1) return x.stride(2);
  if (h == 1 || x.stride(2) == w * x.stride(3)) return x.stride(3);
  return 0;
}
bool reads_planar(const Tensor& x) { return pixel_stride(x) == 1; }
bool reads_by_pixel(const Tensor& x) { return pixel_stride(x) > 0 && (x.size(1) == 1 || x.stride(1) == 1); }

// Sizes that all maps of a call share, and the layout that they are read in.
struct Shape {
  int64_t batch, channels, pixels, chunks, chunk;
  bool planar;

  explicit Shape(const Tensor& x) : batch(x.size(0)), channels(x.size(1)), pixels(x.size(2) * x.size(3)) {
    chunks = ceil_div(pixels, kChunk);
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
  MapTile tile(int64_t image, int64_t pixel) const { return {at(image, pixel), row_}; }
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

Chunk chunk_of(const Shape& s, int64_t task) {
  const int64_t first = task % s.chunks * s.chunk;
  return {task / s.chunks, first, std::min(s.chunk, s.pixels - first)};
}

template <class F>
void for_chunks(const Shape& s, int64_t maps, const F& f) {
  parallel_for(0, maps * s.tasks(), 1, [&](int64_t begin, int64_t end) { f(begin, end); });
}

// out [maps, C] = factor * sum over chunks of parts [maps, chunks, C]
template <class A>
void add_chunks(const Shape& s, int64_t maps, const std::vector<A>& parts, double factor, A* out) {
  for (int64_t m = 0; m < maps; ++m) {
    for (int64_t c = 0; c < s.channels; ++c) {
      double sum = 0;
      for (int64_t k = 0; k < s.chunks; ++k) sum += parts[(m * s.chunks + k) * s.channels + c];
      out[m * s.channels + c] = static_cast<A>(factor * sum);
    }
  }
}

// Means over channels, spatial [kinds, maps, B, P], and over pixels, channel [kinds, maps, B, C], of |x| (and
// of x).
template <class A>
void pool_maps(const Shape& s, MapDtype dtype, const std::vector<const Map*>& maps, bool with_signed,
               A* spatial, A* channel) {
  const int64_t count = static_cast<int64_t>(maps.size()), kinds = 1 + with_signed, tasks = count * s.tasks();
  std::vector<A> parts[2];
  for (int64_t k = 0; k < kinds; ++k) parts[k].resize(tasks * s.channels);
  for_chunks(s, count, [&](int64_t begin, int64_t end) {
    const int64_t width = padded(std::max(s.channels, s.chunk));
    std::vector<A> columns(2 * width), rows(2 * width);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t m = task / s.tasks();
      const Chunk c = chunk_of(s, task % s.tasks());
      const int64_t step = s.planar ? c.count : kSteps;
      for (int64_t at = 0; at < c.count; at += step) {
        const int64_t pixel_count = std::min(step, c.count - at), pixel = c.first + at;
        std::fill(columns.begin(), columns.end(), A(0));
        kernels<A>().pool(dtype, maps[m]->tile(c.image, pixel), s.planar ? s.channels : pixel_count,
                          s.planar ? pixel_count : s.channels, rows.data(), columns.data(),
                          with_signed ? rows.data() + width : nullptr, columns.data() + width);
        for (int64_t k = 0; k < kinds; ++k) {
          const A *over_rows = rows.data() + k * width, *over_columns = columns.data() + k * width;
          const A *pixels = s.planar ? over_columns : over_rows,
                  *channels = s.planar ? over_rows : over_columns;
          A *to = spatial + ((k * count + m) * s.batch + c.image) * s.pixels + pixel,
            *part = parts[k].data() + task * s.channels;
          for (int64_t i = 0; i < pixel_count; ++i) to[i] = pixels[i] / static_cast<A>(s.channels);
          for (int64_t i = 0; i < s.channels; ++i) part[i] += channels[i];
        }
      }
    }
  });
  for (int64_t k = 0; k < kinds; ++k) {
    const double mean = 1 / static_cast<double>(s.pixels);
    add_chunks(s, count * s.batch, parts[k], mean, channel + k * count * s.batch * s.channels);
  }
}

// Sum of spatial_mask * channel_mask * (x - y)^2. With pointers to them also, per pixel and per channel, the
// sums that a mask multiplies.
template <class A>
double masked_error(const Shape& s, MapDtype dtype, const Map& x, const Map& y, const A* spatial_mask,
                    const A* channel_mask, A* spatial_error, A* channel_error) {
  std::vector<double> sums(s.tasks());
  std::vector<A> parts(channel_error ? s.tasks() * s.channels : 0);
  for_chunks(s, 1, [&](int64_t begin, int64_t end) {
    const int64_t width = padded(std::max(s.channels, s.chunk));
    std::vector<A> weights(width), columns(width), rows(width);
    for (int64_t task = begin; task < end; ++task) {
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
  if (channel_error) add_chunks(s, s.batch, parts, 1.0, channel_error);
  double error = 0;
  for (double sum : sums) error += sum;
  return error;
}

// Waking a thread costs as much as some ten thousand elements.
int64_t images_per_task(int64_t pixels) { return std::max<int64_t>(1, 16384 / pixels); }

// Squared distance of two maps [B, count]: per image, then in order.
template <class A>
double squared_distance(const A* x, const A* y, int64_t batch, int64_t count) {
  std::vector<double> sums(batch);
  parallel_for(0, batch, images_per_task(count), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      double parts[8] = {};
      for (int64_t i = 0; i < count; ++i) {
        const double d = static_cast<double>(x[b * count + i]) - static_cast<double>(y[b * count + i]);
        parts[i % 8] += d * d;
      }
      for (double part : parts) sums[b] += part;
    }
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

Tensor empty(const Tensor& like, std::vector<int64_t> size) {
  return torch::stable::new_empty(like, size, is_wide(like) ? ScalarType::Double : ScalarType::Float);
}

template <class A>
A* data(const Tensor& x) {
  return static_cast<A*>(x.data_ptr());
}

double factor(double weight, double distance) { return distance > 0 ? weight / distance : 0.0; }

template <class F>
void with_accumulator(const Tensor& x, const F& f) {
  if (is_wide(x)) {
    f(double{});
  } else {
    f(float{});
  }
}

struct Settings {
  double temperature, transfer_weight, masked_weight;
  bool softmax_of_sum, channel_mask, with_signed, through;
};

template <class A>
void forward(const Tensor& student, const Tensor& teacher, const Tensor& compared, const Settings& set,
             A* loss, A* terms, A* spatial, A* channel, A* spatial_mask, A* channel_mask) {
  const Shape s(student);
  const MapDtype dtype = dtype_of(student);
  const Map x(student, s), y(teacher, s), z(compared, s);
  pool_maps<A>(s, dtype, {&x, &y}, set.with_signed, spatial, channel);
  const int64_t pixels = s.batch * s.pixels, channels = s.batch * s.channels;
  parallel_for(0, s.batch, images_per_task(s.pixels), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const A *of_pixels = spatial + b * s.pixels, *of_channels = channel + b * s.channels;
      A *to_pixels = spatial_mask + b * s.pixels, *to_channels = channel_mask + b * s.channels;
      const auto scale = static_cast<A>(1 / set.temperature);
      kernels<A>().mask(of_pixels, of_pixels + pixels, s.pixels, scale, set.softmax_of_sum, to_pixels);
      if (set.channel_mask) {
        kernels<A>().mask(of_channels, of_channels + channels, s.channels, scale, set.softmax_of_sum,
                          to_channels);
      } else {
        std::fill_n(to_channels, s.channels, A(1));
      }
    }
  });
  double distances[3] = {};
  if (set.transfer_weight != 0) {
    const A *of_pixels = spatial + set.with_signed * 2 * pixels,
            *of_channels = channel + set.with_signed * 2 * channels;
    distances[0] = std::sqrt(squared_distance(of_pixels, of_pixels + pixels, s.batch, s.pixels));
    distances[1] = std::sqrt(squared_distance(of_channels, of_channels + channels, s.batch, s.channels));
  }
  distances[2] = std::sqrt(masked_error<A>(s, dtype, z, y, spatial_mask, channel_mask,
                                           set.through ? spatial_mask + pixels : nullptr,
                                           set.through ? channel_mask + channels : nullptr));
  const double weights[3] = {set.transfer_weight, set.transfer_weight, set.masked_weight};
  double sum = 0;
  for (int i = 0; i < 3; ++i) {
    terms[i] = static_cast<A>(distances[i]);
    terms[3 + i] = static_cast<A>(factor(weights[i], distances[i]));
    sum += weights[i] * distances[i];
  }
  *loss = static_cast<A>(sum);
}

// The small inputs of the backward, contiguous; null where not given.
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

template <class A>
struct Parts {
  A grad_loss = 0;
  Small<A> terms, spatial, channel, spatial_mask, channel_mask, grad_spatial, grad_channel;
  int64_t side;
};

// Sign, plain and weight term of `count` pixels (or channels) from `first` on; `all`: how many one map of a
// pair has.
template <class A>
void terms_of(const Small<A>& pair, const Small<A>& mask, const Small<A>& given, double transfer,
              double weight, int64_t side, int64_t all, int64_t first, int64_t count, double mean,
              A* const to[3]) {
  for (int t = 0; t < 3; ++t) std::fill_n(to[t], padded(count), A(0));
  if (pair.get()) {  // the last kind is what L_AT compares: means of |x|, unless there are two kinds
    const int64_t kinds = pair.count;
    const A *own = pair.get() + ((kinds - 1) * 2 + side) * all + first,
            *other = pair.get() + ((kinds - 1) * 2 + 1 - side) * all + first;
    A* const out = to[kinds - 1];
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<A>(transfer * mean) * (own[i] - other[i]);
  }
  for (int64_t k = 0; k < given.count; ++k) {
    for (int64_t i = 0; i < count; ++i) to[k][i] += given.get()[k * all + first + i] * static_cast<A>(mean);
  }
  if (mask.get()) {
    for (int64_t i = 0; i < count; ++i) to[2][i] = static_cast<A>(weight) * mask.get()[first + i];
  }
}

template <class A>
void backward(const Tensor& x, const Tensor& other, const Parts<A>& parts, bool masked, const Tensor& out) {
  const Shape s(out);
  const MapDtype dtype = dtype_of(x);
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
        terms_of(parts.channel, masked ? parts.channel_mask : none, parts.grad_channel, scale[1], 1.0,
                 parts.side, s.batch * s.channels, c.image * s.channels, s.channels,
                 1 / static_cast<double>(s.pixels), channels);
      }
      terms_of(parts.spatial, masked ? parts.spatial_mask : none, parts.grad_spatial, scale[0], scale[2],
               parts.side, s.batch * s.pixels, c.image * s.pixels + c.first, c.count,
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

std::tuple<Tensor, Tensor> attention_pool_cpu(const Tensor& x, bool with_signed) {
  check_map(x, "x");
  const int64_t kinds = 1 + with_signed;
  Tensor spatial = empty(x, {kinds, x.size(0), 1, x.size(2), x.size(3)}),
         channel = empty(x, {kinds, x.size(0), x.size(1)});
  with_accumulator(x, [&](auto zero) {
    using A = decltype(zero);
    const Shape s(x);
    const Map map(x, s);
    pool_maps<A>(s, dtype_of(x), {&map}, with_signed, data<A>(spatial), data<A>(channel));
  });
  return {spatial, channel};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_mask_cpu(
    const Tensor& student, const Tensor& teacher, std::optional<Tensor> adapted, double temperature,
    double transfer_weight, double masked_weight, bool softmax_of_sum, bool channel_mask, bool with_signed,
    bool through) {
  check_map(student, "student");
  check_same(student, teacher, "student and teacher");
  if (adapted.has_value()) check_same(*adapted, teacher, "adapted and teacher");
  const int64_t b = student.size(0), c = student.size(1), h = student.size(2), w = student.size(3);
  const int64_t kinds = 1 + with_signed, kept = 1 + through;
  Tensor loss = empty(student, {}), terms = empty(student, {2, 3}),
         spatial = empty(student, {kinds, 2, b, 1, h, w}), channel = empty(student, {kinds, 2, b, c}),
         spatial_weights = empty(student, {kept, b, 1, h, w}), channel_weights = empty(student, {kept, b, c});
  const Settings settings{temperature,  transfer_weight, masked_weight, softmax_of_sum,
                          channel_mask, with_signed,     through};
  with_accumulator(student, [&](auto zero) {
    using A = decltype(zero);
    forward<A>(student, teacher, adapted.value_or(student), settings, data<A>(loss), data<A>(terms),
               data<A>(spatial), data<A>(channel), data<A>(spatial_weights), data<A>(channel_weights));
  });
  return {loss, terms, spatial, channel, spatial_weights, channel_weights};
}

Tensor masked_distance_cpu(const Tensor& x, const Tensor& y, const Tensor& spatial_mask,
                           const Tensor& channel_mask) {
  check_map(x, "x");
  check_same(x, y, "x and y");
  Tensor terms = empty(x, {2, 3});
  with_accumulator(x, [&](auto zero) {
    using A = decltype(zero);
    const Shape s(x);
    const Small<A> spatial(spatial_mask, "spatial_mask", s.batch * s.pixels),
        channel(channel_mask, "channel_mask", s.batch * s.channels);
    KD_CHECK(s.batch == 0 || (spatial.count == 1 && channel.count == 1),
             "masked_distance: spatial_mask must be [B, 1, H, W] and channel_mask [B, C]");
    const Map xs(x, s), ys(y, s);
    const double distance =
        std::sqrt(masked_error<A>(s, dtype_of(x), xs, ys, spatial.get(), channel.get(), nullptr, nullptr));
    const double values[6] = {0, 0, distance, 0, 0, factor(1, distance)};
    std::copy_n(values, 6, data<A>(terms));
  });
  return terms;
}

Tensor attention_mask_backward_cpu(const Tensor& x, std::optional<Tensor> other,
                                   std::optional<Tensor> grad_loss, std::optional<Tensor> terms,
                                   std::optional<Tensor> spatial, std::optional<Tensor> channel,
                                   std::optional<Tensor> spatial_mask, std::optional<Tensor> channel_mask,
                                   std::optional<Tensor> grad_spatial, std::optional<Tensor> grad_channel,
                                   int64_t side) {
  check_map(x, "x");
  if (other.has_value()) check_same(x, *other, "x and other");
  KD_CHECK(!(other.has_value() || spatial.has_value()) || (grad_loss.has_value() && terms.has_value()),
           "attention_mask_backward: other, spatial and channel need grad_loss and terms");
  Tensor out = new_gradient(x);
  with_accumulator(x, [&](auto zero) {
    using A = decltype(zero);
    const int64_t pixels = x.size(0) * x.size(2) * x.size(3), channels = x.size(0) * x.size(1);
    const Small<A> gradient(grad_loss, "grad_loss", 1);
    const Parts<A> parts{gradient.get() ? *gradient.get() : A(0),
                         {terms, "terms", 6},
                         {spatial, "spatial", 2 * pixels},
                         {channel, "channel", 2 * channels},
                         {spatial_mask, "spatial_mask", pixels},
                         {channel_mask, "channel_mask", channels},
                         {grad_spatial, "grad_spatial", pixels},
                         {grad_channel, "grad_channel", channels},
                         side};
    const bool fits = reads_planar(out) || reads_by_pixel(out);
    Tensor written = fits ? out : torch::stable::contiguous(out);
    backward<A>(x, other.value_or(x), parts, other.has_value(), written);
    if (!fits) torch::stable::copy_(out, written);
  });
  return out;
}

}  // namespace kd
