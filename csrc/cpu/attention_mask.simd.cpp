// The passes of the op attention_mask over its maps. Where rows lie apart, each works on blocks of kRows
// rows, so that what belongs to a column is loaded and stored once per block, and the sums over rows are
// short trees. Bytes per element (e: its size): pool e, pool_pair and errors 2e, gradient 3e; some 5 to 15
// operations, so that memory is the limit, and in cache the additions.

#include "cpu/attention_mask.h"

#include "cpu/attention_simd.h"

namespace kd::KD_ISA {
namespace {

constexpr int kRows = 4;

// The same tree for one row as for four, so that a map pooled alone and in a pair has the same sums.
template <class A, int R>
inline void store_lane_sums(const Vec<A>* v, A* to) {
  Vec<A> four[4] = {};
  A sums[4] = {};
  for (int i = 0; i < R; ++i) four[i] = v[i];
  add_sums4<A>(four, sums);
  for (int i = 0; i < R; ++i) to[i] = sums[i];
}

// Rows that follow one another within a page are read one by one: several streams in a page defeat the
// prefetcher.
template <class F>
inline void for_row_blocks(int64_t rows, int64_t row_bytes, const F& f) {
  int64_t r = 0;
  for (; r + kRows <= rows && row_bytes >= 4096; r += kRows) f.template operator()<kRows>(r);
  for (; r < rows; ++r) f.template operator()<1>(r);
}

template <class A, int R>
inline Vec<A> tree_sum(const Vec<A>* v) {
  if constexpr (R == 1) {
    return v[0];
  } else {
    return tree_sum<A, R / 2>(v) + tree_sum<A, R / 2>(v + R / 2);
  }
}

template <class T, class A, bool kSigned>
void pool_map(const T* x, int64_t stride, int64_t rows, int64_t columns, A* rows_abs, A* columns_abs,
              A* rows_signed, A* columns_signed) {
  for_row_blocks(rows, stride * static_cast<int64_t>(sizeof(T)), [&]<int R>(int64_t r) {
    const T* const block = x + r * stride;
    Vec<A> sum_abs[R] = {}, sum_signed[R] = {};
    for_columns<A>(columns, [&](int64_t j, int64_t left) {
      Vec<A> v[R];
      for (int i = 0; i < R; ++i) v[i] = load_columns<T, A>(block + i * stride + j, left);
      if constexpr (kSigned) {
        store_vec(columns_signed + j, load_vec(columns_signed + j) + tree_sum<A, R>(v));
        for (int i = 0; i < R; ++i) sum_signed[i] += v[i];
      }
      for (int i = 0; i < R; ++i) {
        v[i] = magnitude<A>(v[i]);
        sum_abs[i] += v[i];
      }
      store_vec(columns_abs + j, load_vec(columns_abs + j) + tree_sum<A, R>(v));
    });
    store_lane_sums<A, R>(sum_abs, rows_abs + r);
    if constexpr (kSigned) store_lane_sums<A, R>(sum_signed, rows_signed + r);
  });
}

// f.operator()<kind>() for every kind of sum.
template <int kKind = 0, class F>
inline void for_kinds(const F& f) {
  if constexpr (kKind < kKinds) {
    f.template operator()<kKind>();
    for_kinds<kKind + 1>(f);
  }
}

// Both maps in one read; bit k of kOfRows and kOfColumns: sums of kind k are wanted.
template <class T, class A, unsigned kOfRows, unsigned kOfColumns>
void pool_pair_of(const T* x, int64_t x_stride, const T* y, int64_t y_stride, int64_t rows, int64_t columns,
                  const PairSums<A>& to) {
  A* of_columns[kKinds];  // copies, which writing sums cannot change
  for (int k = 0; k < kKinds; ++k) of_columns[k] = to.columns[k];
  for_row_blocks(rows, x_stride * static_cast<int64_t>(sizeof(T)), [&]<int R>(int64_t r) {
    const T *const xs = x + r * x_stride, *const ys = y + r * y_stride;
    // The next block's columns are asked for beside this one's: rows are too short for the prefetcher alone.
    const int64_t ahead = R > 1 && r + 2 * R <= rows ? R : 0;
    Vec<A> sums[kKinds][R] = {};
    for_columns<A>(columns, [&](int64_t j, int64_t left) {
      for (int i = 0; i < R && R > 1; ++i) {
        __builtin_prefetch(xs + (ahead + i) * x_stride + j);
        __builtin_prefetch(ys + (ahead + i) * y_stride + j);
      }
      Vec<A> v[kKinds][R];
      for (int i = 0; i < R; ++i) {
        const Vec<A> a = load_columns<T, A>(xs + i * x_stride + j, left);
        const Vec<A> b = load_columns<T, A>(ys + i * y_stride + j, left), d = a - b;
        v[0][i] = magnitude<A>(a), v[1][i] = magnitude<A>(b), v[2][i] = d, v[3][i] = d * d;
      }
      for_kinds([&]<int k>() {
        if constexpr (kOfRows >> k & 1) {
          for (int i = 0; i < R; ++i) sums[k][i] += v[k][i];
        }
        if constexpr (kOfColumns >> k & 1) {
          store_vec(of_columns[k] + j, load_vec(of_columns[k] + j) + tree_sum<A, R>(v[k]));
        }
      });
    });
    A of_row[kKinds] = {};
    if constexpr (R == 1) {
      const Vec<A> all[kKinds] = {sums[0][0], sums[1][0], sums[2][0], sums[3][0]};
      add_sums4<A>(all, of_row);
    }
    for_kinds([&]<int k>() {
      if constexpr ((kOfRows >> k & 1) && R == 1) to.rows[k][r] = of_row[k];
      if constexpr ((kOfRows >> k & 1) && R > 1) store_lane_sums<A, R>(sums[k], to.rows[k] + r);
    });
  });
}

template <class T, class A, bool kColumns>
void errors_of(const T* x, int64_t x_stride, const T* y, int64_t y_stride, int64_t rows, int64_t columns,
               const A* row_weights, const A* column_weights, A* row_errors, A* column_errors) {
  for_row_blocks(rows, x_stride * static_cast<int64_t>(sizeof(T)), [&]<int R>(int64_t r) {
    const T *const xs = x + r * x_stride, *const ys = y + r * y_stride;
    Vec<A> sums[R] = {};
    for_columns<A>(columns, [&](int64_t j, int64_t left) {
      const Vec<A> weight = load_vec(column_weights + j);
      Vec<A> weighted[R];
      for (int i = 0; i < R; ++i) {
        const Vec<A> d =
            load_columns<T, A>(xs + i * x_stride + j, left) - load_columns<T, A>(ys + i * y_stride + j, left);
        const Vec<A> square = d * d;
        sums[i] += weight * square;
        if constexpr (kColumns) weighted[i] = row_weights[r + i] * square;
      }
      if constexpr (kColumns)
        store_vec(column_errors + j, load_vec(column_errors + j) + tree_sum<A, R>(weighted));
    });
    store_lane_sums<A, R>(sums, row_errors + r);
  });
}

// Sums over columns; the map is in cache, so that many rows at once cost nothing.
template <class T, class A, bool kTwo>
void errors_of_rows(const T* x, int64_t x_stride, const T* y, int64_t y_stride, int64_t rows, int64_t columns,
                    const A* const (&weights)[2], A* const (&errors)[2]) {
  const auto block = [&]<int R>(int64_t r) {
    const T *const xs = x + r * x_stride, *const ys = y + r * y_stride;
    Vec<A> sums[2][R] = {};
    for_columns<A>(columns, [&](int64_t j, int64_t left) {
      const Vec<A> first = load_columns<A, A>(weights[0] + j, left);
      const Vec<A> second = kTwo ? load_columns<A, A>(weights[1] + j, left) : Vec<A>{};
      for (int i = 0; i < R; ++i) {
        const Vec<A> d =
            load_columns<T, A>(xs + i * x_stride + j, left) - load_columns<T, A>(ys + i * y_stride + j, left);
        const Vec<A> square = d * d;
        sums[0][i] += first * square;
        if constexpr (kTwo) sums[1][i] += second * square;
      }
    });
    store_lane_sums<A, R>(sums[0], errors[0] + r);
    if constexpr (kTwo) store_lane_sums<A, R>(sums[1], errors[1] + r);
  };
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) block.template operator()<kRows>(r);
  for (; r < rows; ++r) block.template operator()<1>(r);
}

// Sums over rows, of which kRows share a load and a store of each sum.
template <class T, class A, bool kTwo>
void errors_of_columns(const T* x, int64_t x_stride, const T* y, int64_t y_stride, int64_t rows,
                       int64_t columns, const A* const (&weights)[2], A* const (&errors)[2]) {
  A *const first = errors[0], *const second = errors[1];
  const auto block = [&]<int R>(int64_t r) {
    const T *const xs = x + r * x_stride, *const ys = y + r * y_stride;
    for_columns<A>(columns, [&](int64_t j, int64_t left) {
      Vec<A> sums[2] = {load_vec(first + j), kTwo ? load_vec(second + j) : Vec<A>{}};
      for (int i = 0; i < R; ++i) {
        const Vec<A> d =
            load_columns<T, A>(xs + i * x_stride + j, left) - load_columns<T, A>(ys + i * y_stride + j, left);
        const Vec<A> square = d * d;
        sums[0] += weights[0][r + i] * square;
        if constexpr (kTwo) sums[1] += weights[1][r + i] * square;
      }
      store_vec(first + j, sums[0]);
      if constexpr (kTwo) store_vec(second + j, sums[1]);
    });
  };
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) block.template operator()<kRows>(r);
  for (; r < rows; ++r) block.template operator()<1>(r);
}

