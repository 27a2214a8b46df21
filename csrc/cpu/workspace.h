#pragma once

// Memory that a call needs while it lasts. malloc keeps freed blocks resident, and blocks of many sizes that
// several threads free in turn then take up to twice what is live at any time. Large workspaces are mapped
// instead, handed on from use to use while a call runs and given back at its end, all but a few MB: small
// calls would spend as long on mapping them as on their arithmetic.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "common/check.h"
#include "common/rounding.h"

namespace kd {

class Workspaces {
 public:
  struct Block {
    void* data;
    int64_t bytes;
  };

  // While one lives, blocks that are given back are kept for the next that asks.
  class Call {
   public:
    Call() { change(1); }
    ~Call() { change(-1); }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

   private:
    static void change(int by) {
      Workspaces& all = Workspaces::all();
      const std::lock_guard<std::mutex> lock(all.mutex_);
      if ((all.calls_ += by) == 0) all.trim();
    }
  };

  static Workspaces& all() {
    static Workspaces one;
    return one;
  }

  // 64-byte aligned, uninitialised; data is null where there is no memory.
  Block take(int64_t bytes) {
    if (!kMaps || bytes < kLeastMapped) {
      bytes = (bytes + 64) / 64 * 64;
      return {std::aligned_alloc(64, bytes), bytes};
    }
    bytes = round_up(bytes, kPage);
    const std::lock_guard<std::mutex> lock(mutex_);
    // The smallest that is large enough, else the largest of all, which then grows.
    auto best = idle_.end();
    for (auto b = idle_.begin(); b != idle_.end(); ++b) {
      const bool fits = best != idle_.end() && best->bytes >= bytes;
      if (best == idle_.end() ||
          (fits ? b->bytes >= bytes && b->bytes < best->bytes : b->bytes > best->bytes))
        best = b;
    }
    Block found{nullptr, 0};
    if (best != idle_.end()) found = *best, idle_.erase(best);
    ++takes_;
    if (bytes <= found.bytes && found.bytes <= 2 * bytes) return found;
    int64_t idle = 0;
    for (const Block& block : idle_) idle += block.bytes;
    if (changes_ >= kFreeChanges && takes_ < 64 + kPageTakes * idle / kPage) {
      // Uses alternate: keep all their sizes.
      if (found.data) idle_.push_back(found);
      return resized({nullptr, 0}, bytes);
    }
    // Uses have changed: what idles now is of sizes that are asked for no more.
    ++changes_, takes_ = 0;
    drop();
    return resized(found, bytes);
  }

  // Gives back what is kept between calls.
  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (calls_ == 0) drop(), takes_ = changes_ = 0;
  }

  void give(const Block& block) {
    if (!kMaps || block.bytes < kLeastMapped) return std::free(block.data);
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(block);
    if (calls_ == 0) trim();
  }

 private:
  static constexpr int64_t kLeastMapped = 20 << 10, kPage = 1 << 12, kFreeChanges = 16;
  static constexpr int64_t kPageTakes = 16;  // how many times as long as a take the first use of a page lasts
  static constexpr int64_t kKept = 16 << 20;

#ifdef __linux__
  static constexpr bool kMaps = true;
  static Block resized(const Block& from, int64_t bytes) {
    void* data = from.data ? mremap(from.data, from.bytes, bytes, MREMAP_MAYMOVE)
                           : mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return {data == MAP_FAILED ? nullptr : data, bytes};
  }
  static void unmap(const Block& block) { munmap(block.data, block.bytes); }
#else
  static constexpr bool kMaps = false;
  static Block resized(const Block&, int64_t bytes) { return {nullptr, bytes}; }
  static void unmap(const Block&) {}
#endif

  void trim() {
    int64_t bytes = 0;
    for (const Block& block : idle_) bytes += block.bytes;
    if (bytes > kKept) drop(), takes_ = changes_ = 0;
  }

  void drop() {
    for (const Block& block : idle_) unmap(block);
    idle_.clear();
  }

  std::mutex mutex_;
  std::vector<Block> idle_;
  int calls_ = 0;
  int64_t takes_ = 0, changes_ = 0;  // since uses changed, and how often they did since all was given back
};

// Uninitialised, 64-byte aligned.
template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t count) : block_(Workspaces::all().take(count * static_cast<int64_t>(sizeof(A)))) {
    KD_CHECK(block_.data != nullptr, "out of memory for a workspace of ", count, " elements");
  }
  ~Buffer() { Workspaces::all().give(block_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  A* get() const { return static_cast<A*>(block_.data); }

 private:
  Workspaces::Block block_;
};

}  // namespace kd
