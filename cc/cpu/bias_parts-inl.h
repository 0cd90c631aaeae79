// The gradient of a bias that few groups of heads add to, in parts: the groups are cut, so that there are tasks enough, each part
// has a gradient of its own, and their sum is the whole. How many there are does not depend on the number of threads.
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/groups-inl.h"
#include "cpu/logits-inl.h"
#include "cpu/scratch-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// One gradient without what broadcasts.
struct BiasSize {
  int64_t heads, rows, columns;

  explicit BiasSize(const Call& c)
      : heads(c.dbias.head == 0 ? 1 : c.N),
        rows(c.dbias.row == 0 || c.bias_offset ? 1 : c.Sq),
        columns(c.bias_offset      ? c.bias_elements
                : c.dbias.col == 0 ? 1
                                   : c.Skv) {}
  int64_t All() const { return heads * rows * columns; }
};

// Cuts the groups so that there are about `tasks` of at least `least` heads each, as memory allows.
inline void CutGroups(const Call& c, int64_t tasks, int64_t least, HeadGroups* groups) {
  if (!groups->shared() || groups->count() == 0 || groups->count() >= tasks) return;
  const int64_t bytes = groups->gradients() * BiasSize(c).All() * 4 + 1, affordable = kSplitBytes / bytes + 1;
  int64_t parts = (tasks + groups->count() - 1) / groups->count();
  parts = parts < groups->Least() / least ? parts : groups->Least() / least;
  parts = parts < affordable ? parts : affordable;
  groups->Cut(parts > 1 ? parts : 1);
}

class BiasParts {
 public:
  BiasParts(const Call& c, const Runner& runner, const HeadGroups& groups)
      : c_(c), runner_(runner), groups_(groups), size_(c), memory_([&](Arena& arena) {
          if (More() == 0) return;
          batch_ = arena.Take<int64_t>(c.B);
          sums_ = arena.Take(More() * Floats());
        }) {
    if (More() == 0) return;
    for (int64_t b = 0; b < c.B; ++b) batch_[b] = groups.GradientOf(b) * size_.All();
    if (!WritesAllBias(c)) Run(runner, More(), [&](int64_t i) { Fill(sums_, i * Floats(), (i + 1) * Floats(), 0.0f); });
  }

  // The call as a group takes it: with the gradient of its part.
  Call Of(int64_t group) const {
    Call own = c_;
    const int64_t part = groups_.PartOf(group);
    if (part == 0) return own;
    own.dbias.data = reinterpret_cast<char*>(sums_ + (part - 1) * Floats());
    own.dbias.batch = batch_;
    own.dbias.head = size_.heads == 1 ? 0 : size_.rows * size_.columns;
    own.dbias.row = size_.rows == 1 ? 0 : size_.columns;
    own.dbias.col = c_.dbias.col == 0 ? 0 : 1;
    return own;
  }

  // Adds the other parts to the first.
  void Add() const {
    if (More() == 0) return;
    Run(runner_, groups_.gradients() * size_.heads, [&](int64_t task) {
      const int64_t gradient = task / size_.heads, n = task % size_.heads;
      int64_t b = 0;
      while (groups_.GradientOf(b) != gradient) ++b;
      const float* part = sums_ + task * size_.rows * size_.columns;
      for (int64_t more = 0; more < More(); ++more, part += Floats())
        for (int64_t i = 0; i < size_.rows; ++i) {
          float* const to = c_.dbias.At<float>(b, n, i);
          const float* const from = part + i * size_.columns;
          if (c_.dbias.col == 1) {
            Combine(size_.columns, to, from, [](F x, F y) { return x + y; });
          } else {
            for (int64_t j = 0; j < size_.columns; ++j) to[j * c_.dbias.col] += from[j];
          }
        }
    });
  }

 private:
  int64_t More() const { return groups_.parts() - 1; }
  int64_t Floats() const { return groups_.gradients() * size_.All(); }  // of a part

  const Call& c_;
  const Runner& runner_;
  const HeadGroups& groups_;
  const BiasSize size_;
  int64_t* batch_ = nullptr;
  float* sums_ = nullptr;
  const BufferParts memory_;  // the last member, as it fills in those above
};

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
