// Products of the op dot_product on the CPU, compiled once per instruction set.
//
// Per position a sweep makes one or two products of 2 d e operations and touches d or e numbers per map: what
// a block of positions holds is packed once into the L2 cache, used by both, and the block that comes next is
// fetched meanwhile.

#include "cpu/dot_product.h"

#include "cpu/position_tiles.h"

namespace kd::KD_ISA {
namespace {

template <class A>
int64_t workspace(int64_t e, int64_t d, int64_t block) {
  return (e + d + (e > d ? e : d)) * padded<A>(block) + block * padded<A>(d);
}

// out [rows, count] = a y, or a^T y where kTransposed, for y [inner, count].
template <class T, bool kTransposed, class A>
void product(const A* a, int64_t ld_a, const A* y, int64_t ld, int64_t rows, int64_t count, int64_t inner,
             const PositionMap& out, int64_t position, A* buffer, Ahead& ahead) {
  T* const to = at<T>(out, position);
  if constexpr (__is_same(T, A)) {
    if (out.position == 1 && count % kLanes<A> == 0) {
      multiply<A, kTransposed>(a, ld_a, y, ld, rows, count, inner, false, to, out.channel, ahead);
      return;
    }
  }
  const int64_t columns = (count + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
  multiply<A, kTransposed>(a, ld_a, y, ld, rows, columns, inner, false, buffer, ld, ahead);
  write(buffer, ld, rows, count, to, out.channel, out.position);
}

template <class A>
void pass(const DotPass<A>& p, int64_t first, int64_t last, A* workspace) {
  typed<A>(p.dtype, [&]<class T>(T) {
    const int64_t ld = padded<A>(p.block), ld_d = padded<A>(p.d);
    A *const x = workspace, *const y = x + p.e * ld, *const out = y + p.d * ld;
    A* const y_t = out + (p.e > p.d ? p.e : p.d) * ld;  // [positions, ld_d]
    const int64_t columns = (p.d + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
    if (p.sums) {
      for (int64_t r = 0; r < p.block; ++r) {
        for (int64_t c = p.d; c < columns; ++c) y_t[r * ld_d + c] = 0;
      }
    }
    for (int64_t i = first; i < last; i += p.block) {
      const int64_t count = last - i < p.block ? last - i : p.block;
      const int64_t next = i + count, after = last - next < p.block ? last - next : p.block;
      Ahead ahead;
      fetch(ahead, p.x, next, after, sizeof(T));
      fetch(ahead, p.y, next, after, sizeof(T));
      if (p.x.data) read(at<T>(p.x, i), p.x.channel, p.x.position, p.e, count, x, ld);
      if (p.sums) {
        read(at<T>(p.y, i), p.y.position, p.y.channel, count, p.d, y_t, ld_d);
        multiply<A, false>(x, ld, y_t, ld_d, p.e, columns, count, i != first, p.sums, p.ld, ahead);
      }
      if (p.out_x.data) {
        read(at<T>(p.y, i), p.y.channel, p.y.position, p.d, count, y, ld);
        product<T, false>(p.matrix, p.ld, y, ld, p.e, count, p.d, p.out_x, i, out, ahead);
      }
      if (p.out_y.data) product<T, true>(p.matrix, p.ld, x, ld, p.d, count, p.e, p.out_y, i, out, ahead);
    }
  });
}

}  // namespace

extern const DotKernels<float> dot_product_float;
extern const DotKernels<double> dot_product_double;
const DotKernels<float> dot_product_float = {kLanes<float>, workspace<float>, pass<float>};
const DotKernels<double> dot_product_double = {kLanes<double>, workspace<double>, pass<double>};

}  // namespace kd::KD_ISA
