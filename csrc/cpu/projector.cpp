// Op projector on the CPU: batch norm of the rows, dropout, linear layer, in one call each way: checks and
// threads. Formulas: kdfast/reference/projector.py.
//
// At the sizes it is for, a few million multiply-adds, PyTorch's three layers cost more by their calls than
// by their arithmetic.

#include "cpu/projector.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <vector>

#include "common/check.h"
#include "common/dtype.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/rounding.h"
#include "cpu/projector_ops.h"
#include "cpu/result.h"
#include "cpu/workspace.h"

namespace kd {

KD_DECLARE_ISA(extern const ProjectorKernels projector_kernels;)

namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kTaskProducts = 1 << 18;  // multiply-adds, below which a second thread does not pay
constexpr int64_t kBlockRows = 48;          // of embeddings, whose sums are added in order

const ProjectorKernels& kernels() { return KD_DISPATCH_ISA(projector_kernels); }

const float* values(const Tensor& x, const char* name, std::initializer_list<int64_t> size) {
  KD_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous(), "projector: ", name,
           " must be contiguous and float32");
  KD_CHECK(x.dim() == static_cast<int64_t>(size.size()), "projector: ", name, " must have ", size.size(),
           " axes, got ", x.dim());
  int64_t axis = 0;
  for (const int64_t s : size) {
    KD_CHECK(x.size(axis) == s, "projector: axis ", axis, " of ", name, " must have ", s, ", got ",
             x.size(axis));
    ++axis;
  }
  return static_cast<const float*>(x.const_data_ptr());
}

ProjectorInputs inputs(const Tensor& x, const OptionalTensor& noise, const Tensor& gamma, const Tensor& beta,
                       const Tensor& weight) {
  KD_CHECK(x.dim() == 2 && weight.dim() == 2, "projector: x and weight must have two axes");
  const int64_t rows = x.size(0), in = x.size(1), out = weight.size(0);
  KD_CHECK(rows > 1, "projector: statistics need two rows, got ", rows);
  KD_CHECK(in % kProjectorWidth == 0 && out % kProjectorWidth == 0, "projector: widths must be multiples of ",
           kProjectorWidth, ", got ", in, " and ", out);
  values(weight, "weight", {out, in});
  return {rows,
          in,
          out,
          values(x, "x", {rows, in}),
          noise ? values(*noise, "noise", {rows, in}) : nullptr,
          values(gamma, "gamma", {in}),
          values(beta, "beta", {in}),
          nullptr,
          nullptr};
}

// f(begin, end) on blocks of kBlockRows rows, whatever the threads.
template <class F>
void for_blocks(const ProjectorInputs& p, const F& f) {
  const int64_t blocks = ceil_div(p.rows, kBlockRows);
  const int64_t grain = std::max<int64_t>(1, kTaskProducts / (kBlockRows * p.in * p.out));
  parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      f(block * kBlockRows, std::min((block + 1) * kBlockRows, p.rows));
    }
  });
}

