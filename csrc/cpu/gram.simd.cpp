// Arithmetic of the gram op on the CPU, compiled once per instruction set.
//
// Forward, per N x N Gram: N (N + 1) / 2 * D multiply-adds and one read of the input; backward N^2 D and one
// read, one write. At N >= 32 arithmetic decides, so both products are register-blocked over tiles that stay
// in the L2 cache.

#include "cpu/gram.h"

#include "cpu/gram_compare.h"
#include "cpu/gram_difference.h"
#include "cpu/gram_triangle.h"
#include "cpu/simd.h"

namespace kd::KD_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kJ = 6, kMixRows = 8, kMixVectors = 3;
#elif defined(__AVX2__)
constexpr int kJ = 3, kMixRows = 6, kMixVectors = 2;
#else
constexpr int kJ = 2, kMixRows = 4, kMixVectors = 2;
#endif
constexpr int kI = 4;
constexpr int64_t kMixColumns = 256;
// Rows of a tile that are revisited while they are in L1 (32 KB, half of it for them).
constexpr int64_t kL1Bytes = 16384;

template <class F>
void for_runs(const GramView& v, int64_t first, int64_t count, const F& f) {
  for (int64_t d = 0; d < count;) {
    const int64_t o = (first + d) / v.inner, i = (first + d) % v.inner;
    const int64_t run = v.inner - i < count - d ? v.inner - i : count - d;
    f(d, v.outer[o] + i * v.inner_stride, run);
    d += run;
  }
}

template <class T, class A>
void gather(const GramView& v, int64_t group, int64_t first, int64_t count, A* tile, int64_t ld) {
  const T* base = static_cast<const T*>(v.data) + group * v.group_stride;
  const bool rows_inside = v.inner_stride != 1 && v.rows > 1 && v.row_offset[1] - v.row_offset[0] == 1;
  if (rows_inside) {  // neighbouring rows are neighbours in memory: read along them
    for_runs(v, first, count, [&](int64_t d, int64_t offset, int64_t run) {
      constexpr int64_t kBlock = 16;  // columns whose lines of memory stay in L1 while the rows pass by
      for (int64_t c0 = 0; c0 < run; c0 += kBlock) {
        const int64_t c1 = c0 + kBlock < run ? c0 + kBlock : run;
        for (int64_t r = 0; r < v.rows; ++r) {
          const T* from = base + offset + v.row_offset[r];
          A* to = tile + r * ld + d;
          for (int64_t c = c0; c < c1; ++c) to[c] = static_cast<A>(load(from + c * v.inner_stride));
        }
      }
    });
    return;
  }
  for (int64_t r = 0; r < v.rows; ++r) {
    const T* row = base + v.row_offset[r];
    A* to = tile + r * ld;
    for_runs(v, first, count, [&](int64_t d, int64_t offset, int64_t run) {
      const T* from = row + offset;
      if (v.inner_stride == 1) {
        convert(from, to + d, run);
      } else {
        for (int64_t c = 0; c < run; ++c) to[d + c] = static_cast<A>(load(from + c * v.inner_stride));
      }
    });
  }
}

template <class T, class A>
void scatter(const GramView& v, int64_t group, int64_t first, int64_t count, const A* tile, int64_t ld) {
  T* base = static_cast<T*>(v.data) + group * v.group_stride;
  for (int64_t r = 0; r < v.rows; ++r) {
    T* row = base + v.row_offset[r];
    const A* from = tile + r * ld;
    for_runs(v, first, count, [&](int64_t d, int64_t offset, int64_t run) {
      T* to = row + offset;
      if (v.inner_stride == 1) {
        convert(from + d, to, run);
      } else {
        for (int64_t c = 0; c < run; ++c) store(to + c * v.inner_stride, from[d + c]);
      }
    });
  }
}

