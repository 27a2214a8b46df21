#pragma once

// The column pass of the op criss_cross where columns lie side by side in memory: kLanes of them are worked
// on at a time, one in each lane of a vector. No value moves between lanes, so that nothing is transposed,
// and all of a line of the cache is used when it is read. Everything below counts in such vectors: a part of
// a map is [channels, positions], the scores of a block are [queries, keys].

#include "common/rounding.h"
#include "cpu/criss_cross.h"
#include "cpu/exp.h"
#include "cpu/simd.h"

namespace kd::KD_ISA {
namespace {

// Products held in registers: channels by positions, and queries by keys.
#if defined(__AVX512F__)
constexpr int kGroup = 6, kQueries = 4, kPositions = 4;
#else
constexpr int kGroup = 3, kQueries = 2, kPositions = 4;
#endif

// Channels whose products are added to scores at a time: reading and writing scores would cost as much as the
// products of one group.
constexpr int kDepth = 3 * kGroup;

// Most terms of a sum of products: what it reads again and again stays in a first-level cache of 32 KB.
constexpr int64_t kTerms = (24 << 10) / (kVectorBytes * (kGroup + kPositions));

constexpr double kLog2E = 1.4426950408889634;

inline float logarithm(float x) { return __builtin_logf(x); }
inline double logarithm(double x) { return __builtin_log(x); }

template <class A>
inline Vec<A> power(const Vec<A>& x) {  // e^x
  return exp2_vec<A>(x * static_cast<A>(kLog2E));
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The size of blocks that cover n evenly: at most `most`, a multiple of 4.
inline int64_t even_blocks(int64_t n, int64_t most) {
  return round_up(ceil_div(n, ceil_div(n, most)), int64_t{4});
}

// Parts of maps that come next: a line of their cache lines is asked for at every step of a product. Nobody
// else would: positions are far apart.
class Coming {
 public:
  void add(const void* at, int64_t channel_step, int64_t position_step, int64_t channels, int64_t positions) {
    if (channels <= 0) return;
    parts_[count_++] = {static_cast<const char*>(at), channel_step, position_step, channels, positions};
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
    Part& p = parts_[now_];
    p.at += p.channel_step;
    if (--p.channels == 0 && ++now_ == count_) {
      at_ = p.at - p.channel_step, step_ = 0;
    } else {
      begin();
    }
  }

  Part parts_[2];
  int count_ = 0, now_ = 0;
  const char* at_ = reinterpret_cast<const char*>(this);
  int64_t step_ = 0, left_ = 0;  // 0: no end
};

// sums[r][s] += a[t, r] b[t, s] for all terms t; strides in vectors.
template <class A, int R, int S>
[[gnu::always_inline]] inline void add_products(const A* a, int64_t a_unit, int64_t a_term, const A* b,
                                                int64_t b_unit, int64_t b_term, int64_t terms,
                                                Vec<A> (&sums)[R][S], Coming& coming) {
  constexpr int64_t L = kLanes<A>;
  for (int64_t t = 0; t < terms; ++t) {
    coming.ask();
    Vec<A> bs[S];
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) bs[s] = load_vec(b + (t * b_term + s * b_unit) * L);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<A> x = load_vec(a + (t * a_term + r * a_unit) * L);
#pragma GCC unroll 8
      for (int s = 0; s < S; ++s) sums[r][s] += x * bs[s];
    }
  }
}

// kLanes columns of an image, from `first`.
template <class A>
struct Columns {
  const CrissCrossCall<A>& call;
  int64_t image, first;
  static constexpr int64_t L = kLanes<A>;

  A* at(const CrissCrossMap& map, int64_t channel, int64_t position) const {
    return static_cast<A*>(map.data) + image * map.image + first + channel * map.channel +
           position * map.position;
  }
  A* statistic(A* of, int64_t position) const {
    return of + image * call.image_step + first + position * call.position_step;
  }
  void expect(Coming& coming, const CrissCrossMap& map, int64_t channel, int64_t channels, int64_t position,
              int64_t positions) const {
    constexpr int64_t size = sizeof(A);
    coming.add(at(map, channel, position), map.channel * size, map.position * size, channels, positions);
  }

