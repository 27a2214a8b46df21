#pragma once

// Tiles of the op criss_cross, for criss_cross.simd.cpp: packing lines of a map, and register-blocked
// products. A tile holds some channels of some lines, [lines, channels, ld], positions side by side.

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "common/rounding.h"
#include "cpu/criss_cross.h"
#include "cpu/simd.h"

namespace kd::KD_ISA {
namespace {

// Of a product held in registers: the most vectors of a row, and rows. 24 of 32 vectors, or 12 of 16; at
// least 8 chains of additions, which hide one another's latency.
#if defined(__AVX512F__)
constexpr int kWide = 4;
template <int V>
constexpr int kRows = V == 4 ? 6 : 8;
#else
constexpr int kWide = 2;
template <int V>
constexpr int kRows = V == 2 ? 6 : 8;
#endif

// to[u, n] = from[n, u] for four u and four n.
template <class A>
inline void transpose4(const A* from, int64_t ld_from, A* to, int64_t ld_to) {
#if defined(__SSE__)
  if constexpr (sizeof(A) == 4) {
    __m128 r0 = _mm_loadu_ps(from), r1 = _mm_loadu_ps(from + ld_from), r2 = _mm_loadu_ps(from + 2 * ld_from),
           r3 = _mm_loadu_ps(from + 3 * ld_from);
    _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
    _mm_storeu_ps(to, r0), _mm_storeu_ps(to + ld_to, r1);
    _mm_storeu_ps(to + 2 * ld_to, r2), _mm_storeu_ps(to + 3 * ld_to, r3);
    return;
  }
#endif
  A block[4][4];
  for (int n = 0; n < 4; ++n) {
    for (int u = 0; u < 4; ++u) block[u][n] = from[n * ld_from + u];
  }
  for (int u = 0; u < 4; ++u) __builtin_memcpy(to + u * ld_to, block[u], sizeof block[u]);
}

// The same for kLarge u and n, which reads whole lines of the cache where it can.
#if defined(__AVX512F__)
template <class A>
constexpr int kLarge = sizeof(A) == 4 ? 16 : 4;
#else
template <class A>
constexpr int kLarge = 4;
#endif

template <class A>
inline void transpose_large(const A* from, int64_t ld_from, A* to, int64_t ld_to) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    __m512 r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(from + i * ld_from);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 4) {
      for (int half = 0; half < 2; ++half) {
        const __m512d x = _mm512_castps_pd(t[i + half]), y = _mm512_castps_pd(t[i + half + 2]);
        r[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
        r[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 4; ++i) {
      const __m512 even = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88),
                   odd = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
      const __m512 even8 = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88),
                   odd8 = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
      _mm512_storeu_ps(to + i * ld_to, _mm512_shuffle_f32x4(even, even8, 0x88));
      _mm512_storeu_ps(to + (i + 4) * ld_to, _mm512_shuffle_f32x4(odd, odd8, 0x88));
      _mm512_storeu_ps(to + (i + 8) * ld_to, _mm512_shuffle_f32x4(even, even8, 0xdd));
      _mm512_storeu_ps(to + (i + 12) * ld_to, _mm512_shuffle_f32x4(odd, odd8, 0xdd));
    }
    return;
  }
#endif
  transpose4(from, ld_from, to, ld_to);
}

// f(edge, u, n) for squares that cover [units, length], the largest first; single elements have edge 1.
// Squares of one n follow one another, so that what a line of the cache holds is used together.
template <class A, class F>
inline void for_squares(int64_t units, int64_t length, const F& f) {
  const auto cover = [&]<int E>(int64_t u0, int64_t u1, int64_t n0, int64_t n1) {
    for (int64_t n = n0; n < n1; n += E) {
      for (int64_t u = u0; u < u1; u += E) f.template operator()<E>(u, n);
    }
  };
  constexpr int kMost = kLarge<A>;
  const int64_t large_u = units / kMost * kMost, large_n = length / kMost * kMost;
  const int64_t four_u = units / 4 * 4, four_n = length / 4 * 4;
  cover.template operator()<kMost>(0, large_u, 0, large_n);
  if constexpr (kMost > 4) {
    cover.template operator()<4>(large_u, four_u, 0, large_n);
    cover.template operator()<4>(0, four_u, large_n, four_n);
  }
  cover.template operator()<1>(four_u, units, 0, four_n);
  cover.template operator()<1>(0, units, four_n, length);
}

