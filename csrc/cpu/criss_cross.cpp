// Op criss_cross on the CPU: checks and threads. A row pass, then a column pass that adds to its results:
// every result is written by one thread per pass. Formulas: kdfast/reference/criss_cross.py.

#include "cpu/criss_cross.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <iterator>
#include <thread>
#include <vector>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/rounding.h"
#include "cpu/criss_cross_ops.h"
#include "cpu/result.h"
#include "cpu/tasks.h"

namespace kd {

KD_DECLARE_ISA(extern const CrissCrossKernels<float> criss_cross_float;
               extern const CrissCrossKernels<double> criss_cross_double;)

namespace {

using torch::stable::Tensor;

// Neighbouring lines that are worked on together: image rows in one piece of memory, image columns that share
// lines of the cache. As many columns as leave a workspace within 1/kShare of the scores in float32.
constexpr int64_t kRowsTogether = 4, kColumnsTogether[] = {16, 8, 4}, kShare = 24;
constexpr int64_t kSmallWorkspace = 64 << 10;  // not worth saving
constexpr int64_t kTask = 1 << 20;             // multiply-adds for a thread to be worth its start
constexpr int64_t kGroupBytes = 8 << 20;       // of maps, which fit into a cache with room to spare

template <class A>
const CrissCrossKernels<A>& kernels() {
  if constexpr (sizeof(A) == 4) {
    return KD_DISPATCH_ISA(criss_cross_float);
  } else {
    return KD_DISPATCH_ISA(criss_cross_double);
  }
}

struct Maps {
  const Tensor *query, *key, *value, *out;
  const Tensor *grad_out = nullptr, *grad_query = nullptr, *grad_key = nullptr, *grad_value = nullptr;
};

void check(const Tensor& x, const Tensor& query, int64_t channels, const char* name) {
  KD_CHECK(x.dim() == 4 && query.dim() == 4 && channels >= 1 && x.size(0) == query.size(0) &&
               x.size(1) == channels && x.size(2) == query.size(2) && x.size(3) == query.size(3),
           "criss_cross: ", name, " does not fit query: need [B, channels, H, W] of one B, H, W");
  KD_CHECK(x.scalar_type() == query.scalar_type(), "criss_cross: ", name, " must be ",
           toString(query.scalar_type()), " as query is, got ", toString(x.scalar_type()));
}

CrissCrossMap map_of(const Tensor* x, bool column) {
  if (x == nullptr || x->numel() == 0) return {nullptr, 0, 0, 0, 0};
  const int64_t line = column ? 3 : 2, position = column ? 2 : 3;
  return {const_cast<void*>(x->const_data_ptr()), x->stride(0), x->stride(1), x->stride(line),
          x->size(position) == 1 ? 1 : x->stride(position)};
}

// Whether a pass may work on columns side by side, one in each lane of a vector.
template <class A>
bool side_by_side(const CrissCrossCall<A>& call) {
  if (!call.column || call.dtype != (sizeof(A) == 8 ? Dtype::f64 : Dtype::f32)) return false;
  for (const CrissCrossMap* map : {&call.query, &call.key, &call.value, &call.out, &call.grad_out,
                                   &call.grad_query, &call.grad_key, &call.grad_value}) {
    if (map->data && map->line != 1) return false;
  }
  return true;
}

// One direction over rows or columns, and how it is cut into tasks: per image, vectors of columns, then
// blocks of lines from `rest` on. Depends on shapes and strides only, so that results do not depend on the
// number of threads.
template <class A>
struct Pass {
  CrissCrossCall<A> call;
  bool is_backward;
  int64_t columns, most, vectors, rest, blocks, bytes;

  Pass(const Maps& maps, A* lse, A* delta, bool column, bool is_backward)
      : call(call_of(maps, lse, delta, column)), is_backward(is_backward) {
    const CrissCrossKernels<A>& with = kernels<A>();
    const Tensor& value = *maps.value;
    const int64_t size = sizeof(A), height = value.size(2), width = value.size(3);
    const int64_t share = 4 * value.size(0) * height * width * (height + width) / kShare;
    const auto fits = [&](int64_t lines) { return size * with.workspace(call, lines, is_backward) <= share; };
    columns = with.columns, most = std::max(share, kSmallWorkspace) / size;
    vectors = side_by_side(call) ? call.lines / columns : 0, rest = vectors * columns;
    int64_t together = 1;
    if (value.stride(3) == 1 && value.stride(2) != 1) {
      together = kRowsTogether;
      if (column)
        together = *std::find_if(std::begin(kColumnsTogether), std::end(kColumnsTogether) - 1, fits);
    }
    blocks = ceil_div(call.lines - rest, together), bytes = 0;
    if (vectors) bytes = size * with.workspace_of_columns(call, most, is_backward);
    if (blocks) {
      const int64_t lines = std::min(together, call.lines - rest);
      bytes = std::max(bytes, size * with.workspace(call, lines, is_backward));
    }
  }

