// Arithmetic of the op softmax_affinity on the CPU, compiled once per instruction set.
//
// Weights are held as [keys, queries], queries side by side: maxima and sums over keys are then sums of
// vectors, and of the seven products only those over queries need the queries' maps transposed, once per
// block of queries. A strip of queries is as wide as two of the widest vectors, so that its weights for a
// block of keys stay in the L1 cache between the products that make and use them.

#include "cpu/softmax_affinity.h"

#include "cpu/exp.h"
#include "cpu/position_tiles.h"

namespace kd::KD_ISA {
namespace {

constexpr int64_t kKeys = 96;    // a multiple of the rows that products hold in registers
constexpr int64_t kChunk = 128;  // of channels
constexpr double kLog2E = 1.4426950408889634;

template <class A>
constexpr int64_t kStrip = 128 / static_cast<int64_t>(sizeof(A));
template <class A>
constexpr int64_t kPacked = (kKeys / kLanes<A> | 1) * kLanes<A>;  // see padded
template <class A>
constexpr A kLowest = sizeof(A) == 4 ? static_cast<A>(-3.4028234663852886e38) : -1.7976931348623157e308;

template <class A>
int64_t workspace(const SoftmaxCall<A>& call, bool backward) {
  const int64_t ld = padded<A>(call.block), vectors = 4 * call.block;
  if (!backward) return vectors + (call.d + call.e) * ld + kKeys * kStrip<A>;
  return vectors + (call.d + call.e + call.e + 2 * kKeys) * ld +
         call.block * (padded<A>(call.d) + padded<A>(call.e));
}

template <class A>
void pack(Dtype dtype, const PositionMap& map, int64_t first, int64_t count, A* to) {
  typed<A>(dtype, [&]<class T>(T) {
    read(at<T>(map, first), map.channel, map.position, map.channels, count, to, kPacked<A>);
  });
}

// to [channels, ld] = a block of positions; whole vectors, zeros behind.
template <class T, class A>
void read_block(const PositionMap& map, int64_t first, int64_t count, A* to, int64_t ld) {
  read(at<T>(map, first), map.channel, map.position, map.channels, count, to, ld);
  const int64_t columns = (count + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
  for (int64_t c = 0; count < columns && c < map.channels; ++c) {
    for (int64_t i = count; i < columns; ++i) to[c * ld + i] = 0;
  }
}

// to [positions, ld] = the same block; whole vectors, zeros behind.
template <class T, class A>
void read_transposed(const PositionMap& map, int64_t first, int64_t count, A* to, int64_t ld) {
  read(at<T>(map, first), map.position, map.channel, count, map.channels, to, ld);
  const int64_t columns = (map.channels + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
  for (int64_t i = 0; map.channels < columns && i < count; ++i) {
    for (int64_t c = map.channels; c < columns; ++c) to[i * ld + c] = 0;
  }
}

// A block [rows, ld] that is read soon.
template <class A>
inline void fetch_block(Ahead& ahead, const A* block, int64_t rows, int64_t ld) {
  fetch(ahead, {const_cast<A*>(block), 1, 0, 1}, 0, rows * ld, sizeof(A));
}

// Queries as products with keys are to see them: exponents of 2 come out, rounded once, so that the largest
// minus their maximum is 0, forward and backward alike.
template <class T, class A>
void read_queries(const SoftmaxCall<A>& p, int64_t first, int64_t count, A* to, int64_t ld) {
  read_block<T>(p.query, first, count, to, ld);
  const A factor = static_cast<A>(p.scale * kLog2E);
  for (int64_t c = 0; c < p.d; ++c) {
    for (int64_t i = 0; i < count; i += kLanes<A>) {
      store_vec(to + c * ld + i, factor * load_vec(to + c * ld + i));
    }
  }
}

// c [rows, columns] = a^T b over channels, in chunks: a strip of b stays in the L1 cache, and large sums,
// whose rounding is that of the exponents, are added to less often.
template <class A>
inline void multiply_channels(const A* a, int64_t ld_a, const A* b, int64_t ld_b, int64_t rows,
                              int64_t columns, int64_t channels, A* c, int64_t ld_c, Ahead& ahead) {
  int64_t first = 0;
  do {
    const int64_t inner = channels - first < kChunk ? channels - first : kChunk;
    multiply<A, true>(a + first * ld_a, ld_a, b + first * ld_b, ld_b, rows, columns, inner, first != 0, c,
                      ld_c, ahead);
    first += kChunk;
  } while (first < channels);
}

// Exponents [keys, ld] become weights 2^(s - max), one vector of queries; maximum and sum go on from the
// blocks before, whose results `out` [e, ld_out] are scaled to the new maximum.
template <class A>
inline void weigh(A* s, int64_t ld, int64_t keys, A* maximum, A* sum, bool first, A* out, int64_t ld_out,
                  int64_t e) {
  const Vec<A> old = load_vec(maximum);
  Vec<A> most[4] = {old, old, old, old};
  int64_t j = 0;
  for (; j + 4 <= keys; j += 4) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      const Vec<A> x = load_vec(s + (j + u) * ld);
      most[u] = x > most[u] ? x : most[u];
    }
  }
  for (; j < keys; ++j) {
    const Vec<A> x = load_vec(s + j * ld);
    most[0] = x > most[0] ? x : most[0];
  }
  most[0] = most[1] > most[0] ? most[1] : most[0];
  most[2] = most[3] > most[2] ? most[3] : most[2];
  const Vec<A> now = most[2] > most[0] ? most[2] : most[0];
  Vec<A> total = {};
  for (j = 0; j < keys; ++j) {
    const Vec<A> w = exp2_vec<A>(load_vec(s + j * ld) - now);
    store_vec(s + j * ld, w);
    total += w;
  }
  if (first) {
    store_vec(sum, total);
    store_vec(maximum, now);
    return;
  }
  if (__builtin_memcmp(&old, &now, sizeof now) == 0) {
    store_vec(sum, load_vec(sum) + total);
    return;
  }
  const Vec<A> less = exp2_vec<A>(old - now);
  store_vec(sum, load_vec(sum) * less + total);
  store_vec(maximum, now);
  for (int64_t c = 0; c < e; ++c) store_vec(out + c * ld_out, load_vec(out + c * ld_out) * less);
}

template <class A>
void forward(const SoftmaxCall<A>& p, int64_t first, int64_t last, A* workspace) {
  typed<A>(p.dtype, [&]<class T>(T) {
    const int64_t ld = padded<A>(p.block);
    A *const maximum = workspace, *const sum = maximum + p.block, *const inverse = sum + p.block;
    A *const s = workspace + 4 * p.block, *const q = s + kKeys * kStrip<A>, *const out = q + p.d * ld;
    for (int64_t i = first; i < last; i += p.block) {
      const int64_t count = last - i < p.block ? last - i : p.block;
      const int64_t columns = (count + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
      read_queries<T>(p, i, count, q, ld);
      for (int64_t c = 0; c < columns; ++c) maximum[c] = kLowest<A>;
      const A *k = p.packed_keys, *v = p.packed_values;
      for (int64_t j = 0; j < p.keys; j += p.keys_block, k += p.d * kPacked<A>, v += p.e * kPacked<A>) {
        const int64_t keys = p.keys - j < p.keys_block ? p.keys - j : p.keys_block;
        Ahead ahead;
        if (j + keys < p.keys) {
          fetch_block(ahead, k + p.d * kPacked<A>, p.d, kPacked<A>);
          fetch_block(ahead, v + p.e * kPacked<A>, p.e, kPacked<A>);
        }
        for (int64_t c = 0; c < columns; c += kStrip<A>) {
          const int64_t width = columns - c < kStrip<A> ? columns - c : kStrip<A>;
          multiply_channels(k, kPacked<A>, q + c, ld, keys, width, p.d, s, kStrip<A>, ahead);
          for (int64_t x = 0; x < width; x += kLanes<A>) {
            weigh(s + x, kStrip<A>, keys, maximum + c + x, sum + c + x, j == 0, out + c + x, ld, p.e);
          }
          multiply<A, false>(v, kPacked<A>, s, kStrip<A>, p.e, width, keys, j != 0, out + c, ld, ahead);
        }
      }
      for (int64_t c = 0; c < columns; c += kLanes<A>) {
        store_vec(inverse + c, (Vec<A>{} + 1) / load_vec(sum + c));
      }
      for (int64_t r = 0; r < p.e; ++r) {
        for (int64_t c = 0; c < columns; c += kLanes<A>) {
          store_vec(out + r * ld + c, load_vec(out + r * ld + c) * load_vec(inverse + c));
        }
      }
      convert(maximum, p.maxima + i, count);
      convert(inverse, p.inverses + i, count);
      write(out, ld, p.e, count, at<T>(p.out, i), p.out.channel, p.out.position);
    }
  });
}

// Weights without their sum, w = 2^(s - max), and gradients of the scores, w times (ds - mean), in
// place of s and ds; one strip. Without kScores weights only.
template <class A, bool kScores>
inline void weigh_again(A* s, A* ds, int64_t ld, int64_t keys, int64_t width, const A* maximum,
                        const A* times, const A* mean) {
  for (int64_t x = 0; x < width; x += kLanes<A>) {
    const Vec<A> most = load_vec(maximum + x), by = load_vec(times + x), less = load_vec(mean + x);
    for (int64_t j = 0; j < keys; ++j) {
      const Vec<A> w = exp2_vec<A>(load_vec(s + j * ld + x) - most);
      store_vec(s + j * ld + x, w);
      if constexpr (kScores) {
        store_vec(ds + j * ld + x, (w * by) * (load_vec(ds + j * ld + x) - less));
      }
    }
  }
}

template <class A>
void backward(const SoftmaxCall<A>& p, int64_t first, int64_t last, A* workspace) {
  typed<A>(p.dtype, [&]<class T>(T) {
    const int64_t ld = padded<A>(p.block), ld_d = padded<A>(p.d), ld_e = padded<A>(p.e);
    const int64_t columns_d = (p.d + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
    const int64_t columns_e = (p.e + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
    A *const maximum = workspace, *const inverse = maximum + p.block;
    A *const times = inverse + p.block, *const mean = times + p.block;
    A *const s = mean + p.block, *const ds = s + kKeys * ld;   // [keys, queries]
    A *const q = ds + kKeys * ld, *const dout = q + p.d * ld;  // [channels, queries]
    A* const out = dout + p.e * ld;
    A *const q_t = out + p.e * ld, *const dout_t = q_t + p.block * ld_d;  // [queries, channels]
    const A scale = static_cast<A>(p.scale);
    const bool scores = p.grad_query.data || p.grad_keys;
    A* dq = p.grad_queries;
    for (int64_t i = first; i < last; i += p.block, dq += p.d * ld) {
      const int64_t count = last - i < p.block ? last - i : p.block;
      const int64_t columns = (count + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
      for (int64_t c = 0; c < columns; ++c) {
        maximum[c] = c < count ? p.maxima[i + c] : 0;
        inverse[c] = c < count ? p.inverses[i + c] : 0;
      }
      read_queries<T>(p, i, count, q, ld);
      read_block<T>(p.grad_out, i, count, dout, ld);
      if (scores) {  // gradient of the weights minus its mean under them, y.dy
        read_block<T>(p.out, i, count, out, ld);
        for (int64_t c = 0; c < columns; c += kLanes<A>) {
          Vec<A> sum = {};  // in the order of the product below: of one key the difference is 0
          for (int64_t r = 0; r < p.e; ++r) sum += load_vec(dout + r * ld + c) * load_vec(out + r * ld + c);
          store_vec(times + c, load_vec(inverse + c) * scale);
          store_vec(mean + c, sum);
        }
      }
      if (p.grad_keys) read_transposed<T>(p.query, i, count, q_t, ld_d);
      if (p.grad_values) {
        read_transposed<T>(p.grad_out, i, count, dout_t, ld_e);
        for (int64_t r = 0; r < count; ++r) {
          for (int64_t c = 0; c < columns_e; c += kLanes<A>) {
            store_vec(dout_t + r * ld_e + c, load_vec(dout_t + r * ld_e + c) * inverse[r]);
          }
        }
      }
      const A *k = p.packed_keys, *v = p.packed_values;
      for (int64_t j = 0; j < p.keys; j += p.keys_block, k += p.d * kPacked<A>, v += p.e * kPacked<A>) {
        const int64_t keys = p.keys - j < p.keys_block ? p.keys - j : p.keys_block;
        Ahead ahead;
        if (p.grad_values) fetch_block(ahead, p.grad_values + j * ld_e, keys, ld_e);
        if (p.grad_keys) fetch_block(ahead, p.grad_keys + j * ld_d, keys, ld_d);
        if (j + keys < p.keys) {
          fetch_block(ahead, k + p.d * kPacked<A>, p.d, kPacked<A>);
          fetch_block(ahead, v + p.e * kPacked<A>, p.e, kPacked<A>);
        }
        for (int64_t c = 0; c < columns; c += kStrip<A>) {
          const int64_t width = columns - c < kStrip<A> ? columns - c : kStrip<A>;
          multiply_channels(k, kPacked<A>, q + c, ld, keys, width, p.d, s + c, ld, ahead);
          if (scores) {
            multiply_channels(v, kPacked<A>, dout + c, ld, keys, width, p.e, ds + c, ld, ahead);
            weigh_again<A, true>(s + c, ds + c, ld, keys, width, maximum + c, times + c, mean + c);
          } else {
            weigh_again<A, false>(s + c, ds + c, ld, keys, width, maximum + c, times + c, mean + c);
          }
          if (p.grad_query.data) {
            multiply<A, false>(k, kPacked<A>, ds + c, ld, p.d, width, keys, j != 0 || !p.first, dq + c, ld,
                               ahead);
          }
        }
        const bool add = i != first || !p.first;
        if (p.grad_values) {
          multiply<A, false>(s, ld, dout_t, ld_e, keys, columns_e, count, add, p.grad_values + j * ld_e, ld_e,
                             ahead);
        }
        if (p.grad_keys) {
          multiply<A, false>(ds, ld, q_t, ld_d, keys, columns_d, count, add, p.grad_keys + j * ld_d, ld_d,
                             ahead);
        }
      }
      if (p.grad_query.data && p.last) {
        write(dq, ld, p.d, count, at<T>(p.grad_query, i), p.grad_query.channel, p.grad_query.position);
      }
    }
  });
}

template <class A>
void collect(Dtype dtype, A* sums, int64_t sets, int64_t step, int64_t first, int64_t count,
             const PositionMap& map) {
  typed<A>(dtype, [&]<class T>(T) {
    const int64_t ld = padded<A>(map.channels);
    A* const to = sums + first * ld;
    for (int64_t set = 1; set < sets; ++set) {
      const A* const from = to + set * step;
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t c = 0; c < map.channels; c += kLanes<A>) {
          store_vec(to + r * ld + c, load_vec(to + r * ld + c) + load_vec(from + r * ld + c));
        }
      }
    }
    write(to, ld, count, map.channels, at<T>(map, first), map.position, map.channel);
  });
}

}  // namespace

template <class A>
constexpr SoftmaxKernels<A> kTable = {kStrip<A>, kKeys,      kPacked<A>,  padded<A>, workspace<A>,
                                      pack<A>,   forward<A>, backward<A>, collect<A>};
extern const SoftmaxKernels<float> softmax_float;
extern const SoftmaxKernels<double> softmax_double;
const SoftmaxKernels<float> softmax_float = kTable<float>;
const SoftmaxKernels<double> softmax_double = kTable<double>;

}  // namespace kd::KD_ISA
