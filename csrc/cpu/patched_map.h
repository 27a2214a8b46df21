#pragma once

// A map as groups of patch matrices, resized on the way: tables of the resize and its adjoint, threads. The
// arithmetic is in patches.simd.cpp. For patch_gram.cpp only (not for *.simd.cpp: it uses std).

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/rounding.h"
#include "cpu/gram_tiles.h"
#include "cpu/patches.h"
#include "cpu/workspace.h"

namespace kd {

KD_DECLARE_ISA(extern const PatchKernels<float> patches_float;
               extern const PatchKernels<double> patches_double;)

enum class Average : int { channel, batch, spatial };

inline int64_t padded(int64_t n) { return round_up(n, kLinePadding); }

template <class A>
const PatchKernels<A>& patch_kernels() {
  if constexpr (std::is_same_v<A, float>) {
    return KD_DISPATCH_ISA(patches_float);
  } else {
    return KD_DISPATCH_ISA(patches_double);
  }
}

// The map of one axis from `in` to `out` pixels, and its adjoint.
template <class A>
class Taps {
 public:
  // bilinear: torch's interpolate with align_corners=False; else pixel o is pixel o, or 0 past the end.
  Taps(int64_t in, int64_t out, bool bilinear, bool adjoint) {
    std::vector<std::vector<Tap>> of_output(adjoint ? in : out);
    const auto add = [&](int64_t o, int64_t i, double weight) {
      if (weight == 0) return;
      auto& taps = of_output[adjoint ? i : o];
      const int32_t index = static_cast<int32_t>(adjoint ? o : i);
      if (!taps.empty() && taps.back().index == index) {
        taps.back().weight += weight;
      } else {
        taps.push_back({index, weight});
      }
    };
    for (int64_t o = 0; o < out; ++o) {
      if (bilinear && in != out) {
        const double scale = static_cast<double>(in) / static_cast<double>(out);
        const double at = std::max(0.0, scale * (static_cast<double>(o) + 0.5) - 0.5);
        const int64_t i = std::min(static_cast<int64_t>(at), in - 1), next = std::min(i + 1, in - 1);
        add(o, i, 1 - (at - static_cast<double>(i)));
        add(o, next, at - static_cast<double>(i));
      } else if (o < in) {
        add(o, o, 1);
      }
    }
    fill(adjoint ? out : in, of_output);
  }

  AxisTaps<A> get() const {
    return {in_,           out_,           padded(out_),  count_,  in_ == out_,
            index_.data(), weight_.data(), first_.data(), windows_};
  }

 private:
  struct Tap {
    int32_t index;
    double weight;
  };

  void fill(int64_t in, const std::vector<std::vector<Tap>>& of_output) {
    in_ = in, out_ = static_cast<int64_t>(of_output.size()), count_ = 1;
    for (const auto& taps : of_output) count_ = std::max(count_, static_cast<int64_t>(taps.size()));
    const int64_t ld = padded(out_);
    index_.assign(count_ * ld, 0), weight_.assign(count_ * ld, A(0)),
        first_.assign(count_ * ld / kTapLanes, 0);
    windows_ = 1;
    for (int64_t k = 0; k < count_; ++k) {
      for (int64_t begin = 0; begin < ld; begin += kTapLanes) {
        const int64_t end = std::min(begin + kTapLanes, out_);
        const auto used = [&](int64_t o) { return o < end && k < static_cast<int64_t>(of_output[o].size()); };
        int32_t lowest = INT32_MAX, highest = 0;
        for (int64_t o = begin; o < end; ++o) {
          if (!used(o)) continue;
          lowest = std::min(lowest, of_output[o][k].index),
          highest = std::max(highest, of_output[o][k].index);
        }
        lowest = std::min(lowest, highest);
        first_[(k * ld + begin) / kTapLanes] = lowest;
        const int64_t windows = (highest - lowest) / kTapLanes + 1;
        windows_ = windows > 2 || windows_ == 0 ? 0 : std::max(windows_, static_cast<int>(windows));
        for (int64_t o = begin; o < begin + kTapLanes; ++o) {
          index_[k * ld + o] = used(o) ? of_output[o][k].index : lowest;
          weight_[k * ld + o] = used(o) ? static_cast<A>(of_output[o][k].weight) : A(0);
        }
      }
    }
  }

