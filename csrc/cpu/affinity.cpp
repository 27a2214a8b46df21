// Op affinity on the CPU: the orders of queries and keys, and sweeps over both, one thread for 16 columns of
// an image. Method: kdfast/ops/affinity.py.
//
// Memory beside the results: per thread two packed blocks of 16 columns of all positions, 4 bytes for the
// order of every position, and in the backward 8 bytes for every position and 16 columns.

#include "cpu/affinity.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "common/dtype.h"
#include "common/gradient.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "cpu/affinity_ops.h"

namespace kd {

KD_DECLARE_ISA(extern const AffinityKernels<float> affinity_float;
               extern const AffinityKernels<double> affinity_double;)

namespace {

using torch::stable::Tensor;

// Rows and columns of image `image` of a tensor [B, rows, columns].
AffinityMatrix matrix(const Tensor& x, int64_t image, const char* name) {
  auto* data = const_cast<char*>(static_cast<const char*>(x.const_data_ptr()));
  data += image * x.stride(0) * static_cast<int64_t>(x.element_size());
  return {data, dtype_of(x.scalar_type(), name), x.size(1), x.stride(1), x.stride(2)};
}

struct Sizes {
  int64_t batch, n, m, e;
  int64_t blocks() const { return (e + kAffinityWidth - 1) / kAffinityWidth; }
};

Sizes check(const Tensor& a, const Tensor& b, const Tensor& g) {
  KD_CHECK(a.dim() == 2 && b.dim() == 2 && g.dim() == 3, "affinity: need a [B, n], b [B, m], g [B, m, e]");
  KD_CHECK(a.size(0) == g.size(0) && b.size(0) == g.size(0) && b.size(1) == g.size(1) && g.size(1) > 0,
           "affinity: a, b and g need one batch, b and g equally many keys, at least one");
  KD_CHECK(a.scalar_type() == g.scalar_type() && b.scalar_type() == g.scalar_type(),
           "affinity: a, b and g need one dtype");
  KD_CHECK(a.size(1) < INT32_MAX && b.size(1) < INT32_MAX, "affinity: need fewer than 2^31 positions");
  return {g.size(0), a.size(1), b.size(1), g.size(2)};
}

// [B, count] as P, one row after the other.
template <class P>
std::vector<P> values_of(const Tensor& x) {
  std::vector<P> values(x.numel());
  dispatch_float(x.scalar_type(), "affinity: a and b", [&](auto zero) {
    using T = decltype(zero);
    const T* data = static_cast<const T*>(x.const_data_ptr());
    for (int64_t i = 0; i < x.size(0); ++i) {
      for (int64_t j = 0; j < x.size(1); ++j) {
        values[i * x.size(1) + j] = static_cast<P>(data[i * x.stride(0) + j * x.stride(1)]);
      }
    }
  });
  return values;
}

// Bits that order as the numbers do; NaN lies outside all of them, so that any input has an order.
uint32_t ordered(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
uint64_t ordered(double x) {
  const uint64_t bits = std::bit_cast<uint64_t>(x);
  return bits >> 63 ? ~bits : bits | (1ull << 63);
}

constexpr int64_t kRadixFrom = 512;  // below, the histograms cost more than comparisons

void sort(const float* values, int64_t count, int32_t* order) {
  std::vector<uint64_t> pairs(count);  // value above, place below
  for (int64_t i = 0; i < count; ++i) pairs[i] = static_cast<uint64_t>(ordered(values[i])) << 32 | i;
  if (count < kRadixFrom) {
    std::sort(pairs.begin(), pairs.end());
  } else {
    std::vector<uint64_t> other(count);
    for (int shift = 32; shift < 64; shift += 11) {
      std::array<int64_t, 2048> start{};
      for (const uint64_t p : pairs) ++start[p >> shift & 2047];
      int64_t sum = 0;
      for (int64_t& s : start) sum += std::exchange(s, sum);
      for (const uint64_t p : pairs) other[start[p >> shift & 2047]++] = p;
      pairs.swap(other);
    }
  }
  for (int64_t i = 0; i < count; ++i) order[i] = static_cast<int32_t>(pairs[i]);
}

void sort(const double* values, int64_t count, int32_t* order) {
  std::vector<std::pair<uint64_t, int32_t>> pairs(count);
  for (int64_t i = 0; i < count; ++i) pairs[i] = {ordered(values[i]), static_cast<int32_t>(i)};
  std::sort(pairs.begin(), pairs.end());
  for (int64_t i = 0; i < count; ++i) order[i] = pairs[i].second;
}

template <class P>
std::unique_ptr<P[]> block(int64_t rows) {
  return std::unique_ptr<P[]>(new P[rows * kAffinityWidth]);
}

// The middle of ascending values; 0 where it is no number to subtract.
template <class P>
double median(const P* values, const int32_t* order, int64_t count) {
  const double middle = count ? static_cast<double>(values[order[count / 2]]) : 0.0;
  return std::isfinite(middle) ? middle : 0.0;
}

// f(image, first column, columns) for every block of columns.
template <class F>
void for_blocks(const Sizes& s, const F& f) {
  parallel_for(0, s.batch * s.blocks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % s.blocks() * kAffinityWidth;
      f(task / s.blocks(), first, std::min(kAffinityWidth, s.e - first));
    }
  });
}

template <class P>
void forward(const AffinityKernels<P>& kernels, const Sizes& s, const Tensor& a, const Tensor& b,
             const Tensor& g, const Tensor& out, int32_t* order_a, int32_t* order_b) {
  const std::vector<P> query = values_of<P>(a), key = values_of<P>(b);
  parallel_for(0, 2 * s.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / 2;
      i % 2 ? sort(key.data() + image * s.m, s.m, order_b + image * s.m)
            : sort(query.data() + image * s.n, s.n, order_a + image * s.n);
    }
  });
  const double scale = 1.0 / static_cast<double>(s.m);
  for_blocks(s, [&](int64_t image, int64_t first, int64_t count) {
    const auto values = block<P>(s.m), result = block<P>(s.n);
    kernels.pack(matrix(g, image, "g"), first, count, values.get());
    const P *q = query.data() + image * s.n, *k = key.data() + image * s.m;
    const int32_t *order_q = order_a + image * s.n, *order_k = order_b + image * s.m;
    kernels.sweep({q, order_q, s.n, k, order_k, s.m, values.get(), result.get(), nullptr, nullptr, scale,
                   median(k, order_k, s.m)});
    kernels.unpack(result.get(), first, count, matrix(out, image, "out"));
  });
}

