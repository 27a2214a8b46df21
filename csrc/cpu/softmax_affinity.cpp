// Op softmax_affinity on the CPU: attention in blocks, without the matrix of all pairs. Blocks of queries go
// to threads; the backward's sums over queries are split into parts that do not depend on the number of
// threads. Method: kdfast/ops/softmax_affinity.py.
//
// Operations: 2 n m (d + e) forward and 2 n m (3 d + 2 e) backward, which recomputes the weights. Memory
// beside the results: keys and values packed, in the backward a few sums [m, d + e] per image, and per thread
// what fits its L2 cache.

#include "cpu/softmax_affinity.h"

#include <algorithm>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/rounding.h"
#include "cpu/position_tensors.h"
#include "cpu/result.h"
#include "cpu/softmax_affinity_ops.h"
#include "cpu/tasks.h"

namespace kd {

KD_DECLARE_ISA(extern const SoftmaxKernels<float> softmax_float;
               extern const SoftmaxKernels<double> softmax_double;)

namespace {

using torch::stable::Tensor;

constexpr int64_t kBlock = 192, kBlockBackward = 96;  // queries at a time, at most
constexpr int64_t kBlockElements = 3 << 14, kBlockElementsBackward = 5 << 14;
constexpr int64_t kParts = 4;                 // of the queries of a batch; of kMany, twice as many
constexpr int64_t kPart = 192, kRange = 512;  // queries that are worth a part, keys that are worth a range
constexpr int64_t kMany = 8192;
constexpr int64_t kTask = 1 << 18;  // multiply-adds that are worth another thread

template <class A>
const SoftmaxKernels<A>& kernels() {
  if constexpr (sizeof(A) == 4) {
    return KD_DISPATCH_ISA(softmax_float);
  } else {
    return KD_DISPATCH_ISA(softmax_double);
  }
}

struct Sizes {
  int64_t batch, d, e, n, m;
  Sizes(const Tensor& query, const Tensor& key, const Tensor& value) {
    KD_CHECK(query.dim() == 3 && key.dim() == 3 && value.dim() == 3,
             "softmax_affinity: need queries [B, d, n], keys [B, d, m] and values [B, e, m]");
    KD_CHECK(
        query.size(0) == key.size(0) && key.size(0) == value.size(0) && query.size(1) == key.size(1) &&
            key.size(2) == value.size(2) && key.size(2) > 0,
        "softmax_affinity: need one batch, queries as wide as keys, and as many values as keys, at least "
        "one");
    KD_CHECK(query.scalar_type() == key.scalar_type() && query.scalar_type() == value.scalar_type(),
             "softmax_affinity: need one dtype");
    batch = query.size(0), d = query.size(1), e = value.size(1), n = query.size(2), m = key.size(2);
  }
};

// Keys and values of all images in blocks of one size, a number of blocks that `ranges` divides.
template <class A>
class Packed {
 public:
  Packed(const Sizes& s, int64_t ranges)
      : key_(s.d * kernels<A>().packed_ld),
        value_(s.e * kernels<A>().packed_ld),
        m_(s.m),
        ranges_(ranges),
        size_(ceil_div(s.m, round_up(ceil_div(s.m, kernels<A>().keys), ranges))),
        blocks_(ceil_div(s.m, size_)),
        data_(s.batch * blocks_ * (key_ + value_)) {}
  // The blocks from `first` on, counted over all images.
  void pack(Dtype dtype, const Tensor& key, const Tensor& value, int64_t first, int64_t count) const {
    for (int64_t b = first; b < first + count; ++b) {
      const int64_t image = b / blocks_, block = b % blocks_, position = block * size_;
      const int64_t positions = std::min(size_, m_ - position);
      const auto pack_one = kernels<A>().pack;
      pack_one(dtype, position_map(&key, image), position, positions, keys(image) + block * key_);
      pack_one(dtype, position_map(&value, image), position, positions, values(image) + block * value_);
    }
  }
  int64_t blocks() const { return blocks_; }  // of an image
  // The first key of a range; that of the last but one is their number.
  int64_t first(int64_t range) const { return std::min(blocks_ * range / ranges_ * size_, m_); }
  void fill(SoftmaxCall<A>& call, int64_t image, int64_t range) const {
    const int64_t block = blocks_ * range / ranges_;
    call.keys_block = size_, call.keys = first(range + 1) - first(range);
    call.packed_keys = keys(image) + block * key_, call.packed_values = values(image) + block * value_;
  }

