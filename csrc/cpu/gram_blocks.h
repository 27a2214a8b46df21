#pragma once

// The gram op on views of which a block of the features is in memory at a time; not its feature side. Grams
// are sums over features, and centring over rows is per feature; what needs whole rows is measured in a pass
// before.

#include "cpu/gram_terms.h"

namespace kd {

// Source: groups(), blocks(); for block k of the features of a side, views [G, R1, R2, F1, F2, F3] that stand
// until the next block: view(k, side), without values; load(k, side), with them; gradient(k, side), to be
// written; and store(k), which keeps the gradients that were asked for. another(): for one more thread;
// grain(): blocks that a thread at least takes; release(): gives its memory back.
template <class A, class Source>
class GramBlocks {
 public:
  GramBlocks(const GramFlags& flags, Source& source)
      : flags_(flags), groups_(source.groups()), blocks_(source.blocks()), source_(source) {
    if (!GramProblem<A>::measures_rows(flags)) return;
    const auto measures = std::make_shared<RowMeasures<A>>();
    for (int64_t k = 0; k < blocks_; ++k) {
      const Tensor x = source_.load(k, 0), y = source_.load(k, 1);
      GramProblem<A>(x, y, flags_, nullptr, nullptr, measures).measure(*measures);
    }
    measures->finish(flags_.cosine);
    measures_ = measures;
  }

  // Into products [terms, 3, G], distance [terms, G] and, if it is not null, saved [G, per_group].
  void forward(A* products, A* distance, A* saved, int64_t per_group) {
    add();
    each_group([&](const GramProblem<A>& p, int64_t g, A* matrices) {
      if (saved) for_saved_rows(p, g, matrices, saved + g * per_group, false);
      forward_group(p, g, matrices, products, distance);
    });
  }

  void backward(const Tensor& grad_products, const Tensor& grad_distance, const Tensor& saved, bool need_x,
                bool need_y) {
    const bool needs[2] = {need_x, need_y}, both = flags_.inter;
    if (!saved.numel()) add();
    std::vector<GroupMix<A>> mixes(groups_);
    const auto problem = [&](Source& source, int64_t k, bool values) {
      Tensor inputs[2], gradients[2];
      for (int s : {0, 1}) {
        inputs[s] = values && (needs[s] || both) ? source.load(k, s) : source.view(k, s);
        if (needs[s]) gradients[s] = source.gradient(k, s);
      }
      return GramProblem<A>(inputs[0], inputs[1], flags_, need_x ? &gradients[0] : nullptr,
                            need_y ? &gradients[1] : nullptr, measures_);
    };
    {
      const GramProblem<A> p = problem(source_, 0, false);
      const auto mix = [&](int64_t g, A* m) { mixes[g] = group_mix(p, g, m, grad_products, grad_distance); };
      if (saved.numel()) {
        for_saved_matrices(p, saved, mix);
      } else {
        parallel_for(0, groups_, 1, [&](int64_t begin, int64_t end) {
          for (int64_t g = begin; g < end; ++g) mix(g, matrices_->get() + g * p.matrix_elements());
        });
      }
      matrices_.reset();
    }
    source_.release();
    parallel_for(0, blocks_, source_.grain(), [&](int64_t begin, int64_t end) {
      Source mine = source_.another();
      for (int64_t k = begin; k < end; ++k) {
        write_gradients(problem(mine, k, true), mixes);
        mine.store(k);
      }
    });
  }

 private:
  // Grams of all blocks, in order.
  void add() {
    for (int64_t k = 0; k < blocks_; ++k) {
      const Tensor x = source_.load(k, 0), y = source_.load(k, 1);
      last_ = std::make_unique<GramProblem<A>>(x, y, flags_, nullptr, nullptr, measures_);
      const int64_t elements = last_->matrix_elements();
      if (!matrices_) {
        matrices_ = std::make_unique<Buffer<A>>(groups_ * elements);
        std::memset(matrices_->get(), 0, groups_ * elements * sizeof(A));
      }
      last_->for_matrices([&](int64_t g, const A* matrices) {
        A* sum = matrices_->get() + g * elements;
        for (int64_t i = 0; i < elements; ++i) sum[i] += matrices[i];
      });
    }
  }

  template <class F>
  void each_group(const F& f) {
    parallel_for(0, groups_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) f(*last_, g, matrices_->get() + g * last_->matrix_elements());
    });
  }

  GramFlags flags_;
  int64_t groups_, blocks_;
  Source& source_;
  std::shared_ptr<RowMeasures<A>> measures_;
  std::unique_ptr<GramProblem<A>> last_;
  std::unique_ptr<Buffer<A>> matrices_;
};

}  // namespace kd
