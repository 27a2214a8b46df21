// Sweeps of the affinity op on the CPU, compiled once per instruction set.
//
// Per key and 16 columns: one row of 16 values read, 32 multiply-adds into sums that stay in registers; per
// query one row written. Sums run in double, and over keys less their median: a_i G + H cancels where a_i
// and the b_j are large and opposite, and a prefix may hold tens of thousands of keys.
//
// Rows are sorted when they are packed and unpacked, where each row's place is known long before, so that it
// can be fetched; the sweeps read and write one row after the other.

#include "cpu/affinity.h"

#include "cpu/criss_cross_tiles.h"
#include "cpu/simd.h"

namespace kd::KD_ISA {
namespace {

constexpr int64_t kWidth = kAffinityWidth;
constexpr int kDoubles = kLanes<double>;
constexpr int kVectors = static_cast<int>(kWidth) / kDoubles;
constexpr int64_t kTile = 32;   // rows transposed at a time: 2 KB of float
constexpr int64_t kTable = 32;  // prefixes held at a time: 8 KB

typedef float Narrow __attribute__((vector_size(kVectorBytes / 2)));

inline Vec<double> widen(const double* from) { return load_vec(from); }
inline Vec<double> widen(const float* from) {
  Narrow v;
  __builtin_memcpy(&v, from, sizeof v);
  return __builtin_convertvector(v, Vec<double>);
}
inline void narrow(const Vec<double>& v, double* to) { store_vec(to, v); }
inline void narrow(const Vec<double>& v, float* to) {
  const Narrow n = __builtin_convertvector(v, Narrow);
  __builtin_memcpy(to, &n, sizeof n);
}

inline double total(const Vec<double>& v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_pd((__m512d)v);
#else
  double sum = 0;
  for (int lane = 0; lane < kDoubles; ++lane) sum += v[lane];
  return sum;
#endif
}

// Queries wait for their prefix until a table of the next kTable prefixes is full: when a query follows a key
// is random, and a branch per query or key would be mispredicted every other time.
template <class P, bool kOut, bool kDots>
void sweep_as(const AffinitySweep<P>& s) {
  alignas(64) double sums[kTable][kWidth], products[kTable][kWidth];
  Vec<double> sum[kVectors] = {}, weighted[kVectors] = {};
  for (int64_t first = 0, r = 0; first <= s.keys && r < s.queries; first += kTable) {
    const int64_t last = first + kTable <= s.keys ? first + kTable : s.keys + 1;
    for (int64_t c = first; c < last; ++c) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        store_vec(sums[c - first] + v * kDoubles, sum[v]);
        if (kOut) store_vec(products[c - first] + v * kDoubles, weighted[v]);
      }
      const int64_t j = s.keys - 1 - c;
      if (j < 0) break;
      const Vec<double> weight = Vec<double>{} + (static_cast<double>(s.key[j]) - s.center);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const Vec<double> value = widen(s.values + j * kWidth + v * kDoubles);
        sum[v] += value;
        if (kOut) weighted[v] += weight * value;
      }
    }
    for (; r < s.queries && s.counted[r] < last; ++r) {
      const double *g = sums[s.counted[r] - first], *h = products[s.counted[r] - first];
      if (kDots) {
        Vec<double> dot = {};
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          dot += widen(s.with + r * kWidth + v * kDoubles) * load_vec(g + v * kDoubles);
        }
        s.dots[r] = static_cast<P>(s.scale * total(dot));
      }
      if (kOut) {
        const Vec<double> weight = Vec<double>{} + (static_cast<double>(s.query[r]) + s.center);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          narrow((weight * load_vec(g + v * kDoubles) + load_vec(h + v * kDoubles)) * s.scale,
                 s.out + r * s.out_step + v * kDoubles);
        }
      }
    }
  }
}

template <class P>
void sweep(const AffinitySweep<P>& s) {
  if (s.out == nullptr) {
    if (s.dots != nullptr) sweep_as<P, false, true>(s);
  } else {
    s.dots != nullptr ? sweep_as<P, true, true>(s) : sweep_as<P, true, false>(s);
  }
}

// Into the second level: asking for random rows in the first took a third more time at 67,200 rows,
// presumably since its few miss buffers were then not free for loads.
inline void request(const void* line) { __builtin_prefetch(line, 0, 2); }

// f(first row, rows) for tiles of kTile rows, after `ahead(row)` for each row of the tile that comes next.
template <class Ahead, class F>
inline void for_tiles(int64_t rows, const Ahead& ahead, const F& f) {
  for (int64_t begin = 0; begin < rows; begin += kTile) {
    const int64_t end = begin + kTile < rows ? begin + kTile : rows;
    const int64_t next = end + kTile < rows ? end + kTile : rows;
    for (int64_t r = end; r < next; ++r) ahead(r);
    f(begin, end - begin);
  }
}

