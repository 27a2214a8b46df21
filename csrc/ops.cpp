// Op name -> C++ function, per device. Schemas and fakes live in kdfast/ops/<op>.py, so an op exists without
// this file. To add one: declare its function below (definition in cpu/<op>.cpp or cuda/<op>.cpp) and give it
// a line in the table:
//   m.impl("gram", TORCH_BOX(&kd::gram_cpu));

#include <torch/csrc/stable/library.h>

#include "cpu/direction_ops.h"
#include "cpu/gram_ops.h"

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("direction", TORCH_BOX(&kd::direction_cpu));
  m.impl("direction_backward", TORCH_BOX(&kd::direction_backward_cpu));
  m.impl("gram", TORCH_BOX(&kd::gram_cpu));
  m.impl("gram_backward", TORCH_BOX(&kd::gram_backward_cpu));
}

#ifdef KD_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(kdfast, CUDA, m) { (void)m; }
#endif