  int windows_;
  int64_t in_, out_, count_;
  std::vector<int32_t> index_, first_;
  std::vector<A> weight_;
};

// Some groups and some of their features, in units of what the features run over: images (channel), channels
// (batch) or channels of one image after the other (spatial).
struct Part {
  int64_t first_group, groups, first_unit, units;
};

struct Grid {
  int64_t patch_h, patch_w, rows, columns;  // patches of patch_h x patch_w pixels
  bool bilinear;
  Average average;
  int64_t patches() const { return rows * columns; }
  int64_t pixels() const { return patch_h * patch_w; }
};

// One map [B, C, H, W] as groups of patch matrices [N, D].
template <class A>
class PatchedMap {
 public:
  PatchedMap(const torch::stable::Tensor& map, const Grid& grid)
      : map_(map),
        grid_(grid),
        images_(map.size(0)),
        channels_(map.size(1)),
        rows_(map.size(2), grid.rows * grid.patch_h, grid.bilinear, false),
        columns_(map.size(3), grid.columns * grid.patch_w, grid.bilinear, false),
        rows_adjoint_(map.size(2), grid.rows * grid.patch_h, grid.bilinear, true),
        columns_adjoint_(map.size(3), grid.columns * grid.patch_w, grid.bilinear, true) {}

  int64_t groups() const { return pick(channels_, images_, grid_.pixels()); }
  int64_t features() const { return images_ * channels_ * grid_.pixels() / std::max<int64_t>(groups(), 1); }
  int64_t units() const { return pick(images_, channels_, images_ * channels_); }
  int64_t features(const Part& part) const { return part.units * pick(grid_.pixels(), grid_.pixels(), 1); }
  int64_t elements(const Part& part) const { return part.groups * grid_.patches() * features(part); }
  int64_t total() const { return groups() * grid_.patches() * features(); }
  bool resized() const {
    return map_.size(2) != grid_.rows * grid_.patch_h || map_.size(3) != grid_.columns * grid_.patch_w;
  }

  // A part into or out of `tiles` [groups, N, features]; spatial groups come in whole rows of pixels.
  void read(const Part& part, A* tiles) const {
    for_planes(map_, part, [&](const MapPlanes& planes, const PatchTile& t, int64_t offset, A* scratch) {
      patch_kernels<A>().read(planes, rows_.get(), columns_.get(), t, tiles + offset, scratch);
    });
  }
  // Where parts share rows of the map, adds to what is there.
  bool adds(int64_t groups) const {
    return grid_.average == Average::spatial && resized() && groups < grid_.pixels();
  }
  void write(torch::stable::Tensor& gradient, const Part& part, const A* tiles) const {
    const bool add = adds(part.groups);
    for_planes(gradient, part, [&](const MapPlanes& planes, const PatchTile& t, int64_t offset, A* scratch) {
      patch_kernels<A>().write(planes, rows_adjoint_.get(), columns_adjoint_.get(), t, tiles + offset, add,
                               scratch);
    });
  }

  // One unit of one group, a plane, into or out of a tile [N, pixels of a patch] of leading dimension ld.
  void read_plane(int64_t group, int64_t unit, A* tile, int64_t ld) const {
    Buffer<A> scratch(scratch_elements(1, map_.size(3)));
    patch_kernels<A>().read(plane(map_, group, unit), rows_.get(), columns_.get(), plane_tile(ld), tile,
                            scratch.get());
  }
  void write_plane(const torch::stable::Tensor& gradient, int64_t group, int64_t unit, const A* tile,
                   int64_t ld) const {
    Buffer<A> scratch(scratch_elements(1, map_.size(3)));
    patch_kernels<A>().write(plane(gradient, group, unit), rows_adjoint_.get(), columns_adjoint_.get(),
                             plane_tile(ld), tile, false, scratch.get());
  }
  const Grid& grid() const { return grid_; }

 private:
  int64_t scratch_elements(int64_t planes, int64_t map_width) const {
    const int64_t width = padded(std::max(map_width, grid_.columns * grid_.patch_w)) + 2 * kTapLanes;
    return planes * width * (std::max(rows_.get().count, rows_adjoint_.get().count) + 2);  // patch_scratch()
  }
  MapPlanes plane(const torch::stable::Tensor& map, int64_t group, int64_t unit) const {
    const int64_t image = pick(unit, group, 0), channel = pick(group, unit, 0);
    return planes_at(map, image, channel, 1);
  }
  static MapPlanes planes_at(const torch::stable::Tensor& map, int64_t image, int64_t channel,
                             int64_t planes) {
    const int64_t at = image * map.stride(0) + channel * map.stride(1);
    const int64_t itemsize = static_cast<int64_t>(map.element_size());
    return {static_cast<char*>(const_cast<void*>(map.const_data_ptr())) + at * itemsize,
            gram_dtype(map),
            planes,
            map.stride(1),
            map.stride(2),
            map.stride(3)};
  }
  PatchTile plane_tile(int64_t ld) const {
    return {0, grid_.columns * ld, ld, grid_.patch_w, 1, grid_.patch_h, grid_.patch_w, 0, grid_.patch_h};
  }
  int64_t pick(int64_t channel, int64_t batch, int64_t spatial) const {
    return grid_.average == Average::channel ? channel : grid_.average == Average::batch ? batch : spatial;
  }