// Asks for rows [row, row + kTile) of `count` columns. The processor, which finds regular accesses by
// itself, does not among requests for random rows.
template <class T>
inline void request_tile(const T* data, const AffinityMatrix& from, int64_t row, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  if (row + kTile > from.rows) return;
  const T* const block = data + row * from.row_stride;
  if (from.row_stride == 1) {
    for (int64_t c = 0; c < count; ++c) {
      for (int64_t r = 0; r < kTile; r += kLine) request(block + c * from.column_stride + r);
    }
  } else if (from.column_stride == 1) {
    for (int64_t r = 0; r < kTile; ++r) request(block + r * from.row_stride);
  }
}

template <class P>
void pack(const AffinityMatrix& from, const int32_t* rank, int64_t first, int64_t count, P* to) {
  alignas(64) P tile[kTile * kWidth] = {};
  typed<P>(from.dtype, [&]<class T>(T) {
    const T* const data = static_cast<const T*>(from.data) + first * from.column_stride;
    for_tiles(
        from.rows, [&](int64_t r) { request(to + rank[r] * kWidth); },
        [&](int64_t begin, int64_t rows) {
          request_tile(data, from, begin + 2 * kTile, count);
          const T* const block = data + begin * from.row_stride;
          if (from.column_stride == 1) {
            for (int64_t r = 0; r < rows; ++r) convert(block + r * from.row_stride, tile + r * kWidth, count);
          } else if (from.row_stride == 1) {
            gather_units(block, from.column_stride, rows, count, tile, kWidth);
          } else {
            for (int64_t r = 0; r < rows; ++r) {
              for (int64_t c = 0; c < count; ++c) {
                tile[r * kWidth + c] = load(block + r * from.row_stride + c * from.column_stride);
              }
            }
          }
          for (int64_t r = 0; r < rows; ++r) {
            __builtin_memcpy(to + rank[begin + r] * kWidth, tile + r * kWidth, kWidth * sizeof(P));
          }
        });
  });
}

// Writes a tile past the caches where it is made of whole lines of them; `to` starts one.
template <class P>
bool stream(const P* tile, int64_t rows, int64_t count, P* to, int64_t row_stride, int64_t column_stride) {
  constexpr int64_t kLine = 64 / sizeof(P);
  if (column_stride == 1 && row_stride % kLine == 0 && count == kWidth) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < kWidth; c += kLanes<P>) {
        stream_vec(to + r * row_stride + c, load_vec(tile + r * kWidth + c));
      }
    }
  } else if (row_stride == 1 && column_stride % kLine == 0 && rows == kTile) {
    alignas(64) P turned[kWidth * kTile];
    scatter_units(tile, kWidth, rows, count, turned, kTile);
    for (int64_t c = 0; c < count; ++c) {
      for (int64_t r = 0; r < kTile; r += kLanes<P>) {
        stream_vec(to + c * column_stride + r, load_vec(turned + c * kTile + r));
      }
    }
  } else {
    return false;
  }
  return true;
}

template <class P>
void unpack(const P* from, int64_t step, const int32_t* rank, int64_t first, int64_t count,
            const AffinityMatrix& to) {
  alignas(64) P tile[kTile * kWidth];
  typed<P>(to.dtype, [&]<class T>(T) {
    T* const data = static_cast<T*>(to.data) + first * to.column_stride;
    const bool past = to.past_caches && reinterpret_cast<uintptr_t>(data) % 64 == 0;
    for_tiles(
        to.rows, [&](int64_t r) { request(from + rank[r] * step); },
        [&](int64_t begin, int64_t rows) {
          T* const block = data + begin * to.row_stride;
          for (int64_t r = 0; r < rows; ++r) {
            __builtin_memcpy(tile + r * kWidth, from + rank[begin + r] * step, kWidth * sizeof(P));
          }
          if constexpr (__is_same(T, P)) {
            if (past && stream(tile, rows, count, block, to.row_stride, to.column_stride)) return;
          }
          if (to.column_stride == 1) {
            for (int64_t r = 0; r < rows; ++r) convert(tile + r * kWidth, block + r * to.row_stride, count);
          } else if (to.row_stride == 1) {
            scatter_units(tile, kWidth, rows, count, block, to.column_stride);
          } else {
            for (int64_t r = 0; r < rows; ++r) {
              for (int64_t c = 0; c < count; ++c) {
                store(block + r * to.row_stride + c * to.column_stride, tile[r * kWidth + c]);
              }
            }
          }
        });
  });
  if (to.past_caches) end_streams();
}

}  // namespace

extern const AffinityKernels<float> affinity_float;
extern const AffinityKernels<double> affinity_double;
const AffinityKernels<float> affinity_float = {pack<float>, unpack<float>, sweep<float>};
const AffinityKernels<double> affinity_double = {pack<double>, unpack<double>, sweep<double>};

}  // namespace kd::KD_ISA
