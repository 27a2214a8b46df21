#pragma once

// Memory of large results. malloc maps most blocks of some MB anew, and the system then clears every page
// at its first use, which takes as long as writing it. A training step asks for the same sizes again and
// again, so blocks are kept when their tensors die, as an allocator for GPUs does: KDFAST_KEEP_MB of them at
// most (256), 0 for none, and none that many requests have passed over.

#include <cstdint>
#include <mutex>
#include <vector>

namespace kd {

class KeptMemory {
 public:
  struct Block {
    void* data = nullptr;
    int64_t bytes = 0;
  };
  static constexpr int64_t kLeast = 1 << 20;  // bytes of a block; malloc keeps smaller ones itself

  static KeptMemory& all();

  // At least `bytes`, uninitialised, on huge pages from 4 MB on; null where there is no memory, or where it
  // is for malloc: less than kLeast, or a system that cannot map.
  Block take(int64_t bytes);
  void give(const Block& block);
  void release();  // gives back all that is kept

  KeptMemory(const KeptMemory&) = delete;
  KeptMemory& operator=(const KeptMemory&) = delete;

 private:
  struct Idle {
    Block block;
    int64_t since;  // number of the request before which it was given back
  };
  KeptMemory();
  void drop_oldest();

  std::mutex mutex_;
  std::vector<Idle> idle_;  // the oldest first
  int64_t most_, idle_bytes_ = 0, requests_ = 0;
};

}  // namespace kd
