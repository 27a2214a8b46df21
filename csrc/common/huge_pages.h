#pragma once

#include <cstdint>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace kd {

// Asks for huge pages under a new tensor, before its first write. From 32 MB on malloc maps every block anew,
// and smaller ones often too, as it gives the end of its heap back: a page fault for each 4 KB then costs
// more than writing them. Only whole huge pages inside the block are asked for, so that no more memory is
// used; where the system refuses, nothing changes.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  if (bytes < 4 << 20) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace kd
