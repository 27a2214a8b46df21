#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace kd {

inline int64_t num_threads() { return torch::stable::get_num_threads(); }

// f(begin, end) on torch's own threads, over blocks of at least `grain` indices. Where a result must not
// depend on the number of threads, let each index write its own slot and reduce the slots afterwards in a
// fixed order.
template <class F>
inline void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (begin >= end) return;
  if (end - begin <= grain) {
    f(begin, end);
    return;
  }
  torch::stable::parallel_for(begin, end, grain, f);
}

}  // namespace kd
