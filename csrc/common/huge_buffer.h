#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>

#include "common/check.h"
#include "common/huge_pages.h"
#include "common/parallel.h"
#include "common/rounding.h"

namespace kd {

// Uninitialised workspace, 64-byte aligned; from 4 MB on in huge pages.
template <class A>
class HugeBuffer {
 public:
  explicit HugeBuffer(int64_t count) {
    constexpr int64_t kPage = 2 << 20;
    const int64_t bytes = count * static_cast<int64_t>(sizeof(A)), align = bytes < 2 * kPage ? 64 : kPage;
    data_ = static_cast<A*>(std::aligned_alloc(align, (bytes / align + 1) * align));
    KD_CHECK(data_ != nullptr, "out of memory for a workspace of ", bytes, " bytes");
    if (align == kPage) advise_huge_pages(data_, bytes);
  }
  ~HugeBuffer() { std::free(data_); }
  HugeBuffer(const HugeBuffer&) = delete;
  HugeBuffer& operator=(const HugeBuffer&) = delete;
  A* get() const { return data_; }

 private:
  A* data_;
};

// f(task, workspace) for each task, by at most `most` workers (one where that is less) with a workspace of
// `elements` each, uninitialised and 64-byte aligned. Whoever is free takes the next task, so results must
// not depend on who does, nor on what an earlier task left in the workspace.
template <class A, class F>
void for_tasks(int64_t tasks, int64_t most, int64_t elements, const F& f) {
  const int64_t workers = std::min({num_threads(), tasks, std::max<int64_t>(most, 1)});
  elements = round_up(elements, static_cast<int64_t>(64 / sizeof(A)));
  const HugeBuffer<A> workspace(workers * elements);
  std::atomic<int64_t> next{0};
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) f(task, workspace.get() + worker * elements);
    }
  });
}

}  // namespace kd