 private:
  A* keys(int64_t image) const { return data_.get() + image * blocks_ * (key_ + value_); }
  A* values(int64_t image) const { return keys(image) + blocks_ * key_; }
  int64_t key_, value_, m_, ranges_, size_, blocks_;
  LargeBuffer<A> data_;
};

// Before tasks that share an image's keys; where each image is one task, it packs its own.
template <class A>
void pack_all(const Packed<A>& packed, const Sizes& s, Dtype dtype, const Tensor& key, const Tensor& value) {
  const int64_t grain = kTask / std::max<int64_t>(kernels<A>().keys * (s.d + s.e), 1) + 1;
  parallel_for(0, s.batch * packed.blocks(), grain,
               [&](int64_t begin, int64_t end) { packed.pack(dtype, key, value, begin, end - begin); });
}

// Queries at a time: so many that `each` elements per query stay in the L2 cache.
template <class A>
int64_t block_of(int64_t most, int64_t elements, int64_t each) {
  const int64_t strip = kernels<A>().strip;
  return std::clamp(elements / std::max<int64_t>(each, 1) / strip * strip, strip, most);
}

template <class F>
void with_accumulator(ScalarType dtype, const F& f) {
  dtype == ScalarType::Double ? f(double{}) : f(float{});
}

}  // namespace

std::tuple<Tensor, Tensor> softmax_affinity_cpu(const Tensor& query, const Tensor& key, const Tensor& value,
                                                double scale) {
  const Sizes s(query, key, value);
  const Dtype dtype = dtype_of(query.scalar_type(), "softmax_affinity: the inputs");
  Tensor out = new_positions(query, s.e);
  Tensor saved = torch::stable::new_empty(query, {s.batch, 2, s.n},
                                          dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float);
  if (s.batch * s.n == 0) return {out, saved};
  with_accumulator(query.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    const SoftmaxKernels<A>& use = kernels<A>();
    const Packed<A> packed(s, 1);
    // Blocks of one size, an even number in all, so that two threads share them evenly.
    const int64_t most = block_of<A>(kBlock, kBlockElements, s.d + s.e);
    int64_t wanted = ceil_div(s.n, most);
    if (s.batch * wanted % 2 != 0 && s.n > use.strip) ++wanted;
    const int64_t block = round_up(ceil_div(s.n, wanted), use.strip), blocks = ceil_div(s.n, block);
    if (blocks > 1) pack_all(packed, s, dtype, key, value);
    SoftmaxCall<A> call{};
    call.dtype = dtype, call.d = s.d, call.e = s.e, call.block = block, call.scale = scale;
    const int64_t workers = s.batch * s.n * s.m * (s.d + s.e) / kTask;
    for_tasks<A>(s.batch * blocks, workers, use.workspace(call, false), [&](int64_t task, A* workspace) {
      const int64_t image = task / blocks, first = task % blocks * block;
      if (blocks == 1) packed.pack(dtype, key, value, image * packed.blocks(), packed.blocks());
      SoftmaxCall<A> part = call;
      packed.fill(part, image, 0);
      part.maxima = static_cast<A*>(saved.data_ptr()) + image * 2 * s.n, part.inverses = part.maxima + s.n;
      part.query = position_map(&query, image), part.out = position_map(&out, image);
      use.forward(part, first, std::min(first + block, s.n), workspace);
    });
  });
  return {out, saved};
}

