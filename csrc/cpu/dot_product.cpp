// Op dot_product on the CPU: two sweeps over positions per direction, of keys and of queries, whose sums over
// positions are split into parts that do not depend on the number of threads. Method:
// kdfast/ops/dot_product.py.
//
// Memory beside the results: at most kParts matrices [e, d] per image, and per thread a few blocks of
// positions.

#include "cpu/dot_product.h"

#include <algorithm>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/rounding.h"
#include "cpu/dot_product_ops.h"
#include "cpu/position_tensors.h"
#include "cpu/result.h"
#include "cpu/tasks.h"

namespace kd {

KD_DECLARE_ISA(extern const DotKernels<float> dot_product_float;
               extern const DotKernels<double> dot_product_double;)

namespace {

using torch::stable::Tensor;

constexpr int64_t kParts = 16;               // of the positions of an image
constexpr int64_t kBlock = 192;              // positions at a time, so many that the packed blocks of
constexpr int64_t kBlockElements = 3 << 14;  // both maps stay in the L2 cache
constexpr int64_t kTask = 1 << 18;           // multiply-adds that are worth another thread

template <class A>
const DotKernels<A>& kernels() {
  if constexpr (sizeof(A) == 4) {
    return KD_DISPATCH_ISA(dot_product_float);
  } else {
    return KD_DISPATCH_ISA(dot_product_double);
  }
}

void check(const Tensor& query, const Tensor& key, const Tensor& value) {
  KD_CHECK(query.dim() == 3 && key.dim() == 3 && value.dim() == 3,
           "dot_product: need queries [B, d, n], keys [B, d, m] and values [B, e, m]");
  KD_CHECK(query.size(0) == key.size(0) && key.size(0) == value.size(0) && query.size(1) == key.size(1) &&
               key.size(2) == value.size(2) && key.size(2) > 0,
           "dot_product: need one batch, queries as wide as keys, and as many values as keys, at least one");
  KD_CHECK(query.scalar_type() == key.scalar_type() && query.scalar_type() == value.scalar_type(),
           "dot_product: need one dtype");
}

// A pass over all positions of all images. Maps are [B, channels, n], or null.
template <class A>
struct Pass {
  int64_t batch, e, d, n;
  const Tensor *x = nullptr, *y = nullptr, *out_x = nullptr, *out_y = nullptr;
  const Tensor* matrix = nullptr;  // [B, e, d]
  const Tensor* sums = nullptr;    // [B, e, d] = scale x y^T
  double scale = 1;

  int64_t ld() const { return round_up(d, kernels<A>().lanes) + kernels<A>().lanes; }

  void run(Dtype dtype) const {
    if (batch == 0) return;
    // An even number of blocks of one size, so that two threads share them evenly.
    const int64_t lanes = kernels<A>().lanes;
    const int64_t most = std::clamp(kBlockElements / (e + d) / 32 * 32, int64_t{32}, kBlock);
    const int64_t wanted = std::max<int64_t>(2 * ceil_div(n, 2 * most), 1);
    const int64_t block = std::max(round_up(ceil_div(n, wanted), lanes), lanes);
    const int64_t blocks = ceil_div(n, block), parts = std::clamp<int64_t>(blocks, 1, kParts);
    const int64_t size = e * ld();
    const LargeBuffer<A> matrices(matrix ? batch * size : 0), partial(sums ? batch * parts * size : 0);
    if (matrix) {
      const A* from = static_cast<const A*>(matrix->const_data_ptr());
      for (int64_t r = 0; r < batch * e; ++r) std::copy_n(from + r * d, d, matrices.get() + r * ld());
    }
    if (sums && n == 0) std::fill_n(partial.get(), batch * parts * size, A(0));
    for_tasks<A>(batch * parts, batch * n * e * d / kTask, kernels<A>().workspace(e, d, block),
                 [&](int64_t task, A* workspace) {
                   const int64_t image = task / parts, part = task % parts;
                   const auto begin = [&](int64_t p) { return std::min(blocks * p / parts * block, n); };
                   kernels<A>().pass(
                       {dtype, e, d, block, position_map(x, image), position_map(y, image),
                        position_map(out_x, image), position_map(out_y, image), matrices.get() + image * size,
                        sums ? partial.get() + task * size : nullptr, ld()},
                       begin(part), begin(part + 1), workspace);
                 });
    if (!sums) return;
    A* to = static_cast<A*>(sums->data_ptr());
    parallel_for(0, batch * e, kTask / std::max<int64_t>(d * parts, 1) + 1, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r) {
        const A* from = partial.get() + r / e * parts * size + r % e * ld();
        std::fill_n(to + r * d, d, A(0));
        for (int64_t part = 0; part < parts; ++part) {
          for (int64_t c = 0; c < d; ++c) to[r * d + c] += from[part * size + c];
        }
        for (int64_t c = 0; c < d; ++c) to[r * d + c] *= static_cast<A>(scale);
      }
    });
  }
};

