// Key heads in groups: those that add to one bias gradient are the work of one task.
#pragma once

#include "call.h"
#include "cpu/scratch-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// Numbers the distinct offsets of batch entries in the order of their first entries: class_of[b] is that of entry b.
// Returns how many there are. By hashing, so that the time is that of one pass.
inline int64_t Classes(const int64_t* offsets, int64_t count, int64_t* class_of) {
  int64_t bits = 1;
  while ((int64_t{1} << bits) < 2 * count) ++bits;
  const int64_t slots = int64_t{1} << bits;
  int64_t *first = nullptr, classes = 0;  // first: the entry that came first to a slot
  const BufferParts memory([&](Arena& arena) { first = arena.Take<int64_t>(slots); });
  for (int64_t i = 0; i < slots; ++i) first[i] = -1;
  for (int64_t b = 0; b < count; ++b) {
    const uint64_t hash = static_cast<uint64_t>(offsets[b]) * 0x9E3779B97F4A7C15u;
    int64_t at = static_cast<int64_t>(hash >> (64 - bits));
    while (first[at] >= 0 && offsets[first[at]] != offsets[b]) at = (at + 1) & (slots - 1);
    if (first[at] < 0) first[at] = b, class_of[b] = classes++;
    class_of[b] = class_of[first[at]];
  }
  return classes;
}

// Heads that add to the same bias gradient form a group; without one, each head is its own. Groups may be cut into parts
// (see bias_parts-inl.h), which then count as groups.
class HeadGroups {
 public:
  explicit HeadGroups(const Call& c)
      : shared_(c.dbias && !c.bias_apart), count_(c.B * c.K), memory_([&](Arena& arena) {
          if (!shared_) return;
          heads_ = arena.Take<int64_t>(c.B * c.K);
          starts_ = arena.Take<int64_t>(c.B * c.K + 1);
          gradient_of_ = arena.Take<int64_t>(c.B);
        }) {
    if (shared_) Sort(c);
  }

  bool shared() const { return shared_; }
  int64_t count() const { return count_ * parts_; }
  // The places of a group's heads, and the key head b * K + k at a place.
  int64_t Begin(int64_t group) const {
    if (!shared_) return group;
    const int64_t whole = group / parts_, part = group % parts_, first = starts_[whole];
    return part == 0 ? first : first + (starts_[whole + 1] - first) * part / parts_;
  }
  int64_t End(int64_t group) const { return Begin(group + 1); }
  int64_t Head(int64_t place) const { return shared_ ? heads_[place] : place; }

  void Cut(int64_t parts) { parts_ = parts; }
  int64_t parts() const { return parts_; }
  int64_t PartOf(int64_t group) const { return group % parts_; }

  // Heads of the smallest group.
  int64_t Least() const {
    int64_t least = INT64_MAX;
    for (int64_t g = 0; g < count_; ++g) {
      const int64_t n = starts_[g + 1] - starts_[g];
      least = n < least ? n : least;
    }
    return least;
  }

  // Batch entries with the same number add to the same gradients.
  int64_t gradients() const { return gradients_; }
  int64_t GradientOf(int64_t b) const { return gradient_of_[b]; }

 private:
  void Sort(const Call& c) {
    const int64_t all = c.B * c.K;
    int64_t *group_of = nullptr, *next = nullptr;
    const BufferParts own([&](Arena& arena) {
      group_of = arena.Take<int64_t>(all);
      next = arena.Take<int64_t>(all);
    });
    const bool by_head = c.dbias.head == 0, by_batch = SharesBiasBatch(c);
    const int64_t groups_of_batch = by_head ? 1 : c.K;
    gradients_ = by_batch ? Classes(c.dbias.batch, c.B, gradient_of_) : c.B;
    count_ = gradients_ * groups_of_batch;
    for (int64_t b = 0; b < c.B; ++b) {
      if (!by_batch) gradient_of_[b] = b;
      const int64_t first = gradient_of_[b] * groups_of_batch;
      for (int64_t k = 0; k < c.K; ++k) group_of[b * c.K + k] = first + (by_head ? 0 : k);
    }
    for (int64_t g = 0; g <= count_; ++g) starts_[g] = 0;
    for (int64_t head = 0; head < all; ++head) ++starts_[group_of[head] + 1];
    for (int64_t g = 0; g < count_; ++g) starts_[g + 1] += starts_[g];
    for (int64_t g = 0; g < count_; ++g) next[g] = starts_[g];
    for (int64_t head = 0; head < all; ++head) heads_[next[group_of[head]]++] = head;
  }

  const bool shared_;
  int64_t count_, parts_ = 1, gradients_ = 0;
  int64_t *heads_ = nullptr, *starts_ = nullptr, *gradient_of_ = nullptr;
  const BufferParts memory_;  // the last member, as it fills in those above
};

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