template <class A>
void center_columns(A* tile, int64_t ld, int64_t width, int64_t rows, A* means) {
  using V = Vec<A>;
  const A inverse = A(1) / static_cast<A>(rows);
  for (int64_t c = 0; c < width; c += 2 * kLanes<A>) {
    const int64_t second =
        c + kLanes<A> < width ? c + kLanes<A> : c;  // the last odd vector is worked on twice
    const V ref0 = load_vec(tile + c), ref1 = load_vec(tile + second);
    V sum0 = {}, sum1 = {};
    for (int64_t r = 1; r < rows; ++r) {
      sum0 += load_vec(tile + r * ld + c) - ref0;
      sum1 += load_vec(tile + r * ld + second) - ref1;
    }
    sum0 *= inverse, sum1 *= inverse;
    if (means) store_vec(means + c, ref0 + sum0), store_vec(means + second, ref1 + sum1);
    for (int64_t r = 0; r < rows; ++r) {
      A* row = tile + r * ld;
      const V a = load_vec(row + c) - ref0 - sum0, b = load_vec(row + second) - ref1 - sum1;
      store_vec(row + c, a), store_vec(row + second, b);
    }
  }
}

// Scales every column to unit length (zero columns stay); squares of values / the column's largest stay in
// range.
template <class A>
void unit_columns(A* tile, int64_t ld, int64_t width, int64_t rows, A* scale) {
  using V = Vec<A>;
  for (int64_t c = 0; c < width; c += kLanes<A>) {
    V largest = {}, sum = {};
    for (int64_t r = 0; r < rows; ++r) {
      const V value = load_vec(tile + r * ld + c), negative = -value;
      const V magnitude = value > negative ? value : negative;
      largest = magnitude > largest ? magnitude : largest;
    }
    const V shrink = largest > 0 ? 1 / largest : V{};
    for (int64_t r = 0; r < rows; ++r) {
      const V value = load_vec(tile + r * ld + c) * shrink;
      sum += value * value;
    }
    for (int lane = 0; lane < kLanes<A>; ++lane) {
      scale[c + lane] = sum[lane] > 0 ? shrink[lane] / square_root(sum[lane]) : 0;
    }
    const V by = load_vec(scale + c);
    for (int64_t r = 0; r < rows; ++r) store_vec(tile + r * ld + c, load_vec(tile + r * ld + c) * by);
  }
}

template <class A>
void pack(const GramView& v, int64_t group, int64_t first, int64_t count, A* tile, int64_t ld) {
  switch (v.dtype) {
    case Dtype::f32:
      gather<float, A>(v, group, first, count, tile, ld);
      break;
    case Dtype::f64:
      gather<double, A>(v, group, first, count, tile, ld);
      break;
    case Dtype::f16:
      gather<Half, A>(v, group, first, count, tile, ld);
      break;
    case Dtype::bf16:
      gather<BFloat16, A>(v, group, first, count, tile, ld);
      break;
  }
}

template <class A>
void transform_tile(const TileTransform<A>& t, int64_t rows, int64_t count, A* tile, int64_t ld,
                    int64_t width, int64_t padded_rows) {
  for (int64_t r = 0; r < rows; ++r) {
    A* row = tile + r * ld;
    if (t.row_norm) {  // divided, so that rows of one feature become exactly 1 or -1
      for (int64_t c = 0; c < count; ++c) row[c] /= t.row_norm[r];
    }
    if (t.row_ref) {
      for (int64_t c = 0; c < count; ++c) row[c] = row[c] - t.row_ref[r] - t.row_mean[r];
    }
    for (int64_t c = count; c < width; ++c) row[c] = 0;
  }
  if (t.column_scale) unit_columns(tile, ld, width, rows, t.column_scale);
  if (t.center) center_columns(tile, ld, width, rows, t.extend ? tile + rows * ld : nullptr);
  for (int64_t r = rows + t.extend; r < padded_rows; ++r) {
    for (int64_t c = 0; c < width; ++c) tile[r * ld + c] = 0;
  }
}

template <class A>
void unpack(const GramView& v, int64_t group, int64_t first, int64_t count, const A* tile, int64_t ld) {
  switch (v.dtype) {
    case Dtype::f32:
      scatter<float, A>(v, group, first, count, tile, ld);
      break;
    case Dtype::f64:
      scatter<double, A>(v, group, first, count, tile, ld);
      break;
    case Dtype::f16:
      scatter<Half, A>(v, group, first, count, tile, ld);
      break;
    case Dtype::bf16:
      scatter<BFloat16, A>(v, group, first, count, tile, ld);
      break;
  }
}

