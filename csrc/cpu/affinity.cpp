// Op affinity on the CPU: the orders of queries and keys, and sweeps over both, one thread for 16 columns of
// an image. Method: kdfast/ops/affinity.py.
//
// Memory beside the results: per thread two packed blocks of 16 columns of all positions (in the forward
// little more than one is touched), 12 bytes for every position, and in the backward one number for every
// position and 16 columns.

#include "cpu/affinity.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/rounding.h"
#include "cpu/affinity_ops.h"
#include "cpu/affinity_order.h"
#include "cpu/result.h"
#include "cpu/tasks.h"

namespace kd {

KD_DECLARE_ISA(extern const AffinityKernels<float> affinity_float;
               extern const AffinityKernels<double> affinity_double;)

namespace {

using torch::stable::Tensor;

constexpr int64_t kPastCaches = 16 << 20;  // bytes of a result

int64_t bytes_of(const Tensor& x) { return x.numel() * static_cast<int64_t>(x.element_size()); }

// Rows and columns of image `image` of a tensor [B, rows, columns].
AffinityMatrix matrix(const Tensor& x, int64_t image, const char* name) {
  auto* data = const_cast<char*>(static_cast<const char*>(x.const_data_ptr()));
  data += image * x.stride(0) * static_cast<int64_t>(x.element_size());
  return {data,        dtype_of(x.scalar_type(), name), x.size(1), x.stride(1),
          x.stride(2), bytes_of(x) >= kPastCaches};
}

struct Sizes {
  int64_t batch, n, m, e;
  int64_t blocks() const { return ceil_div(e, kAffinityWidth); }
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

// f(image, first column, columns, workspace) for every block of columns; a workspace has `elements`.
template <class P, class F>
void for_blocks(const Sizes& s, int64_t elements, const F& f) {
  const int64_t tasks = s.batch * s.blocks();
  for_tasks<P>(tasks, tasks, elements, [&](int64_t task, P* workspace) {
    const int64_t first = task % s.blocks() * kAffinityWidth;
    f(task / s.blocks(), first, std::min(kAffinityWidth, s.e - first), workspace);
  });
}

template <class P>
using Sides = std::vector<std::array<AffinitySide<P>, 2>>;  // queries and keys of every image

// Orders are written where they are not known; for which side the other's values are counted.
template <class P>
Sides<P> arrange(const Sizes& s, const Tensor& a, const Tensor& b, int32_t* order_a, int32_t* order_b,
                 bool known, bool queries, bool keys) {
  Sides<P> sides(s.batch);
  const auto each = [&](const auto& f) {
    parallel_for(0, 2 * s.batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i / 2, i % 2);
    });
  };
  each([&](int64_t image, int64_t side) {
    int32_t* const order = side ? order_b + image * s.m : order_a + image * s.n;
    sides[image][side].arrange(side ? b : a, image, order, known);
  });
  each([&](int64_t image, int64_t side) {
    if (side ? keys : queries) sides[image][side].count_others(sides[image][1 - side]);
  });
  return sides;
}

template <class P>
void forward(const AffinityKernels<P>& kernels, const Sizes& s, const Tensor& a, const Tensor& b,
             const Tensor& g, const Tensor& out, int32_t* order_a, int32_t* order_b) {
  const Sides<P> sides = arrange<P>(s, a, b, order_a, order_b, false, true, false);
  const double scale = 1.0 / static_cast<double>(s.m);
  // Results take the place of values that were read before, from the last row down: row r the place of value
  // m - 1 + ahead - r. Up to there counted[r] values were read, so that `ahead` rows, at most n, are to be
  // free. Few are touched mostly; the block is as large as in the backward, so that malloc gives the same.
  int64_t ahead = 0;
  for (const auto& [q, k] : sides) {
    for (int64_t r = 0; r < s.n; ++r) ahead = std::max(ahead, r + 1 - q.others[r]);
  }
  for_blocks<P>(s, (s.n + s.m) * kAffinityWidth, [&](int64_t image, int64_t first, int64_t count, P* values) {
    const auto& [q, k] = sides[image];
    P* const last = values + (s.m - 1 + ahead) * kAffinityWidth;
    kernels.pack(matrix(g, image, "g"), k.rank.get(), first, count, values);
    kernels.sweep({q.values.get(), s.n, k.values.get(), s.m, q.others.get(), values, last, -kAffinityWidth,
                   nullptr, nullptr, scale, k.median()});
    kernels.unpack(last, -kAffinityWidth, q.rank.get(), first, count, matrix(out, image, "out"));
  });
}

// to[image, order[r]] = sum over the blocks of dots [B, blocks, r].
template <class P>
void add_up(const Tensor& to, const int32_t* order, const P* dots, int64_t blocks) {
  constexpr int64_t kChunk = 1024;
  dispatch_float(to.scalar_type(), "affinity: a and b", [&](auto zero) {
    using T = decltype(zero);
    const int64_t count = to.size(1), chunks = ceil_div(count, kChunk), step = to.stride(1);
    parallel_for(0, to.size(0) * chunks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / chunks, first = task % chunks * kChunk;
        const int64_t rows = std::min(kChunk, count - first);
        std::array<double, kChunk> sums{};
        for (int64_t k = 0; k < blocks; ++k) {
          const P* from = dots + (image * blocks + k) * count + first;
          for (int64_t r = 0; r < rows; ++r) sums[r] += static_cast<double>(from[r]);
        }
        T* data = static_cast<T*>(to.data_ptr()) + image * to.stride(0);
        const int32_t* place = order + image * count + first;
        for (int64_t r = 0; r < rows; ++r) data[place[r] * step] = static_cast<T>(sums[r]);
      }
    });
  });
}

