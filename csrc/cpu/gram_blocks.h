#pragma once

// The gram op on views of which a block of the features is in memory at a time; not its feature side. Grams
// are sums over features, and centring over rows is per feature; what needs whole rows is measured in a pass
// before.

#include "common/rounding.h"
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
    const auto one = [&](int64_t g, A* matrices) {
      if (saved && last_->cross()) {
        last_->keep_row_means(g, saved + g * per_group + kept_elements(*last_), false);
      }
      forward_group(*last_, g, matrices, products, distance);
    };
    if (saved) kept_ = saved, per_group_ = per_group;
    add();
    each_group(*last_, one);
  }

  void backward(const Tensor& grad_products, const Tensor& grad_distance, const Tensor& saved, bool need_x,
                bool need_y) {
    const bool needs[2] = {need_x, need_y}, both = flags_.inter;
    const auto problem = [&](Source& source, int64_t k, bool values) {
      Tensor inputs[2], gradients[2];
      for (int s : {0, 1}) {
        inputs[s] = values && (needs[s] || both) ? source.load(k, s) : source.view(k, s);
        if (needs[s]) gradients[s] = source.gradient(k, s);
      }
      return GramProblem<A>(inputs[0], inputs[1], flags_, need_x ? &gradients[0] : nullptr,
                            need_y ? &gradients[1] : nullptr, measures_);
    };
    std::vector<PlacedMix<A>> mixes(groups_);
    {
      const GramProblem<A> p = problem(source_, 0, false);
      // A group's mix takes the place of its matrices.
      const bool known = saved.numel() != 0;
      reserve(std::max(known ? 0 : kept_elements(p), mix_elements(p)));
      if (!known) add();
      const auto mix = [&](int64_t g, A* m) {
        mixes[g] = placed(p, group_mix(p, g, m, grad_products, grad_distance), kept_ + g * per_group_);
      };
      known ? for_saved_matrices(p, saved, mix) : each_group(p, mix);
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
  using Problem = GramProblem<A>;

  static int64_t kept_elements(const Problem& p) {
    const int64_t x = p.rows(0), y = p.rows(1);
    return x * (x + 1) / 2 + y * (y + 1) / 2 + (p.cross() ? x * y : 0);
  }
  // f(part of the mix, elements) for all that a group's mix consists of.
  template <class F>
  static void for_mix(const Problem& p, PlacedMix<A>& mix, const F& f) {
    for (int s : {0, 1}) {
      if (!p.wants(s)) continue;
      f(mix.sides[s].own, p.mix_elements(s, s));
      if (p.flags().inter) f(mix.sides[s].other, p.mix_elements(s, 1 - s));
      if (p.flags().inter && p.extended()) f(mix.sides[s].bias, p.view(s).rows);
    }
  }
  static int64_t mix_elements(const Problem& p) {
    int64_t all = 0;
    PlacedMix<A> none{};
    for_mix(p, none, [&](A*, int64_t count) { all += round_up(count, kAligned); });
    return all;
  }
  static PlacedMix<A> placed(const Problem& p, const GroupMix<A>& from, A* to) {
    PlacedMix<A> mix{{from.get(0), from.get(1)}};
    for_mix(p, mix, [&](A*& part, int64_t count) {
      std::memcpy(to, part, count * sizeof(A));
      part = to, to += round_up(count, kAligned);
    });
    return mix;
  }

  void reserve(int64_t per_group) {
    per_group_ = round_up(per_group, kAligned);
    storage_ = std::make_unique<Buffer<A>>(groups_ * per_group_);
    kept_ = storage_->get();
  }

  // Grams of all blocks, in order, without what lies below their diagonals.
  void add() {
    for (int64_t k = 0; k < blocks_; ++k) {
      const Tensor x = source_.load(k, 0), y = source_.load(k, 1);
      last_ = std::make_unique<Problem>(x, y, flags_, nullptr, nullptr, measures_);
      if (!kept_) reserve(kept_elements(*last_));
      const auto one = [&](int64_t g, A* matrices) {
        for_kept_rows(*last_, matrices, kept_ + g * per_group_, [&](const A* row, A* kept, int64_t count) {
          if (k == 0) std::memcpy(kept, row, count * sizeof(A));
          for (int64_t i = 0; k && i < count; ++i) kept[i] += row[i];
        });
      };
      last_->for_matrices(one, false);
    }
  }

  // f(group, matrices), all of them.
  template <class F>
  void each_group(const Problem& p, const F& f) const {
    parallel_for(0, groups_, 1, [&](int64_t begin, int64_t end) {
      Buffer<A> matrices(p.matrix_elements());
      for (int64_t g = begin; g < end; ++g) {
        for_kept_rows(p, matrices.get(), kept_ + g * per_group_, [](A* row, const A* kept, int64_t count) {
          std::memcpy(row, kept, count * sizeof(A));
        });
        p.complete(matrices.get());
        f(g, matrices.get());
      }
    });
  }

  static constexpr int64_t kAligned = 64 / sizeof(A);

  GramFlags flags_;
  int64_t groups_, blocks_;
  Source& source_;
  std::shared_ptr<RowMeasures<A>> measures_;
  std::unique_ptr<Problem> last_;
  // Of each group [per_group]: the triangles of its Grams, later its mix; in `storage` or where they are
  // saved.
  std::unique_ptr<Buffer<A>> storage_;
  A* kept_ = nullptr;
  int64_t per_group_ = 0;
};

}  // namespace kd
