// torch's side of the CUDA attention_mask ops: checks, maps in place, outputs, workspace, stream.

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "common/cuda_stream.h"
#include "common/dtype.h"
#include "cuda/attention_mask.h"
#include "cuda/attention_mask_ops.h"

namespace kd {
namespace {

using torch::stable::Tensor;
using Given = std::optional<Tensor>;

constexpr int64_t kMaxBatch = 65535;  // kdfast/kernels/attention_mask_cuda.py holds the same number

int32_t dtype_code(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return KD_MAP_F32;
    case ScalarType::Half:
      return KD_MAP_F16;
    case ScalarType::BFloat16:
      return KD_MAP_BF16;
    default:
      KD_CHECK(false, "attention_mask: the cuda backend takes float32, float16 or bfloat16, got maps of ",
               toString(x.scalar_type()));
  }
  return KD_MAP_F32;
}

kd_maps sizes_of(const Tensor& x) {
  KD_CHECK(x.dim() == 4 && x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0,
           "attention_mask: need maps [B, C, H, W] with channels and pixels, got ", x.dim(), " axes");
  KD_CHECK(x.size(0) > 0 && x.size(0) <= kMaxBatch, "attention_mask: the cuda backend takes 1 to ", kMaxBatch,
           " images, got ", x.size(0));
  const bool channels_last = x.stride(1) == 1 && x.size(2) * x.size(3) > 1 && x.size(1) > 1;
  return {x.size(0), x.size(1), x.size(2) * x.size(3), dtype_code(x), !channels_last};
}

// Whether pixels lie along one stride; a map where they do not is copied.
bool is_flat(const Tensor& x) {
  return x.size(2) == 1 || x.size(3) == 1 || x.stride(2) == x.size(3) * x.stride(3);
}
Tensor flat(const Tensor& x) { return is_flat(x) ? x : torch::stable::contiguous(x); }

// The kernels write `out` alone.
kd_map map_of(const Tensor& x) {
  const int64_t pixel = x.size(3) > 1 ? x.stride(3) : x.size(2) > 1 ? x.stride(2) : 1;
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), pixel};
}

void check_like(const Tensor& x, const Tensor& y, const char* name) {
  KD_CHECK(y.is_cuda() && x.get_device_index() == y.get_device_index(), "attention_mask: ", name,
           " must be on the device of the other maps");
  KD_CHECK(x.scalar_type() == y.scalar_type() && y.dim() == 4, "attention_mask: ", name,
           " must be a map of the dtype of the others");
  for (int a = 0; a < 4; ++a) {
    KD_CHECK(x.size(a) == y.size(a), "attention_mask: ", name,
             " must have the shape of the other maps, axis ", a, " has ", y.size(a), " and ", x.size(a));
  }
}

Tensor empty(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

float* floats(const Tensor& v) { return static_cast<float*>(v.mutable_data_ptr()); }

// A small input: contiguous float32 of a multiple of `count` elements, null where not given.
class Small {
 public:
  Small(const Given& v, const char* name, int64_t count) {
    if (!v.has_value()) return;
    KD_CHECK(v->is_cuda() && v->scalar_type() == ScalarType::Float && v->numel() % count == 0,
             "attention_mask: ", name, " must be float32 on the maps' device and fit them, got ", v->numel(),
             " elements");
    tensor_ = torch::stable::contiguous(*v);
  }
  const float* get() const {
    return tensor_.has_value() ? static_cast<const float*>(tensor_->const_data_ptr()) : nullptr;
  }

 private:
  Given tensor_;
};

void check(int32_t code) { KD_CUDA_CHECK(static_cast<cudaError_t>(code)); }

}  // namespace