  // tile [positions, row] = channels of a map, as many whole groups as hold them: those that do not exist are
  // 0.
  void pack(const CrissCrossMap& map, int64_t channel, int64_t channels, int64_t position, int64_t positions,
            A* tile, int64_t row) const {
    const int64_t whole = round_up(channels, int64_t{kGroup});
    for (int64_t c = 0; c < whole; ++c) {
      A* const to = tile + c * L;
      if (c < channels) {
        const A* const from = at(map, channel + c, position);
        for (int64_t p = 0; p < positions; ++p) {
          store_vec(to + p * row * L, load_vec(from + p * map.position));
        }
      } else {
        for (int64_t p = 0; p < positions; ++p) store_vec(to + p * row * L, Vec<A>{});
      }
    }
  }

  // scores [queries, keys] = (add ? scores : 0) + query^T key, of a tile [queries, kDepth] and of the map of
  // keys, a few of which are packed into `panel` at a time. Works on whole blocks of positions: what lies
  // between and behind those that exist is never read from the result.
  void add_scores(const A* query, int64_t queries, const CrissCrossMap& key, int64_t channel,
                  int64_t channels, int64_t position, int64_t keys, A* panel, A* scores, int64_t ld,
                  Coming& coming) const {
    const bool add = channel > 0;
    for (int64_t j = 0; j < keys; j += kPositions) {
      pack(key, channel, channels, position + j, least(kPositions, keys - j), panel, kDepth);
      for (int64_t i = 0; i < queries; i += kQueries) {
        Vec<A> sums[kQueries][kPositions] = {};
        add_products<A, kQueries, kPositions>(query + i * kDepth * L, kDepth, 1, panel, kDepth, 1, channels,
                                              sums, coming);
#pragma GCC unroll 8
        for (int r = 0; r < kQueries; ++r) {
#pragma GCC unroll 8
          for (int s = 0; s < kPositions; ++s) {
            A* const to = scores + ((i + r) * ld + j + s) * L;
            store_vec(to, add ? load_vec(to) + sums[r][s] : sums[r][s]);
          }
        }
      }
    }
  }

  // result[c, i] = result[c, i] (* keep[i]) + sum over j of tile[j, c] scores(i, j) for up to kGroup channels
  // and for positions i: queries, with keys for j, or the other way round (kTransposed). Tiles are [terms,
  // row].
  template <bool kTransposed>
  void apply(const A* tile, int64_t row, int64_t terms, const A* scores, int64_t ld,
             const CrissCrossMap& result, int64_t channel, int64_t channels, int64_t position,
             int64_t positions, const A* keep, Coming& coming) const {
    const int64_t unit = kTransposed ? 1 : ld, term = kTransposed ? ld : 1;
    for (int64_t i = 0; i < positions; i += kPositions) {
      A* const to = at(result, channel, position + i);
      const int64_t width = least(kPositions, positions - i);
      for (int64_t r = 0; r < channels; ++r) {
        for (int64_t s = 0; s < width; ++s) {
          __builtin_prefetch(to + r * result.channel + s * result.position, 1);
        }
      }
      Vec<A> sums[kGroup][kPositions] = {}, kept[kPositions];
      add_products<A, kGroup, kPositions>(tile, 1, row, scores + i * unit * L, unit, term, terms, sums,
                                          coming);
      for (int s = 0; s < kPositions; ++s) {
        kept[s] = keep && s < width ? load_vec(keep + (i + s) * L) : Vec<A>{} + 1;
      }
      const auto write = [&](int r, int s) {
        A* const x = to + r * result.channel + s * result.position;
        store_vec(x, load_vec(x) * kept[s] + sums[r][s]);
      };
      const bool whole = channels == kGroup && width == kPositions;
#pragma GCC unroll 8
      for (int r = 0; r < kGroup; ++r) {
#pragma GCC unroll 8
        for (int s = 0; s < kPositions; ++s) {
          if (whole || (r < channels && s < width)) write(r, s);
        }
      }
    }
  }

