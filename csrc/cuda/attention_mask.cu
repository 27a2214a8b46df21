// Op attention_mask in few launches; formulas: kdfast/reference/attention_mask.py.
//   forward   attention_pool, attention_masks, attention_errors   3 launches
//   backward  attention_gradient                                  1 launch per map
//
// A map is read as rows of neighbouring columns: channels x pixels (planar) or pixels x channels. A block has
// a chunk of pixels and all channels; its warps take rows in turns, its lanes 16 bytes of columns each. Sums
// over channels are final, sums over pixels are left per chunk and added in the order of the chunks. Bytes
// for B C P elements of e bytes: pool 2 e, errors 2 e, gradient 3 e, and C floats per chunk and map: 1/128 to
// 1/64 of it.

#include "attention_mask.h"
#include "attention_passes.cuh"
#include "common/rounding.h"

namespace kd::attention {
namespace {

int64_t chunks_of(const kd_maps& m) {
  const int64_t pixels = m.planar ? 32 * (m.dtype == KD_MAP_F32 ? 4 : 8) : kRowsPerChunk;
  return ceil_div(m.pixels, pixels);
}

Sizes sizes_of(const kd_maps& m) { return {m.batch, m.channels, m.pixels, chunks_of(m), m.planar != 0}; }

Matrix matrix(const kd_map& m, const kd_maps& s) {
  Matrix out{m.data, m.image_stride, s.planar ? m.channel_stride : m.pixel_stride,
             s.planar ? m.pixel_stride : m.channel_stride, false};
  const int64_t vector = s.dtype == KD_MAP_F32 ? 4 : 8;
  out.vectors = out.column == 1 && out.row % vector == 0 && out.image % vector == 0 &&
                reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
  return out;
}

// Consecutive pieces of the workspace; every piece starts at 16 bytes.
struct Workspace {
  float* base;
  int64_t used = 0;
  float* take(int64_t floats) {
    float* const at = base + used;
    used += round_up(floats, 4);
    return at;
  }
};

dim3 grid(int64_t x, int64_t y, int64_t z = 1) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

template <class T>
cudaError_t launch_pool(const PoolPlan& p, int maps, bool with_signed, cudaStream_t stream) {
  const auto kernel = with_signed ? attention_pool<T, true> : attention_pool<T, false>;
  return KD_LAUNCH(kernel, grid(p.sizes.chunks, p.sizes.batch, maps), dim3(kThreads), 0, stream, p);
}

template <class T>
cudaError_t launch_errors(const ErrorPlan& p, cudaStream_t stream) {
  const auto kernel = p.channel_error ? attention_errors<T, true> : attention_errors<T, false>;
  return KD_LAUNCH(kernel, grid(p.sizes.chunks, p.sizes.batch), dim3(kThreads), 0, stream, p);
}

template <class F>
cudaError_t dispatch(int32_t dtype, const F& run) {
  switch (dtype) {
    case KD_MAP_F32:
      return run(float{});
    case KD_MAP_F16:
      return run(__half{});
    case KD_MAP_BF16:
      return run(__nv_bfloat16{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace kd::attention

using namespace kd::attention;

extern "C" {

int64_t kd_attention_workspace(const kd_maps* m, int32_t maps, int32_t kinds) {
  const int64_t chunks = m->batch * chunks_of(*m);
  return 64 + 2 * m->batch + 2 * chunks + maps * kinds * m->batch * (m->pixels + m->channels) +
         (maps > 0 ? maps * kinds : 1) * chunks * m->channels;
}

int32_t kd_attention_pool(const kd_maps* m, const kd_map* x, int32_t with_signed, float* spatial,
                          float* channel, float* workspace, void* stream) {
  const Sizes s = sizes_of(*m);
  Workspace w{workspace};
  float* const second = spatial + s.batch * s.pixels;
  int* const counter = reinterpret_cast<int*>(w.take(1));
  float* const parts = w.take((1 + with_signed) * s.batch * s.chunks * s.channels);
  const PoolPlan p = {s, {matrix(*x, *m), {}}, {{spatial, nullptr}, {second, nullptr}}, parts, counter};
  const auto on = static_cast<cudaStream_t>(stream);
  const cudaError_t error =
      dispatch(m->dtype, [&](auto zero) { return launch_pool<decltype(zero)>(p, 1, with_signed != 0, on); });
  if (error != cudaSuccess) return error;
  const float* const from = parts;
  return KD_LAUNCH(attention_channels, grid(s.batch, 1, 1 + with_signed), dim3(kThreads), 0, on, s, from,
                   channel);
}

int32_t kd_attention_forward(const kd_maps* m, const kd_map* student, const kd_map* teacher,
                             const kd_map* compared, const kd_attention* set, float* loss, float* terms,
                             float* spatial, float* channel, float* spatial_mask, float* channel_mask,
                             float* workspace, void* stream) {
  const Sizes s = sizes_of(*m);
  const bool with_signed = set->with_signed != 0;
  Workspace w{workspace};
  int* const counter = reinterpret_cast<int*>(w.take(1));
  float *const squares = w.take(2 * s.batch), *const sums = w.take(s.batch * s.chunks);
  float* const parts = w.take(2 * (1 + with_signed) * s.batch * s.chunks * s.channels);
  Pooled pooled[2];
  float* const out[2] = {spatial, channel};
  for (int which = 0; which < 2; ++which) {
    const int64_t n = s.batch * (which ? s.channels : s.pixels);
    // Where both maps are kept, what is compared comes last, after means of |x| if masks pass gradients on.
    float* kept = set->pairs ? out[which] : nullptr;
    const bool keeps_absolute = kept && (!with_signed || set->through);
    float* const absolute = keeps_absolute ? kept : w.take(2 * n);
    float* const plain = !with_signed ? absolute : kept ? kept + (keeps_absolute ? 2 * n : 0) : w.take(2 * n);
    pooled[which] = {{absolute, absolute + n}, {plain, plain + n}};
  }
  const PoolPlan pool = {s, {matrix(*student, *m), matrix(*teacher, *m)}, pooled[0], parts, counter};
  const MaskPlan masks = {s,
                          {pooled[0], pooled[1]},
                          {set->pairs ? nullptr : spatial, set->pairs ? nullptr : channel},
                          {spatial_mask, channel_mask},
                          squares,
                          parts,
                          set->temperature,
                          set->softmax_of_sum != 0,
                          set->channel_mask != 0,
                          with_signed};
  const bool through = set->through != 0;
  const ErrorPlan errors = {s,
                            matrix(*compared, *m),
                            matrix(*teacher, *m),
                            spatial_mask,
                            channel_mask,
                            sums,
                            parts,
                            through ? spatial_mask + s.batch * s.pixels : nullptr,
                            through ? channel_mask + s.batch * s.channels : nullptr,
                            set->transfer_weight != 0.0f ? squares : nullptr,
                            loss,
                            terms,
                            set->transfer_weight,
                            set->masked_weight,
                            counter};
  const auto on = static_cast<cudaStream_t>(stream);
  return dispatch(m->dtype, [&](auto zero) {
    using T = decltype(zero);
    cudaError_t error = launch_pool<T>(pool, 2, with_signed, on);
    if (error == cudaSuccess)
      error = KD_LAUNCH(attention_masks, grid(s.batch, 2), dim3(kThreads), 0, on, masks);
    return error == cudaSuccess ? launch_errors<T>(errors, on) : error;
  });
}

int32_t kd_masked_distance(const kd_maps* m, const kd_map* x, const kd_map* y, const float* spatial_mask,
                           const float* channel_mask, float* terms, float* workspace, void* stream) {
  const Sizes s = sizes_of(*m);
  Workspace w{workspace};
  int* const counter = reinterpret_cast<int*>(w.take(1));
  ErrorPlan p{};
  p.sizes = s, p.x = matrix(*x, *m), p.y = matrix(*y, *m);
  p.spatial_mask = spatial_mask, p.channel_mask = channel_mask;
  p.sums = w.take(s.batch * s.chunks);
  p.terms = terms, p.masked_weight = 1.0f, p.counter = counter;
  const auto on = static_cast<cudaStream_t>(stream);
  const cudaError_t error = KD_LAUNCH(attention_clear, dim3(1), dim3(1), 0, on, counter);
  if (error != cudaSuccess) return error;
  return dispatch(m->dtype, [&](auto zero) { return launch_errors<decltype(zero)>(p, on); });
}

int32_t kd_attention_backward(const kd_maps* m, const kd_map* x, const kd_map* other, const kd_map* out,
                              const kd_attention_parts* parts, void* stream) {
  const Sizes s = sizes_of(*m);
  const GradientPlan p = {s,      matrix(*x, *m),  matrix(other ? *other : *x, *m), matrix(*out, *m),
                          *parts, other != nullptr};
  const int64_t rows = s.planar ? s.channels : kRowsPerChunk;
  const dim3 blocks = grid(s.chunks, kd::ceil_div(rows, kGradientRows), s.batch);
  return dispatch(m->dtype, [&](auto zero) {
    return KD_LAUNCH(attention_gradient<decltype(zero)>, blocks, dim3(kThreads), 0,
                     static_cast<cudaStream_t>(stream), p);
  });
}
}
