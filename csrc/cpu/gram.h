#pragma once

// What gram.cpp (plan, threads) and gram.simd.cpp (arithmetic, once per instruction set) share. Plain data
// only: an inline function here would be compiled with AVX flags and could be linked into the baseline code.

#include <cstdint>

#include "common/storage.h"

namespace kd {

enum class Compare : int { cka, cka_row, unbiased, row_cosine, mean, difference };

// One group axis, rows and features of a strided tensor; offsets are in elements.
// Feature d lies at outer[d / inner] + (d % inner) * inner_stride.
struct GramView {
  void* data;
  Dtype dtype;
  int64_t group_stride;
  int64_t rows, features;
  const int64_t* row_offset;  // [rows]
  const int64_t* outer;       // [features / inner]
  int64_t inner, inner_stride;
};

// How a tile of `rows` x `columns` relates to the side's values.
template <class A>
struct TileTransform {
  const A* row_norm;  // [rows] or null: first, divided by
  const A* row_ref;   // [rows] or null: then minus a reference value of the row ...
  const A* row_mean;  // ... and minus the mean of what is left
  A* column_scale;    // [columns] or null: out, 1 / |column|; the tile is scaled by it
  bool center;        // then minus each column's mean over the rows
  bool extend;        // append the column means as row `rows`
};

// Small matrices of one group, row-major with leading dimension `ld`.
template <class A>
struct CompareArgs {
  Compare compare;
  bool centered;
  int64_t n, ld;
  A* k;                  // [n, ld], transformed in place
  A* l;                  // [n, ld]; or K - L, where `differ`
  bool differ;           // of `difference` only
  double gradient;       // of the distance
  double gxy, gxx, gyy;  // of the products
};

template <class A>
struct GramKernels {
  // Values of a view into a tile [rows, count] of leading dimension `ld`, and back.
  void (*pack)(const GramView&, int64_t group, int64_t first, int64_t count, A* tile, int64_t ld);
  void (*unpack)(const GramView&, int64_t group, int64_t first, int64_t count, const A* tile, int64_t ld);
  // Tiles have `width` columns that are worked on; ld and width are multiples of `lanes`. Columns from
  // `count` to `width` and rows beyond `rows` are written as zeros.
  void (*transform)(const TileTransform<A>&, int64_t rows, int64_t count, A* tile, int64_t ld, int64_t width,
                    int64_t padded_rows);
  // Adds over the tile's columns, per row: sums of x - ref, sums of squares; each where it is not null.
  void (*row_sums)(const A* tile, int64_t ld, int64_t count, int64_t rows, const A* ref, double* sums,
                   double* sums_sq);
  // out[j, i] += <a_j, b_i>; symmetric: a == b, only i >= j is valid. part of parts: an equal share of the
  // rows of out.
  void (*products)(const A* a, int64_t a_rows, int64_t ld_a, const A* b, int64_t b_rows, int64_t ld_b,
                   int64_t width, bool symmetric, int64_t part, int64_t parts, A* out, int64_t ld_out);
  // out = alpha a + beta b, all tiles; out may be one of them.
  void (*add_tiles)(const A* a, A alpha, const A* b, A beta, int64_t rows, int64_t ld, int64_t width, A* out);
  // m -= a b^T.
  void (*subtract_outer)(A* m, int64_t rows, int64_t columns, int64_t ld, const A* a, const A* b);
  // Repacks scale * m [rows, columns] for mix.
  void (*pack_mix)(const A* m, int64_t row_stride, int64_t column_stride, double scale, int64_t rows,
                   int64_t columns, A* packed);
  // out [rows, width] (+)= packed m [rows, columns] times tile [columns, width].
  void (*mix)(const A* packed, int64_t rows, int64_t columns, const A* tile, int64_t ld, int64_t width,
              bool add, A* out);
  // out = (out - tile * column dot(out, tile)) * column_scale: the adjoint of scaling columns to unit length.
  void (*project_columns)(A* out, const A* tile, int64_t ld, int64_t width, int64_t rows,
                          const A* column_scale);
  // Comparison of two Grams: products[3] and the distance.
  double (*compare)(const CompareArgs<A>&, double* products);
  // Symmetric matrices gx, gy [n, ld] such that dX = gx X, dY = gy Y (centred X, Y); k and l as compare takes
  // them. distance: out, where it is not null.
  void (*compare_backward)(const CompareArgs<A>&, A* gx, A* gy, double* distance);
  // Of `cka` from upper triangles [n, ld], in rows [begin, end): what each adds to the products [n, 3], and
  // to |alpha k - beta l|^2 [n].
  void (*triangle_products)(const A* k, const A* l, int64_t n, int64_t ld, int64_t begin, int64_t end,
                            double* sums);
  void (*triangle_distances)(const A* k, double alpha, const A* l, double beta, int64_t n, int64_t ld,
                             int64_t begin, int64_t end, double* sums);
  // Repacks alpha k + beta l, of which the upper triangles are read, for mix: blocks [begin, end) of
  // mix_rows.
  void (*pack_triangles)(const A* k, double alpha, const A* l, double beta, int64_t n, int64_t ld,
                         int64_t begin, int64_t end, A* packed);
  // Completes XX from its upper triangle.
  void (*mirror)(A* m, int64_t n, int64_t ld);
  double (*norm_sq)(const A* m, int64_t rows, int64_t columns, int64_t ld);
  // From X^T X, D^T D and X^T D [n, ld] with D = X - Y: products[3] of the Grams of X and Y, and |K - L|^2.
  double (*difference_products)(const A* xx, const A* dd, const A* xd, int64_t n, int64_t ld,
                                double* products);
  // intra = gram + features * r r^T, inter = gram + what the tile's last row, the column means, contributes
  // (n + 1 rows).
  void (*rank_one_updates)(const A* gram, int64_t n, int64_t ld, const A* r, int64_t features, A* intra,
                           A* inter);
  // The same for XY [n + 1, n + 1], in place; row n and column n receive its column and row sums.
  void (*update_cross)(A* m, int64_t n, int64_t ld);
  // bias_i = sum_j g_ij r_j; then g += factor * inter, with the row sums of factor * inter in column n.
  void (*add_inter)(A* g, const A* inter, double factor, const A* r, int64_t n, int64_t ld, A* bias);
  // Paddings: columns of a tile, its rows as left and as right factor of a product, rows of a packed mix.
  int64_t lanes, product_rows, product_columns, mix_rows;
};

}  // namespace kd