// Where units (channels, or lines) lie side by side in memory: to[u, n] = from[n, u].
template <class T, class A>
inline void gather_units(const T* from, int64_t step, int64_t units, int64_t length, A* to, int64_t ld) {
  for_squares<A>(units, length, [&]<int E>(int64_t u, int64_t n) {
    const T* const block = from + n * step + u;
    A* const out = to + u * ld + n;
    if constexpr (E == 1) {
      *out = static_cast<A>(load(block));
    } else if constexpr (__is_same(T, A)) {
      E == 4 ? transpose4(block, step, out, ld) : transpose_large(block, step, out, ld);
    } else {
      A wide[E * E];
      for (int i = 0; i < E; ++i) convert(block + i * step, wide + E * i, E);
      E == 4 ? transpose4(wide, E, out, ld) : transpose_large(wide, E, out, ld);
    }
  });
}

template <class T, class A>
inline void scatter_units(const A* from, int64_t ld, int64_t units, int64_t length, T* to, int64_t step) {
  for_squares<A>(units, length, [&]<int E>(int64_t u, int64_t n) {
    const A* const block = from + u * ld + n;
    T* const out = to + n * step + u;
    if constexpr (E == 1) {
      store(out, *block);
    } else if constexpr (__is_same(T, A)) {
      E == 4 ? transpose4(block, ld, out, step) : transpose_large(block, ld, out, step);
    } else {
      A wide[E * E];
      E == 4 ? transpose4(block, ld, wide, E) : transpose_large(block, ld, wide, E);
      for (int i = 0; i < E; ++i) convert(wide + E * i, out + i * step, E);
    }
  });
}

// Which part of a map a tile holds.
struct Part {
  int64_t image, line, lines, channel, channels;
};

template <class T>
inline T* start_of(const CrissCrossMap& map, const Part& p) {
  return static_cast<T*>(map.data) + p.image * map.image + p.line * map.line + p.channel * map.channel;
}

template <class T, class A>
void pack_as(const CrissCrossMap& map, const Part& p, int64_t length, A* tile, int64_t ld) {
  const T* const from = start_of<const T>(map, p);
  if (map.position == 1 || (map.line != 1 && map.channel != 1)) {
    for (int64_t l = 0; l < p.lines; ++l) {
      for (int64_t c = 0; c < p.channels; ++c) {
        const T* const row = from + l * map.line + c * map.channel;
        A* const to = tile + (l * p.channels + c) * ld;
        if (map.position == 1) {
          convert(row, to, length);
        } else {
          for (int64_t n = 0; n < length; ++n) to[n] = static_cast<A>(load(row + n * map.position));
        }
      }
    }
  } else if (map.channel == 1) {
    for (int64_t l = 0; l < p.lines; ++l) {
      gather_units(from + l * map.line, map.position, p.channels, length, tile + l * p.channels * ld, ld);
    }
  } else {
    for (int64_t c = 0; c < p.channels; ++c) {
      gather_units(from + c * map.channel, map.position, p.lines, length, tile + c * ld, p.channels * ld);
    }
  }
}

template <class T, class A>
void unpack_as(const A* tile, int64_t ld, const CrissCrossMap& map, const Part& p, int64_t length) {
  T* const to = start_of<T>(map, p);
  if (map.position == 1 || (map.line != 1 && map.channel != 1)) {
    for (int64_t l = 0; l < p.lines; ++l) {
      for (int64_t c = 0; c < p.channels; ++c) {
        T* const row = to + l * map.line + c * map.channel;
        const A* const from = tile + (l * p.channels + c) * ld;
        if (map.position == 1) {
          convert(from, row, length);
        } else {
          for (int64_t n = 0; n < length; ++n) store(row + n * map.position, from[n]);
        }
      }
    }
  } else if (map.channel == 1) {
    for (int64_t l = 0; l < p.lines; ++l) {
      scatter_units(tile + l * p.channels * ld, ld, p.channels, length, to + l * map.line, map.position);
    }
  } else {
    for (int64_t c = 0; c < p.channels; ++c) {
      scatter_units(tile + c * ld, p.channels * ld, p.lines, length, to + c * map.channel, map.position);
    }
  }
}

