#pragma once

// Orders of the affinity op: the positions of each side by their values, and what counts with what. Not for
// *.simd.cpp: it uses std.

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <memory>
#include <utility>

#include "common/dtype.h"

namespace kd {

// Bits that order as the numbers do. NaN comes last, so that it counts with everything.
inline uint32_t ordered(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return UINT32_MAX;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
inline uint64_t ordered(double x) {
  const uint64_t bits = std::bit_cast<uint64_t>(x);
  if (std::isnan(x)) return UINT64_MAX;
  return bits >> 63 ? ~bits : bits | (1ull << 63);
}

constexpr int64_t kRadixFrom = 512;  // below, the histograms cost more than comparisons

// order: places by ascending value(place).
template <class F>
void sort_floats(int64_t count, const F& value, int32_t* order) {
  constexpr int kDigits = 3, kBits = 11;
  const std::unique_ptr<uint64_t[]> storage(new uint64_t[2 * count]);
  uint64_t *pairs = storage.get(), *other = pairs + count;  // value above, place below
  const auto pair = [&](int64_t i) { return static_cast<uint64_t>(ordered(value(i))) << 32 | i; };
  if (count < kRadixFrom) {
    for (int64_t i = 0; i < count; ++i) pairs[i] = pair(i);
    std::sort(pairs, pairs + count);
    for (int64_t i = 0; i < count; ++i) order[i] = static_cast<int32_t>(pairs[i]);
    return;
  }
  const auto digit = [](uint64_t pair, int d) { return pair >> (32 + d * kBits) & ((1 << kBits) - 1); };
  std::array<std::array<int32_t, 1 << kBits>, kDigits> start{};
  for (int64_t i = 0; i < count; ++i) {
    pairs[i] = pair(i);
    for (int d = 0; d < kDigits; ++d) ++start[d][digit(pairs[i], d)];
  }
  for (int d = 0; d < kDigits; ++d) {
    int32_t sum = 0;
    for (int32_t& s : start[d]) sum += std::exchange(s, sum);
    if (d < kDigits - 1) {
      for (int64_t i = 0; i < count; ++i) other[start[d][digit(pairs[i], d)]++] = pairs[i];
      std::swap(pairs, other);
    } else {
      for (int64_t i = 0; i < count; ++i) {
        order[start[d][digit(pairs[i], d)]++] = static_cast<int32_t>(pairs[i]);
      }
    }
  }
}

template <class F>
void sort_doubles(int64_t count, const F& value, int32_t* order) {
  const std::unique_ptr<std::pair<uint64_t, int32_t>[]> pairs(new std::pair<uint64_t, int32_t>[count]);
  for (int64_t i = 0; i < count; ++i) pairs[i] = {ordered(value(i)), static_cast<int32_t>(i)};
  std::sort(pairs.get(), pairs.get() + count);
  for (int64_t i = 0; i < count; ++i) order[i] = pairs[i].second;
}

// Queries or keys of one image.
template <class P>
struct AffinitySide {
  int64_t count = 0;
  std::unique_ptr<P[]> values;        // ascending
  std::unique_ptr<int32_t[]> rank;    // of each position among them
  std::unique_ptr<int32_t[]> others;  // how many values of the other side, the largest ones, count with each

  // From row `image` of x [B, count]; `order` is written first where it is not known yet.
  void arrange(const torch::stable::Tensor& x, int64_t image, int32_t* order, bool known) {
    count = x.size(1);
    values.reset(new P[count]), rank.reset(new int32_t[count]);
    dispatch_float(x.scalar_type(), "affinity: a and b", [&](auto zero) {
      using T = decltype(zero);
      const T* data = static_cast<const T*>(x.const_data_ptr()) + image * x.stride(0);
      const int64_t step = x.stride(1);
      const auto value = [&](int64_t i) { return static_cast<P>(data[i * step]); };
      if (!known) {
        if constexpr (sizeof(P) == 4) {
          sort_floats(count, value, order);
        } else {
          sort_doubles(count, value, order);
        }
      }
      for (int64_t r = 0; r < count; ++r) {
        values[r] = value(order[r]);
        rank[order[r]] = static_cast<int32_t>(r);
      }
    });
  }

  // Merges both sides. What comes next is random, and a branch on it would be mispredicted every other time;
  // without one every step waits for the one before, so that several parts of this side take turns.
  void count_others(const AffinitySide& other) {
    constexpr int kParts = 4;
    struct Part {
      int64_t r, end, c;
    };
    std::array<Part, kParts> parts;
    others.reset(new int32_t[count]);
    const P* const largest = other.values.get() + other.count - 1;
    const auto more = [&](int64_t r, int64_t c) { return c < other.count && !(largest[-c] <= -values[r]); };
    for (int k = 0; k < kParts; ++k) {
      Part& p = parts[k];
      p = {k * count / kParts, (k + 1) * count / kParts, 0};
      for (int64_t end = other.count; p.r < p.end && p.c < end;) {  // the count of its first by bisection
        const int64_t middle = (p.c + end) / 2;
        more(p.r, middle) ? p.c = middle + 1 : end = middle;
      }
    }
    const auto step = [&](Part& p) {
      const bool advance = more(p.r, p.c);
      others[p.r] = static_cast<int32_t>(p.c);  // stays as the step that leaves r writes it
      p.c += advance, p.r += !advance;
    };
    const auto all = [&] {
      bool all = true;
      for (const Part& p : parts) all &= p.r < p.end;
      return all;
    };
    while (all()) {
      for (Part& p : parts) step(p);
    }
    for (Part& p : parts) {
      while (p.r < p.end) step(p);
    }
  }

  // The middle value; 0 where it is no number to subtract.
  double median() const {
    const double middle = count ? static_cast<double>(values[count / 2]) : 0.0;
    return std::isfinite(middle) ? middle : 0.0;
  }
};

}  // namespace kd