template <class A>
inline Vec<A> load_term(const GradientTerms<A>& terms, int t, int64_t j, int64_t left) {
  if (terms.values[t] == nullptr) return Vec<A>{};
  return terms.factors[t] * load_columns<A, A>(terms.values[t] + j, left);
}

template <class T, class A, bool kSign>
void gradient_of(const T* x, int64_t x_stride, const T* y, int64_t y_stride, int64_t rows, int64_t columns,
                 const GradientTerms<A>& of_rows, const GradientTerms<A> of_columns, T* out,
                 int64_t out_stride) {
  for_row_blocks(rows, x_stride * static_cast<int64_t>(sizeof(T)), [&]<int R>(int64_t r) {
    const T *const xs = x + r * x_stride, *const ys = y + r * y_stride;
    T* const to = out + r * out_stride;
    A terms[3][R];  // copies, which writing to `out` cannot change
    for (int t = 0; t < 3; ++t) {
      for (int i = 0; i < R; ++i)
        terms[t][i] = of_rows.values[t] ? of_rows.factors[t] * of_rows.values[t][r + i] : A(0);
    }
    for_columns<A>(columns, [&](int64_t j, int64_t left) {
      const Vec<A> sign = kSign ? load_term(of_columns, 0, j, left) : Vec<A>{};
      const Vec<A> plain = load_term(of_columns, 1, j, left), weight = load_term(of_columns, 2, j, left);
      for (int i = 0; i < R; ++i) {
        const Vec<A> v = load_columns<T, A>(xs + i * x_stride + j, left);
        const Vec<A> d = v - load_columns<T, A>(ys + i * y_stride + j, left);
        Vec<A> g = (plain + terms[1][i]) + weight * terms[2][i] * d;
        if constexpr (kSign) g += times_sign<A>(v, sign + terms[0][i]);
        store_columns<T, A>(to + i * out_stride + j, g, left);
      }
    });
  });
}

