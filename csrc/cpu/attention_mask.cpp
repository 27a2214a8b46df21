// Op attention_mask on the CPU: pooling, masks and masked errors. Formulas:
// kdfast/reference/attention_mask.py.
//
// A chunk's sums over channels stay in the L1 cache and are final; its sums over pixels, C numbers, are added
// up over the chunks in order. The masked error waits for the pooled maps, whose weights it has. Where
// channels have no weights, large maps are read once: the errors of a block of rows are summed while it is in
// the L2 cache, and weighted pixel by pixel afterwards.

#include <cmath>
#include <memory>

#include "cpu/attention_map.h"

namespace kd {

using namespace attention;

namespace {

constexpr int64_t kRowBlock =
    32;  // channels of a chunk (planar) that are pooled before their errors are summed
// Bytes of two maps from which on one pass is worth its larger temporaries: fewer stay in the last cache.
constexpr int64_t kUncached = 24 << 20;
constexpr int64_t kSteps = 64;  // pixels whose channels_last rows are added at once: more lose digits

Tensor empty(const Tensor& like, std::vector<int64_t> size) {
  return torch::stable::new_empty(like, size, is_wide(like) ? ScalarType::Double : ScalarType::Float);
}

// Where a map's sums of |x|, or of x, go; null: not wanted. Over channels: means [B, P]; over pixels: sums of
// every chunk [B, chunks, C].
template <class A>
struct Sums {
  A *spatial = nullptr, *parts = nullptr;
  bool subtracted = false;  // from what is there, the other map's
};

template <class A>
struct Pooling {
  const Map* map;
  Sums<A> absolute, plain;
};

template <class A>
struct Errors {
  const Map *x, *y;
  A* spatial;  // [B, P] sum over channels of (x - y)^2
};

// Divides: a product could be fused with the subtraction, and equal maps would then differ.
template <class A>
void put(A* to, const A* from, int64_t count, A divisor, bool subtracted) {
  if (subtracted) {
    for (int64_t i = 0; i < count; ++i) to[i] -= from[i] / divisor;
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i] / divisor;
  }
}

template <class A>
void add(A* to, const A* from, int64_t count, A factor) {
  for (int64_t i = 0; i < count; ++i) to[i] += factor * from[i];
}

// Pools maps, and sums errors where they are asked for, in one pass.
template <class A>
void pool_maps(const Shape& s, Dtype dtype, const std::vector<Pooling<A>>& maps, const Errors<A>* errors) {
  const int64_t row_block = s.planar ? kRowBlock : kSteps, width = padded(s.planar ? s.chunk : s.channels);
  const auto count = static_cast<int64_t>(maps.size());
  for_chunks(s, 1, [&](int64_t begin, int64_t end) {
    // Columns of every map, of |x| and of x, then those of the errors and their weights; rows of a block.
    std::vector<A> columns((2 * count + (errors ? 2 : 0)) * width), rows(2 * row_block);
    A* const error_columns = columns.data() + 2 * count * width;
    A* const error_weights = error_columns + width;  // 1 in the columns of channels
    const std::vector<A> ones(errors ? row_block : 0, A(1));
    const auto all = static_cast<A>(s.channels);
    for (int64_t task = begin; task < end; ++task) {
      const Chunk c = chunk_of(s, task);
      const int64_t at = c.image * s.pixels + c.first, part = task * s.channels;
      const int64_t row_count = s.planar ? s.channels : c.count,
                    column_count = s.planar ? c.count : s.channels;
      for (const Pooling<A>& m : maps) {
        for (const Sums<A>& to : {m.absolute, m.plain}) {
          if (to.parts && !to.subtracted) std::fill_n(to.parts + part, s.channels, A(0));
        }
      }
      std::fill(columns.begin(), columns.end(), A(0));
      if (errors && !s.planar) std::fill_n(error_weights, s.channels, A(1));
      for (int64_t r = 0; r < row_count; r += row_block) {
        const int64_t block = std::min(row_block, row_count - r);
        const auto tile = [&](const Map& map) { return map.tile(c.image, c.first, r); };
        for (int64_t i = 0; i < count; ++i) {
          const Pooling<A>& m = maps[i];
          const bool with_plain = m.plain.spatial != nullptr;
          A* const own = columns.data() + 2 * i * width;
          if (!s.planar) std::fill_n(own, 2 * width, A(0));
          kernels<A>().pool(dtype, tile(*m.map), block, column_count, rows.data(), own,
                            with_plain ? rows.data() + row_block : nullptr, own + width);
          for (int k = 0; k < 1 + with_plain; ++k) {
            const Sums<A>& to = k ? m.plain : m.absolute;
            const A* const of_rows = rows.data() + k * row_block;
            if (!s.planar) put(to.spatial + at + r, of_rows, block, all, to.subtracted);
            if (to.parts) {
              const A sign = to.subtracted ? A(-1) : A(1);
              if (s.planar) {
                add(to.parts + part + r, of_rows, block, sign);
              } else {
                add(to.parts + part, own + k * width, s.channels, sign);
              }
            }
          }
        }
        if (errors) {
          kernels<A>().errors(dtype, tile(*errors->x), tile(*errors->y), block, column_count, ones.data(),
                              error_weights, rows.data(), s.planar ? error_columns : nullptr);
          if (!s.planar) std::copy_n(rows.data(), block, errors->spatial + at + r);
        }
      }
      if (!s.planar) continue;
      for (int64_t i = 0; i < count; ++i) {
        const A* const own = columns.data() + 2 * i * width;
        put(maps[i].absolute.spatial + at, own, c.count, all, maps[i].absolute.subtracted);
        if (maps[i].plain.spatial)
          put(maps[i].plain.spatial + at, own + width, c.count, all, maps[i].plain.subtracted);
      }
      if (errors) std::copy_n(error_columns, c.count, errors->spatial + at);
    }
  });
}

// out [B, C] = factor * sum over chunks of parts [B, chunks, C]
template <class A>
void add_chunks(const Shape& s, const A* parts, double factor, A* out) {
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t c = 0; c < s.channels; ++c) {
      double sum = 0;
      for (int64_t k = 0; k < s.chunks; ++k) sum += parts[(b * s.chunks + k) * s.channels + c];
      out[b * s.channels + c] = static_cast<A>(factor * sum);
    }
  }
}

