// Op attention_mask on the CPU: pooling, masks and masked errors. Formulas:
// kdfast/reference/attention_mask.py.
//
// The masked error waits for the pooled maps, whose weights it has. The pass that pools sums all of it that
// does not wait, so that no other pass is needed: over channels, where those have no weights; else over
// pixels, under weights that lack a factor (ChannelErrors).

#include <cmath>
#include <numeric>

#include "cpu/attention_gradient.h"
#include "cpu/attention_passes.h"
#include "cpu/result.h"

namespace kd {

using namespace attention;

namespace {

Tensor empty(const Tensor& like, std::vector<int64_t> size) {
  return new_result(like, size, is_wide(like) ? ScalarType::Double : ScalarType::Float);
}

// Waking a thread costs as much as some thousand pixels.
int64_t images_per_task(int64_t pixels) { return std::max<int64_t>(1, 4096 / pixels); }

double factor(double weight, double distance) { return distance > 0 ? weight / distance : 0.0; }

struct Settings {
  double temperature, transfer_weight, masked_weight;
  bool softmax_of_sum, channel_mask, with_signed, through, pairs;
};

template <class A>
void subtract(const A* x, const A* y, int64_t count, A* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = x[i] - y[i];
}

template <class A>
void forward(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& adapted,
             const Settings& set, Scratch<A>& scratch, A* loss, A* terms, A* spatial, A* channel,
             A* spatial_mask, A* channel_mask) {
  const Shape s(student);
  const Dtype dtype = dtype_of(student.scalar_type(), "student");
  const Map x(student, s), y(teacher, s), z = adapted.has_value() ? Map(*adapted, s) : x;
  const int64_t pixels = s.batch * s.pixels, channels = s.batch * s.channels, tasks = s.tasks() * s.channels;
  // Both maps at once, where L_AT needs their difference only and L_AM compares them.
  const bool at_once = !set.pairs && !adapted.has_value(), one_pass = at_once && !set.channel_mask;
  const auto scale = static_cast<A>(1 / set.temperature);
  const bool keeps_absolute = set.pairs && (!set.with_signed || set.through);
  const bool channels_used = set.channel_mask || !set.with_signed;
  const int64_t last = set.with_signed && set.through ? 2 : 0;  // maps before those that L_AT compares
  std::optional<ChannelErrors<A>> weighted;
  if (at_once && set.channel_mask) weighted.emplace(s, scale, set.softmax_of_sum, scratch);

  // Means of |student| and |teacher| (0, 1), and of student and teacher, or of their difference (2, 3).
  A* const absolute = keeps_absolute ? spatial : nullptr;
  Sums<A> means[4] = {};
  means[0].spatial = scratch(absolute ? absolute : one_pass ? nullptr : spatial_mask, pixels);
  means[1].spatial = scratch(absolute ? absolute + pixels : nullptr, pixels);
  for (int m = 0; m < 2 && channels_used; ++m) means[m].parts = scratch(nullptr, tasks);
  for (int m = 2; m < (at_once ? 3 : 4) && set.with_signed; ++m) {
    A* const kept = m == 2 || set.pairs ? spatial + (last + m - 2) * pixels : nullptr;
    means[m] = {scratch(kept, pixels), scratch(nullptr, tasks)};
  }
  if (at_once) {
    pool_pair<A>(s, dtype, x, y, {means[0], means[1], means[2], {one_pass ? spatial_mask : nullptr}},
                 weighted ? &*weighted : nullptr);
  } else {
    pool_map<A>(s, dtype, x, means[0], means[2]);
    pool_map<A>(s, dtype, y, means[1], means[3]);
  }
  A* of_channels[4] = {};
  for (int m = 0; m < 4; ++m) {
    if (!means[m].parts) continue;
    const bool kept = m < 2 ? keeps_absolute : m == 2 || set.pairs;
    of_channels[m] = scratch(kept ? channel + (m < 2 ? m : last + m - 2) * channels : nullptr, channels);
    add_chunks(s, means[m].parts, 1 / static_cast<double>(s.pixels), of_channels[m]);
  }
  if (!set.pairs && !(at_once && set.with_signed)) {
    const int first = set.with_signed ? 2 : 0;
    subtract(means[first].spatial, means[first + 1].spatial, pixels, spatial);
    subtract(of_channels[first], of_channels[first + 1], channels, channel);
  }

  // Of every image: its masked error, and the squares of what L_AT compares.
  std::vector<double> errors(s.batch), transfers[2] = {errors, errors};
  parallel_for(0, s.batch, images_per_task(s.pixels), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t p = b * s.pixels, c = b * s.channels;
      A *const to = spatial_mask + p, *const to_channels = channel_mask + c;
      errors[b] = mask_kernels<A>().mask(means[0].spatial + p, means[1].spatial + p, s.pixels, scale,
                                         set.softmax_of_sum, one_pass ? to : nullptr, to);
      if (set.channel_mask) {
        mask_kernels<A>().mask(of_channels[0] + c, of_channels[1] + c, s.channels, scale, set.softmax_of_sum,
                               nullptr, to_channels);
        if (weighted) errors[b] = weighted->of_image(s, b, to_channels);
      } else {
        std::fill_n(to_channels, s.channels, A(1));
      }
      if (set.transfer_weight == 0) continue;
      const auto squares = [&](const A* kept, int64_t all, int64_t first, int64_t count) {
        const A* const own = kept + last * all + first;
        return mask_kernels<A>().squares(own, set.pairs ? own + all : nullptr, count);
      };
      transfers[0][b] = squares(spatial, pixels, p, s.pixels);
      transfers[1][b] = squares(channel, channels, c, s.channels);
    }
  });
  const auto sum = [](const std::vector<double>& v) { return std::accumulate(v.begin(), v.end(), 0.0); };
  const double error = at_once ? sum(errors)
                               : masked_error<A>(s, dtype, z, y, spatial_mask, channel_mask,
                                                 set.through ? spatial_mask + pixels : nullptr,
                                                 set.through ? channel_mask + channels : nullptr);
  const double distances[3] = {std::sqrt(sum(transfers[0])), std::sqrt(sum(transfers[1])), std::sqrt(error)};
  const double weights[3] = {set.transfer_weight, set.transfer_weight, set.masked_weight};
  double total = 0;
  for (int i = 0; i < 3; ++i) {
    terms[i] = static_cast<A>(distances[i]);
    terms[3 + i] = static_cast<A>(factor(weights[i], distances[i]));
    total += weights[i] * distances[i];
  }
  *loss = static_cast<A>(total);
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
    const int64_t pixels = s.batch * s.pixels, tasks = s.tasks() * s.channels;
    std::vector<A> parts(kinds * tasks);
    const Sums<A> absolute{data<A>(spatial), parts.data()},
        plain{absolute.spatial + pixels, absolute.parts + tasks};
    pool_map<A>(s, dtype_of(x.scalar_type(), "x"), map, absolute, with_signed ? plain : Sums<A>{});
    for (int64_t k = 0; k < kinds; ++k) {
      add_chunks(s, parts.data() + k * tasks, 1 / static_cast<double>(s.pixels),
                 data<A>(channel) + k * s.batch * s.channels);
    }
  });
  return {spatial, channel};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_mask_cpu(
    const Tensor& student, const Tensor& teacher, std::optional<Tensor> adapted, double temperature,
    double transfer_weight, double masked_weight, bool softmax_of_sum, bool channel_mask, bool with_signed,
    bool through, bool pairs) {
  check_map(student, "student");
  check_same(student, teacher, "student and teacher");
  if (adapted.has_value()) check_same(*adapted, teacher, "adapted and teacher");
  const int64_t b = student.size(0), c = student.size(1), h = student.size(2), w = student.size(3);
  KD_CHECK(pairs || !through, "attention_mask: through needs pairs");
  const int64_t kinds = 1 + (with_signed && through), maps = 1 + pairs, kept = 1 + through;
  Tensor loss = empty(student, {}), terms = empty(student, {2, 3}),
         spatial = empty(student, {kinds, maps, b, 1, h, w}), channel = empty(student, {kinds, maps, b, c}),
         spatial_weights = empty(student, {kept, b, 1, h, w}), channel_weights = empty(student, {kept, b, c});
  const Settings settings{temperature,  transfer_weight, masked_weight, softmax_of_sum,
                          channel_mask, with_signed,     through,       pairs};
  with_accumulator(student, [&](auto zero) {
    using A = decltype(zero);
    Scratch<A> scratch;
    forward<A>(student, teacher, adapted, settings, scratch, data<A>(loss), data<A>(terms), data<A>(spatial),
               data<A>(channel), data<A>(spatial_weights), data<A>(channel_weights));
  });
  return {loss, terms, spatial, channel, spatial_weights, channel_weights};
}

