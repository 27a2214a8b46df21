// Arithmetic of the projector op on the CPU, compiled once per instruction set.
//
// Products are so small that packing a matrix would take as long as multiplying it: elements are broadcast
// from where they lie.

#include "cpu/projector.h"

#include "cpu/simd.h"

namespace kd::KD_ISA {
namespace {

using V = Vec<float>;
constexpr int64_t kStep = kLanes<float>;
static_assert(kProjectorWidth % kStep == 0);

#if defined(__AVX512F__)
constexpr int kRows = 8, kVectors = 3;
#elif defined(__AVX2__)
constexpr int kRows = 6, kVectors = 2;
#else
constexpr int kRows = 4, kVectors = 2;
#endif

// sums[c + lane] += term(row) of rows [begin, end); in float over a few rows, in double beyond.
template <class F>
inline void add_rows(int64_t begin, int64_t end, double* sums, const F& term) {
  constexpr int64_t kFew = 16;
  for (int64_t first = begin; first < end; first += kFew) {
    const int64_t last = first + kFew < end ? first + kFew : end;
    V sum = {};
    for (int64_t r = first; r < last; ++r) sum += term(r);
    for (int lane = 0; lane < kStep; ++lane) sums[lane] += static_cast<double>(sum[lane]);
  }
}

void moments(const float* x, int64_t rows, int64_t in, const float* ref, double* sums, double* squares) {
  for (int64_t c = 0; c < in; c += kStep) {
    const V from = load_vec(ref + c);
    const auto beyond = [&](int64_t r) { return load_vec(x + r * in + c) - from; };
    add_rows(0, rows, sums + c, beyond);
    add_rows(0, rows, squares + c, [&](int64_t r) { return beyond(r) * beyond(r); });
  }
}

void normalise(const ProjectorInputs& p, int64_t begin, int64_t end, float* z) {
  for (int64_t c = 0; c < p.in; c += kStep) {
    const V mean = load_vec(p.mean + c), scale = load_vec(p.scale + c), gamma = load_vec(p.gamma + c),
            beta = load_vec(p.beta + c);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = r * p.in + c;
      V value = (load_vec(p.x + at) - mean) * scale * gamma + beta;
      if (p.noise) value *= load_vec(p.noise + at);
      store_vec(z + at, value);
    }
  }
}

template <int kTile>
inline void multiply_tile(const float* m, int64_t row_stride, int64_t column_stride, int64_t rows,
                          int64_t columns, const float* tile, int64_t width, const float* start, float* to) {
  const float* row[kRows];  // beyond the last, it again
  for (int i = 0; i < kRows; ++i) row[i] = m + (i < rows ? i : rows - 1) * row_stride;
  V acc[kRows][kTile];
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kTile; ++v) acc[i][v] = start ? load_vec(start + v * kStep) : V{};
  }
  for (int64_t j = 0; j < columns; ++j) {
    V t[kTile];
#pragma GCC unroll 3
    for (int v = 0; v < kTile; ++v) t[v] = load_vec(tile + j * width + v * kStep);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const float by = row[i][j * column_stride];
#pragma GCC unroll 3
      for (int v = 0; v < kTile; ++v) acc[i][v] += by * t[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    if (i >= rows) break;
    for (int v = 0; v < kTile; ++v) store_vec(to + i * width + v * kStep, acc[i][v]);
  }
}

void multiply(const float* m, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns,
              const float* tile, int64_t width, const float* start, float* to) {
  for (int64_t i = 0; i < rows; i += kRows) {
    int64_t c = 0;
    const auto at = [&](auto multiply_some) {
      multiply_some(m + i * row_stride, row_stride, column_stride, rows - i, columns, tile + c, width,
                    start ? start + c : nullptr, to + i * width + c);
    };
    for (; c + kVectors * kStep <= width; c += kVectors * kStep) at(multiply_tile<kVectors>);
    for (; c < width; c += kStep) at(multiply_tile<1>);
  }
}

void column_sums(const float* m, int64_t rows, int64_t width, double* sums) {
  for (int64_t c = 0; c < width; c += kStep) {
    add_rows(0, rows, sums + c, [&](int64_t r) { return load_vec(m + r * width + c); });
  }
}

void norm_sums(const ProjectorInputs& p, int64_t begin, int64_t end, float* g, double* by_beta,
               double* by_gamma) {
  for (int64_t c = 0; c < p.in; c += kStep) {
    const V mean = load_vec(p.mean + c), scale = load_vec(p.scale + c);
    for (int64_t r = begin; p.noise && r < end; ++r) {
      const int64_t at = r * p.in + c;
      store_vec(g + at, load_vec(g + at) * load_vec(p.noise + at));
    }
    const auto value = [&](int64_t r) { return load_vec(g + r * p.in + c); };
    add_rows(begin, end, by_beta + c, value);
    add_rows(begin, end, by_gamma + c,
             [&](int64_t r) { return value(r) * ((load_vec(p.x + r * p.in + c) - mean) * scale); });
  }
}

void norm_backward(const ProjectorInputs& p, int64_t begin, int64_t end, const float* factor,
                   const float* offset, const float* slope, float* g) {
  for (int64_t c = 0; c < p.in; c += kStep) {
    const V mean = load_vec(p.mean + c), by = load_vec(factor + c), less = load_vec(offset + c),
            steep = load_vec(slope + c);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t at = r * p.in + c;
      store_vec(g + at, by * (load_vec(g + at) - less - (load_vec(p.x + at) - mean) * steep));
    }
  }
}

}  // namespace

extern const ProjectorKernels projector_kernels = {moments,     normalise, multiply,
                                                   column_sums, norm_sums, norm_backward};

}  // namespace kd::KD_ISA
