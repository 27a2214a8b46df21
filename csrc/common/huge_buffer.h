#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>

#include "common/check.h"
#include "common/huge_pages.h"
#include "common/parallel.h"

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

// f(task, workspace of `elements`) for each task, by at most `most` workers with a workspace each. Whoever is
// free takes the next, so results must not depend on who does.
template <class A, class F>
void for_tasks(int64_t tasks, int64_t most, int64_t elements, const F& f) {
  const int64_t workers = std::min({num_threads(), tasks, most});
  const HugeBuffer<A> workspace(workers * elements);
  std::atomic<int64_t> next{0};
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) f(task, workspace.get() + worker * elements);
    }
  });
}

}  // namespace kd
