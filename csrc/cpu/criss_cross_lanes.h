#pragma once

// The column pass of the op criss_cross where columns lie side by side in memory: kLanes of them are worked on
// at a time, one in each lane of a vector. No value is moved between lanes, so that nothing is transposed, and
// every line of the cache that is read is used whole. Everything below counts in such vectors: a map's part is
// [channels, positions], the scores of a block [queries, keys].

#include "cpu/criss_cross.h"
#include "cpu/criss_cross_tiles.h"
#include "cpu/exp.h"
#include "cpu/simd.h"

namespace kd::KD_ISA {
namespace {

// A product held in registers: channels by positions, or queries by keys.
#if defined(__AVX512F__)
constexpr int kGroup = 6, kQueries = 4, kPositions = 4;
#else
constexpr int kGroup = 3, kQueries = 2, kPositions = 4;
#endif

inline int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Parts of maps, [channels, positions] each, whose lines of the cache are asked for while products run, one at
// every step.
class Coming {
 public:
  void add(const void* at, int64_t channel_step, int64_t position_step, int64_t channels, int64_t positions) {
    if (channels <= 0) return;
    Part& p = parts_[count_++];
    p = {static_cast<const char*>(at), channel_step, position_step, channels, positions};
    if (count_ == 1) begin();
  }
  void ask() {
    __builtin_prefetch(at_);
    at_ += step_;
    if (--left_ == 0) next();
  }

 private:
  struct Part {
    const char* at;
    int64_t channel_step, position_step, channels, positions;
  };
  void begin() { at_ = parts_[now_].at, step_ = parts_[now_].position_step, left_ = parts_[now_].positions; }
  [[gnu::noinline]] void next() {
    if (now_ == count_) return;
    Part& p = parts_[now_];
    p.at += p.channel_step;
    if (--p.channels == 0 && ++now_ == count_) {
      step_ = 0, at_ = reinterpret_cast<const char*>(this);
      return;
    }
    begin();
  }
  Part parts_[2];
  int count_ = 0, now_ = 0;
  const char* at_ = reinterpret_cast<const char*>(this);
  int64_t step_ = 0, left_ = 0;
};

// acc[r][s] += sum over t of a[t, r] b[t, s]; strides in vectors.
template <class A, int R, int S>
[[gnu::always_inline]] inline void sum_products(const A* a, int64_t a_unit, int64_t a_step, const A* b,
                                                int64_t b_unit, int64_t b_step, int64_t count,
                                                Vec<A> (&acc)[R][S], Coming& next) {
  constexpr int64_t L = kLanes<A>;
  for (int64_t t = 0; t < count; ++t) {
    next.ask();
    Vec<A> bs[S];
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) bs[s] = load_vec(b + (t * b_step + s * b_unit) * L);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<A> x = load_vec(a + (t * a_step + r * a_unit) * L);
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s) acc[r][s] += x * bs[s];
    }
  }
}

// One vector of columns of an image, from column `first`.
template <class A>
struct Columns {
  const CrissCrossCall<A>& call;
  int64_t image, first;
  static constexpr int64_t L = kLanes<A>;

  A* at(const CrissCrossMap& map, int64_t channel, int64_t position) const {
    return static_cast<A*>(map.data) + image * map.image + first + channel * map.channel +
           position * map.position;
  }
  void ask(Coming& next, const CrissCrossMap& map, int64_t channel, int64_t channels, int64_t position, int64_t count) const {
    constexpr int64_t size = sizeof(A);
    next.add(at(map, channel, position), map.channel * size, map.position * size, channels, count);
  }
  A* statistic(A* of, int64_t position) const {
    return of + image * call.image_step + first + position * call.position_step;
  }