// Sum of spatial_mask * channel_mask * (x - y)^2. With pointers to them also, per pixel and per channel, the
// sums that a mask multiplies.
template <class A>
double masked_error(const Shape& s, Dtype dtype, const Map& x, const Map& y, const A* spatial_mask,
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
  if (channel_error) add_chunks(s, parts.data(), 1.0, channel_error);
  double error = 0;
  for (double sum : sums) error += sum;
  return error;
}

// Waking a thread costs as much as some ten thousand elements.
int64_t images_per_task(int64_t pixels) { return std::max<int64_t>(1, 16384 / pixels); }

// Squared norm of x [B, count], or of x - y: per image, then in order.
template <class A>
double squared_norm(const A* x, const A* y, int64_t batch, int64_t count) {
  std::vector<double> sums(batch);
  parallel_for(0, batch, images_per_task(count), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      double parts[8] = {};
      for (int64_t i = b * count; i < (b + 1) * count; ++i) {
        const double d = static_cast<double>(x[i]) - (y ? static_cast<double>(y[i]) : 0.0);
        parts[i % 8] += d * d;
      }
      for (double part : parts) sums[b] += part;
    }
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

double factor(double weight, double distance) { return distance > 0 ? weight / distance : 0.0; }

struct Settings {
  double temperature, transfer_weight, masked_weight;
  bool softmax_of_sum, channel_mask, with_signed, through, pairs;
};

// Memory for a while, in which a pointer that is given already takes no part.
template <class A>
class Scratch {
 public:
  A* operator()(A* given, int64_t count) {
    if (given) return given;
    blocks_.emplace_back(new A[count]);
    return blocks_.back().get();
  }

 private:
  std::vector<std::unique_ptr<A[]>> blocks_;
};

template <class A>
void forward(const Tensor& student, const Tensor& teacher, const Tensor& compared, const Settings& set,
             A* loss, A* terms, A* spatial, A* channel, A* spatial_mask, A* channel_mask) {
  const Shape s(student);
  const Dtype dtype = dtype_of(student.scalar_type(), "student");
  const Map x(student, s), y(teacher, s), z(compared, s);
  const int64_t pixels = s.batch * s.pixels, channels = s.batch * s.channels;
  const int64_t bytes = 2 * student.numel() * static_cast<int64_t>(student.element_size());
  const bool one_pass = !set.channel_mask && !set.through && bytes >= kUncached;
  const bool keeps_absolute = set.pairs && (!set.with_signed || set.through);
  const int64_t last = set.with_signed && set.through ? 2 : 0;  // maps before those that L_AT compares
  Scratch<A> scratch;

  // Means over channels of |student| and |teacher|, and what the masked error is computed from or in.
  A* const absolute = keeps_absolute ? spatial : nullptr;
  A* const of_student = scratch(absolute ? absolute : one_pass ? nullptr : spatial_mask, pixels);
  A* const of_teacher = scratch(absolute ? absolute + pixels : nullptr, pixels);
  const bool channels_used = set.channel_mask || !set.with_signed;
  const int64_t tasks = s.tasks() * s.channels;
  std::vector<Pooling<A>> pooled = {{&x, {of_student}, {}}, {&y, {of_teacher}, {}}};
  if (channels_used) {
    for (auto& m : pooled) m.absolute.parts = scratch(nullptr, tasks);
  }
  if (set.with_signed) {
    A *const to = spatial + last * pixels, *const parts = scratch(nullptr, tasks);
    pooled[0].plain = {to, parts, false};
    pooled[1].plain =
        set.pairs ? Sums<A>{to + pixels, scratch(nullptr, tasks), false} : Sums<A>{to, parts, true};
  }
  const Errors<A> errors{&z, &y, spatial_mask};
  pool_maps<A>(s, dtype, pooled, one_pass ? &errors : nullptr);
  if (!set.with_signed && !set.pairs) {
    for (int64_t i = 0; i < pixels; ++i) spatial[i] = of_student[i] - of_teacher[i];
  }

  const double mean = 1 / static_cast<double>(s.pixels);
  A* of_channels[2] = {};
  for (int m = 0; m < 2 && channels_used; ++m) {
    of_channels[m] = scratch(keeps_absolute ? channel + m * channels : nullptr, channels);
    add_chunks(s, pooled[m].absolute.parts, mean, of_channels[m]);
  }
  for (int m = 0; m < 1 + set.pairs && set.with_signed; ++m) {
    add_chunks(s, pooled[m].plain.parts, mean, channel + (last + m) * channels);
  }
  if (!set.with_signed && !set.pairs) {
    for (int64_t i = 0; i < channels; ++i) channel[i] = of_channels[0][i] - of_channels[1][i];
  }

  std::vector<double> masked(s.batch);
  parallel_for(0, s.batch, images_per_task(s.pixels), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      A *const to = spatial_mask + b * s.pixels, *const to_channels = channel_mask + b * s.channels;
      const auto scale = static_cast<A>(1 / set.temperature);
      masked[b] = kernels<A>().mask(of_student + b * s.pixels, of_teacher + b * s.pixels, s.pixels, scale,
                                    set.softmax_of_sum, one_pass ? to : nullptr, to);
      if (set.channel_mask) {
        kernels<A>().mask(of_channels[0] + b * s.channels, of_channels[1] + b * s.channels, s.channels, scale,
                          set.softmax_of_sum, nullptr, to_channels);
      } else {
        std::fill_n(to_channels, s.channels, A(1));
      }
    }
  });
  double error = 0;
  if (one_pass) {
    for (double sum : masked) error += sum;
  } else {
    error = masked_error<A>(s, dtype, z, y, spatial_mask, channel_mask,
                            set.through ? spatial_mask + pixels : nullptr,
                            set.through ? channel_mask + channels : nullptr);
  }

  double distances[3] = {0, 0, std::sqrt(error)};
  if (set.transfer_weight != 0) {
    const A *const own = spatial + last * pixels, *const own_channels = channel + last * channels;
    distances[0] = std::sqrt(squared_norm(own, set.pairs ? own + pixels : nullptr, s.batch, s.pixels));
    distances[1] = std::sqrt(
        squared_norm(own_channels, set.pairs ? own_channels + channels : nullptr, s.batch, s.channels));
  }
  const double weights[3] = {set.transfer_weight, set.transfer_weight, set.masked_weight};
  double sum = 0;
  for (int i = 0; i < 3; ++i) {
    terms[i] = static_cast<A>(distances[i]);
    terms[3 + i] = static_cast<A>(factor(weights[i], distances[i]));
    sum += weights[i] * distances[i];
  }
  *loss = static_cast<A>(sum);
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
    Pooling<A> pooling{&map, {data<A>(spatial), parts.data()}, {}};
    if (with_signed) pooling.plain = {data<A>(spatial) + pixels, parts.data() + tasks};
    pool_maps<A>(s, dtype_of(x.scalar_type(), "x"), {pooling}, nullptr);
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
    const double distance = std::sqrt(masked_error<A>(s, dtype_of(x.scalar_type(), "x"), xs, ys,
                                                      spatial.get(), channel.get(), nullptr, nullptr));
    const double values[6] = {0, 0, distance, 0, 0, factor(1, distance)};
    std::copy_n(values, 6, data<A>(terms));
  });
  return terms;
}

}  // namespace kd