// Cache lines of parts of maps that come next, asked for a few at a time while products run: processors do
// not foresee them, and waiting for them would take as long as the products.
class Ahead {
 public:
  void add(const CrissCrossMap& map, const Part& p, int64_t length, int64_t element_bytes) {
    if (!map.data || p.channels <= 0 || p.lines <= 0) return;
    Stream& s = streams_[count_++];
    const char* const data = static_cast<const char*>(map.data);
    s.at = data + (p.image * map.image + p.line * map.line + p.channel * map.channel) * element_bytes;
    if (map.position == 1) {  // lines that follow one another make one run
      const bool joined = map.line == length;
      const int64_t runs = joined ? 1 : p.lines;
      s.inner = ceil_div((joined ? p.lines : 1) * length * element_bytes, int64_t{64}), s.inner_step = 64;
      s.middle = runs, s.middle_step = map.line * element_bytes;
      s.outer = p.channels, s.outer_step = map.channel * element_bytes;
    } else {  // one line of the cache per position and channel, or per position and line
      const bool by_line = map.channel == 1;
      s.inner = length, s.inner_step = map.position * element_bytes;
      s.middle = by_line ? p.lines : 1, s.middle_step = map.line * element_bytes;
      s.outer = by_line ? ceil_div(p.channels * element_bytes, int64_t{64}) : p.channels;
      s.outer_step = by_line ? 64 : map.channel * element_bytes;
    }
  }

  // Addresses for the next `steps` steps, or null where none are left. What a product leaves is for the next.
  const char* const* next(int64_t steps) {
    if (steps > kQueue) return nullptr;
    if (used_ + steps > queued_) {
      const int64_t left = queued_ - used_;
      __builtin_memmove(queue_, queue_ + used_, static_cast<size_t>(left) * sizeof *queue_);
      queued_ = left + take(queue_ + left, kQueue - left), used_ = 0;
      if (queued_ == 0) return nullptr;
      for (; queued_ < steps; ++queued_) queue_[queued_] = queue_[queued_ - 1];
    }
    used_ += steps;
    return queue_ + used_ - steps;
  }

 private:
  // At most `most` of them; returns how many.
  int64_t take(const char** to, int64_t most) {
    int64_t taken = 0;
    while (taken < most && now_ < count_) {
      const Stream& s = streams_[now_];
      const char* at = s.at + o_ * s.outer_step + m_ * s.middle_step;
      const int64_t end = s.inner - i_ < most - taken ? s.inner : i_ + most - taken;
      for (; i_ < end; ++i_) to[taken++] = at + i_ * s.inner_step;
      if (i_ < s.inner) break;
      i_ = 0;
      if (++m_ < s.middle) continue;
      m_ = 0;
      if (++o_ < s.outer) continue;
      o_ = 0, ++now_;
    }
    return taken;
  }

  struct Stream {
    const char* at;
    int64_t inner, inner_step, middle, middle_step, outer, outer_step;
  };
  Stream streams_[4];
  static constexpr int64_t kQueue = 512;
  int64_t count_ = 0, now_ = 0, i_ = 0, m_ = 0, o_ = 0, queued_ = 0, used_ = 0;
  const char* queue_[kQueue];
};

// f(T{}) with the storage type of the maps; float64 goes with A = double only.
template <class A, class F>
inline void typed(Dtype dtype, const F& f) {
  if constexpr (__is_same(A, double)) {
    f(double{});
  } else {
    if (dtype == Dtype::f32) f(float{});
    if (dtype == Dtype::f16) f(Half{});
    if (dtype == Dtype::bf16) f(BFloat16{});
  }
}