// f(pointer) with the type that `dtype` stands for; float64 goes with A = double only.
template <class A, class F>
inline void typed(Dtype dtype, const void* data, const F& f) {
  if constexpr (__is_same(A, double)) {
    f(static_cast<const double*>(data));
  } else {
    if (dtype == Dtype::f32) f(static_cast<const float*>(data));
    if (dtype == Dtype::f16) f(static_cast<const Half*>(data));
    if (dtype == Dtype::bf16) f(static_cast<const BFloat16*>(data));
  }
}

template <class A>
void pool(Dtype dtype, MapTile x, int64_t rows, int64_t columns, A* rows_abs, A* columns_abs, A* rows_signed,
          A* columns_signed) {
  typed<A>(dtype, x.data, [&]<class T>(const T* data) {
    if (rows_signed) {
      pool_map<T, A, true>(data, x.row_stride, rows, columns, rows_abs, columns_abs, rows_signed,
                           columns_signed);
    } else {
      pool_map<T, A, false>(data, x.row_stride, rows, columns, rows_abs, columns_abs, nullptr, nullptr);
    }
  });
}

template <class A>
void pool_pair(Dtype dtype, MapTile x, MapTile y, int64_t rows, int64_t columns, const PairSums<A>& sums) {
  // Bits of |x| and |y|, x - y, (x - y)^2.
  constexpr unsigned kAbs = 3, kSigned = 4, kError = 8;
  typed<A>(dtype, x.data, [&]<class T>(const T* xs) {
    const auto run = [&]<unsigned kOfRows, unsigned kOfColumns>() {
      pool_pair_of<T, A, kOfRows, kOfColumns>(xs, x.row_stride, static_cast<const T*>(y.data), y.row_stride,
                                              rows, columns, sums);
    };
    const bool with_signed = sums.rows[2] != nullptr;
    if (sums.rows[3]) {  // pixels
      with_signed ? run.template operator()<kAbs | kSigned | kError, kSigned>()
                  : run.template operator()<kAbs | kError, kAbs>();
    } else if (sums.columns[3]) {
      with_signed ? run.template operator()<kSigned, kAbs | kSigned | kError>()
                  : run.template operator()<kAbs, kAbs | kError>();
    } else {
      with_signed ? run.template operator()<kAbs | kSigned, kAbs | kSigned>()
                  : run.template operator()<kAbs, kAbs>();
    }
  });
}

