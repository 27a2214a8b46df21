#pragma once

// Launchers of attention_mask.cu. Plain C types: neither torch nor CUDA headers are needed to call them.
// Every function that launches returns a cudaError_t (0: success) and only enqueues work on `stream`.

#include <cstdint>

extern "C" {

enum kd_map_dtype { KD_MAP_F32 = 0, KD_MAP_F16 = 1, KD_MAP_BF16 = 2 };

// data[image * image_stride + channel * channel_stride + pixel * pixel_stride], strides in elements.
struct kd_map {
  void* data;
  int64_t image_stride, channel_stride, pixel_stride;
};

struct kd_maps {
  int64_t batch, channels, pixels;
  int32_t dtype;   // kd_map_dtype of all maps
  int32_t planar;  // bool: pixels are neighbours in memory, else channels
};

struct kd_attention {
  float temperature, transfer_weight, masked_weight;
  int32_t softmax_of_sum, channel_mask, with_signed, through, pairs;  // bools; through needs pairs
};

// float32 elements of the workspace of any of these calls; it need not be initialised.
int64_t kd_attention_workspace(const kd_maps* sizes, int32_t maps, int32_t kinds);

// spatial [kinds, B, P], channel [kinds, B, C] of means of |x|, with `with_signed` also of x.
int32_t kd_attention_pool(const kd_maps* sizes, const kd_map* x, int32_t with_signed, float* spatial,
                          float* channel, float* workspace, void* stream);

// loss [], terms [2, 3], spatial and channel [kinds, pairs ? 2 : 1, B, P | C] with kinds = 2 where both
// with_signed and through, else 1; spatial_mask and channel_mask [1 + through, B, P | C].
int32_t kd_attention_forward(const kd_maps* sizes, const kd_map* student, const kd_map* teacher,
                             const kd_map* compared, const kd_attention* settings, float* loss, float* terms,
                             float* spatial, float* channel, float* spatial_mask, float* channel_mask,
                             float* workspace, void* stream);

// terms [2, 3] of the distance under given masks.
int32_t kd_masked_distance(const kd_maps* sizes, const kd_map* x, const kd_map* y, const float* spatial_mask,
                           const float* channel_mask, float* terms, float* workspace, void* stream);

// What a gradient is made of; null: no such part. `spatial` and `channel`: the kind that L_AT compares, of
// `maps` maps (2: student and teacher, 1: their difference).
struct kd_attention_parts {
  const float *grad_loss, *terms, *spatial, *channel, *spatial_mask, *channel_mask, *grad_spatial,
      *grad_channel;
  int32_t maps, given, side, with_signed;
};

// `other` null where L_AM has no part.
int32_t kd_attention_backward(const kd_maps* sizes, const kd_map* x, const kd_map* other, const kd_map* out,
                              const kd_attention_parts* parts, void* stream);
}