// to[image, i] = sum over the blocks of dots [B, blocks, count].
void add_up(const Tensor& to, const std::vector<double>& dots, int64_t blocks) {
  if (dots.empty()) return;
  dispatch_float(to.scalar_type(), "affinity: a and b", [&](auto zero) {
    using T = decltype(zero);
    T* data = static_cast<T*>(to.data_ptr());
    const int64_t count = to.size(1);
    for (int64_t i = 0; i < to.numel(); ++i) {
      double sum = 0;
      for (int64_t k = 0; k < blocks; ++k) sum += dots[(i / count * blocks + k) * count + i % count];
      data[i / count * to.stride(0) + i % count * to.stride(1)] = static_cast<T>(sum);
    }
  });
}

template <class P>
void backward(const AffinityKernels<P>& kernels, const Sizes& s, const Tensor& grad, const Tensor& a,
              const Tensor& b, const Tensor& g, const int32_t* order_a, const int32_t* order_b,
              const Tensor* grad_a, const Tensor* grad_b, const Tensor* grad_g) {
  const std::vector<P> query = values_of<P>(a), key = values_of<P>(b);
  std::vector<double> dots_a(grad_a ? s.batch * s.blocks() * s.n : 0);
  std::vector<double> dots_b(grad_b ? s.batch * s.blocks() * s.m : 0);
  const double scale = 1.0 / static_cast<double>(s.m);
  for_blocks(s, [&](int64_t image, int64_t first, int64_t count) {
    const auto values = block<P>(s.m), slopes = block<P>(s.n);
    kernels.pack(matrix(g, image, "g"), first, count, values.get());
    kernels.pack(matrix(grad, image, "grad"), first, count, slopes.get());
    const P *q = query.data() + image * s.n, *k = key.data() + image * s.m;
    const int32_t *order_q = order_a + image * s.n, *order_k = order_b + image * s.m;
    const int64_t part = image * s.blocks() + first / kAffinityWidth;
    if (grad_a) {
      kernels.sweep({q, order_q, s.n, k, order_k, s.m, values.get(), nullptr, slopes.get(),
                     dots_a.data() + part * s.n, scale, median(k, order_k, s.m)});
    }
    if (!grad_b && !grad_g) return;
    kernels.sweep({k, order_k, s.m, q, order_q, s.n, slopes.get(), grad_g ? values.get() : nullptr,
                   values.get(), grad_b ? dots_b.data() + part * s.m : nullptr, scale,
                   median(q, order_q, s.n)});
    if (grad_g) kernels.unpack(values.get(), first, count, matrix(*grad_g, image, "g"));
  });
  if (grad_a) add_up(*grad_a, dots_a, s.blocks());
  if (grad_b) add_up(*grad_b, dots_b, s.blocks());
}

