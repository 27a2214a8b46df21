#pragma once

// Launchers of direction.cu. Every function only enqueues work on `stream` and returns a cudaError_t.

#include "cuda/rows.h"

extern "C" {

struct kd_direction_problem {
  kd_rows student, teacher, centers;  // teacher.data may be null
  const int64_t* labels;              // null: row i has centre i
  int64_t label_stride;
  int64_t rows, columns, classes, ignore_index;
  int32_t dtype;         // kd_dtype of student, teacher and their gradients
  int32_t center_dtype;  // the same, or float32 beside half precision
  int32_t balanced;      // bool
};

// loss, total: scalars; factors [rows, 3]; parts [rows, 2], workspace: float32, float64 where dtype is.
int32_t kd_direction_forward(const kd_direction_problem* problem, void* loss, void* factors, void* total,
                             void* parts, void* stream);

// A gradient whose data is null is not computed.
int32_t kd_direction_backward(const kd_direction_problem* problem, const void* grad, const void* factors,
                              const void* total, const kd_rows* grad_student, const kd_rows* grad_teacher,
                              void* stream);
}
