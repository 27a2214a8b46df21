#pragma once

// Runs CUDA C++ on the CPU, so that kernels are tested where there is no GPU:
//   g++ -std=c++20 -pthread -x c++ -include cuda_emulator.h kernel.cu
// Blocks run one after another. The CUDA threads of a block are fibers of one thread, which is quick and
// finds barriers that not every thread reaches; with -DKD_EMULATOR_THREADS they are std::threads, for
// -fsanitize=thread to find barriers that are missing. It shows logic and indexing. It does not show races
// between blocks, the limits of the hardware or speed. Shared memory starts with what the previous block left
// in it.

#define KD_CUDA_EMULATOR 1

#include <atomic>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#ifndef KD_EMULATOR_THREADS
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __restrict__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9;

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace kd_emulator {

constexpr int kWarp = 32;

#ifdef KD_EMULATOR_THREADS

struct Barrier {
  explicit Barrier(int threads) : barrier(threads) {}
  void wait() { barrier.arrive_and_wait(); }
  std::barrier<> barrier;
};

// body(t) for every thread of a block; enter(t) first, whenever t takes over.
inline void run_threads(int threads, const std::function<void(int)>& enter,
                        const std::function<void(int)>& body) {
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      enter(t);
      body(t);
    });
  }
  for (std::thread& thread : pool) thread.join();
}

#else

struct Fibers {
  ucontext_t scheduler;
  std::vector<ucontext_t> contexts;
  const std::function<void(int)>* body;
  int current;
  long progress;
  std::vector<char> done;
};
inline Fibers fibers;

struct Barrier {
  explicit Barrier(int threads) : threads(threads) {}
  void wait() {
    const long mine = phase;
    ++fibers.progress;
    if (++arrived == threads) {
      arrived = 0;
      ++phase;
    }
    while (phase == mine) swapcontext(&fibers.contexts[fibers.current], &fibers.scheduler);
  }
  int threads, arrived = 0;
  long phase = 0;
};

inline void fiber_main() {
  (*fibers.body)(fibers.current);
  fibers.done[fibers.current] = 1;
  ++fibers.progress;
}

inline void run_threads(int threads, const std::function<void(int)>& enter,
                        const std::function<void(int)>& body) {
  constexpr size_t kStack = 128 * 1024;
  const std::unique_ptr<char[]> stacks(new char[threads * kStack]);
  fibers.contexts.resize(threads);
  fibers.done.assign(threads, 0);
  fibers.body = &body;
  for (int t = 0; t < threads; ++t) {
    ucontext_t& context = fibers.contexts[t];
    getcontext(&context);
    context.uc_stack.ss_sp = stacks.get() + t * kStack;
    context.uc_stack.ss_size = kStack;
    context.uc_link = &fibers.scheduler;
    makecontext(&context, fiber_main, 0);
  }
  for (int alive = threads; alive > 0;) {
    const long before = fibers.progress;
    for (int t = 0; t < threads; ++t) {
      if (fibers.done[t]) continue;
      fibers.current = t;
      enter(t);
      swapcontext(&fibers.scheduler, &fibers.contexts[t]);
      alive -= fibers.done[t];
    }
    if (fibers.progress == before) {
      std::fprintf(stderr, "cuda_emulator: some threads wait at a barrier that the others do not reach\n");
      std::abort();
    }
  }
}

#endif

struct Warp {
  explicit Warp(int lanes) : barrier(lanes), lanes(lanes) {}
  Barrier barrier;
  int lanes;
  uint64_t slots[2][kWarp] = {};
  int turns[kWarp] = {};
};

inline thread_local Barrier* block_barrier;
inline thread_local Warp* warp;
inline thread_local int lane;
inline thread_local char* dynamic_shared;

// Every lane of the warp must call it, as on a GPU with a full mask.
template <class T>
T exchange(T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t* const slots =
      warp->slots[warp->turns[lane] ^= 1];  // of the last exchange but one: every lane has read those
  const int lanes = warp->lanes;
  std::memcpy(&slots[lane], &value, sizeof(T));
  warp->barrier.wait();
  if (source >= 0 && source < lanes) std::memcpy(&value, &slots[source], sizeof(T));
  return value;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t,
                   const Arguments&... arguments) {
  const int threads = static_cast<int>(block.x * block.y * block.z);
  const bool grid_fits = grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.y < 65536 && grid.z < 65536;
  if (!grid_fits || threads < 1 || threads > 1024) return cudaErrorInvalidConfiguration;
  Barrier barrier(threads), block_end(threads);
  std::vector<std::unique_ptr<Warp>> warps;
  for (int first = 0; first < threads; first += kWarp) {
    warps.push_back(std::make_unique<Warp>(threads - first < kWarp ? threads - first : kWarp));
  }
  std::vector<float4> memory(shared / sizeof(float4) + 1);
  const auto enter = [&](int t) {
    threadIdx = dim3(t % block.x, t / block.x % block.y, t / (block.x * block.y));
    blockDim = block;
    gridDim = grid;
    block_barrier = &barrier;
    warp = warps[t / kWarp].get();
    lane = t % kWarp;
    dynamic_shared = reinterpret_cast<char*>(memory.data());
  };
  const auto body = [&](int) {
    for (unsigned z = 0; z < grid.z; ++z) {
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = dim3(x, y, z);
          kernel(Parameters(arguments)...);
          block_end.wait();
        }
      }
    }
  };
  run_threads(threads, enter, body);
  return cudaSuccess;
}

}  // namespace kd_emulator

#define KD_LAUNCH(...) ::kd_emulator::launch(__VA_ARGS__)
#define KD_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(::kd_emulator::dynamic_shared)

inline void __syncthreads() { kd_emulator::block_barrier->wait(); }
inline void __syncwarp(unsigned = 0xffffffffu) { kd_emulator::warp->barrier.wait(); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return kd_emulator::exchange(value, source);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return kd_emulator::exchange(value, kd_emulator::lane ^ mask);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int delta) {
  return kd_emulator::exchange(value, kd_emulator::lane + delta);
}

inline int atomicAdd(int* address, int value) { return std::atomic_ref<int>(*address).fetch_add(value); }
template <class T>
T __ldcg(const T* address) {
  return *address;
}

struct __half {
  uint16_t bits;
};
inline float __half2float(__half value) { return static_cast<float>(std::bit_cast<_Float16>(value.bits)); }
inline __half __float2half(float value) { return {std::bit_cast<uint16_t>(static_cast<_Float16>(value))}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 value) {
  return std::bit_cast<float>(uint32_t{value.bits} << 16);
}
inline __nv_bfloat16 __float2bfloat16(float value) {  // to nearest, ties to even
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline double __dmul_rn(double x, double y) { return x * y; }
