#pragma once

// The two directions of a call on a problem whose sides are at hand: by gram.cpp and patch_gram.cpp.

#include "cpu/gram_terms.h"

namespace kd {

// The groups whose matrices are kept in saved [kept, ...]: spread evenly, so that threads find equal shares.
struct SavedGroups {
  const Tensor& saved;
  int64_t groups;
  int64_t kept() const { return saved.numel() ? saved.size(0) : 0; }
  bool has(int64_t g) const { return (g + 1) * kept() / groups > g * kept() / groups; }
  template <class A>
  A* row(int64_t g) const {
    return static_cast<A*>(const_cast<void*>(saved.const_data_ptr())) + g * kept() / groups * saved.size(1);
  }
};

template <class A>
void check_saved(const GramProblem<A>& p, const SavedGroups& keep) {
  const bool some = keep.kept() != 0 && keep.kept() != p.groups();
  KD_CHECK(!some || p.groups() >= kManyGroups, "gram: of few groups, all are saved or none, got ",
           keep.kept(), " of ", p.groups());
}

template <class A>
void run_forward(const GramProblem<A>& p, Tensor& products, Tensor& distance, const Tensor& saved) {
  A *to_products = static_cast<A*>(products.data_ptr()), *to_distance = static_cast<A*>(distance.data_ptr());
  const SavedGroups keep{saved, p.groups()};
  check_saved(p, keep);
  p.for_matrices([&](int64_t g, A* matrices) {
    if (keep.has(g)) for_saved_rows(p, g, matrices, keep.row<A>(g), false);
    forward_group(p, g, matrices, to_products, to_distance);
  });
}

// Gradients from mix_of(group, matrices) of every group; known as for_matrices() takes it.
template <class A, class M, class K>
void write_mixed(const GramProblem<A>& p, const M& mix_of, const K& known) {
  if (p.groups() >= kManyGroups) {
    p.for_matrices(
        [&](int64_t g, A* matrices) {
          const GroupMix<A> mix = mix_of(g, matrices);
          for (int s : {0, 1}) {
            if (p.wants(s)) write_chunks(p, s, g, mix, 0, p.gradient_chunks(s));
          }
        },
        known);
    return;
  }
  std::vector<GroupMix<A>> mixes(p.groups());
  p.for_matrices([&](int64_t g, A* matrices) { mixes[g] = mix_of(g, matrices); });
  write_gradients(p, mixes);
}

template <class A>
void run_backward(const GramProblem<A>& p, const Tensor& grad_products, const Tensor& grad_distance,
                  const Tensor& saved) {
  const SavedGroups keep{saved, p.groups()};
  check_saved(p, keep);
  const auto known = [&](int64_t g, A* matrices) {
    if (!keep.has(g)) return false;
    for_saved_rows(p, g, matrices, keep.row<A>(g), true);
    return true;
  };
  const auto mix_of = [&](int64_t g, A* matrices) {
    return group_mix(p, g, matrices, grad_products, grad_distance);
  };
  if (p.groups() >= kManyGroups || !keep.kept()) return write_mixed(p, mix_of, known);
  std::vector<GroupMix<A>> mixes(p.groups());
  for_saved_matrices(p, saved, [&](int64_t g, A* matrices) { mixes[g] = mix_of(g, matrices); });
  write_gradients(p, mixes);
}

// weights[0] * the mean over groups of the distance, and weights[1] * that of the inter term, whose gradient
// is written.
template <class A>
double run_with_gradient(const GramProblem<A>& p, const double (&weights)[2]) {
  const int terms = p.flags().inter ? 2 : 1;
  const double groups = static_cast<double>(p.groups());
  std::vector<double> distances(2 * p.groups());
  const TermGradient term{0, 0, 0, weights[0] / groups}, inter{0, 0, 0, weights[1] / groups};
  write_mixed(
      p, [&](int64_t g, A* matrices) { return group_mix(p, g, matrices, term, inter, &distances[2 * g]); },
      [](int64_t, A*) { return false; });
  double loss = 0;
  for (int t = 0; t < terms; ++t) {
    double sum = 0;
    for (int64_t g = 0; g < p.groups(); ++g) sum += distances[2 * g + t];
    loss += weights[t] * (sum / groups);  // NaN of no groups, as a mean is
  }
  return loss;
}

}  // namespace kd
