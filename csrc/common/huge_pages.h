#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "common/rounding.h"

namespace kd {

// Of the whole huge pages inside a block of at least 4 MB, so that no more memory is used. Where the system
// refuses, nothing changes.
inline void advise(void* data, int64_t bytes, int advice) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  if (bytes < 4 << 20) return;
  const uintptr_t begin = round_up(reinterpret_cast<uintptr_t>(data), kPage);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, advice);
#else
  (void)data, (void)bytes, (void)advice;
#endif
}

// Asks for huge pages under a new tensor, before its first write. From 32 MB on malloc maps every block anew,
// and smaller ones often too, as it gives the end of its heap back: a page fault for each 4 KB then costs
// more than writing them.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  advise(data, bytes, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

// Whether huge pages come only where they are asked for; elsewhere nothing is to be asked, nor taken back.
inline bool huge_pages_on_request() {
  static const bool found = [] {
    char text[64] = {};
    if (std::FILE* const file = std::fopen("/sys/kernel/mm/transparent_hugepage/enabled", "r")) {
      if (!std::fgets(text, sizeof text, file)) text[0] = 0;
      std::fclose(file);
    }
    return std::strstr(text, "[madvise]") != nullptr;
  }();
  return found;
}

// Takes the request back once the tensor is written: its pages stay as they are, but small blocks that malloc
// later puts there do not each occupy 2 MB.
class HugePagesUntilWritten {
 public:
  HugePagesUntilWritten(void* data, int64_t bytes) : data_(data), bytes_(bytes) {}
  ~HugePagesUntilWritten() {
#if defined(__linux__) && defined(MADV_NOHUGEPAGE)
    if (huge_pages_on_request()) advise(data_, bytes_, MADV_NOHUGEPAGE);
#endif
  }
  HugePagesUntilWritten(const HugePagesUntilWritten&) = delete;
  HugePagesUntilWritten& operator=(const HugePagesUntilWritten&) = delete;

 private:
  void* data_;
  int64_t bytes_;
};

}  // namespace kd
