// Arithmetic of the op criss_cross on the CPU, compiled once per instruction set.
//
// Per position and pass over lines of n cells: n (d + e) multiply-adds forward, n (3 d + 2 e) backward (d
// channels of query and key, e of value). Arithmetic decides: every value that is packed takes part in n
// multiply-adds. Of a few lines at a time the scores lie in L2, [lines, n, n], and maps pass by in blocks of
// channels, each read once per pass, and each result read and written once more by the column pass. Columns
// that lie side by side have a column pass of their own, in criss_cross_lanes.h.

#include "cpu/criss_cross.h"

#include "cpu/criss_cross_lanes.h"
#include "cpu/criss_cross_tiles.h"

namespace kd::KD_ISA {
namespace {

constexpr int64_t kBlock = 48, kBlockOfLines = 18;  // channels of a tile of one line, of several

// Rows of a tile or of scores: whole vectors, and not a multiple of 512 bytes, which few cache sets would
// hold.
template <class A>
inline int64_t row_of(int64_t length) {
  const int64_t ld = round_up(length, int64_t{kLanes<A>});
  return ld * static_cast<int64_t>(sizeof(A)) % 512 == 0 ? ld + kLanes<A> : ld;
}

// Maps of `channels` channels that are read, or written, block by block together.
struct Phase {
  int64_t channels;
  const CrissCrossMap* maps[4];
};

template <class A>
struct Lines {
  const CrissCrossCall<A>& call;
  int64_t image, first, count, n, ld, width, block;

  Lines(const CrissCrossCall<A>& call, int64_t image, int64_t first, int64_t count)
      : call(call),
        image(image),
        first(first),
        count(count),
        n(call.length),
        ld(row_of<A>(call.length)),
        width(round_up(call.length, int64_t{kLanes<A>})),
        block(count == 1 ? kBlock : kBlockOfLines) {}

  int64_t scores() const { return count * n * ld; }
  int64_t tile() const { return count * block * ld; }

  Part part(int64_t channel, int64_t channels) const {
    return {image, first, count, channel, block < channels - channel ? block : channels - channel};
  }
  // f(part, ahead) for every block of channels; `ahead` has what the next block of these maps, or the first
  // one of `then`, reads.
  template <class F>
  void for_blocks(const Phase& phase, const Phase& then, const F& f) const {
    for (int64_t c = 0; c < phase.channels; c += block) {
      const Part p = part(c, phase.channels);
      const bool last = c + block >= phase.channels;
      const Phase& next = last ? then : phase;
      Ahead ahead;
      for (const CrissCrossMap* map : next.maps) {
        if (map) ahead.add(*map, part(last ? 0 : c + block, next.channels), n, bytes());
      }
      f(p, ahead);
    }
  }
  int64_t bytes() const { return __is_same(A, double) ? 8 : call.dtype == Dtype::f32 ? 4 : 2; }

  void pack(const CrissCrossMap& map, const Part& p, A* to) const {
    typed<A>(call.dtype, [&]<class T>(T) { pack_as<T, A>(map, p, n, to, ld); });
    if (width == n) return;
    for (int64_t row = 0; row < p.lines * p.channels; ++row) {
      for (int64_t i = n; i < width; ++i) to[row * ld + i] = 0;
    }
  }
  // Whether a map has lines as they would be packed, but for the steps between them.
  bool in_place(const CrissCrossMap& map) const {
    return map.position == 1 && bytes() == static_cast<int64_t>(sizeof(A));
  }
  void unpack(const A* from, const CrissCrossMap& map, const Part& p) const {
    typed<A>(call.dtype, [&]<class T>(T) { unpack_as<T, A>(from, ld, map, p, n); });
  }

  // scores [n, n] of every line = (add ? scores : 0) + left^T right, of tiles [channels, n].
  void add_scores(const A* left, const A* right, int64_t channels, bool add, A* scores, Ahead& ahead) const {
    for (int64_t l = 0; l < count; ++l) {
      const int64_t at = l * channels * ld;
      multiply<A, true>(left + at, ld, right + at, ld, n, width, channels, add, scores + l * n * ld, ld,
                        ahead);
    }
  }

  // Rows [channels, n] of every line, in a tile or where they lie in a map.
  struct Rows {
    A* at;
    int64_t channel, line;
  };
  Rows in_tile(A* tile, const Part& p) const { return {tile, ld, p.channels * ld}; }
  Rows rows_of(const CrissCrossMap& map, const Part& p) const {
    return {start_of<A>(map, p), map.channel, map.line};
  }
  Rows packed(const CrissCrossMap& map, const Part& p, A* tile) const {
    if (in_place(map)) return rows_of(map, p);
    pack(map, p, tile);
    return in_tile(tile, p);
  }