std::tuple<Tensor, Tensor, Tensor> attention_mask_with_gradient_cpu(const Tensor& student,
                                                                    const Tensor& teacher, double temperature,
                                                                    double transfer_weight,
                                                                    double masked_weight, bool softmax_of_sum,
                                                                    bool channel_mask, bool with_signed) {
  check_map(student, "student");
  check_same(student, teacher, "student and teacher");
  // First of all, so that it finds the memory that the gradient before it had.
  Tensor gradient = new_gradient(student);
  Tensor loss = empty(student, {}), terms = empty(student, {2, 3});
  const Settings settings{temperature,  transfer_weight, masked_weight, softmax_of_sum,
                          channel_mask, with_signed,     false,         false};
  with_accumulator(student, [&](auto zero) {
    using A = decltype(zero);
    const int64_t pixels = student.size(0) * student.size(2) * student.size(3),
                  channels = student.size(0) * student.size(1);
    // What the gradient does not wait for lies in its own memory, until it is written.
    Scratch<A> scratch, before(gradient.data_ptr(), gradient.numel() * gradient.element_size());
    A *const spatial = scratch(nullptr, pixels), *const channel = scratch(nullptr, channels),
             *const spatial_mask = scratch(nullptr, pixels),
             *const channel_weights = scratch(nullptr, channels);
    A* const found = data<A>(terms);
    forward<A>(student, teacher, std::nullopt, settings, before, data<A>(loss), found, spatial, channel,
               spatial_mask, channel_weights);
    const A per_channel = A(1) / static_cast<A>(student.size(1)),
            per_pixel = A(1) / static_cast<A>(student.size(2) * student.size(3));
    GradientTerms<A> of_pixels = {{}, {A(0), A(0), found[5]}}, of_channels = {{}, {A(0), A(0), A(1)}};
    of_pixels.values[with_signed] = spatial, of_pixels.factors[with_signed] = found[3] * per_channel;
    of_channels.values[with_signed] = channel, of_channels.factors[with_signed] = found[4] * per_pixel;
    of_pixels.values[2] = spatial_mask, of_channels.values[2] = channel_weights;
    in_place(gradient, [&](const Tensor& written) {
      const Shape s(written);
      write_gradient<A>(s, dtype_of(student.scalar_type(), "student"), Map(student, s), Map(teacher, s),
                        of_pixels, of_channels, Map(written, s));
    });
  });
  return {loss, terms, gradient};
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
    const double distance = std::sqrt(masked_error<A>(s, dtype_of(x.scalar_type(), "x"), xs, ys,
                                                      spatial.get(), channel.get(), nullptr, nullptr));
    const double values[6] = {0, 0, distance, 0, 0, factor(1, distance)};
    std::copy_n(values, 6, data<A>(terms));
  });
  return terms;
}

}  // namespace kd
