#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>

#include "common/check.h"
#include "common/parallel.h"
#include "common/rounding.h"
#include "cpu/kept_memory.h"

namespace kd {

// Uninitialised workspace, 64-byte aligned; a large one in kept memory.
template <class A>
class LargeBuffer {
 public:
  explicit LargeBuffer(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(A));
    block_ = KeptMemory::all().take(bytes);
    data_ = static_cast<A*>(block_.data ? block_.data : std::aligned_alloc(64, (bytes / 64 + 1) * 64));
    KD_CHECK(data_ != nullptr, "out of memory for a workspace of ", bytes, " bytes");
  }
  ~LargeBuffer() { block_.data ? KeptMemory::all().give(block_) : std::free(data_); }
  LargeBuffer(const LargeBuffer&) = delete;
  LargeBuffer& operator=(const LargeBuffer&) = delete;
  A* get() const { return data_; }

 private:
  KeptMemory::Block block_;
  A* data_;
};

// f(task, workspace) for each task, by at most `most` workers (one where that is less) with a workspace of
// `elements` each, uninitialised and 64-byte aligned. Whoever is free takes the next task, so results must
// not depend on who does, nor on what an earlier task left in the workspace.
template <class A, class F>
void for_tasks(int64_t tasks, int64_t most, int64_t elements, const F& f) {
  const int64_t workers = std::min({num_threads(), tasks, std::max<int64_t>(most, 1)});
  elements = round_up(elements, static_cast<int64_t>(64 / sizeof(A)));
  const LargeBuffer<A> workspace(workers * elements);
  std::atomic<int64_t> next{0};
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) f(task, workspace.get() + worker * elements);
    }
  });
}

}  // namespace kd
