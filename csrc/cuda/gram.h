#pragma once

// Launchers of gram.cu: linear CKA of small inputs, one C call per direction and two or three kernel launches
// in it. Plain C types: neither torch nor CUDA headers are needed to call them. Every function that launches
// returns a cudaError_t (0: success) and only enqueues work on `stream`.

#include <cstdint>

extern "C" {

// data[g * group_stride + i * row_stride + k * feature_stride], strides in elements.
struct kd_gram_matrix {
  void* data;
  int64_t group_stride, row_stride, feature_stride;
  int64_t features;
};

enum kd_gram_dtype { KD_GRAM_F32 = 0, KD_GRAM_F16 = 1, KD_GRAM_BF16 = 2 };
enum kd_gram_phase { KD_GRAM_FORWARD = 0, KD_GRAM_BACKWARD_SAVED = 1, KD_GRAM_BACKWARD_AGAIN = 2 };

struct kd_gram_problem {
  kd_gram_matrix x, y;  // the same groups, rows and dtype; the same features where `inter`
  int64_t groups, rows;
  int32_t dtype;     // kd_gram_dtype of x, y and their gradients
  int32_t centered;  // bool
  int32_t inter;     // bool: two terms, else one
};

// float32 elements of the workspace of a phase (kd_gram_phase); its content need not be initialised.
int64_t kd_gram_workspace(const kd_gram_problem* problem, int32_t phase);

// products [terms, 3, groups], distance [terms, groups], both contiguous.
// saved [groups, (inter ? 3 : 2) * (rows + inter)^2] for the backward, or null.
int32_t kd_gram_forward(const kd_gram_problem* problem, float* products, float* distance, float* saved,
                        float* workspace, void* stream);

// grad_products [terms, 3, groups] and grad_distance [terms, groups] with strides in elements; saved as the
// forward left it, or null: then it is computed again. A gradient whose data is null is not computed.
int32_t kd_gram_backward(const kd_gram_problem* problem, const float* grad_products,
                         const int64_t products_strides[3], const float* grad_distance,
                         const int64_t distance_strides[2], const float* saved, const kd_gram_matrix* grad_x,
                         const kd_gram_matrix* grad_y, float* workspace, void* stream);
}