template <class A>
void errors(Dtype dtype, MapTile x, MapTile y, int64_t rows, int64_t columns, const A* row_weights,
            const A* column_weights, A* row_errors, A* column_errors) {
  typed<A>(dtype, x.data, [&]<class T>(const T* xs) {
    const T* const ys = static_cast<const T*>(y.data);
    const auto run = column_errors ? errors_of<T, A, true> : errors_of<T, A, false>;
    run(xs, x.row_stride, ys, y.row_stride, rows, columns, row_weights, column_weights, row_errors,
        column_errors);
  });
}

template <class A>
void channel_errors(Dtype dtype, MapTile x, MapTile y, int64_t rows, int64_t columns, bool pixels_are_rows,
                    const A* const (&weights)[2], A* const (&errors)[2]) {
  typed<A>(dtype, x.data, [&]<class T>(const T* xs) {
    const auto run = pixels_are_rows
                         ? (weights[1] ? errors_of_columns<T, A, true> : errors_of_columns<T, A, false>)
                         : (weights[1] ? errors_of_rows<T, A, true> : errors_of_rows<T, A, false>);
    run(xs, x.row_stride, static_cast<const T*>(y.data), y.row_stride, rows, columns, weights, errors);
  });
}

template <class A>
void gradient(Dtype dtype, MapTile x, MapTile y, int64_t rows, int64_t columns,
              const GradientTerms<A>& of_rows, const GradientTerms<A>& of_columns, void* out,
              int64_t out_stride) {
  typed<A>(dtype, x.data, [&]<class T>(const T* xs) {
    const bool sign = of_rows.values[0] || of_columns.values[0];
    const auto run = sign ? gradient_of<T, A, true> : gradient_of<T, A, false>;
    run(xs, x.row_stride, static_cast<const T*>(y.data), y.row_stride, rows, columns, of_rows, of_columns,
        static_cast<T*>(out), out_stride);
  });
}

}  // namespace

extern const AttentionKernels<float> attention_float;
extern const AttentionKernels<double> attention_double;
const AttentionKernels<float> attention_float = {pool<float>, pool_pair<float>, errors<float>,
                                                 channel_errors<float>, gradient<float>};
const AttentionKernels<double> attention_double = {pool<double>, pool_pair<double>, errors<double>,
                                                   channel_errors<double>, gradient<double>};

}  // namespace kd::KD_ISA