  // Of `count` queries from q0: scores become weights, in which the own cell is 0; lse of the row pass
  // becomes that of all, and `kept` the share of the row pass.
  void softmax(A* scores, int64_t ld, int64_t q0, int64_t count, A* kept) const {
    for (int64_t i = 0; i < count; ++i) {
      A *const s = scores + i * ld * L, *const lse = statistic(call.lse, q0 + i);
      store_vec(s + (q0 + i) * L, Vec<A>{} - static_cast<A>(__builtin_inff()));
      const Vec<A> before = load_vec(lse);
      Vec<A> most = before;
      for (int64_t j = 0; j < call.length; ++j) {
        const Vec<A> v = load_vec(s + j * L);
        most = v > most ? v : most;
      }
      const Vec<A> own = power<A>(before - most);
      Vec<A> total = own;
      for (int64_t j = 0; j < call.length; ++j) {
        const Vec<A> e = power<A>(load_vec(s + j * L) - most);
        store_vec(s + j * L, e);
        total += e;
      }
      const Vec<A> share = 1 / total;
      for (int64_t j = 0; j < call.length; ++j) store_vec(s + j * L, load_vec(s + j * L) * share);
      store_vec(kept + i * L, own * share);
      for (int lane = 0; lane < L; ++lane) lse[lane] = most[lane] + logarithm(total[lane]);
    }
  }
};

// f(channel, channels, channels of the next group) for groups of `group` channels.
template <class F>
inline void for_groups(int64_t channels, int64_t group, const F& f) {
  for (int64_t c = 0; c < channels; c += group) {
    f(c, least(group, channels - c), least(group, channels - c - group));
  }
}

// Where the forward keeps things for `most` elements, and the backward: blocks of queries by all keys; square
// blocks, twice.
template <class A>
struct ForwardBlocks {
  int64_t ld, queries, keys, scores, panel, kept, all;

  ForwardBlocks(const CrissCrossCall<A>& call, int64_t most) {
    const int64_t n = call.length, L = kLanes<A>, few = kPositions * kDepth;
    ld = round_up(n, int64_t{4});
    const int64_t fit = (most / L - few) / (ld + kDepth + 1) / 4 * 4;
    queries = even_blocks(n, fit < 8 ? 8 : fit), keys = even_blocks(n, kTerms);
    const int64_t for_scores = queries * kDepth + few, for_values = keys * kGroup;  // one after the other
    scores = queries * ld * L, panel = scores + queries * kDepth * L;
    kept = scores + (for_scores > for_values ? for_scores : for_values) * L;
    all = kept + queries * L;
  }
};

template <class A>
struct BackwardBlocks {
  int64_t size, scores, tile, all;

