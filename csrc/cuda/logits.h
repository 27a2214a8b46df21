#pragma once

// Launchers of logits.cu. Every function only enqueues work on `stream` and returns a cudaError_t.

#include "cuda/rows.h"

extern "C" {

enum kd_logits_kind { KD_LOGITS_KL = 0, KD_LOGITS_DKD = 1, KD_LOGITS_NKD = 2, KD_LOGITS_DIST = 3 };

struct kd_logits_problem {
  kd_rows student, teacher;
  const int64_t* labels;  // [rows] or null
  int64_t rows, classes, ignore_index;
  double alpha, beta, temperature;
  int32_t kind;
  int32_t dtype;  // kd_dtype of both sides and their gradients
};

// Elements of `saved`, which the backward reads, and of the forward's workspace `values`: float32, float64
// where dtype is.
int64_t kd_logits_saved(const kd_logits_problem* problem);
int64_t kd_logits_values(const kd_logits_problem* problem);

// loss: scalar.
int32_t kd_logits_forward(const kd_logits_problem* problem, void* loss, void* saved, void* values,
                          void* stream);

// A gradient whose data is null is not computed.
int32_t kd_logits_backward(const kd_logits_problem* problem, const void* grad, const void* saved,
                           const kd_rows* grad_student, const kd_rows* grad_teacher, void* stream);
}
