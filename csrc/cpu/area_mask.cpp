// Op area_mask on the CPU: boxes to a mask that counts them. Formula: kdfast/reference/masked_error.py.

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/check.h"
#include "cpu/masked_error_ops.h"

namespace kd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor area_mask_cpu(const Tensor& boxes, int64_t height, int64_t width, int64_t multiplicity) {
  KD_CHECK(boxes.dim() == 3 && boxes.size(2) == 4 && boxes.scalar_type() == ScalarType::Long &&
               boxes.is_contiguous(),
           "area_mask: boxes must be contiguous int64 [B, K, 4]");
  KD_CHECK(height >= 0 && width >= 0, "area_mask: got a map of ", height, " x ", width);
  KD_CHECK(0 <= multiplicity && multiplicity <= 2, "area_mask: unknown multiplicity ", multiplicity);
  const int64_t batch = boxes.size(0), count = boxes.size(1), pixels = height * width;
  Tensor mask = torch::stable::new_empty(boxes, {batch, 1, height, width}, ScalarType::Float);
  const auto* box = static_cast<const int64_t*>(boxes.const_data_ptr());
  auto* image = static_cast<float*>(mask.data_ptr());
  for (int64_t b = 0; b < batch; ++b, image += pixels) {
    std::fill_n(image, pixels, 0.0f);
    for (int64_t k = 0; k < count; ++k, box += 4) {  // x1, y1, x2, y2, both ends inside
      const int64_t left = std::max<int64_t>(box[0], 0), top = std::max<int64_t>(box[1], 0);
      const int64_t right = std::min(box[2], width - 1), bottom = std::min(box[3], height - 1);
      for (int64_t r = top; r <= bottom; ++r) {
        for (int64_t c = left; c <= right; ++c) image[r * width + c] += 1;
      }
    }
    if (multiplicity == 0) continue;
    for (int64_t p = 0; p < pixels; ++p) {
      image[p] = multiplicity == 1 ? image[p] * image[p] : std::min(image[p], 1.0f);
    }
  }
  return mask;
}

}  // namespace kd
