// The passes of the op attention_mask over its maps. Where rows lie apart, each works on blocks of kRows
// rows, so that what belongs to a column is loaded and stored once per block, and the sums over rows are
// short trees. Bytes per element (e: its size): pool e, errors 2e, gradient 3e; some 5 to 15 operations, so
// that memory is the limit.

#include "cpu/attention_mask.h"

#include "cpu/simd.h"

namespace kd::KD_ISA {
namespace {

constexpr int kRows = 4;

template <class A>
struct BitsOf;
template <>
struct BitsOf<float> {
  typedef uint32_t type __attribute__((vector_size(kVectorBytes)));
  static constexpr uint32_t sign = 0x80000000u;
};
template <>
struct BitsOf<double> {
  typedef uint64_t type __attribute__((vector_size(kVectorBytes)));
  static constexpr uint64_t sign = 0x8000000000000000u;
};
template <class A>
using Bits = typename BitsOf<A>::type;

typedef uint16_t Shorts __attribute__((vector_size(kVectorBytes / 2)));

template <class A>
inline Vec<A> magnitude(const Vec<A>& x) {
  return (Vec<A>)((Bits<A>)x & ~BitsOf<A>::sign);
}

// sign(x) * v, 0 where x is 0
template <class A>
inline Vec<A> times_sign(const Vec<A>& x, const Vec<A>& v) {
  const Bits<A> flipped = (Bits<A>)v ^ ((Bits<A>)x & BitsOf<A>::sign);
  return (Vec<A>)(flipped & (Bits<A>)(x != 0));
}

template <class A>
inline A lane_sum(const Vec<A>& v) {
  A parts[kLanes<A>];
  store_vec(parts, v);
  for (int width = kLanes<A> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  }
  return parts[0];
}

template <class A, int R>
inline void store_lane_sums(const Vec<A>* v, A* to) {
  if constexpr (R == 4) {
    for (int i = 0; i < R; ++i) to[i] = 0;
    add_sums4<A>(v, to);
  } else {
    for (int i = 0; i < R; ++i) to[i] = lane_sum<A>(v[i]);
  }
}

// Rows to come: processors do not foresee where they begin.
inline void fetch(const void* address) { __builtin_prefetch(address); }

// The first `count` values of a row, the others 0.
template <class T, class A>
inline Vec<A> load_columns(const T* from, int64_t count) {
  if (count >= kLanes<A>) {
    if constexpr (__is_same(T, A)) {
      return load_vec(from);
    } else if constexpr (__is_same(T, BFloat16)) {
      Shorts bits;
      __builtin_memcpy(&bits, from, sizeof bits);
      return (Vec<A>)(__builtin_convertvector(bits, Bits<float>) << 16);
#if defined(__AVX512F__)
    } else if constexpr (__is_same(T, Half)) {
      return (Vec<A>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
    } else if constexpr (__is_same(T, Half)) {
      return (Vec<A>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
    } else {
      A wide[kLanes<A>];
      convert(from, wide, kLanes<A>);
      return load_vec(wide);
    }
  }
  A wide[kLanes<A>] = {};
  convert(from, wide, count);
  return load_vec(wide);
}

template <class T, class A>
inline void store_columns(T* to, const Vec<A>& v, int64_t count) {
  if constexpr (__is_same(T, A)) {
    if (count >= kLanes<A>) {
      store_vec(to, v);
      return;
    }
  }
  if constexpr (__is_same(T, BFloat16)) {
    if (count >= kLanes<A>) {
      const Bits<float> bits = (Bits<float>)v, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
      const Bits<float> result = v == v ? rounded : Bits<float>{} + 0x7fc0u;
      const Shorts narrow = __builtin_convertvector(result, Shorts);
      __builtin_memcpy(to, &narrow, sizeof narrow);
      return;
    }
  }
  A wide[kLanes<A>];
  store_vec(wide, v);
  convert(wide, to, count < kLanes<A> ? count : kLanes<A>);
}

// f(column, columns left) for every vector of columns; the compiler sees a constant for all but the last.
template <class A, class F>
inline void for_columns(int64_t columns, const F& f) {
  int64_t j = 0;
  for (; j + kLanes<A> <= columns; j += kLanes<A>) f(j, int64_t{kLanes<A>});
  if (j < columns) f(j, columns - j);
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
      for (int i = 0; i < R; ++i) {
        v[i] = load_columns<T, A>(block + i * stride + j, left);
        fetch(block + (i + 3 * R) * stride + j);
      }
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
        fetch(xs + (i + 3 * R) * x_stride + j), fetch(ys + (i + 3 * R) * y_stride + j);
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

template <class T, class A>
void gradient_of(const T* x, int64_t x_stride, const T* y, int64_t y_stride, int64_t rows, int64_t columns,
                 const A* const row_terms[3], const A* const column_terms[3], T* out, int64_t out_stride) {
  for_row_blocks(rows, x_stride * static_cast<int64_t>(sizeof(T)), [&]<int R>(int64_t r) {
    const T *const xs = x + r * x_stride, *const ys = y + r * y_stride;
    T* const to = out + r * out_stride;
    A terms[3][R];  // copies, which writing to `out` cannot change
    for (int t = 0; t < 3; ++t) {
      for (int i = 0; i < R; ++i) terms[t][i] = row_terms[t][r + i];
    }
    for_columns<A>(columns, [&](int64_t j, int64_t left) {
      const Vec<A> sign = load_vec(column_terms[0] + j), plain = load_vec(column_terms[1] + j);
      const Vec<A> weight = load_vec(column_terms[2] + j);
      for (int i = 0; i < R; ++i) {
        const Vec<A> v = load_columns<T, A>(xs + i * x_stride + j, left);
        fetch(xs + (i + 3 * R) * x_stride + j), fetch(ys + (i + 3 * R) * y_stride + j);
        const Vec<A> d = v - load_columns<T, A>(ys + i * y_stride + j, left);
        const Vec<A> g =
            times_sign<A>(v, sign + terms[0][i]) + (plain + terms[1][i]) + weight * terms[2][i] * d;
        store_columns<T, A>(to + i * out_stride + j, g, left);
      }
    });
  });
}

template <class A>
inline Vec<A> spread(A value) {
  return Vec<A>{} + value;
}

// e^x for x <= 0; relative error below 2e-7, and 0 below -87.
inline Vec<float> exponential(const Vec<float>& given) {
  typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
  const Vec<float> low = spread(-87.0f);
  const Vec<float> x = given > low ? given : low;
  const Vec<float> shift = spread(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> n = (x * 1.44269504f + shift) - shift;
  const Vec<float> r =
      (x - n * 0.693359375f) + n * 2.12194440e-4f;  // log 2 in two parts, the first exact in n * it
  Vec<float> p = spread(1.0f / 5040);
  constexpr float taylor[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (const float coefficient : taylor) p = p * r + coefficient;
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  const Vec<float> result = p * (Vec<float>)power;
  return given >= low ? result : Vec<float>{};
}
inline Vec<double> exponential(const Vec<double>& x) {
  Vec<double> result = {};
  for (int i = 0; i < kLanes<double>; ++i) result[i] = __builtin_exp(x[i]);
  return result;
}

// Of exp((v - most) * scale) with v = first (+ second): the largest v, and the sum.
template <class A>
struct SoftmaxTerms {
  A most, total;
};

template <class A>
inline Vec<A> sum_of(const A* first, const A* second, int64_t i, int64_t left) {
  const Vec<A> v = load_columns<A, A>(first + i, left);
  return second ? v + load_columns<A, A>(second + i, left) : v;
}

template <class A>
SoftmaxTerms<A> softmax_terms(const A* first, const A* second, int64_t count, A scale) {
  const auto value = [&](int64_t i) { return second ? first[i] + second[i] : first[i]; };
  A most = value(0);
  for (int64_t i = 1; i < count; ++i) {
    const A v = value(i);
    most = v > most || v != v ? v : most;
  }
  Vec<A> total = {};
  for_columns<A>(count, [&](int64_t i, int64_t left) {
    Vec<A> e = exponential((sum_of(first, second, i, left) - most) * scale);
    for (int64_t lane = left; lane < kLanes<A>; ++lane) e[lane] = 0;
    total += e;
  });
  return {most, lane_sum<A>(total)};
}

template <class A>
double mask(const A* student, const A* teacher, int64_t count, A scale, bool softmax_of_sum,
            const A* multiplied, A* out) {
  constexpr int64_t kBlock = 1024;  // whose sum stays in the accumulator's type
  const A size = static_cast<A>(count);
  const A* const added = softmax_of_sum ? teacher : nullptr;
  const SoftmaxTerms<A> s = softmax_terms<A>(student, added, count, scale);
  const SoftmaxTerms<A> t = softmax_of_sum ? s : softmax_terms<A>(teacher, nullptr, count, scale);
  const A share_s = (softmax_of_sum ? size : size / 2) / s.total, share_t = size / 2 / t.total;
  double sum = 0;
  for (int64_t first = 0; first < count; first += kBlock) {
    Vec<A> part = {};
    for_columns<A>(count - first < kBlock ? count - first : kBlock, [&](int64_t j, int64_t left) {
      const int64_t i = first + j;
      Vec<A> m = share_s * exponential((sum_of(student, added, i, left) - s.most) * scale);
      if (!softmax_of_sum)
        m += share_t * exponential((load_columns<A, A>(teacher + i, left) - t.most) * scale);
      if (multiplied) part += m * load_columns<A, A>(multiplied + i, left);
      store_columns<A, A>(out + i, m, left);
    });
    sum += lane_sum<A>(part);
  }
  return sum;
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
void gradient(Dtype dtype, MapTile x, MapTile y, int64_t rows, int64_t columns, const A* const row_terms[3],
              const A* const column_terms[3], void* out, int64_t out_stride) {
  typed<A>(dtype, x.data, [&]<class T>(const T* xs) {
    gradient_of<T, A>(xs, x.row_stride, static_cast<const T*>(y.data), y.row_stride, rows, columns, row_terms,
                      column_terms, static_cast<T*>(out), out_stride);
  });
}

}  // namespace

extern const AttentionKernels<float> attention_float;
extern const AttentionKernels<double> attention_double;
const AttentionKernels<float> attention_float = {pool<float>, errors<float>, gradient<float>, mask<float>};
const AttentionKernels<double> attention_double = {pool<double>, errors<double>, gradient<double>,
                                                   mask<double>};

}  // namespace kd::KD_ISA