std::tuple<Tensor, Tensor, Tensor> softmax_affinity_backward_cpu(const Tensor& grad, const Tensor& query,
                                                                 const Tensor& key, const Tensor& value,
                                                                 const Tensor& out, const Tensor& saved,
                                                                 double scale, bool need_query, bool need_key,
                                                                 bool need_value) {
  const Sizes s(query, key, value);
  const Dtype dtype = dtype_of(query.scalar_type(), "softmax_affinity: the inputs");
  for (const Tensor* x : {&grad, &out}) {
    KD_CHECK(x->dim() == 3 && x->size(0) == s.batch && x->size(1) == s.e && x->size(2) == s.n &&
                 x->scalar_type() == query.scalar_type(),
             "softmax_affinity: result and gradient must be [", s.batch, ", ", s.e, ", ", s.n,
             "] of the inputs' type");
  }
  KD_CHECK(saved.is_contiguous() && saved.numel() == s.batch * 2 * s.n &&
               saved.scalar_type() == (dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float),
           "softmax_affinity: what the forward saved must be [", s.batch, ", 2, ", s.n, "], contiguous");
  Tensor grad_query = new_gradient(query, need_query), grad_key = new_gradient(key, need_key);
  Tensor grad_value = new_gradient(value, need_value);
  with_accumulator(query.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    if (s.batch == 0 || !(need_query || need_key || need_value)) return;
    const SoftmaxKernels<A>& use = kernels<A>();
    // Each part of the queries adds to sums over queries, range after range of the keys, while other parts
    // add to other ranges: the parts that share a set of sums meet no range at a time, and each range always
    // in one order.
    int64_t parts = 1, ranges = 1;
    const int64_t wanted = s.n < kMany ? kParts : 2 * kParts;
    while (s.batch * parts < wanted && s.n >= parts * 2 * kPart) parts *= 2;
    while (ranges < parts && s.m >= ranges * 2 * kRange) ranges *= 2;
    const Packed<A> packed(s, ranges);
    if (parts > 1) pack_all(packed, s, dtype, key, value);
    const auto begin = [&](int64_t part) { return std::min(round_up(s.n * part / parts, 16), s.n); };
    const int64_t most = block_of<A>(kBlockBackward, kBlockElementsBackward, 3 * s.d + 2 * s.e);
    const int64_t part_size = ceil_div(s.n, parts) + 16, blocks = ceil_div(part_size, most);
    const int64_t block = round_up(ceil_div(part_size, blocks), use.strip);
    const int64_t size_key = need_key ? s.m * use.ld(s.d) : 0;
    const int64_t size_value = need_value ? s.m * use.ld(s.e) : 0;
    const int64_t step = size_key + size_value, sets = parts / ranges;
    const LargeBuffer<A> sums(s.batch * sets * step);
    if (s.n == 0) std::fill_n(sums.get(), s.batch * step, A(0));
    const auto collect = [&](int64_t image, int64_t first, int64_t count) {
      A* const own = sums.get() + image * sets * step;
      if (need_key) use.collect(dtype, own, sets, step, first, count, position_map(&grad_key, image));
      if (need_value) {
        use.collect(dtype, own + size_key, sets, step, first, count, position_map(&grad_value, image));
      }
    };
    const int64_t size_query = need_query ? blocks * s.d * use.ld(block) : 0;
    const LargeBuffer<A> grad_queries(s.batch * parts * size_query);
    SoftmaxCall<A> call{};
    call.dtype = dtype, call.d = s.d, call.e = s.e, call.block = block, call.scale = scale;
    const int64_t workers = s.batch * s.n * s.m * (s.d + s.e) / kTask;
    for (int64_t turn = 0; turn < ranges; ++turn) {
      for_tasks<A>(s.batch * parts, workers, use.workspace(call, true), [&](int64_t task, A* workspace) {
        const int64_t image = task / parts, p = task % parts;
        const int64_t range = (p + turn) % ranges, first = packed.first(range);
        if (parts == 1) packed.pack(dtype, key, value, image * packed.blocks(), packed.blocks());
        SoftmaxCall<A> part = call;
        packed.fill(part, image, range);
        part.maxima = static_cast<A*>(saved.data_ptr()) + image * 2 * s.n, part.inverses = part.maxima + s.n;
        part.query = position_map(&query, image), part.out = position_map(&out, image);
        part.grad_out = position_map(&grad, image);
        if (need_query) part.grad_query = position_map(&grad_query, image);
        part.grad_queries = grad_queries.get() + task * size_query;
        part.first = turn == 0, part.last = turn == ranges - 1;
        A* const own = sums.get() + (image * sets + p / ranges) * step;
        if (need_key) part.grad_keys = own + first * use.ld(s.d);
        if (need_value) part.grad_values = own + size_key + first * use.ld(s.e);
        use.backward(part, begin(p), begin(p + 1), workspace);
        if (parts == 1) collect(image, 0, s.m);
      });
    }
    if (parts == 1) return;
    const int64_t key_blocks = ceil_div(s.m, use.keys);
    const int64_t grain = kTask / std::max<int64_t>(use.keys * (s.d + s.e) * sets, 1) + 1;
    parallel_for(0, s.batch * key_blocks, grain, [&](int64_t from, int64_t to) {
      for (int64_t b = from; b < to; ++b) {
        const int64_t first = b % key_blocks * use.keys;
        collect(b / key_blocks, first, std::min(use.keys, s.m - first));
      }
    });
  });
  return {grad_query, grad_key, grad_value};
}

}  // namespace kd
