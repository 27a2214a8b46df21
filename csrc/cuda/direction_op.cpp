// torch's side of the CUDA direction op: checks, rows, outputs, workspace, stream.

#include "common/cuda_stream.h"
#include "common/direction_ops.h"
#include "cuda/direction.h"
#include "cuda/rows_op.h"

namespace kd {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

class Problem {
 public:
  Problem(const Tensor& student, const OptionalTensor& teacher, const Tensor& centers,
          const OptionalTensor& labels, int64_t ignore_index, bool balanced)
      : student_(student), teacher_(teacher ? *teacher : student), centers_(centers) {
    KD_CHECK(student.dim() == 2 && centers.dim() == 2 && student.size(1) == centers.size(1),
             "direction: student and centers need equally many columns");
    KD_CHECK(!teacher || (teacher->dim() == 2 && teacher->size(0) == student.size(0) &&
                          teacher->size(1) == student.size(1)),
             "direction: teacher needs the shape of student");
    const auto same_device = [&](const Tensor& x) {
      return x.is_cuda() && x.get_device_index() == student.get_device_index();
    };
    KD_CHECK(same_device(centers) && (!teacher || same_device(*teacher)) && (!labels || same_device(*labels)),
             "direction: all tensors must be on one device");
    KD_CHECK(labels || centers.size(0) == student.size(0),
             "direction: without labels, centers need one row per sample");
    KD_CHECK(labels || !balanced, "direction: balanced needs labels");
    KD_CHECK(!labels || (labels->scalar_type() == ScalarType::Long && labels->dim() == 1 &&
                         labels->size(0) == student.size(0)),
             "direction: labels must be int64 [", student.size(0), "]");
    KD_CHECK(!teacher || teacher->scalar_type() == student.scalar_type(),
             "direction: the cuda backend needs student and teacher of one dtype, got ",
             toString(student.scalar_type()), " and ", toString(teacher->scalar_type()));
    KD_CHECK(centers.scalar_type() == student.scalar_type() ||
                 (centers.scalar_type() == ScalarType::Float && student.scalar_type() != ScalarType::Double),
             "direction: the cuda backend needs centers of the student's dtype or float32, got ",
             toString(centers.scalar_type()));
    get.student = student_.get(), get.teacher = teacher_.get(), get.centers = centers_.get();
    if (!teacher) get.teacher.data = nullptr;
    if (labels) {
      get.labels = static_cast<const int64_t*>(labels->const_data_ptr());
      get.label_stride = labels->stride(0);
    }
    get.rows = student.size(0), get.columns = student.size(1), get.classes = centers.size(0);
    get.ignore_index = ignore_index, get.balanced = balanced;
    get.dtype = dtype_code(student, "student"), get.center_dtype = dtype_code(centers, "centers");
  }

  kd_direction_problem get{};

 private:
  InputRows student_, teacher_, centers_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> direction_cuda(const Tensor& student, const OptionalTensor& teacher,
                                                  const Tensor& centers, const OptionalTensor& labels,
                                                  int64_t ignore_index, bool balanced) {
  const DeviceGuard guard(student.get_device_index());
  const Problem problem(student, teacher, centers, labels, ignore_index, balanced);
  const ScalarType dtype = problem.get.dtype == KD_F64 ? ScalarType::Double : ScalarType::Float;
  const int64_t rows = student.size(0);
  const Tensor loss = torch::stable::new_empty(student, {}, dtype),
               total = torch::stable::new_empty(student, {}, dtype),
               factors = torch::stable::new_empty(student, {rows, 3}, dtype),
               parts = torch::stable::new_empty(student, {rows, 2}, dtype);
  KD_CUDA_CHECK(static_cast<cudaError_t>(kd_direction_forward(
      &problem.get, loss.mutable_data_ptr(), factors.mutable_data_ptr(), total.mutable_data_ptr(),
      parts.mutable_data_ptr(), current_stream(student.get_device_index()))));
  return {loss, factors, total};
}

std::tuple<Tensor, Tensor> direction_backward_cuda(const Tensor& grad, const Tensor& student,
                                                   const OptionalTensor& teacher, const Tensor& centers,
                                                   const OptionalTensor& labels, const Tensor& factors,
                                                   const Tensor& total, int64_t ignore_index, bool balanced,
                                                   bool need_student, bool need_teacher) {
  const DeviceGuard guard(student.get_device_index());
  const Problem problem(student, teacher, centers, labels, ignore_index, balanced);
  KD_CHECK(grad.scalar_type() == factors.scalar_type(), "direction_backward: grad must be ",
           toString(factors.scalar_type()), ", got ", toString(grad.scalar_type()));
  const OutputRows grad_student(student, need_student),
      grad_teacher(teacher ? *teacher : student, need_teacher && teacher);
  KD_CUDA_CHECK(static_cast<cudaError_t>(kd_direction_backward(
      &problem.get, grad.const_data_ptr(), factors.const_data_ptr(), total.const_data_ptr(),
      grad_student.get(), grad_teacher.get(), current_stream(student.get_device_index()))));
  return {grad_student.result(), grad_teacher.result()};
}

}  // namespace kd