  // tile [groups, count (rounded up), kGroup] = channels of a map at positions; channels that do not exist: 0.
  void pack(const CrissCrossMap& map, int64_t channel, int64_t channels, int64_t position, int64_t count,
            A* tile) const {
    const int64_t group = rounded_up(count, 4) * kGroup;
    for (int64_t c = 0; c < rounded_up(channels, kGroup); ++c) {
      A* const to = tile + (c / kGroup * group + c % kGroup) * L;
      const A* const from = at(map, channel + (c < channels ? c : 0), position);
      if (c < channels) {
        for (int64_t p = 0; p < count; ++p) store_vec(to + p * kGroup * L, load_vec(from + p * map.position));
      } else {
        for (int64_t p = 0; p < count; ++p) store_vec(to + p * kGroup * L, Vec<A>{});
      }
    }
  }

  // scores [queries, keys] = (add ? scores : 0) + left^T right, of tiles.
  void add_scores(const A* left, int64_t queries, const A* right, int64_t keys, int64_t channels, bool add,
                  A* scores, int64_t ld, Coming& next) const {
    const int64_t groups = (channels + kGroup - 1) / kGroup;
    const int64_t left_group = rounded_up(queries, 4) * kGroup, right_group = rounded_up(keys, 4) * kGroup;
    for (int64_t j = 0; j < keys; j += kPositions) {
      for (int64_t i = 0; i < queries; i += kQueries) {
        Vec<A> acc[kQueries][kPositions] = {};
        for (int64_t g = 0; g < groups; ++g) {
          sum_products<A, kQueries, kPositions>(left + (g * left_group + i * kGroup) * L, kGroup, 1,
                                                right + (g * right_group + j * kGroup) * L, kGroup, 1, kGroup,
                                                acc, next);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kQueries; ++r) {
#pragma GCC unroll 8
          for (int s = 0; s < kPositions; ++s) {
            A* const to = scores + ((i + r) * ld + j + s) * L;
            store_vec(to, add ? load_vec(to) + acc[r][s] : acc[r][s]);
          }
        }
      }
    }
  }

  // result[c, i] = result[c, i] (* keep[i]) + sum over j of tile[c, j] scores(i, j), for positions i; strides of
  // the scores in vectors.
  template <bool kByRow>
  void apply(const A* tile, int64_t inner, const A* scores, int64_t ld, int64_t channels,
             const CrissCrossMap& result, int64_t channel, int64_t position, int64_t count, const A* keep,
             Coming& next) const {
    const int64_t group = rounded_up(inner, 4) * kGroup, blocks = (count + kPositions - 1) / kPositions;
    for (int64_t c = 0; c < channels; c += kGroup) {
      const int rows = static_cast<int>(channels - c < kGroup ? channels - c : kGroup);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t i = block * kPositions;
        const int width = static_cast<int>(count - i < kPositions ? count - i : kPositions);
        A* const to = at(result, channel + c, position + i);
        for (int r = 0; r < rows; ++r) {
          for (int s = 0; s < width; ++s) {
            __builtin_prefetch(to + r * result.channel + s * result.position, 1);
          }
        }
        Vec<A> acc[kGroup][kPositions] = {};
        const A* const from = scores + (kByRow ? i * ld : i) * L;
        sum_products<A, kGroup, kPositions>(tile + c / kGroup * group * L, 1, kGroup, from, kByRow ? ld : 1,
                                            kByRow ? 1 : ld, inner, acc, next);
        Vec<A> share[kPositions];
        for (int s = 0; s < kPositions; ++s) share[s] = keep && s < width ? load_vec(keep + (i + s) * L) : Vec<A>{} + 1;
        const auto add = [&](int r, int s) {
          A* const x = to + r * result.channel + s * result.position;
          store_vec(x, load_vec(x) * share[s] + acc[r][s]);
        };
        if (rows == kGroup && width == kPositions) {
#pragma GCC unroll 8
          for (int r = 0; r < kGroup; ++r) {
#pragma GCC unroll 8
            for (int s = 0; s < kPositions; ++s) add(r, s);
          }
        } else {
#pragma GCC unroll 8
          for (int r = 0; r < kGroup; ++r) {
#pragma GCC unroll 8
            for (int s = 0; s < kPositions; ++s) {
              if (r < rows && s < width) add(r, s);
            }
          }
        }
      }
    }
  }
};

