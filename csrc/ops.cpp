// Op name -> C++ function, per device. Schemas and fakes live in kdfast/ops/<op>.py, so an op exists without
// this file. To add one: declare its function below (definition in cpu/<op>.cpp or cuda/<op>.cpp) and give it
// a line in the table:
//   m.impl("gram", TORCH_BOX(&kd::gram_cpu));

#include <torch/csrc/stable/library.h>

#include "common/direction_ops.h"
#include "common/logits_ops.h"
#include "cpu/affinity_ops.h"
#include "cpu/attention_mask_ops.h"
#include "cpu/criss_cross_ops.h"
#include "cpu/dot_product_ops.h"
#include "cpu/feature_augment_ops.h"
#include "cpu/gram_ops.h"
#include "cpu/masked_error_ops.h"
#include "cpu/patch_gram.h"
#include "cpu/projector_ops.h"
#include "cpu/result.h"
#include "cpu/softmax_affinity_ops.h"
#ifdef KD_WITH_CUDA
#include "cuda/attention_mask_ops.h"
#include "cuda/gram_ops.h"
#endif

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("affinity", TORCH_BOX(&kd::affinity_cpu));
  m.impl("affinity_backward", TORCH_BOX(&kd::affinity_backward_cpu));
  m.impl("attention_mask", TORCH_BOX(&kd::attention_mask_cpu));
  m.impl("attention_mask_backward", TORCH_BOX(&kd::attention_mask_backward_cpu));
  m.impl("attention_mask_with_gradient", TORCH_BOX(&kd::attention_mask_with_gradient_cpu));
  m.impl("attention_pool", TORCH_BOX(&kd::attention_pool_cpu));
  m.impl("masked_distance", TORCH_BOX(&kd::masked_distance_cpu));
  m.impl("criss_cross", TORCH_BOX(&kd::criss_cross_cpu));
  m.impl("criss_cross_backward", TORCH_BOX(&kd::criss_cross_backward_cpu));
  m.impl("direction", TORCH_BOX(&kd::direction_cpu));
  m.impl("direction_backward", TORCH_BOX(&kd::direction_backward_cpu));
  m.impl("direction_with_gradient", TORCH_BOX(&kd::direction_with_gradient_cpu));
  m.impl("dot_product", TORCH_BOX(&kd::dot_product_cpu));
  m.impl("dot_product_backward", TORCH_BOX(&kd::dot_product_backward_cpu));
  m.impl("feature_augment", TORCH_BOX(&kd::feature_augment_cpu));
  m.impl("feature_augment_backward", TORCH_BOX(&kd::feature_augment_backward_cpu));
  m.impl("gram", TORCH_BOX(&kd::gram_cpu));
  m.impl("gram_backward", TORCH_BOX(&kd::gram_backward_cpu));
  m.impl("gram_with_gradient", TORCH_BOX(&kd::gram_with_gradient_cpu));
  m.impl("logits", TORCH_BOX(&kd::logits_cpu));
  m.impl("logits_backward", TORCH_BOX(&kd::logits_backward_cpu));
  m.impl("logits_with_gradient", TORCH_BOX(&kd::logits_with_gradient_cpu));
  m.impl("area_mask", TORCH_BOX(&kd::area_mask_cpu));
  m.impl("masked_error", TORCH_BOX(&kd::masked_error_cpu));
  m.impl("masked_error_backward", TORCH_BOX(&kd::masked_error_backward_cpu));
  m.impl("masked_error_with_gradient", TORCH_BOX(&kd::masked_error_with_gradient_cpu));
  m.impl("patch_gram", TORCH_BOX(&kd::patch_gram_cpu));
  m.impl("patch_gram_backward", TORCH_BOX(&kd::patch_gram_backward_cpu));
  m.impl("projector", TORCH_BOX(&kd::projector_cpu));
  m.impl("projector_backward", TORCH_BOX(&kd::projector_backward_cpu));
  m.impl("result", TORCH_BOX(&kd::result_cpu));
  m.impl("softmax_affinity", TORCH_BOX(&kd::softmax_affinity_cpu));
  m.impl("softmax_affinity_backward", TORCH_BOX(&kd::softmax_affinity_backward_cpu));
}

#ifdef KD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(kdfast, CUDA, m) {
  m.impl("attention_mask", TORCH_BOX(&kd::attention_mask_cuda));
  m.impl("attention_mask_backward", TORCH_BOX(&kd::attention_mask_backward_cuda));
  m.impl("attention_pool", TORCH_BOX(&kd::attention_pool_cuda));
  m.impl("masked_distance", TORCH_BOX(&kd::masked_distance_cuda));
  m.impl("direction", TORCH_BOX(&kd::direction_cuda));
  m.impl("direction_backward", TORCH_BOX(&kd::direction_backward_cuda));
  m.impl("gram", TORCH_BOX(&kd::gram_cuda));
  m.impl("gram_backward", TORCH_BOX(&kd::gram_backward_cuda));
  m.impl("logits", TORCH_BOX(&kd::logits_cuda));
  m.impl("logits_backward", TORCH_BOX(&kd::logits_backward_cuda));
}
#endif