  // result (+)= from * scores, in place in the row pass where that can be; else through a tile. `keep`, if
  // any, is what the column pass multiplies the result with before, [count, ld].
  void apply(const Rows& from, const A* scores, const CrissCrossMap& result, const Part& p, const A* keep,
             A* tile, Ahead& ahead) const {
    const bool add = call.column, direct = !add && in_place(result);
    const Rows to = direct ? rows_of(result, p) : in_tile(tile, p);
    if (add) pack(result, p, tile);
    for (int64_t row = 0; keep && row < count * p.channels; ++row) {
      A* const x = tile + row * ld;
      const A* const share = keep + row / p.channels * ld;
      for (int64_t i = 0; i < width; i += kLanes<A>) {
        store_vec(x + i, load_vec(x + i) * load_vec(share + i));
      }
    }
    for (int64_t l = 0; l < count; ++l) {
      multiply<A, false>(from.at + l * from.line, from.channel, scores + l * n * ld, ld, p.channels,
                         direct ? n : width, n, add, to.at + l * to.line, to.channel, ahead);
    }
    if (!direct) unpack(tile, result, p);
  }

  // The same for all channels of query or key, block by block.
  void apply_all(const CrissCrossMap& from, const A* scores, const CrissCrossMap& result, const Phase& then,
                 A* first_tile, A* second_tile) const {
    for_blocks({call.channels, {&from, &result}}, then, [&](const Part& p, Ahead& ahead) {
      apply(packed(from, p, first_tile), scores, result, p, nullptr, second_tile, ahead);
    });
  }