constexpr int64_t kTileChannels = kGroup;
// Most terms of a product whose operands stay in a first-level cache of 32 KB together.
constexpr int64_t kInner = (24 << 10) / (kVectorBytes * (kGroup + kPositions));

// Blocks of nearly one size, of at most `most` and a multiple of 4.
inline int64_t even_step(int64_t n, int64_t most) {
  const int64_t blocks = (n + most - 1) / most;
  return rounded_up((n + blocks - 1) / blocks, 4);
}

template <class A>
void forward_lanes(const CrissCrossCall<A>& call, int64_t image, int64_t first, int64_t most, A* workspace) {
  constexpr int64_t L = kLanes<A>;
  const Columns<A> columns{call, image, first};
  Coming none;
  const int64_t n = call.length, ld = rounded_up(n, 4);
  int64_t step = (most / L - ld * kGroup) / (ld + kGroup + 1) / 4 * 4;
  step = even_step(n, step < 8 ? 8 : step);
  const int64_t inner = even_step(n, kInner);
  A* const scores = workspace;
  A *const keys = scores + step * ld * L, *const queries = keys + kTileChannels * ld * L;
  A* const kept = queries + kTileChannels * step * L;
  for (int64_t q0 = 0; q0 < n; q0 += step) {
    const int64_t count = n - q0 < step ? n - q0 : step;
    for (int64_t c = 0; c < call.channels; c += kTileChannels) {
      const int64_t channels = call.channels - c < kTileChannels ? call.channels - c : kTileChannels;
      columns.pack(call.key, c, channels, 0, n, keys);
      columns.pack(call.query, c, channels, q0, count, queries);
      columns.add_scores(queries, count, keys, n, channels, c > 0, scores, ld, none);
    }
    for (int64_t i = 0; i < count; ++i) {
      A *const s = scores + i * ld * L, *const lse = columns.statistic(call.lse, q0 + i);
      store_vec(s + (q0 + i) * L, Vec<A>{} - static_cast<A>(__builtin_inff()));
      const Vec<A> before = load_vec(lse);
      Vec<A> largest = before;
      for (int64_t j = 0; j < n; ++j) {
        const Vec<A> v = load_vec(s + j * L);
        largest = v > largest ? v : largest;
      }
      const Vec<A> own = exp2_vec<A>((before - largest) * static_cast<A>(1.4426950408889634));
      Vec<A> total = own;
      for (int64_t j = 0; j < n; ++j) {
        const Vec<A> e = exp2_vec<A>((load_vec(s + j * L) - largest) * static_cast<A>(1.4426950408889634));
        store_vec(s + j * L, e);
        total += e;
      }
      const Vec<A> share = 1 / total;
      for (int64_t j = 0; j < n; ++j) store_vec(s + j * L, load_vec(s + j * L) * share);
      store_vec(kept + i * L, own * share);
      Vec<A> result;
      for (int lane = 0; lane < L; ++lane) {
        result[lane] = largest[lane] + (sizeof(A) == 4 ? __builtin_logf(total[lane]) : __builtin_log(total[lane]));
      }
      store_vec(lse, result);
    }
    for (int64_t c = 0; c < call.values; c += kGroup) {
      const int64_t channels = call.values - c < kGroup ? call.values - c : kGroup;
      const int64_t left = call.values - c - channels;
      for (int64_t k0 = 0; k0 < n; k0 += inner) {
        const int64_t terms = n - k0 < inner ? n - k0 : inner;
        const bool last = k0 + inner >= n;
        Coming next;
        if (last) {
          columns.ask(next, call.value, c + channels, left < kGroup ? left : kGroup, 0, inner);
        } else {
          columns.ask(next, call.value, c, channels, k0 + inner, n - k0 - inner < inner ? n - k0 - inner : inner);
        }
        columns.pack(call.value, c, channels, k0, terms, keys);
        columns.template apply<true>(keys, terms, scores + k0 * L, ld, channels, call.out, c, q0, count, k0 > 0 ? nullptr : kept, next);
      }
    }
  }
}

