// Arithmetic of the direction op on the CPU, compiled once per instruction set.
//
// Forward, per row: three rows read once, 4 D multiply-adds; backward: two rows read, one written. Where the
// forward writes the gradient too, a row's second read comes from the cache. Memory decides, so there is
// nothing to block; sums have two vectors each, which hides the latency of the additions.

#include "cpu/direction.h"

#include "cpu/simd.h"

namespace kd::KD_ISA {
namespace {

constexpr int64_t kChunk = 512;  // columns converted at a time: four buffers stay in L1

// Columns [first, first + count) of a row as A: where they lie, or converted into `buffer`.
template <class A>
const A* chunk(const DirectionRows& m, int64_t row, int64_t first, int64_t count, A* buffer) {
  const int64_t offset = row * m.row_stride + first;
  switch (m.dtype) {
    case Dtype::f32:
      if constexpr (sizeof(A) == 4) return static_cast<const float*>(m.data) + offset;
      convert(static_cast<const float*>(m.data) + offset, buffer, count);
      break;
    case Dtype::f64:
      if constexpr (sizeof(A) == 8) return static_cast<const double*>(m.data) + offset;
      break;  // float64 input makes A double
    case Dtype::f16:
      convert(static_cast<const Half*>(m.data) + offset, buffer, count);
      break;
    case Dtype::bf16:
      convert(static_cast<const BFloat16*>(m.data) + offset, buffer, count);
      break;
  }
  return buffer;
}

// `next_s`, `next_t`: from here to the row after, which is fetched meanwhile; 0 where the values were
// converted.
template <class A, bool kTeacher>
void add_sums(const A* s, const A* t, const A* c, int64_t count, int64_t next_s, int64_t next_t,
              DirectionSums& sums) {
  constexpr int64_t lanes = kLanes<A>;
  Vec<A> dot[2] = {}, ss[2] = {}, tt[2] = {}, cc[2] = {};
  int64_t i = 0;
  for (; i + 2 * lanes <= count; i += 2 * lanes) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      __builtin_prefetch(s + i + v * lanes + next_s);
      if constexpr (kTeacher) __builtin_prefetch(t + i + v * lanes + next_t);
      const Vec<A> a = load_vec(s + i + v * lanes), b = load_vec(c + i + v * lanes);
      dot[v] += a * b;
      ss[v] += a * a;
      cc[v] += b * b;
      if constexpr (kTeacher) {
        const Vec<A> d = load_vec(t + i + v * lanes);
        tt[v] += d * d;
      }
    }
  }
  A rest[4] = {};
  for (; i < count; ++i) {
    rest[0] += s[i] * c[i];
    rest[1] += s[i] * s[i];
    if constexpr (kTeacher) rest[2] += t[i] * t[i];
    rest[3] += c[i] * c[i];
  }
  const Vec<A> totals[4] = {dot[0] + dot[1], ss[0] + ss[1], tt[0] + tt[1], cc[0] + cc[1]};
  add_sums4(totals, rest);
  sums.dot += static_cast<double>(rest[0]);
  sums.student += static_cast<double>(rest[1]);
  sums.teacher += static_cast<double>(rest[2]);
  sums.center += static_cast<double>(rest[3]);
}

template <class A>
DirectionSums sums(const DirectionRows& student, const DirectionRows& teacher, const DirectionRows& centers,
                   int64_t row, int64_t center, int64_t columns) {
  A buffers[3][kChunk];
  DirectionSums result = {0, 0, 0, 0};
  for (int64_t first = 0; first < columns; first += kChunk) {
    const int64_t count = columns - first < kChunk ? columns - first : kChunk;
    const A* s = chunk(student, row, first, count, buffers[0]);
    const A* c = chunk(centers, center, first, count, buffers[2]);
    const int64_t next_s = s == buffers[0] ? 0 : student.row_stride;
    if (teacher.data) {
      const A* t = chunk(teacher, row, first, count, buffers[1]);
      add_sums<A, true>(s, t, c, count, next_s, t == buffers[1] ? 0 : teacher.row_stride, result);
    } else {
      add_sums<A, false>(s, nullptr, c, count, next_s, 0, result);
    }
  }
  return result;
}

template <class A, bool kStreams>
void mix_values(A f0, const A* c, A f1, const A* s, A* to, int64_t count) {
  const A* one = c ? c : s;
  const A f = c ? f0 : f1;
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) {
    Vec<A> value = {};
    if (one) value = f * load_vec(one + i);
    if (c && s) value += f1 * load_vec(s + i);
    kStreams ? stream_vec(to + i, value) : store_vec(to + i, value);
  }
  for (; i < count; ++i) to[i] = (one ? f * one[i] : A(0)) + (c && s ? f1 * s[i] : A(0));
}

template <class A>
void mix(double f0, const DirectionRows& centers, int64_t center, double f1, const DirectionRows& from,
         const DirectionRows& to, int64_t row, int64_t columns, bool streams) {
  A buffers[3][kChunk];
  for (int64_t first = 0; first < columns; first += kChunk) {
    const int64_t count = columns - first < kChunk ? columns - first : kChunk;
    const int64_t offset = row * to.row_stride + first;
    const A* c = f0 != 0 ? chunk(centers, center, first, count, buffers[0]) : nullptr;
    const A* s = f1 != 0 ? chunk(from, row, first, count, buffers[1]) : nullptr;
    A* out = buffers[2];
    if constexpr (sizeof(A) == 4) {
      if (to.dtype == Dtype::f32) out = static_cast<float*>(to.data) + offset;
    } else {
      if (to.dtype == Dtype::f64) out = static_cast<double*>(to.data) + offset;
    }
    if (streams && reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0) {
      mix_values<A, true>(static_cast<A>(f0), c, static_cast<A>(f1), s, out, count);
    } else {
      mix_values<A, false>(static_cast<A>(f0), c, static_cast<A>(f1), s, out, count);
    }
    if (out != buffers[2]) continue;
    if (to.dtype == Dtype::f32) convert(out, static_cast<float*>(to.data) + offset, count);
    if (to.dtype == Dtype::f16) convert(out, static_cast<Half*>(to.data) + offset, count);
    if (to.dtype == Dtype::bf16) convert(out, static_cast<BFloat16*>(to.data) + offset, count);
  }
}

}  // namespace

extern const DirectionKernels<float> direction_float = {sums<float>, mix<float>, end_streams};
extern const DirectionKernels<double> direction_double = {sums<double>, mix<double>, end_streams};

}  // namespace kd::KD_ISA