Tensor empty(const Tensor& like, std::vector<int64_t> size) { return new_result(like, size); }
float* data(Tensor& x) { return static_cast<float*>(x.data_ptr()); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor> projector_cpu(const Tensor& x, const OptionalTensor& noise,
                                                 const Tensor& gamma, const Tensor& beta,
                                                 const Tensor& weight, const Tensor& bias,
                                                 Tensor running_mean, Tensor running_var, double momentum,
                                                 double eps) {
  const Workspaces::Call call;
  ProjectorInputs p = inputs(x, noise, gamma, beta, weight);
  const float *w = static_cast<const float*>(weight.const_data_ptr()), *b = values(bias, "bias", {p.out});
  values(running_mean, "running_mean", {p.in}), values(running_var, "running_var", {p.in});
  Tensor y = empty(x, {p.rows, p.out}), mean = empty(x, {p.in}), scale = empty(x, {p.in});
  // Beyond the first row, then beyond the mean, so that large means cost no digits.
  std::vector<double> sums(p.in, 0.0), rest(p.in, 0.0), squares(p.in, 0.0);
  const double rows = static_cast<double>(p.rows);
  kernels().moments(p.x, p.rows, p.in, p.x, sums.data(), squares.data());
  for (int64_t i = 0; i < p.in; ++i) data(mean)[i] = static_cast<float>(p.x[i] + sums[i] / rows);
  std::fill(squares.begin(), squares.end(), 0.0);
  kernels().moments(p.x, p.rows, p.in, data(mean), rest.data(), squares.data());
  for (int64_t i = 0; i < p.in; ++i) {
    const double beyond = squares[i] - rest[i] * rest[i] / rows;
    const double variance = beyond < 0 ? 0 : beyond;  // times the rows; NaN stays
    data(scale)[i] = static_cast<float>(1 / std::sqrt(variance / rows + eps));
    float &kept_mean = data(running_mean)[i], &kept_var = data(running_var)[i];
    kept_mean = static_cast<float>((1 - momentum) * kept_mean + momentum * (p.x[i] + sums[i] / rows));
    kept_var = static_cast<float>((1 - momentum) * kept_var + momentum * variance / (rows - 1));
  }
  p.mean = data(mean), p.scale = data(scale);
  Buffer<float> z(p.rows * p.in), turned(p.in * p.out);  // [rows, in], [in, out]
  for (int64_t o = 0; o < p.out; ++o) {
    for (int64_t i = 0; i < p.in; ++i) turned.get()[i * p.out + o] = w[o * p.in + i];
  }
  for_blocks(p, [&](int64_t begin, int64_t end) {
    kernels().normalise(p, begin, end, z.get());
    kernels().multiply(z.get() + begin * p.in, p.in, 1, end - begin, p.in, turned.get(), p.out, b,
                       data(y) + begin * p.out);
  });
  return {y, mean, scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> projector_backward_cpu(
    const Tensor& grad, const Tensor& x, const OptionalTensor& noise, const Tensor& gamma, const Tensor& beta,
    const Tensor& weight, const Tensor& mean, const Tensor& scale) {
  const Workspaces::Call call;
  ProjectorInputs p = inputs(x, noise, gamma, beta, weight);
  p.mean = values(mean, "mean", {p.in}), p.scale = values(scale, "scale", {p.in});
  const float* w = static_cast<const float*>(weight.const_data_ptr());
  const Tensor whole = torch::stable::contiguous(grad);
  const float* g = values(whole, "grad", {p.rows, p.out});
  Tensor grad_x = empty(x, {p.rows, p.in}), grad_gamma = empty(x, {p.in}), grad_beta = empty(x, {p.in}),
         grad_weight = empty(x, {p.out, p.in}), grad_bias = empty(x, {p.out});
  float* to = data(grad_x);  // first of the norm's output, then of its input

  Buffer<float> z(p.rows * p.in);
  const int64_t blocks = ceil_div(p.rows, kBlockRows);
  std::vector<double> parts(2 * blocks * p.in, 0.0), sums(p.out, 0.0);
  for_blocks(p, [&](int64_t begin, int64_t end) {
    double* part = parts.data() + 2 * begin / kBlockRows * p.in;
    kernels().normalise(p, begin, end, z.get());
    kernels().multiply(g + begin * p.out, p.out, 1, end - begin, p.out, w, p.in, nullptr, to + begin * p.in);
    kernels().norm_sums(p, begin, end, to, part, part + p.in);
  });
  const int64_t share = kProjectorWidth * p.rows * p.in;
  parallel_for(0, p.out / kProjectorWidth, std::max<int64_t>(1, kTaskProducts / share),
               [&](int64_t begin, int64_t end) {
                 const int64_t first = begin * kProjectorWidth, count = (end - begin) * kProjectorWidth;
                 kernels().multiply(g + first, 1, p.out, count, p.rows, z.get(), p.in, nullptr,
                                    data(grad_weight) + first * p.in);
               });
  kernels().column_sums(g, p.rows, p.out, sums.data());
  std::copy(sums.begin(), sums.end(), data(grad_bias));

  std::vector<float> factor(p.in), offset(p.in), slope(p.in);
  const double rows = static_cast<double>(p.rows);
  for (int64_t i = 0; i < p.in; ++i) {
    double by_beta = 0, by_gamma = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      by_beta += parts[2 * block * p.in + i], by_gamma += parts[(2 * block + 1) * p.in + i];
    }
    data(grad_beta)[i] = static_cast<float>(by_beta), data(grad_gamma)[i] = static_cast<float>(by_gamma);
    factor[i] = p.gamma[i] * p.scale[i], offset[i] = static_cast<float>(by_beta / rows);
    slope[i] = static_cast<float>(by_gamma / rows * static_cast<double>(p.scale[i]));
  }
  kernels().norm_backward(p, 0, p.rows, factor.data(), offset.data(), slope.data(), to);
  return {grad_x, grad_gamma, grad_beta, grad_weight, grad_bias};
}

}  // namespace kd