template <class A>
void backward_lanes(const CrissCrossCall<A>& call, int64_t image, int64_t first, int64_t most, A* workspace) {
  constexpr int64_t L = kLanes<A>;
  const Columns<A> columns{call, image, first};
  const bool need_scores = call.grad_query.data || call.grad_key.data, need_value = call.grad_value.data;
  Coming none;
  const int64_t n = call.length;
  int64_t step = 8;  // two matrices [step, step], tiles of queries and keys
  while (step + 4 <= kInner && 2 * (step + 4) * (step + 4 + kTileChannels) * L <= most) step += 4;
  step = even_step(n, step);
  const int64_t ld = step;
  A* const weights = workspace;
  A *const slopes = weights + ld * ld * L, *const left = slopes + ld * ld * L;
  A* const right = left + kTileChannels * ld * L;
  for (int64_t k0 = 0; k0 < n; k0 += step) {
    const int64_t keys = n - k0 < step ? n - k0 : step;
    for (int64_t q0 = 0; q0 < n; q0 += step) {
      const int64_t queries = n - q0 < step ? n - q0 : step;
      const auto blocks = [&](int64_t channels, const auto& f) {
        for (int64_t c = 0; c < channels; c += kTileChannels) {
          const int64_t left = channels - c - kTileChannels;
          f(c, left < 0 ? channels - c : kTileChannels, left < 0 ? 0 : left < kTileChannels ? left : kTileChannels);
        }
      };
      blocks(call.channels, [&](int64_t c, int64_t channels, int64_t) {
        columns.pack(call.query, c, channels, q0, queries, left);
        columns.pack(call.key, c, channels, k0, keys, right);
        columns.add_scores(left, queries, right, keys, channels, c > 0, weights, ld, none);
      });
      for (int64_t i = 0; i < queries; ++i) {
        const Vec<A> lse = load_vec(columns.statistic(call.lse, q0 + i));
        A* const w = weights + i * ld * L;
        for (int64_t j = 0; j < keys; ++j) {
          store_vec(w + j * L, exp2_vec<A>((load_vec(w + j * L) - lse) * static_cast<A>(1.4426950408889634)));
        }
        if (q0 + i >= k0 && q0 + i < k0 + keys) store_vec(w + (q0 + i - k0) * L, Vec<A>{});
      }
      blocks(call.values, [&](int64_t c, int64_t channels, int64_t next) {
        Coming coming;
        columns.ask(coming, call.grad_out, c + channels, next, q0, queries);
        if (need_scores) columns.ask(coming, call.value, c + channels, next, k0, keys);
        columns.pack(call.grad_out, c, channels, q0, queries, left);
        if (need_scores) {
          columns.pack(call.value, c, channels, k0, keys, right);
          columns.add_scores(left, queries, right, keys, channels, c > 0, slopes, ld, coming);
        }
        if (need_value) {
          columns.template apply<false>(left, queries, weights, ld, channels, call.grad_value, c, k0, keys,
                                        nullptr, coming);
        }
      });
      if (!need_scores) continue;
      for (int64_t i = 0; i < queries; ++i) {
        const Vec<A> delta = load_vec(columns.statistic(call.delta, q0 + i));
        A *const s = slopes + i * ld * L, *const w = weights + i * ld * L;
        for (int64_t j = 0; j < keys; ++j) {
          store_vec(s + j * L, load_vec(w + j * L) * (load_vec(s + j * L) - delta));
        }
      }
      blocks(call.channels, [&](int64_t c, int64_t channels, int64_t) {
        if (call.grad_key.data) {
          columns.pack(call.query, c, channels, q0, queries, left);
          columns.template apply<false>(left, queries, slopes, ld, channels, call.grad_key, c, k0, keys, nullptr, none);
        }
        if (call.grad_query.data) {
          columns.pack(call.key, c, channels, k0, keys, right);
          columns.template apply<true>(right, keys, slopes, ld, channels, call.grad_query, c, q0, queries,
                                       nullptr, none);
        }
      });
    }
  }
}

}  // namespace
}  // namespace kd::KD_ISA