template <class F>
void with_accumulator(ScalarType dtype, const F& f) {
  dtype == ScalarType::Double ? f(double{}) : f(float{});
}

}  // namespace

std::tuple<Tensor, Tensor> dot_product_cpu(const Tensor& query, const Tensor& key, const Tensor& value) {
  check(query, key, value);
  const int64_t batch = query.size(0), d = query.size(1), e = value.size(1);
  const int64_t n = query.size(2), m = key.size(2);
  const Dtype dtype = dtype_of(query.scalar_type(), "dot_product: the inputs");
  Tensor out = new_positions(query, e);
  const bool wide = dtype == Dtype::f64;
  Tensor weight =
      torch::stable::new_empty(query, {batch, e, d}, wide ? ScalarType::Double : ScalarType::Float);
  with_accumulator(query.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    Pass<A> keys{batch, e, d, m, &value, &key};
    keys.sums = &weight, keys.scale = 1.0 / static_cast<double>(m);
    keys.run(dtype);
    Pass<A> queries{batch, e, d, n, nullptr, &query};
    queries.out_x = &out, queries.matrix = &weight;
    queries.run(dtype);
  });
  return {out, weight};
}

std::tuple<Tensor, Tensor, Tensor> dot_product_backward_cpu(const Tensor& grad, const Tensor& query,
                                                            const Tensor& key, const Tensor& value,
                                                            const Tensor& weight, bool need_query,
                                                            bool need_key, bool need_value) {
  check(query, key, value);
  const int64_t batch = query.size(0), d = query.size(1), e = value.size(1);
  const int64_t n = query.size(2), m = key.size(2);
  const Dtype dtype = dtype_of(query.scalar_type(), "dot_product: the inputs");
  KD_CHECK(grad.dim() == 3 && grad.size(0) == batch && grad.size(1) == e && grad.size(2) == n &&
               grad.scalar_type() == query.scalar_type(),
           "dot_product: the gradient must be [", batch, ", ", e, ", ", n, "] of the inputs' type");
  KD_CHECK(weight.is_contiguous() && weight.numel() == batch * e * d, "dot_product: the weight must be [",
           batch, ", ", e, ", ", d, "], contiguous");
  Tensor grad_query = new_gradient(query, need_query), grad_key = new_gradient(key, need_key);
  Tensor grad_value = new_gradient(value, need_value);
  const bool through = need_key || need_value;
  Tensor grad_weight = torch::stable::new_empty(weight, {through ? batch : 0, e, d});
  with_accumulator(query.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    Pass<A> queries{batch, e, d, n, &grad, &query};
    if (need_query) queries.out_y = &grad_query, queries.matrix = &weight;
    if (through) queries.sums = &grad_weight, queries.scale = 1.0 / static_cast<double>(m);
    if (need_query || through) queries.run(dtype);
    if (!through) return;
    Pass<A> keys{batch, e, d, m, &value, &key};
    if (need_value) keys.out_x = &grad_value;
    if (need_key) keys.out_y = &grad_key;
    keys.matrix = &grad_weight;
    keys.run(dtype);
  });
  return {grad_query, grad_key, grad_value};
}

}  // namespace kd
