#pragma once

// Rows of strided logits in blocks of the accumulation type, for the logits' *.simd.cpp.

#include "common/rounding.h"
#include "cpu/exp.h"
#include "cpu/logits.h"
#include "cpu/simd.h"

namespace kd::KD_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // two blocks of float stay in L1
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <class A>
constexpr A kInfinity = static_cast<A>(__builtin_inf());

template <class A>
constexpr int64_t padded(int64_t count) {
  return round_up(count, kLanes<A>);
}

template <class A>
constexpr Dtype kDtypeOf = sizeof(A) == 8 ? Dtype::f64 : Dtype::f32;

inline int64_t element_size(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

inline char* row_data(const LogitsMatrix& m, int64_t row) {
  int64_t offset = 0;
  for (int a = 0; a + 1 < m.axes; ++a) {
    offset += row % m.size[a] * m.step[a];
    row /= m.size[a];
  }
  if (m.axes) offset += row * m.step[m.axes - 1];
  return m.data + offset * element_size(m.dtype);
}

// Whether classes are neighbours of the accumulation type.
template <class A>
inline bool is_plain(const LogitsMatrix& m) {
  return m.dtype == kDtypeOf<A> && m.stride == 1;
}

template <class A>
inline bool in_place(const LogitsMatrix& m, int64_t count) {
  return is_plain<A>(m) && count % kLanes<A> == 0;
}

// Classes [first, first + count) of a row, padded with -inf; class `hidden` reads as -inf too. In place where
// it can be, else in `buffer`.
template <class A>
inline const A* load_block(const LogitsMatrix& m, const char* row, int64_t first, int64_t count,
                           int64_t hidden, A* buffer) {
  const bool hides = hidden >= first && hidden < first + count;
  if (!hides && in_place<A>(m, count)) return reinterpret_cast<const A*>(row) + first;
  if (is_plain<A>(m)) {  // in vectors: loads of a vector wait for smaller stores to it
    const A* from = reinterpret_cast<const A*>(row) + first;
    const int64_t whole = count / kLanes<A> * kLanes<A>;
    for (int64_t i = 0; i < whole; i += kLanes<A>) store_vec(buffer + i, load_vec(from + i));
    if (whole < count) {
      store_vec(buffer + whole, load_part<A>(from + whole, count - whole, Vec<A>{} - kInfinity<A>));
    }
  } else {
    with_dtype(m.dtype, row, [&](const auto* data) {
      const auto* from = data + first * m.stride;
      if (m.stride == 1) {
        convert(from, buffer, count);
      } else {
        for (int64_t i = 0; i < count; ++i) buffer[i] = load(from + i * m.stride);
      }
    });
    for (int64_t i = count; i < padded<A>(count); ++i) buffer[i] = -kInfinity<A>;
  }
  if (hides) buffer[hidden - first] = -kInfinity<A>;
  return buffer;
}

template <class A>
inline void store_block(const LogitsMatrix& m, char* row, int64_t first, int64_t count, const A* buffer) {
  with_dtype(m.dtype, row, [&](auto* data) {
    auto* to = data + first * m.stride;
    if (m.stride == 1) {
      convert(buffer, to, count);
    } else {
      for (int64_t i = 0; i < count; ++i) store(to + i * m.stride, buffer[i]);
    }
  });
}

// What comes after a block of a row: fetched while the block is worked on, since processors follow a stream
// of reads only to the end of its page. Beyond a row lies the next one, or nothing, where a fetch does
// nothing.
class Ahead {
 public:
  Ahead(const LogitsMatrix& m, const char* row, int64_t first)
      : size_(m.stride == 1 ? element_size(m.dtype) : 0), next_(row + first * size_) {}
  void fetch(int64_t i) const { __builtin_prefetch(next_ + i * size_); }

 private:
  int64_t size_;
  const char* next_;
};

// Elements up to the next address where a whole vector lies.
template <class A>
inline int64_t to_vector(const char* data) {
  return -static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) / sizeof(A)) & (kLanes<A> - 1);
}

inline double load_one(const LogitsMatrix& m, const char* row, int64_t index) {
  double value = 0;
  with_dtype(m.dtype, row, [&](const auto* data) { value = load(data + index * m.stride); });
  return value;
}

inline void store_one(const LogitsMatrix& m, char* row, int64_t index, double value) {
  with_dtype(m.dtype, row, [&](auto* data) { store(data + index * m.stride, value); });
}

// Where a row starts with nothing but -inf, its maximum is this finite number until there is a better one.
template <class A>
constexpr A kLowestMax = static_cast<A>(-1e30);

// At least kLowestMax. NaN is not seen here; it shows in the sums.
template <class A>
inline A block_max(const A* block, int64_t count) {
  Vec<A> largest = Vec<A>{} + kLowestMax<A>;
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    const Vec<A> v = load_vec(block + i);
    largest = v > largest ? v : largest;
  }
  return lanes_max<A>(largest);
}

template <class A>
inline bool is_ignored(const LogitsCall<A>& call, int64_t row) {
  return call.labels && call.labels[row] == call.ignore_index;
}

template <class A>
void zero_row(const LogitsCall<A>& call, const LogitsMatrix& to, int64_t row) {
  const A zeros[kBlock] = {};
  char* data = row_data(to, row);
  for (int64_t first = 0; first < call.classes; first += kBlock) {
    const int64_t left = call.classes - first;
    store_block(to, data, first, left < kBlock ? left : kBlock, zeros);
  }
}

inline double sigmoid(double x) {
  return x < 0 ? __builtin_exp(x) / (1 + __builtin_exp(x)) : 1 / (1 + __builtin_exp(-x));
}
inline double softplus(double x) { return (x > 0 ? x : 0) + __builtin_log1p(__builtin_exp(x > 0 ? -x : x)); }

}  // namespace
}  // namespace kd::KD_ISA
