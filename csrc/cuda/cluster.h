#pragma once

// Clusters (sm_90 and later): up to 8 blocks that run at once and wait for each other. KD_LAUNCH_CLUSTER
// starts one cluster. Older GPUs have clusters of one block, and so has tests/cuda_emulator.

#include "launch.h"

#ifdef KD_CUDA_EMULATOR

#define KD_LAUNCH_CLUSTER(...) KD_LAUNCH(__VA_ARGS__)

namespace kd {

template <auto kKernel>
int cluster_blocks(int) {
  return 1;
}
inline void cluster_barrier() { __syncthreads(); }

}  // namespace kd

#else

#include <atomic>

namespace kd {

constexpr int kClusterBlocks = 8;  // what every GPU with clusters has

inline cudaLaunchConfig_t cluster_config(int blocks, int threads, cudaStream_t stream,
                                         cudaLaunchAttribute* attribute) {
  attribute->id = cudaLaunchAttributeClusterDimension;
  attribute->val.clusterDim.x = static_cast<unsigned>(blocks);
  attribute->val.clusterDim.y = attribute->val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = 1;
  return config;
}

template <class... Parameters>
int probe_cluster(void (*kernel)(Parameters...), int threads, int device) {
  int supported = 0, active = 0;
  cudaFuncAttributes code{};
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config = cluster_config(kClusterBlocks, threads, nullptr, &attribute);
  const bool fits = cudaDeviceGetAttribute(&supported, cudaDevAttrClusterLaunch, device) == cudaSuccess &&
                    supported && cudaFuncGetAttributes(&code, kernel) == cudaSuccess &&
                    code.ptxVersion >= 90 &&
                    cudaOccupancyMaxActiveClusters(&active, kernel, &config) == cudaSuccess && active > 0;
  if (!fits) cudaGetLastError();  // of a question, not of work
  return fits ? kClusterBlocks : 1;
}

// Blocks of `threads` threads that a cluster of a kernel may have; asked once for every device.
template <auto kKernel>
int cluster_blocks(int threads) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return 1;
  int blocks = known[device].load(std::memory_order_relaxed);
  if (blocks == 0) known[device].store(blocks = probe_cluster(kKernel, threads, device));
  return blocks;
}

template <class... Parameters, class... Arguments>
cudaError_t launch_cluster(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t,
                           cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config =
      cluster_config(static_cast<int>(blocks.x), static_cast<int>(threads.x), stream, &attribute);
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

// For all threads of a cluster, or of a block where there is none: what they wrote before is seen after it.
__device__ inline void cluster_barrier() {
  __threadfence();
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}

}  // namespace kd

#define KD_LAUNCH_CLUSTER(...) ::kd::launch_cluster(__VA_ARGS__)
#endif