  int64_t tasks() const { return vectors + blocks; }

  // Whether tasks may go to whoever is free: not where many write to one line of the cache, or to a pair of
  // them, as blocks of a few columns would.
  bool apart() const { return vectors || !call.column || call.value.line != 1; }

  int64_t work() const {  // multiply-adds of a task
    return ceil_div(call.lines, tasks()) * call.length * call.length * (call.channels + call.values);
  }

  // Task `task` of an image: lines spread evenly over the blocks.
  void run(int64_t image, int64_t task, A* workspace) const {
    const CrissCrossKernels<A>& with = kernels<A>();
    if (task < vectors) {
      const auto pass = is_backward ? with.backward_columns : with.forward_columns;
      return pass(call, image, task * columns, most, workspace);
    }
    const auto start = [&](int64_t block) { return rest + block * (call.lines - rest) / blocks; };
    const int64_t first = start(task - vectors), count = start(task - vectors + 1) - first;
    const auto pass = is_backward ? with.backward : with.forward;
    pass(call, image, first, count, workspace);
  }

 private:
  static CrissCrossCall<A> call_of(const Maps& maps, A* lse, A* delta, bool column) {
    const Tensor& value = *maps.value;
    const int64_t height = value.size(2), width = value.size(3);
    CrissCrossCall<A> call{};
    call.dtype = dtype_of(value.scalar_type(), "query");
    call.query = map_of(maps.query, column), call.key = map_of(maps.key, column);
    call.value = map_of(maps.value, column), call.out = map_of(maps.out, column);
    call.grad_out = map_of(maps.grad_out, column), call.grad_query = map_of(maps.grad_query, column);
    call.grad_key = map_of(maps.grad_key, column), call.grad_value = map_of(maps.grad_value, column);
    call.lines = column ? width : height, call.length = column ? height : width;
    call.channels = maps.query->size(1), call.values = value.size(1);
    call.column = column, call.lse = lse, call.delta = delta;
    call.image_step = height * width, call.line_step = column ? 1 : width;
    call.position_step = column ? width : 1;
    return call;
  }
};

// A pass over some images; a column pass adds to what the stage before it, the row pass, has written.
template <class A>
struct Stage {
  const Pass<A>& pass;
  int64_t first_image, images;
};

// Each worker takes the tasks of images of its own, stage by stage, so that it finds them in its cache, then
// those that are left of others. Columns of an image wait for its rows, which others may have but begun;
// those who begin a task end it, so nobody waits for ever.
template <class A>
void run_in_order(const std::vector<Stage<A>>& stages) {
  int64_t tasks = 0, work = 0, bytes = 0, most_images = 0;
  for (const Stage<A>& stage : stages) {
    const int64_t count = stage.images * stage.pass.tasks();
    tasks += count, work += count * stage.pass.work();
    bytes = std::max(bytes, stage.pass.bytes), most_images = std::max(most_images, stage.images);
  }
  const int64_t workers = std::clamp<int64_t>(work / kTask, 1, std::min(num_threads(), tasks));
  std::vector<std::atomic<int64_t>> taken(stages.size() * most_images), ended(stages.size() * most_images);
  std::atomic<int64_t> arrived{0};
  parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    const LargeBuffer<A> workspace(bytes / static_cast<int64_t>(sizeof(A)));
    const int64_t worker = arrived.fetch_add(1) % workers;
    for (size_t s = 0; s < stages.size(); ++s) {
      const Stage<A>& stage = stages[s];
      const int64_t count = stage.pass.tasks(), even = ceil_div(count, int64_t{2});
      for (int64_t k = 0; k < stage.images; ++k) {
        const int64_t i = (worker * stage.images / workers + k) % stage.images;
        for (int64_t t; (t = taken[s * most_images + i].fetch_add(1)) < count;) {
          while (stage.pass.call.column && ended[(s - 1) * most_images + i] < stages[s - 1].pass.tasks()) {
            std::this_thread::yield();
          }
          // Neighbours, which may share lines of the cache, do not follow one another.
          const int64_t task = t < even ? 2 * t : 2 * (t - even) + 1;
          stage.pass.run(stage.first_image + i, task, workspace.get());
          ++ended[s * most_images + i];
        }
      }
    }
  });
}