  // Statistics of positions: [count, ld] beside [images, H, W].
  void read(const A* from, A* to) const {
    for (int64_t l = 0; l < count; ++l) {
      const A* const line = from + image * call.image_step + (first + l) * call.line_step;
      for (int64_t i = 0; i < n; ++i) to[l * ld + i] = line[i * call.position_step];
      for (int64_t i = n; i < ld; ++i) to[l * ld + i] = 0;
    }
  }
  void write(const A* from, A* to) const {
    for (int64_t l = 0; l < count; ++l) {
      A* const line = to + image * call.image_step + (first + l) * call.line_step;
      for (int64_t i = 0; i < n; ++i) line[i * call.position_step] = from[l * ld + i];
    }
  }
  void fill_diagonals(A* scores, A value) const {
    for (int64_t i = 0; i < count * n; ++i) scores[i * ld + i % n] = value;
  }
};

// Scores of keys [j] by positions [i] become weights. In the column pass `lse` holds what the row pass left,
// and `kept` becomes its share; lse becomes the log-sum-exp of all.
template <class A>
void softmax(A* scores, int64_t n, int64_t width, int64_t ld, bool column, A* lse, A* kept) {
  for (int64_t i = 0; i < width; i += kLanes<A>) {
    A* const s = scores + i;
    const Vec<A> before = load_vec(lse + i);
    Vec<A> most = column ? before : load_vec(s);
    for (int64_t j = 0; j < n; ++j) {
      const Vec<A> v = load_vec(s + j * ld);
      most = v > most ? v : most;
    }
    const Vec<A> first = column ? power<A>(before - most) : Vec<A>{};
    Vec<A> total = first;
    for (int64_t j = 0; j < n; ++j) {
      const Vec<A> e = power<A>(load_vec(s + j * ld) - most);
      store_vec(s + j * ld, e);
      total += e;
    }
    const Vec<A> share = 1 / total;
    for (int64_t j = 0; j < n; ++j) store_vec(s + j * ld, load_vec(s + j * ld) * share);
    store_vec(kept + i, first * share);
    for (int lane = 0; lane < kLanes<A>; ++lane) lse[i + lane] = most[lane] + logarithm(total[lane]);
  }
}

template <class A>
void forward(const CrissCrossCall<A>& call, int64_t image, int64_t first, int64_t count, A* workspace) {
  const Lines<A> lines(call, image, first, count);
  const int64_t n = lines.n, ld = lines.ld, width = lines.width;
  A* const scores = workspace;  // [count, keys, positions]
  A *const tile = scores + lines.scores(), *const second = tile + lines.tile();
  A *const lse = second + lines.tile(), *const kept = lse + count * ld;
  const Phase qk{call.channels, {&call.key, &call.query}}, values{call.values, {&call.value, &call.out}};
  lines.for_blocks(qk, values, [&](const Part& p, Ahead& ahead) {
    lines.pack(call.key, p, tile), lines.pack(call.query, p, second);
    lines.add_scores(tile, second, p.channels, p.channel > 0, scores, ahead);
  });
  lines.read(call.lse, lse);
  if (call.column) lines.fill_diagonals(scores, -static_cast<A>(__builtin_inff()));
  for (int64_t l = 0; l < count; ++l) {
    softmax(scores + l * n * ld, n, width, ld, call.column, lse + l * ld, kept + l * ld);
  }
  lines.write(lse, call.lse);
  lines.for_blocks(values, {}, [&](const Part& p, Ahead& ahead) {
    lines.apply(lines.packed(call.value, p, tile), scores, call.out, p, call.column ? kept : nullptr, second,
                ahead);
  });
}

template <class A>
void backward(const CrissCrossCall<A>& call, int64_t image, int64_t first, int64_t count, A* workspace) {
  const Lines<A> lines(call, image, first, count);
  const int64_t ld = lines.ld, width = lines.width, rows = count * lines.n;
  const bool need_scores = call.grad_query.data || call.grad_key.data, need_value = call.grad_value.data;
  A *const weights = workspace, *const slopes = weights + lines.scores();  // [count, positions, keys]
  A *const tile = slopes + lines.scores(), *const second = tile + lines.tile();
  A *const lse = second + lines.tile(), *const delta = lse + count * ld;
  const Phase qk{call.channels, {&call.query, &call.key}};
  const Phase for_key{call.channels, {&call.query, &call.grad_key}};
  const Phase for_query{call.channels, {&call.key, &call.grad_query}};
  const Phase values{call.values,
                     {&call.grad_out, need_scores ? &call.value : nullptr, &call.grad_value,
                      need_scores && !call.column ? &call.out : nullptr}};
  lines.for_blocks(qk, values, [&](const Part& p, Ahead& ahead) {
    lines.pack(call.query, p, tile), lines.pack(call.key, p, second);
    lines.add_scores(tile, second, p.channels, p.channel > 0, weights, ahead);
  });
  lines.read(call.lse, lse);
  const auto statistic = [&](const A* of, int64_t row) { return of[row / lines.n * ld + row % lines.n]; };
  for (int64_t row = 0; row < rows; ++row) {
    const A lse_row = statistic(lse, row);
    for (A *w = weights + row * ld, *end = w + width; w < end; w += kLanes<A>) {
      store_vec(w, power<A>(load_vec(w) - lse_row));
    }
  }
  if (call.column) lines.fill_diagonals(weights, 0);

  // delta = <out, grad_out>, of all channels: found in the row pass, used in both.
  if (need_scores && call.column) lines.read(call.delta, delta);
  if (need_scores && !call.column) {
    for (int64_t i = 0; i < count * ld; ++i) delta[i] = 0;
  }
  const Phase then = call.grad_key.data ? for_key : call.grad_query.data ? for_query : Phase{};
  lines.for_blocks(values, then, [&](const Part& p, Ahead& ahead) {
    lines.pack(call.grad_out, p, tile);
    if (need_scores && !call.column) {
      const auto out = lines.packed(call.out, p, second);
      for (int64_t l = 0; l < count; ++l) {
        for (int64_t c = 0; c < p.channels; ++c) {
          const A* __restrict const a = tile + (l * p.channels + c) * ld;
          const A* __restrict const b = out.at + l * out.line + c * out.channel;
          A* __restrict const to = delta + l * ld;
          for (int64_t i = 0; i < lines.n; ++i) to[i] += a[i] * b[i];
        }
      }
    }
    if (need_scores) {
      lines.pack(call.value, p, second);
      lines.add_scores(tile, second, p.channels, p.channel > 0, slopes, ahead);
    }
    if (need_value) lines.apply(lines.in_tile(tile, p), weights, call.grad_value, p, nullptr, second, ahead);
  });
  if (!need_scores) return;
  if (!call.column) lines.write(delta, call.delta);
  for (int64_t row = 0; row < rows; ++row) {
    const A delta_row = statistic(delta, row);
    const A* const w = weights + row * ld;
    A* const s = slopes + row * ld;
    for (int64_t j = 0; j < width; j += kLanes<A>) {
      store_vec(s + j, load_vec(w + j) * (load_vec(s + j) - delta_row));
    }
  }
  if (call.grad_key.data) {
    lines.apply_all(call.query, slopes, call.grad_key, call.grad_query.data ? for_query : Phase{}, tile,
                    second);
  }
  if (call.grad_query.data) {
    for (int64_t l = 0; l < count; ++l) transpose_square(slopes + l * lines.n * ld, lines.n, ld);
    lines.apply_all(call.key, slopes, call.grad_query, {}, tile, second);
  }
}

template <class A>
int64_t workspace(const CrissCrossCall<A>& call, int64_t count, bool is_backward) {
  const Lines<A> lines(call, 0, 0, count);
  return (1 + is_backward) * lines.scores() + 2 * lines.tile() + 2 * count * lines.ld;
}

template <class A>
constexpr CrissCrossKernels<A> table() {
  return {.workspace = workspace<A>,
          .forward = forward<A>,
          .backward = backward<A>,

          .columns = kLanes<A>,
          .workspace_of_columns = workspace_of_columns<A>,
          .forward_columns = forward_columns<A>,
          .backward_columns = backward_columns<A>};
}

}  // namespace

extern const CrissCrossKernels<float> criss_cross_float;
extern const CrissCrossKernels<double> criss_cross_double;
const CrissCrossKernels<float> criss_cross_float = table<float>();
const CrissCrossKernels<double> criss_cross_double = table<double>();

}  // namespace kd::KD_ISA