  BackwardBlocks(const CrissCrossCall<A>& call, int64_t most) {
    constexpr int64_t L = kLanes<A>;
    const auto fits = [&](int64_t n) { return (2 * n * n + (n + kPositions) * kDepth) * L <= most; };
    size = 8;
    while (size + 4 <= kTerms && fits(size + 4)) size += 4;
    size = even_blocks(call.length, size);
    scores = size * size * L, tile = size * kDepth * L, all = 2 * scores + tile + kPositions * kDepth * L;
  }
};

template <class A>
void forward_columns(const CrissCrossCall<A>& call, int64_t image, int64_t first, int64_t most,
                     A* workspace) {
  const Columns<A> columns{call, image, first};
  const ForwardBlocks<A> blocks(call, most);
  const int64_t n = call.length, ld = blocks.ld;
  A *const scores = workspace, *const tile = scores + blocks.scores;
  A *const panel = workspace + blocks.panel, *const kept = workspace + blocks.kept;
  for (int64_t q0 = 0; q0 < n; q0 += blocks.queries) {
    const int64_t count = least(blocks.queries, n - q0);
    for_groups(call.channels, kDepth, [&](int64_t c, int64_t channels, int64_t next) {
      Coming coming;
      columns.expect(coming, call.key, c + channels, next, 0, n);
      columns.pack(call.query, c, channels, q0, count, tile, kDepth);
      columns.add_scores(tile, count, call.key, c, channels, 0, n, panel, scores, ld, coming);
    });
    columns.softmax(scores, ld, q0, count, kept);
    for_groups(call.values, kGroup, [&](int64_t c, int64_t channels, int64_t next) {
      for (int64_t k0 = 0; k0 < n; k0 += blocks.keys) {
        const int64_t keys = least(blocks.keys, n - k0), after = k0 + keys;
        Coming coming;
        if (after < n) {
          columns.expect(coming, call.value, c, channels, after, least(blocks.keys, n - after));
        } else {
          columns.expect(coming, call.value, c + channels, next, 0, blocks.keys);
        }
        columns.pack(call.value, c, channels, k0, keys, tile, kGroup);
        columns.template apply<false>(tile, kGroup, keys, scores + k0 * kLanes<A>, ld, call.out, c, channels,
                                      q0, count, k0 > 0 ? nullptr : kept, coming);
      }
    });
  }
}

template <class A>
void backward_columns(const CrissCrossCall<A>& call, int64_t image, int64_t first, int64_t most,
                      A* workspace) {
  constexpr int64_t L = kLanes<A>;
  const Columns<A> columns{call, image, first};
  const BackwardBlocks<A> blocks(call, most);
  const bool need_scores = call.grad_query.data || call.grad_key.data, need_value = call.grad_value.data;
  const int64_t n = call.length, size = blocks.size;
  A *const weights = workspace, *const slopes = weights + blocks.scores;
  A *const tile = slopes + blocks.scores, *const panel = tile + blocks.tile;
  const auto block = [&](int64_t q0, int64_t k0) {
    const int64_t queries = least(size, n - q0), keys = least(size, n - k0);
    for_groups(call.channels, kDepth, [&](int64_t c, int64_t channels, int64_t next) {
      Coming coming;
      columns.expect(coming, call.query, c + channels, next, q0, queries);
      columns.expect(coming, call.key, c + channels, next, k0, keys);
      columns.pack(call.query, c, channels, q0, queries, tile, kDepth);
      columns.add_scores(tile, queries, call.key, c, channels, k0, keys, panel, weights, size, coming);
    });
    for (int64_t i = 0; i < queries; ++i) {
      const Vec<A> lse = load_vec(columns.statistic(call.lse, q0 + i));
      A* const w = weights + i * size * L;
      for (int64_t j = 0; j < keys; ++j) store_vec(w + j * L, power<A>(load_vec(w + j * L) - lse));
      if (q0 == k0) store_vec(w + i * L, Vec<A>{});
    }
    for_groups(call.values, kDepth, [&](int64_t c, int64_t channels, int64_t next) {
      Coming coming;
      columns.expect(coming, call.grad_out, c + channels, next, q0, queries);
      columns.pack(call.grad_out, c, channels, q0, queries, tile, kDepth);
      if (need_scores) {
        columns.expect(coming, call.value, c + channels, next, k0, keys);
        columns.add_scores(tile, queries, call.value, c, channels, k0, keys, panel, slopes, size, coming);
      }
      if (need_value) {
        for_groups(channels, kGroup, [&](int64_t g, int64_t some, int64_t) {
          columns.template apply<true>(tile + g * L, kDepth, queries, weights, size, call.grad_value, c + g,
                                       some, k0, keys, nullptr, coming);
        });
      }
    });
    if (!need_scores) return;
    for (int64_t i = 0; i < queries; ++i) {
      const Vec<A> delta = load_vec(columns.statistic(call.delta, q0 + i));
      const A* const w = weights + i * size * L;
      A* const s = slopes + i * size * L;
      for (int64_t j = 0; j < keys; ++j) {
        store_vec(s + j * L, load_vec(w + j * L) * (load_vec(s + j * L) - delta));
      }
    }
    for_groups(call.channels, kGroup, [&](int64_t c, int64_t channels, int64_t) {
      Coming none;
      if (call.grad_key.data) {
        columns.pack(call.query, c, channels, q0, queries, tile, kGroup);
        columns.template apply<true>(tile, kGroup, queries, slopes, size, call.grad_key, c, channels, k0,
                                     keys, nullptr, none);
      }
      if (call.grad_query.data) {
        columns.pack(call.key, c, channels, k0, keys, tile, kGroup);
        columns.template apply<false>(tile, kGroup, keys, slopes, size, call.grad_query, c, channels, q0,
                                      queries, nullptr, none);
      }
    });
  };
  for (int64_t k0 = 0; k0 < n; k0 += size) {
    for (int64_t q0 = 0; q0 < n; q0 += size) block(q0, k0);
  }
}

template <class A>
int64_t workspace_of_columns(const CrissCrossCall<A>& call, int64_t most, bool is_backward) {
  return is_backward ? BackwardBlocks<A>(call, most).all : ForwardBlocks<A>(call, most).all;
}

}  // namespace
}  // namespace kd::KD_ISA