template <class A>
void row_sums(const A* tile, int64_t ld, int64_t count, int64_t rows, const A* ref, double* sums,
              double* sums_sq) {
  for (int64_t r = 0; r < rows; ++r) {
    const A* row = tile + r * ld;
    if (sums) sums[r] += row_sum<A>(count, [&](int64_t i, auto like) { return at(row, i, like) - ref[r]; });
    if (!sums_sq) continue;
    for (int64_t c = 0; c < count; ++c)
      sums_sq[r] += static_cast<double>(row[c]) * static_cast<double>(row[c]);
  }
}

// out[j, i..i+3] += <a_j, b_i> for kJ rows of a and kI rows of b.
template <class A>
inline void product_tile(const A* a, int64_t ld_a, const A* b, int64_t ld_b, int64_t width, A* out,
                         int64_t ld_out) {
  using V = Vec<A>;
  V acc[kJ][kI] = {};
  for (int64_t c = 0; c < width; c += kLanes<A>) {
    V bi[kI];
#pragma GCC unroll 4
    for (int i = 0; i < kI; ++i) bi[i] = load_vec(b + i * ld_b + c);
#pragma GCC unroll 6
    for (int j = 0; j < kJ; ++j) {
      const V aj = load_vec(a + j * ld_a + c);
#pragma GCC unroll 4
      for (int i = 0; i < kI; ++i) acc[j][i] += aj * bi[i];
    }
  }
#pragma GCC unroll 6
  for (int j = 0; j < kJ; ++j) add_sums4(acc[j], out + j * ld_out);
}

template <class A>
void products(const A* a, int64_t a_rows, int64_t ld_a, const A* b, int64_t b_rows, int64_t ld_b,
              int64_t width, bool symmetric, int64_t part, int64_t parts, A* out, int64_t ld_out) {
  const int64_t block = kL1Bytes / (width * static_cast<int64_t>(sizeof(A))) / kI * kI;
  const int64_t rows_in_l1 = block < kI ? kI : block;
  for (int64_t i0 = 0; i0 < b_rows; i0 += rows_in_l1) {
    const int64_t i1 = i0 + rows_in_l1 < b_rows ? i0 + rows_in_l1 : b_rows;
    for (int64_t j = part * kJ; j < a_rows;
         j += parts * kJ) {  // interleaved shares of the triangle are equal
      int64_t i = i0;
      if (symmetric) {
        if (j >= i1) break;
        const int64_t diagonal = j / kI * kI;
        if (diagonal > i) i = diagonal;
      }
      for (; i < i1; i += kI) {
        product_tile(a + j * ld_a, ld_a, b + i * ld_b, ld_b, width, out + j * ld_out + i, ld_out);
      }
    }
  }
}

template <class A>
void add_tiles(const A* a, A alpha, const A* b, A beta, int64_t rows, int64_t ld, int64_t width, A* out) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = r * ld; c < r * ld + width; c += kLanes<A>) {
      store_vec(out + c, alpha * load_vec(a + c) + beta * load_vec(b + c));
    }
  }
}

template <class A>
void subtract_outer(A* m, int64_t rows, int64_t columns, int64_t ld, const A* a, const A* b) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) m[i * ld + j] -= a[i] * b[j];
  }
}

template <class A>
void pack_mix(const A* m, int64_t row_stride, int64_t column_stride, double scale, int64_t rows,
              int64_t columns, A* packed) {
  const A by = static_cast<A>(scale);
  for (int64_t i0 = 0; i0 < rows; i0 += kMixRows) {
    const A* from = m + i0 * row_stride;
    const int64_t count = rows - i0 < kMixRows ? rows - i0 : kMixRows;
    for (int64_t j = 0; j < columns; ++j, from += column_stride, packed += kMixRows) {
      if (count == kMixRows) {
#pragma GCC unroll 8
        for (int i = 0; i < kMixRows; ++i) packed[i] = by * from[i * row_stride];
      } else {
        for (int i = 0; i < kMixRows; ++i) packed[i] = i < count ? by * from[i * row_stride] : A(0);
      }
    }
  }
}