// Each thread gets tasks beside one another.
template <class A>
void run_side_by_side(const Stage<A>& stage) {
  const int64_t grain = std::max<int64_t>(1, kTask / std::max<int64_t>(stage.pass.work(), 1));
  parallel_for(0, stage.images * stage.pass.tasks(), grain, [&](int64_t begin, int64_t end) {
    const LargeBuffer<A> workspace(stage.pass.bytes / static_cast<int64_t>(sizeof(A)));
    for (int64_t i = begin; i < end; ++i) {
      stage.pass.run(stage.first_image + i / stage.pass.tasks(), i % stage.pass.tasks(), workspace.get());
    }
  });
}

// The passes alternate between groups of images, so that the second finds in cache what the first has read
// and written; the backward begins with the images that the forward had last.
template <class A>
void run(const Maps& maps, A* lse, A* delta, bool is_backward) {
  const Pass<A> rows(maps, lse, delta, false, is_backward), columns(maps, lse, delta, true, is_backward);
  const bool in_order = rows.apart() && columns.apart();
  const int64_t images = maps.value->size(0);
  const int64_t bytes = maps.value->element_size() * (maps.value->numel() + maps.query->numel()) *
                        (is_backward ? 4 : 2) / images;
  const int64_t group = in_order ? std::min(images, ceil_div(kGroupBytes, bytes)) : images;
  const int64_t groups = ceil_div(images, group);
  std::vector<Stage<A>> stages;
  for (int64_t i = 0; i < groups; ++i) {
    const int64_t first = (is_backward ? groups - 1 - i : i) * group, count = std::min(group, images - first);
    stages.push_back({rows, first, count});
    if (maps.value->size(2) > 1) stages.push_back({columns, first, count});  // of one row, no other cell
  }
  if (in_order) return run_in_order(stages);
  for (const Stage<A>& stage : stages) run_side_by_side(stage);
}

// f(A{}) with the type of sums.
template <class F>
void with_accumulator(const Tensor& x, const F& f) {
  x.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

Tensor statistics(const Tensor& x) {
  return torch::stable::new_empty(
      x, {x.size(0), x.size(2), x.size(3)},
      x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
}

void check_inputs(const Tensor& query, const Tensor& key, const Tensor& value) {
  KD_CHECK(query.dim() == 4 && value.dim() == 4,
           "criss_cross: query and value need 4 axes [B, channels, H, W]");
  check(query, query, query.size(1), "query");
  check(key, query, query.size(1), "key");
  check(value, query, value.size(1), "value");
}

}  // namespace

std::tuple<Tensor, Tensor> criss_cross_cpu(const Tensor& query, const Tensor& key, const Tensor& value) {
  check_inputs(query, key, value);
  Tensor out = new_gradient(value), lse = statistics(value);
  if (out.numel() == 0) return {out, lse};
  with_accumulator(value, [&](auto zero) {
    using A = decltype(zero);
    run<A>({&query, &key, &value, &out}, static_cast<A*>(lse.data_ptr()), nullptr, false);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> criss_cross_backward_cpu(const Tensor& grad_out, const Tensor& query,
                                                            const Tensor& key, const Tensor& value,
                                                            const Tensor& out, const Tensor& lse,
                                                            bool need_query, bool need_key, bool need_value) {
  check_inputs(query, key, value);
  check(grad_out, query, value.size(1), "grad_out");
  check(out, query, value.size(1), "out");
  Tensor grad_query = new_gradient(query, need_query), grad_key = new_gradient(key, need_key),
         grad_value = new_gradient(value, need_value);
  if (value.numel() == 0 || !(need_query || need_key || need_value))
    return {grad_query, grad_key, grad_value};
  KD_CHECK(lse.is_contiguous() && lse.numel() == value.size(0) * value.size(2) * value.size(3),
           "criss_cross: lse must be the forward's, [B, H, W]");
  const bool need_scores = need_query || need_key;
  Tensor delta = need_scores ? statistics(value) : torch::stable::new_empty(lse, {0});
  with_accumulator(value, [&](auto zero) {
    using A = decltype(zero);
    KD_CHECK(lse.element_size() == sizeof(A), "criss_cross: lse has a wrong type");
    run<A>({&query, &key, &value, &out, &grad_out, &grad_query, &grad_key, &grad_value},
           static_cast<A*>(const_cast<void*>(lse.const_data_ptr())), static_cast<A*>(delta.data_ptr()), true);
  });
  return {grad_query, grad_key, grad_value};
}

}  // namespace kd