std::tuple<Tensor, Tensor> attention_pool_cuda(const Tensor& x, bool with_signed) {
  const kd_maps sizes = sizes_of(x);
  const DeviceGuard guard(x.get_device_index());
  const int64_t kinds = 1 + with_signed;
  const Tensor spatial = empty(x, {kinds, x.size(0), 1, x.size(2), x.size(3)}),
               channel = empty(x, {kinds, x.size(0), x.size(1)}),
               workspace = empty(x, {kd_attention_workspace(&sizes, 1, static_cast<int32_t>(kinds))}),
               source = flat(x);
  const kd_map map = map_of(source);
  check(kd_attention_pool(&sizes, &map, with_signed, floats(spatial), floats(channel), floats(workspace),
                          current_stream(x.get_device_index())));
  return {spatial, channel};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_mask_cuda(
    const Tensor& student, const Tensor& teacher, Given adapted, double temperature, double transfer_weight,
    double masked_weight, bool softmax_of_sum, bool channel_mask, bool with_signed, bool through,
    bool pairs) {
  const kd_maps sizes = sizes_of(student);
  check_like(student, teacher, "teacher");
  if (adapted.has_value()) check_like(student, *adapted, "adapted");
  KD_CHECK(pairs || !through, "attention_mask: through needs pairs");
  const DeviceGuard guard(student.get_device_index());
  const int64_t b = student.size(0), c = student.size(1), h = student.size(2), w = student.size(3);
  const int64_t kinds = 1 + (with_signed && through), maps = 1 + pairs, kept = 1 + through;
  const Tensor loss = empty(student, {}), terms = empty(student, {2, 3}),
               spatial = empty(student, {kinds, maps, b, 1, h, w}),
               channel = empty(student, {kinds, maps, b, c}),
               spatial_mask = empty(student, {kept, b, 1, h, w}),
               channel_weights = empty(student, {kept, b, c}),
               workspace = empty(student, {kd_attention_workspace(&sizes, 2, 1 + with_signed)});
  const Tensor s = flat(student), t = flat(teacher), z = adapted.has_value() ? flat(*adapted) : s;
  const kd_map maps_[3] = {map_of(s), map_of(t), map_of(z)};
  const kd_attention settings{static_cast<float>(temperature),
                              static_cast<float>(transfer_weight),
                              static_cast<float>(masked_weight),
                              softmax_of_sum,
                              channel_mask,
                              with_signed,
                              through,
                              pairs};
  check(kd_attention_forward(&sizes, &maps_[0], &maps_[1], &maps_[2], &settings, floats(loss), floats(terms),
                             floats(spatial), floats(channel), floats(spatial_mask), floats(channel_weights),
                             floats(workspace), current_stream(student.get_device_index())));
  return {loss, terms, spatial, channel, spatial_mask, channel_weights};
}

Tensor masked_distance_cuda(const Tensor& x, const Tensor& y, const Tensor& spatial_mask,
                            const Tensor& channel_mask) {
  const kd_maps sizes = sizes_of(x);
  check_like(x, y, "y");
  const DeviceGuard guard(x.get_device_index());
  const Small spatial(spatial_mask, "spatial_mask", sizes.batch * sizes.pixels),
      channel(channel_mask, "channel_mask", sizes.batch * sizes.channels);
  KD_CHECK(spatial_mask.numel() == sizes.batch * sizes.pixels &&
               channel_mask.numel() == sizes.batch * sizes.channels,
           "masked_distance: spatial_mask must be [B, 1, H, W] and channel_mask [B, C]");
  const Tensor terms = empty(x, {2, 3}), workspace = empty(x, {kd_attention_workspace(&sizes, 0, 1)});
  const Tensor xs = flat(x), ys = flat(y);
  const kd_map maps[2] = {map_of(xs), map_of(ys)};
  check(kd_masked_distance(&sizes, &maps[0], &maps[1], spatial.get(), channel.get(), floats(terms),
                           floats(workspace), current_stream(x.get_device_index())));
  return terms;
}

Tensor attention_mask_backward_cuda(const Tensor& x, Given other, Given grad_loss, Given terms, Given spatial,
                                    Given channel, Given spatial_mask, Given channel_mask, Given grad_spatial,
                                    Given grad_channel, int64_t side, bool with_signed) {
  const kd_maps sizes = sizes_of(x);
  if (other.has_value()) check_like(x, *other, "other");
  KD_CHECK(!(other.has_value() || spatial.has_value()) || (grad_loss.has_value() && terms.has_value()),
           "attention_mask_backward: other, spatial and channel need grad_loss and terms");
  const DeviceGuard guard(x.get_device_index());
  const int64_t pixels = sizes.batch * sizes.pixels, channels = sizes.batch * sizes.channels;
  const Small small[] = {{grad_loss, "grad_loss", 1},
                         {terms, "terms", 6},
                         {spatial, "spatial", pixels},
                         {channel, "channel", channels},
                         {spatial_mask, "spatial_mask", pixels},
                         {channel_mask, "channel_mask", channels},
                         {grad_spatial, "grad_spatial", pixels},
                         {grad_channel, "grad_channel", channels}};
  const int64_t maps = spatial.has_value() ? spatial->size(1) : 0, kinds = maps ? spatial->size(0) : 0;
  const int64_t given = grad_spatial.has_value() ? grad_spatial->size(0) : 0;
  KD_CHECK(given <= 1 + with_signed, "attention_mask_backward: grad_spatial has ", given,
           " kinds of means, at most ", 1 + with_signed, " are compared");
  const kd_attention_parts parts{small[0].get(),
                                 small[1].get(),
                                 maps ? small[2].get() + (kinds - 1) * maps * pixels : nullptr,
                                 maps ? small[3].get() + (kinds - 1) * maps * channels : nullptr,
                                 small[4].get(),
                                 small[5].get(),
                                 small[6].get(),
                                 small[7].get(),
                                 static_cast<int32_t>(maps),
                                 static_cast<int32_t>(given),
                                 static_cast<int32_t>(side),
                                 with_signed};
  const Tensor out = torch::stable::empty_like(x);
  const Tensor xs = flat(x), ys = other.has_value() ? flat(*other) : xs;
  const bool fits = is_flat(out);
  const Tensor written = fits ? out : torch::stable::contiguous(out);
  const kd_map maps_[3] = {map_of(xs), map_of(ys), map_of(written)};
  check(kd_attention_backward(&sizes, &maps_[0], other.has_value() ? &maps_[1] : nullptr, &maps_[2], &parts,
                              current_stream(x.get_device_index())));
  if (!fits) {
    Tensor result = out;
    torch::stable::copy_(result, written);
  }
  return out;
}

}  // namespace kd
