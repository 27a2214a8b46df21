#pragma once

// How a .cu file meets the CUDA runtime: KD_LAUNCH starts a kernel and gives a cudaError_t, KD_DYNAMIC_SHARED
// names the block's dynamic shared memory. tests/cuda_emulator/cuda_emulator.h defines both for a plain C++
// compiler.

#ifndef KD_CUDA_EMULATOR
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>

namespace kd {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                   const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace kd

#define KD_LAUNCH(...) ::kd::launch(__VA_ARGS__)
#define KD_DYNAMIC_SHARED(type, name)             \
  extern __shared__ __align__(16) char name##_[]; \
  type* name = reinterpret_cast<type*>(name##_)
#endif