template <class P>
void backward(const AffinityKernels<P>& kernels, const Sizes& s, const Tensor& grad, const Tensor& a,
              const Tensor& b, const Tensor& g, const int32_t* order_a, const int32_t* order_b,
              const Tensor* grad_a, const Tensor* grad_b, const Tensor* grad_g) {
  const Sides<P> sides = arrange<P>(s, a, b, const_cast<int32_t*>(order_a), const_cast<int32_t*>(order_b),
                                    true, grad_a != nullptr, grad_b || grad_g);
  const LargeBuffer<P> dots_a(grad_a ? s.batch * s.blocks() * s.n : 0);
  const LargeBuffer<P> dots_b(grad_b ? s.batch * s.blocks() * s.m : 0);
  const double scale = 1.0 / static_cast<double>(s.m);
  for_blocks<P>(
      s, (s.n + s.m) * kAffinityWidth, [&](int64_t image, int64_t first, int64_t count, P* workspace) {
        const auto& [q, k] = sides[image];
        P *values = workspace, *slopes = workspace + s.m * kAffinityWidth;
        kernels.pack(matrix(g, image, "g"), k.rank.get(), first, count, values);
        kernels.pack(matrix(grad, image, "grad"), q.rank.get(), first, count, slopes);
        const int64_t part = image * s.blocks() + first / kAffinityWidth;
        if (grad_a) {
          kernels.sweep({q.values.get(), s.n, k.values.get(), s.m, q.others.get(), values, nullptr, 0, slopes,
                         dots_a.get() + part * s.n, scale, k.median()});
        }
        if (!grad_b && !grad_g) return;
        kernels.sweep({k.values.get(), s.m, q.values.get(), s.n, k.others.get(), slopes,
                       grad_g ? values : nullptr, kAffinityWidth, values,
                       grad_b ? dots_b.get() + part * s.m : nullptr, scale, q.median()});
        if (grad_g)
          kernels.unpack(values, kAffinityWidth, k.rank.get(), first, count, matrix(*grad_g, image, "g"));
      });
  if (grad_a) add_up(*grad_a, order_a, dots_a.get(), s.blocks());
  if (grad_b) add_up(*grad_b, order_b, dots_b.get(), s.blocks());
}

// A new map [B, rows, e], neighbours along e or along the rows: as g has them, see the fake.
Tensor new_map(const Tensor& g, int64_t batch, int64_t rows, int64_t e) {
  if (g.stride(1) >= g.stride(2)) return new_result(g, {batch, rows, e});
  return torch::stable::transpose(new_result(g, {batch, e, rows}), 1, 2);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> affinity_cpu(const Tensor& a, const Tensor& b, const Tensor& g) {
  const Sizes s = check(a, b, g);
  Tensor out = new_map(g, s.batch, s.n, s.e);
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
  Tensor grad_a = new_gradient(a, need_a), grad_b = new_gradient(b, need_b);
  Tensor grad_g = new_gradient(g, need_g);
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