  template <class F>
  void for_planes(const torch::stable::Tensor& map, const Part& part, const F& f) const {
    if (grid_.average == Average::spatial) return for_neighbours(map, part, f);
    const int64_t d = features(part), group = grid_.patches() * d, pixels = grid_.pixels();
    const int64_t begin = part.first_group, unit = part.first_unit, units = part.units;
    const int64_t first_image = pick(unit, begin, 0), images = pick(units, part.groups, 0);
    const int64_t first_channel = pick(begin, unit, 0), channels = pick(part.groups, units, 0);
    const int64_t image_stride = pick(pixels, group, 0), channel_stride = pick(group, pixels, 0);
    const PatchTile tile{channel_stride, grid_.columns * d, d, grid_.patch_w, 1,
                         grid_.patch_h,  grid_.patch_w,     0, grid_.patch_h};
    const int64_t together = map.stride(1) == 1 || tile.plane == 1 ? kPlanes : 1,
                  tasks = ceil_div(channels, together);
    parallel_for(0, images * tasks, 1, [&](int64_t task_begin, int64_t task_end) {
      Buffer<A> scratch(scratch_elements(together, map.size(3)));
      for (int64_t task = task_begin; task < task_end; ++task) {
        const int64_t b = task / tasks, c = task % tasks * together;
        const MapPlanes planes =
            planes_at(map, first_image + b, first_channel + c, std::min(together, channels - c));
        f(planes, tile, b * image_stride + c * channel_stride, scratch.get());
      }
    });
  }

  // Spatial groups, whole rows of pixels: up to kPlanes channels of an image at a time.
  template <class F>
  void for_neighbours(const torch::stable::Tensor& map, const Part& part, const F& f) const {
    const int64_t d = part.units, group = grid_.patches() * d;
    const PatchTile tile{1,
                         grid_.columns * d,
                         d,
                         grid_.patch_w * group,
                         group,
                         grid_.patch_h,
                         grid_.patch_w,
                         part.first_group / grid_.patch_w,
                         (part.first_group + part.groups) / grid_.patch_w};
    std::vector<int64_t> begins;
    for (int64_t k = 0; k < d;) {
      begins.push_back(k);
      k += std::min({kPlanes, d - k, channels_ - (part.first_unit + k) % channels_});
    }
    begins.push_back(d);
    parallel_for(0, static_cast<int64_t>(begins.size()) - 1, 1, [&](int64_t first, int64_t last) {
      Buffer<A> scratch(scratch_elements(kPlanes, map.size(3)));
      for (int64_t i = first; i < last; ++i) {
        const int64_t unit = part.first_unit + begins[i];
        const MapPlanes planes =
            planes_at(map, unit / channels_, unit % channels_, begins[i + 1] - begins[i]);
        f(planes, tile, begins[i], scratch.get());
      }
    });
  }

  const torch::stable::Tensor& map_;
  Grid grid_;
  int64_t images_, channels_;
  Taps<A> rows_, columns_, rows_adjoint_, columns_adjoint_;
};

// Groups that are channels or images: tiles of whole planes, resized straight into them.
template <class A>
class PlaneTiles : public TileSource<A> {
 public:
  // to: gradients go there; the map's values come from `map`.
  explicit PlaneTiles(const PatchedMap<A>& map, const torch::stable::Tensor* to = nullptr)
      : TileSource<A>(map.grid().patches(), map.features(), map.grid().pixels()), map_(map), to_(to) {}
  void load(int64_t group, int64_t first, int64_t count, A* tile, int64_t ld) const override {
    for (int64_t d = 0; d < count; d += this->unit) {
      map_.read_plane(group, (first + d) / this->unit, tile + d, ld);
    }
  }
  void store(int64_t group, int64_t first, int64_t count, const A* tile, int64_t ld) const override {
    for (int64_t d = 0; d < count; d += this->unit) {
      map_.write_plane(*to_, group, (first + d) / this->unit, tile + d, ld);
    }
  }
  // Planes that are neighbours in memory, as in channels_last, are read together instead.
  static bool suits(const torch::stable::Tensor& map, const Grid& grid) {
    return grid.average != Average::spatial && (map.stride(3) == 1 || map.stride(1) != 1);
  }

 private:
  const PatchedMap<A>& map_;
  const torch::stable::Tensor* to_;
};

}  // namespace kd
