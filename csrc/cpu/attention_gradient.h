#pragma once

// The pass of the op attention_mask that writes a map's gradient, with all its parts.

#include "common/rounding.h"
#include "cpu/attention_map.h"

namespace kd::attention {

constexpr int64_t kRowElements = 1 << 14;  // of the rows that one task takes, at least

template <class A>
GradientTerms<A> from(GradientTerms<A> terms, int64_t first) {
  for (auto& values : terms.values) values = values ? values + first : nullptr;
  return terms;
}

// f(tensor), where the tensor is `out` or, if no kernel writes its layout, one whose values are copied to it.
template <class F>
void in_place(Tensor& out, const F& f) {
  if (reads_planar(out) || reads_by_pixel(out)) return f(out);
  const Tensor written = torch::stable::contiguous(out);
  f(written);
  torch::stable::copy_(out, written);
}

// pixels [B, P], channels [B, C]. Rows are written one after the other, which page faults and prefetchers
// like best; nothing is summed here. From the last row to the first: what the forward has just read last is
// still in cache.
template <class A>
void write_gradient(const Shape& s, Dtype dtype, const Map& x, const Map& y, const GradientTerms<A>& pixels,
                    const GradientTerms<A>& channels, const Map& to) {
  const int64_t rows = s.planar ? s.channels : s.pixels, columns = s.planar ? s.pixels : s.channels;
  const GradientTerms<A>&of_rows = s.planar ? channels : pixels, &of_columns = s.planar ? pixels : channels;
  const int64_t step = std::max<int64_t>(kRowElements / columns / 4, 1) * 4, steps = ceil_div(rows, step);
  parallel_for(0, s.batch * steps, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = end; task-- > begin;) {
      const int64_t image = task / steps, row = task % steps * step;
      const MapTile tile = to.tile(image, 0, row);
      kernels<A>().gradient(dtype, x.tile(image, 0, row), y.tile(image, 0, row), std::min(step, rows - row),
                            columns, from(of_rows, image * rows + row), from(of_columns, image * columns),
                            const_cast<void*>(tile.data), tile.row_stride);
    }
  });
}

}  // namespace kd::attention
