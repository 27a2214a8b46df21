#include "cpu/kept_memory.h"

#include <cstdlib>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "common/check.h"
#include "common/rounding.h"

namespace kd {
namespace {

constexpr int64_t kPage = 4 << 10, kHugePage = 2 << 20;
constexpr int64_t kPassedOver = 256;  // requests after which a block that fitted none of them goes

int64_t bytes_to_keep() {
  const char* const asked = std::getenv("KDFAST_KEEP_MB");
  if (asked == nullptr || *asked == 0) return int64_t{256} << 20;
  char* end = nullptr;
  const long long megabytes = std::strtoll(asked, &end, 10);
  KD_CHECK(*end == 0 && megabytes >= 0 && megabytes <= 1 << 30,
           "KDFAST_KEEP_MB: need a number of MB, 0 or more, got ", asked);
  return static_cast<int64_t>(megabytes) << 20;
}

#ifdef __linux__
// Blocks of 4 MB and more begin on a huge page and ask for as many as lie inside, so that no more memory is
// used: a page fault for each 4 KB costs more than writing them. Where the system refuses, nothing changes.
KeptMemory::Block map(int64_t bytes) {
  const int64_t slack = bytes < 2 * kHugePage ? 0 : kHugePage;
  void* const whole =
      mmap(nullptr, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (whole == MAP_FAILED) return {};
  if (slack == 0) return {whole, bytes};
  char* const begin = static_cast<char*>(whole);
  const int64_t before =
      round_up(reinterpret_cast<uintptr_t>(begin), uintptr_t{kHugePage}) - reinterpret_cast<uintptr_t>(begin);
  if (before > 0) munmap(begin, before);
  if (slack > before) munmap(begin + before + bytes, slack - before);
#ifdef MADV_HUGEPAGE
  madvise(begin + before, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  return {begin + before, bytes};
}
void unmap(const KeptMemory::Block& block) { munmap(block.data, block.bytes); }
#else
KeptMemory::Block map(int64_t) { return {}; }
void unmap(const KeptMemory::Block&) {}
#endif

}  // namespace

KeptMemory::KeptMemory() : most_(bytes_to_keep()) {}

KeptMemory& KeptMemory::all() {
  static KeptMemory& one = *new KeptMemory;  // tensors may outlive everything that is destroyed at exit
  return one;
}

KeptMemory::Block KeptMemory::take(int64_t bytes) {
  if (bytes < kLeast) return {};
  bytes = round_up(bytes, kPage);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++requests_;
    auto best = idle_.end();
    for (auto i = idle_.begin(); i != idle_.end(); ++i) {
      const int64_t found = i->block.bytes;
      // A block that is much larger would hold back more than it serves. Of equal ones the last is the one in
      // cache.
      if (found >= bytes && found <= bytes + bytes / 4 && (best == idle_.end() || found <= best->block.bytes))
        best = i;
    }
    if (best != idle_.end()) {
      const Block block = best->block;
      idle_.erase(best), idle_bytes_ -= block.bytes;
      return block;
    }
    while (!idle_.empty() && requests_ - idle_.front().since > kPassedOver) drop_oldest();
  }
  return map(bytes);
}

void KeptMemory::give(const Block& block) {
  if (block.bytes > most_) return unmap(block);
  const std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back({block, requests_}), idle_bytes_ += block.bytes;
  while (idle_bytes_ > most_) drop_oldest();
}

void KeptMemory::release() {
  const std::lock_guard<std::mutex> lock(mutex_);
  while (!idle_.empty()) drop_oldest();
}

void KeptMemory::drop_oldest() {
  unmap(idle_.front().block);
  idle_bytes_ -= idle_.front().block.bytes;
  idle_.erase(idle_.begin());
}

}  // namespace kd