// Laid out as the fake says: neighbours along e, or along positions where those of g are closer.
Tensor new_result(const Sizes& s, const Tensor& g) {
  if (g.stride(1) >= g.stride(2)) return torch::stable::new_empty(g, {s.batch, s.n, s.e});
  return torch::stable::transpose(torch::stable::new_empty(g, {s.batch, s.e, s.n}), 1, 2);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> affinity_cpu(const Tensor& a, const Tensor& b, const Tensor& g) {
  const Sizes s = check(a, b, g);
  Tensor out = new_result(s, g);
  Tensor order_a = torch::stable::new_empty(a, {s.batch, s.n}, ScalarType::Int);
  Tensor order_b = torch::stable::new_empty(b, {s.batch, s.m}, ScalarType::Int);
  const auto run = [&](const auto& kernels) {
    forward(kernels, s, a, b, g, out, static_cast<int32_t*>(order_a.data_ptr()),
            static_cast<int32_t*>(order_b.data_ptr()));
  };
  g.scalar_type() == ScalarType::Double ? run(KD_DISPATCH_ISA(affinity_double))
                                        : run(KD_DISPATCH_ISA(affinity_float));
  return {out, order_a, order_b};
}

std::tuple<Tensor, Tensor, Tensor> affinity_backward_cpu(const Tensor& grad, const Tensor& a, const Tensor& b,
                                                         const Tensor& g, const Tensor& order_a,
                                                         const Tensor& order_b, bool need_a, bool need_b,
                                                         bool need_g) {
  const Sizes s = check(a, b, g);
  KD_CHECK(grad.dim() == 3 && grad.size(0) == s.batch && grad.size(1) == s.n && grad.size(2) == s.e,
           "affinity: the gradient must be [", s.batch, ", ", s.n, ", ", s.e, "]");
  KD_CHECK(order_a.is_contiguous() && order_b.is_contiguous(), "affinity: the orders must be contiguous");
  Tensor grad_a = new_gradient(a, need_a), grad_b = new_gradient(b, need_b), grad_g = new_gradient(g, need_g);
  const auto run = [&](const auto& kernels) {
    backward(kernels, s, grad, a, b, g, static_cast<const int32_t*>(order_a.const_data_ptr()),
             static_cast<const int32_t*>(order_b.const_data_ptr()), need_a ? &grad_a : nullptr,
             need_b ? &grad_b : nullptr, need_g ? &grad_g : nullptr);
  };
  g.scalar_type() == ScalarType::Double ? run(KD_DISPATCH_ISA(affinity_double))
                                        : run(KD_DISPATCH_ISA(affinity_float));
  return {grad_a, grad_b, grad_g};
}

}  // namespace kd