template <class A, int kVectors>
inline void mix_tile(const A* packed, int64_t rows, int64_t columns, const A* tile, int64_t ld, bool add,
                     A* out) {
  using V = Vec<A>;
  V acc[kMixRows][kVectors] = {};
  for (int64_t j = 0; j < columns; ++j) {
    V t[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) t[v] = load_vec(tile + j * ld + v * kLanes<A>);
#pragma GCC unroll 8
    for (int i = 0; i < kMixRows; ++i) {
      const A m = packed[j * kMixRows + i];
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) acc[i][v] += m * t[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kMixRows; ++i) {
    if (i >= rows) break;
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      A* to = out + i * ld + v * kLanes<A>;
      store_vec(to, add ? load_vec(to) + acc[i][v] : acc[i][v]);
    }
  }
}

template <int kValue>
struct Number {
  constexpr operator int() const { return kValue; }
};

template <class A>
void mix(const A* packed, int64_t rows, int64_t columns, const A* tile, int64_t ld, int64_t width, bool add,
         A* out) {
  // Long sums are cut: for their rounding, and so that the part of the tile below a step stays in L1.
  for (int64_t j = 0; j < columns || j == 0; j += kMixColumns, add = true) {
    const int64_t count = columns - j < kMixColumns ? columns - j : kMixColumns;
    const A *m = packed + j * kMixRows, *t = tile + j * ld;
    int64_t c = 0;
    const auto columns_of = [&](auto vectors) {
      for (int64_t i = 0; i < rows; i += kMixRows) {
        mix_tile<A, vectors>(m + i * columns, rows - i, count, t + c, ld, add, out + i * ld + c);
      }
      c += vectors * kLanes<A>;
    };
    while (c < width) {
      const int64_t left = (width - c) / kLanes<A>;
      if (left >= kMixVectors && left != kMixVectors + 1) {
        columns_of(Number<kMixVectors>{});
      } else if (left > 1) {
        columns_of(Number<2>{});
      } else {
        columns_of(Number<1>{});
      }
    }
  }
}

template <class A>
void project_columns(A* out, const A* tile, int64_t ld, int64_t width, int64_t rows, const A* column_scale) {
  for (int64_t c = 0; c < width; c += kLanes<A>) {
    Vec<A> dot = {};
    for (int64_t r = 0; r < rows; ++r) dot += load_vec(out + r * ld + c) * load_vec(tile + r * ld + c);
    const Vec<A> scale = load_vec(column_scale + c);
    for (int64_t r = 0; r < rows; ++r) {
      A* to = out + r * ld + c;
      store_vec(to, (load_vec(to) - dot * load_vec(tile + r * ld + c)) * scale);
    }
  }
}

template <class A>
constexpr GramKernels<A> table() {
  return {.pack = pack<A>,
          .unpack = unpack<A>,
          .transform = transform_tile<A>,
          .row_sums = row_sums<A>,
          .products = products<A>,
          .add_tiles = add_tiles<A>,
          .subtract_outer = subtract_outer<A>,
          .pack_mix = pack_mix<A>,
          .mix = mix<A>,
          .project_columns = project_columns<A>,
          .compare = compare<A>,
          .compare_backward = compare_backward<A>,
          .triangle_products = triangle_products<A>,
          .triangle_distances = triangle_distances<A>,
          .pack_triangles = pack_triangles<A, kMixRows>,
          .mirror = mirror<A>,
          .norm_sq = norm_sq<A>,
          .difference_products = difference_products<A>,
          .rank_one_updates = rank_one_updates<A>,
          .update_cross = update_cross<A>,
          .add_inter = add_inter<A>,
          .lanes = kLanes<A>,
          .product_rows = kJ,
          .product_columns = kI,
          .mix_rows = kMixRows};
}

}  // namespace

extern const GramKernels<float> gram_float = table<float>();
extern const GramKernels<double> gram_double = table<double>();

}  // namespace kd::KD_ISA
