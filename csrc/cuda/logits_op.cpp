// torch's side of the CUDA logits op: checks, rows, outputs, workspace, stream.

#include "common/cuda_stream.h"
#include "common/logits_ops.h"
#include "cuda/logits.h"
#include "cuda/rows_op.h"

namespace kd {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

class Problem {
 public:
  Problem(const Tensor& student, const Tensor& teacher, const OptionalTensor& labels, int64_t kind,
          double alpha, double beta, double temperature, int64_t ignore_index)
      : student_(checked(student, teacher)), teacher_(teacher) {
    KD_CHECK(KD_LOGITS_KL <= kind && kind <= KD_LOGITS_DIST, "logits: unknown kind ", kind);
    KD_CHECK(student.scalar_type() == teacher.scalar_type(),
             "logits: the cuda backend needs student and teacher of one dtype, got ",
             toString(student.scalar_type()), " and ", toString(teacher.scalar_type()));
    get.student = student_.get(), get.teacher = teacher_.get();
    get.classes = student.size(student.dim() - 1);
    KD_CHECK(get.classes > 0, "logits: need at least one class");
    get.rows = student.numel() / get.classes;
    get.ignore_index = ignore_index, get.alpha = alpha, get.beta = beta, get.temperature = temperature;
    get.kind = static_cast<int32_t>(kind), get.dtype = dtype_code(student, "student");
    KD_CHECK(labels || (kind != KD_LOGITS_DKD && kind != KD_LOGITS_NKD), "logits: this kind needs labels");
    if (!labels) return;
    KD_CHECK(labels->is_cuda() && labels->get_device_index() == student.get_device_index() &&
                 labels->scalar_type() == ScalarType::Long && labels->numel() == get.rows,
             "logits: labels must be int64, one for each of ", get.rows,
             " rows, on the student's device, got ", labels->numel(), " of ",
             toString(labels->scalar_type()));
    labels_ = torch::stable::contiguous(*labels);
    get.labels = static_cast<const int64_t*>(labels_->const_data_ptr());
  }

  kd_logits_problem get{};

 private:
  static const Tensor& checked(const Tensor& student, const Tensor& teacher) {
    KD_CHECK(student.dim() >= 1 && student.dim() == teacher.dim(), "logits: student has ", student.dim(),
             " axes, teacher ", teacher.dim());
    for (int64_t a = 0; a < student.dim(); ++a) {
      KD_CHECK(student.size(a) == teacher.size(a), "logits: axis ", a, " of student has ", student.size(a),
               ", of teacher ", teacher.size(a));
    }
    KD_CHECK(teacher.is_cuda() && teacher.get_device_index() == student.get_device_index(),
             "logits: student and teacher must be on one device");
    return student;
  }

  InputRows student_, teacher_;
  OptionalTensor labels_;
};

}  // namespace

std::tuple<Tensor, Tensor> logits_cuda(const Tensor& student, const Tensor& teacher,
                                       const OptionalTensor& labels, int64_t kind, double alpha, double beta,
                                       double temperature, int64_t ignore_index) {
  const DeviceGuard guard(student.get_device_index());
  const Problem problem(student, teacher, labels, kind, alpha, beta, temperature, ignore_index);
  const ScalarType dtype = problem.get.dtype == KD_F64 ? ScalarType::Double : ScalarType::Float;
  const Tensor loss = torch::stable::new_empty(student, {}, dtype),
               saved = torch::stable::new_empty(student, {kd_logits_saved(&problem.get)}, dtype),
               values = torch::stable::new_empty(student, {kd_logits_values(&problem.get)}, dtype);
  KD_CUDA_CHECK(static_cast<cudaError_t>(
      kd_logits_forward(&problem.get, loss.mutable_data_ptr(), saved.mutable_data_ptr(),
                        values.mutable_data_ptr(), current_stream(student.get_device_index()))));
  return {loss, saved};
}

std::tuple<Tensor, Tensor> logits_backward_cuda(const Tensor& grad, const Tensor& student,
                                                const Tensor& teacher, const OptionalTensor& labels,
                                                const Tensor& saved, int64_t kind, double alpha, double beta,
                                                double temperature, int64_t ignore_index, bool need_student,
                                                bool need_teacher) {
  const DeviceGuard guard(student.get_device_index());
  const Problem problem(student, teacher, labels, kind, alpha, beta, temperature, ignore_index);
  KD_CHECK(grad.scalar_type() == saved.scalar_type() && saved.numel() == kd_logits_saved(&problem.get),
           "logits_backward: grad and saved must be what logits returned, got ", saved.numel(), " of ",
           toString(saved.scalar_type()), " and a gradient of ", toString(grad.scalar_type()));
  const OutputRows grad_student(student, need_student), grad_teacher(teacher, need_teacher);
  KD_CUDA_CHECK(static_cast<cudaError_t>(
      kd_logits_backward(&problem.get, grad.const_data_ptr(), saved.const_data_ptr(), grad_student.get(),
                         grad_teacher.get(), current_stream(student.get_device_index()))));
  return {grad_student.result(), grad_teacher.result()};
}

}  // namespace kd
