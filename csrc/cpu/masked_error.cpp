// Op masked_error on the CPU. Formulas: kdfast/reference/masked_error.py.
//
// One pass reads both maps and, if asked, writes the gradient: 8 or 12 bytes per element in float32. The mask
// of one channel is read from the cache, never expanded. Rows are channels (NCHW), whose columns have the
// weights, or pixels (channels_last), which have one each. Small planes that follow one another are taken
// several at a time, under as many copies of their mask.

#include "cpu/masked_error.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "common/rounding.h"
#include "cpu/attention_map.h"
#include "cpu/masked_error_ops.h"
#include "cpu/result.h"

namespace kd {

KD_DECLARE_ISA(extern const MaskedErrorKernels<float> masked_error_float;
               extern const MaskedErrorKernels<double> masked_error_double;)

namespace {

using torch::stable::Tensor;

constexpr int64_t kTask = 32768;   // elements of a task, whose sum is one of those added in order
constexpr int64_t kRepeat = 4096;  // columns up to which planes are taken together

template <class A>
const MaskedErrorKernels<A>& kernels() {
  if constexpr (sizeof(A) == 8) {
    return KD_DISPATCH_ISA(masked_error_double);
  } else {
    return KD_DISPATCH_ISA(masked_error_float);
  }
}

void check(const Tensor& x, const Tensor& y, const Tensor& mask) {
  KD_CHECK(x.dim() == 4 && y.dim() == 4, "masked_error: x and y must be maps [B, C, H, W], got ", x.dim(),
           " and ", y.dim(), " axes");
  KD_CHECK(x.scalar_type() == y.scalar_type(), "masked_error: x and y must have one dtype");
  for (int a = 0; a < 4; ++a) {
    KD_CHECK(x.size(a) == y.size(a), "masked_error: x and y must have one shape, axis ", a, " has ",
             x.size(a), " and ", y.size(a));
  }
  KD_CHECK(mask.is_contiguous() && mask.numel() == x.size(0) * x.size(2) * x.size(3),
           "masked_error: mask must be contiguous [B, 1, H, W]");
  KD_CHECK(mask.scalar_type() == (attention::is_wide(x) ? ScalarType::Double : ScalarType::Float),
           "masked_error: mask must be float32 (float64 for float64 maps)");
}

// Sum of mask * (x - y)^2; to `gradient` goes scale * mask * (x - y).
template <class A>
double compute(const Tensor& x, const Tensor& y, const Tensor& mask, double scale, Tensor* gradient) {
  if (x.numel() == 0) return 0;
  const attention::Shape shape(x);
  const attention::Map xs(x, shape), ys(y, shape);
  Tensor written = gradient ? *gradient : x;
  const bool fits = shape.planar ? attention::reads_planar(written) : attention::reads_by_pixel(written);
  if (!fits) {
    written = torch::stable::empty_like(torch::stable::contiguous(written));
  }
  const attention::Map to(written, shape);
  const int64_t pixels = shape.pixels, channels = shape.channels;
  const int64_t rows = shape.planar ? channels : pixels, columns = shape.planar ? pixels : channels;
  const bool packed = shape.planar && xs.row_stride() == pixels && ys.row_stride() == pixels &&
                      (!gradient || to.row_stride() == pixels);
  const int64_t together = packed ? std::clamp<int64_t>(kRepeat / pixels, 1, rows) : 1;
  const int64_t task_rows = round_up(std::max<int64_t>(kTask / columns, 1), together);
  const int64_t tasks = ceil_div(rows, task_rows);
  const A* const masks = static_cast<const A*>(mask.const_data_ptr());
  std::vector<double> sums(shape.batch * tasks);
  parallel_for(0, shape.batch * tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> repeated(together > 1 ? together * pixels : 0);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / tasks, first = task % tasks * task_rows;
      const int64_t count = std::min(task_rows, rows - first);
      const A* weights = masks + image * pixels;
      for (int64_t i = 0; i < together && together > 1; ++i) {
        std::copy_n(weights, pixels, repeated.data() + i * pixels);
      }
      if (together > 1) weights = repeated.data();
      const auto sum = [&](int64_t row, int64_t repeats, int64_t row_count) {
        const MaskedRows block{dtype_of(x.scalar_type(), "x"),
                               xs.tile(image, 0, row).data,
                               ys.tile(image, 0, row).data,
                               gradient ? const_cast<void*>(to.tile(image, 0, row).data) : nullptr,
                               row_count,
                               repeats * columns,
                               repeats * xs.row_stride(),
                               repeats * ys.row_stride(),
                               repeats * to.row_stride()};
        const auto a = static_cast<A>(scale);
        return shape.planar ? kernels<A>().by_column(block, weights, a)
                            : kernels<A>().by_row(block, weights + row, a);
      };
      const int64_t whole = count / together, rest = count % together;
      sums[task] = sum(first, together, whole);
      if (rest) sums[task] += sum(first + whole * together, rest, 1);
    }
  });
  if (gradient && written.data_ptr() != gradient->data_ptr()) torch::stable::copy_(*gradient, written);
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

// The mean, to `value` unless it is null; the gradient for x times `grad`.
void run(const Tensor& x, const Tensor& y, const Tensor& mask, Tensor* value, double grad, Tensor* gradient) {
  attention::with_accumulator(x, [&](auto zero) {
    using A = decltype(zero);
    const auto count = static_cast<double>(std::max<int64_t>(x.numel(), 1));
    const double sum = compute<A>(x, y, mask, 2 * grad / count, gradient);
    if (value) *attention::data<A>(*value) = static_cast<A>(sum / count);
  });
}

Tensor scalar(const Tensor& x) {
  return torch::stable::new_empty(x, {}, attention::is_wide(x) ? ScalarType::Double : ScalarType::Float);
}

}  // namespace

Tensor masked_error_cpu(const Tensor& x, const Tensor& y, const Tensor& mask) {
  check(x, y, mask);
  Tensor value = scalar(x);
  run(x, y, mask, &value, 1, nullptr);
  return value;
}

std::tuple<Tensor, Tensor> masked_error_with_gradient_cpu(const Tensor& x, const Tensor& y,
                                                          const Tensor& mask) {
  check(x, y, mask);
  Tensor value = scalar(x), gradient = new_gradient(x);
  run(x, y, mask, &value, 1, &gradient);
  return {value, gradient};
}

Tensor masked_error_backward_cpu(const Tensor& x, const Tensor& y, const Tensor& mask, const Tensor& grad) {
  check(x, y, mask);
  KD_CHECK(grad.numel() == 1 && grad.scalar_type() == mask.scalar_type(),
           "masked_error_backward: grad must be a scalar of the mask's dtype");
  Tensor gradient = new_gradient(x);
  const double factor = attention::is_wide(x) ? *static_cast<const double*>(grad.const_data_ptr())
                                              : *static_cast<const float*>(grad.const_data_ptr());
  run(x, y, mask, nullptr, factor, &gradient);
  return gradient;
}

}  // namespace kd
