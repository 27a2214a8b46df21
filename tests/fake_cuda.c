// A CUDA driver that launches nothing: what Triton's launchers call, and a record of the last launch.
#include <stdint.h>
#include <string.h>

typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned count;
} Config;  // CUlaunchConfig

enum { MOST = 256 };
struct {
  uint64_t function, stream;
  uint32_t launches, grid[3], threads, shared, size;
  uint8_t bytes[8 * MOST];
} fake_last;

// Sizes of the parameters of function f, f's handle less 1; 0 ends them.
static uint8_t sizes[1 << 12][MOST];

int fake_sizes(uint64_t f, const uint8_t* of, unsigned n) {
  if (f == 0 || f > sizeof(sizes) / MOST || n >= MOST) return 1;
  memset(sizes[f - 1], 0, MOST);
  memcpy(sizes[f - 1], of, n);
  return 0;
}

int cuLaunchKernelEx(const Config* config, uint64_t f, void** params, void** extra) {
  if (f == 0 || f > sizeof(sizes) / MOST || extra) return 1;
  fake_last.function = f;
  fake_last.stream = (uint64_t)config->stream;
  memcpy(fake_last.grid, config->grid, sizeof(fake_last.grid));
  fake_last.threads = config->block[0];
  fake_last.shared = config->shared;
  fake_last.size = 0;
  for (int i = 0; sizes[f - 1][i]; ++i) {
    memcpy(fake_last.bytes + fake_last.size, params[i], sizes[f - 1][i]);
    fake_last.size += sizes[f - 1][i];
  }
  ++fake_last.launches;
  return 0;
}

int cuPointerGetAttribute(void* to, int attribute, uint64_t pointer) {
  *(uint64_t*)to = pointer;
  return 0;
}
int cuCtxGetCurrent(void** to) {
  *to = &fake_last;
  return 0;
}
int cuGetErrorString(int error, const char** to) {
  *to = "the fake driver was asked for what it cannot do";
  return 0;
}

#define UNUSED(name) \
  int name(void) { return 999; }
UNUSED(cuCtxGetDevice)
UNUSED(cuCtxGetLimit)
UNUSED(cuCtxSetCurrent)
UNUSED(cuCtxSetLimit)
UNUSED(cuDeviceGet)
UNUSED(cuDeviceGetAttribute)
UNUSED(cuDeviceGetCount)
UNUSED(cuDevicePrimaryCtxRetain)
UNUSED(cuDriverGetVersion)
UNUSED(cuFuncGetAttribute)
UNUSED(cuFuncSetAttribute)
UNUSED(cuFuncSetCacheConfig)
UNUSED(cuInit)
UNUSED(cuModuleGetFunction)
UNUSED(cuModuleLoadData)
UNUSED(cuModuleUnload)
UNUSED(cuStreamIsCapturing)
