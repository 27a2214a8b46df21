#pragma once

// What logits.cpp (checks, threads, sums over rows) and logits.simd.cpp (arithmetic of rows, once per
// instruction set) share. Plain data only, see gram.h.

#include <cstdint>

#include "cpu/gram.h"  // Dtype

namespace kd {

enum class LogitsKind : int { kl, dkd, nkd, dist };

constexpr int kMostAxes = 8;

// Logits [..., K] with any strides, in elements; leading axes that lie along one stride are merged.
struct LogitsMatrix {
  char* data;
  Dtype dtype;
  int64_t stride;  // between classes
  int axes;
  int64_t size[kMostAxes], step[kMostAxes];  // leading axes, innermost first
};

// What a row of `saved` holds. Logarithms are binary, of sums of 2^((z - max) log2(e) / T) over the row: over
// the classes but the target's where there is a target.
enum SavedLogits : int {
  kStudentMax,
  kStudentLog,
  kTeacherMax,
  kTeacherLog,
  kValue,               // kl, dkd: the divergence; nkd: the cross-entropy, over the same classes
  kPlainLog,            // nkd: the student's at T = 1
  kTargetWeight,        // nkd: the teacher's probability of the target at T = 1
  kStudentInverse = 1,  // dist: 1 over the sums themselves
  kTeacherInverse = 3,
  kStudentNorm = 4,  // dist: norms of the row's probabilities minus 1 / K ...
  kTeacherNorm,
  kProduct,  // ... and their inner product
};

template <class A>
struct LogitsCall {
  LogitsKind kind;
  double alpha, beta, temperature;
  int64_t rows, classes, ignore_index;
  LogitsMatrix student, teacher;
  const int64_t* labels;  // [rows] or null
  A* saved;               // [rows, saved_width]
  int64_t saved_width;
};

template <class A>
struct LogitsGradient {
  double scale;  // of the loss's gradient, over the number of rows that count
  LogitsMatrix to;
  bool teacher;  // whose gradient
  bool streams;  // past the caches: it is larger than they are
};

// DIST's columns, [5, K]: means, then while rows are joined second moments, saved as norms and a product.
enum ColumnMoments : int { kMeanS, kMeanT, kMomentSS, kMomentTT, kMomentST, kColumnMoments };
enum SavedColumns : int { kNormS = 2, kNormT, kProductST };

template <class A>
struct LogitsKernels {
  // Rows [begin, end): fills saved and values (the row's part of the sum, 0 where ignored).
  void (*forward)(const LogitsCall<A>&, int64_t begin, int64_t end, double* values);
  void (*backward)(const LogitsCall<A>&, const LogitsGradient<A>&, int64_t begin, int64_t end);
  // Both at once, without saved; of the student, not for DIST.
  void (*with_gradient)(const LogitsCall<A>&, const LogitsGradient<A>&, int64_t begin, int64_t end,
                        double* values);
  // DIST. Joins the rows' columns to moments [5, K], fills saved, values; returns how many count; scratch
  // [2, dist_rows, K].
  int64_t (*dist_forward)(const LogitsCall<A>&, int64_t begin, int64_t end, int64_t dist_rows, A* scratch,
                          double* moments, double* values);
  // columns [4, K]: factors of the other's deviation from its mean and of the own, means of own and other;
  // scratch [2, K].
  void (*dist_backward)(const LogitsCall<A>&, const LogitsGradient<A>&, int64_t begin, int64_t end,
                        const A* columns, A* scratch);
  int64_t lanes;  // K is padded to a multiple of it wherever it is a leading dimension
};

}  // namespace kd
