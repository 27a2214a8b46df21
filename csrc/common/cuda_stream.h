#pragma once

// Device and stream for the launchers. No torch header, so that nvcc compiles it beside any build of torch.

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

// Part of torch's stable C ABI. Weak: a CPU-only torch lacks it, and the extension must still load there.
extern "C" __attribute__((weak, visibility("default"))) int32_t
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

#define KD_CUDA_CHECK(call)                                                                             \
  do {                                                                                                  \
    const cudaError_t kd_error = (call);                                                                \
    if (kd_error != cudaSuccess) {                                                                      \
      throw std::runtime_error(std::string("kdfast: " #call " failed: ") + cudaGetErrorName(kd_error) + \
                               ", " + cudaGetErrorString(kd_error));                                    \
    }                                                                                                   \
  } while (0)

// After a kernel launch.
#define KD_CUDA_LAUNCH_CHECK() KD_CUDA_CHECK(cudaGetLastError())

namespace kd {

inline cudaStream_t current_stream(int32_t device) {
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error("kdfast: this torch is built without CUDA, so it has no CUDA stream");
  }
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream) != 0) {
    throw std::runtime_error("kdfast: torch gave no CUDA stream for device " + std::to_string(device));
  }
  return static_cast<cudaStream_t>(stream);
}

// Makes `device` current for its lifetime. Costs one thread-local read when it is current already.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    KD_CUDA_CHECK(cudaGetDevice(&before_));
    changed_ = before_ != device;
    if (changed_) KD_CUDA_CHECK(cudaSetDevice(device));
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace kd