// c[r, :] = (add ? c[r, :] : 0) + sum over k of a(r, k) b[k, :], for R rows and V vectors of columns, of
// which only the first `columns` are in c; a(r, k) is a[r, k], or a[k, r] where kTransposed.
template <class A, bool kTransposed, int R, int V>
inline void product_tile(const A* a, int64_t ld_a, const A* b, int64_t ld_b, int64_t inner, bool add, A* c,
                         int64_t ld_c, int64_t columns, const char* const* ahead, int64_t ahead_step) {
  constexpr int64_t L = kLanes<A>;
  Vec<A> acc[R][V] = {};
  for (int64_t k = 0; k < inner; ++k) {
    __builtin_prefetch(ahead[k * ahead_step]);
    Vec<A> bk[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) bk[v] = load_vec(b + k * ld_b + v * L);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const A x = kTransposed ? a[k * ld_a + r] : a[r * ld_a + k];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] += x * bk[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      A* const to = c + r * ld_c + v * L;
      if (v == V - 1 && columns < V * L) {
        A last[L];
        store_vec(last, acc[r][v]);
        for (int64_t i = 0; i < columns - v * L; ++i) to[i] = add ? to[i] + last[i] : last[i];
      } else {
        store_vec(to, add ? load_vec(to) + acc[r][v] : acc[r][v]);
      }
    }
  }
}

template <class A, bool kTransposed, int V, int R = kRows<V>>
inline void product_rows(int64_t rows, const A* a, int64_t ld_a, const A* b, int64_t ld_b, int64_t inner,
                         bool add, A* c, int64_t ld_c, int64_t columns, const char* const* ahead,
                         int64_t ahead_step) {
  if (rows >= R) {
    product_tile<A, kTransposed, R, V>(a, ld_a, b, ld_b, inner, add, c, ld_c, columns, ahead, ahead_step);
  } else if constexpr (R > 1) {
    product_rows<A, kTransposed, V, R - 1>(rows, a, ld_a, b, ld_b, inner, add, c, ld_c, columns, ahead,
                                           ahead_step);
  }
}

// c [rows, columns] = (add ? c : 0) + a b with inner terms; rows of b are whole vectors.
template <class A, bool kTransposed>
void multiply(const A* a, int64_t ld_a, const A* b, int64_t ld_b, int64_t rows, int64_t columns,
              int64_t inner, bool add, A* c, int64_t ld_c, Ahead& ahead) {
  const char* const nothing = reinterpret_cast<const char*>(&nothing);
  const int64_t a_step = kTransposed ? 1 : ld_a;
  const auto panel = [&]<int V>(int64_t j) {
    for (int64_t r = 0; r < rows; r += kRows<V>) {
      const char* const* const next = ahead.next(inner);
      product_rows<A, kTransposed, V>(rows - r, a + r * a_step, ld_a, b + j, ld_b, inner, add,
                                      c + r * ld_c + j, ld_c, columns - j, next ? next : &nothing,
                                      next != nullptr);
    }
  };
  constexpr int64_t L = kLanes<A>;
  int64_t j = 0;
  for (; j + (kWide - 1) * L < columns; j += kWide * L) panel.template operator()<kWide>(j);
  const int64_t left = ceil_div(columns - j, L);  // vectors
  if constexpr (kWide > 3) {
    if (left == 3) panel.template operator()<3>(j);
    if (left == 2) panel.template operator()<2>(j);
  }
  if (left == 1) panel.template operator()<1>(j);
}

// The square matrix [n, n] transposed in place.
template <class A>
void transpose_square(A* m, int64_t n, int64_t ld) {
  const int64_t whole = n / 4 * 4;
  for (int64_t i = 0; i < whole; i += 4) {
    for (int64_t j = i; j < whole; j += 4) {
      A upper[16], lower[16];
      transpose4(m + i * ld + j, ld, upper, 4);
      transpose4(m + j * ld + i, ld, lower, 4);
      for (int r = 0; r < 4; ++r) {
        __builtin_memcpy(m + (j + r) * ld + i, upper + 4 * r, 4 * sizeof(A));
        __builtin_memcpy(m + (i + r) * ld + j, lower + 4 * r, 4 * sizeof(A));
      }
    }
  }
  for (int64_t i = whole; i < n; ++i) {
    for (int64_t j = 0; j < i; ++j) {
      const A kept = m[i * ld + j];
      m[i * ld + j] = m[j * ld + i];
      m[j * ld + i] = kept;
    }
  }
}

}  // namespace
}  // namespace kd::KD_ISA
