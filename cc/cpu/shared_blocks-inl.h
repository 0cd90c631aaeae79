// Blocks of keys and what belongs to them, of some key heads, packed once for all tasks.
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/scratch-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

template <typename Block>
class SharedBlocks {
 public:
  // Of key heads first + [0, heads): blocks of `key_block` keys and `size` floats each, whose parts are those of
  // `place(memory)`.
  template <typename Place>
  SharedBlocks(const Call& c, int64_t first, int64_t heads, int64_t key_block, int64_t size, const Place& place)
      : first_(first),
        key_block_(key_block),
        per_head_((c.Skv + key_block - 1) / key_block),
        count_(heads * per_head_),
        memory_([&](Arena& arena) {
          floats_ = arena.Take(count_ * size);
          blocks_ = arena.Take<Block>(count_);
        }) {
    for (int64_t i = 0; i < count_; ++i) blocks_[i] = place(floats_ + i * size);
  }

  // By `pack(b, k, j0, width, stage, block)` for keys [j0, j0 + width) of key head k of batch entry b.
  template <typename PackBlock>
  void Pack(const Call& c, const Runner& runner, const PackBlock& pack) const {
    Run(runner, count_, [&](int64_t index) {
      const int64_t head = first_ + index / per_head_, j0 = index % per_head_ * key_block_;
      float* stage = nullptr;
      const ThreadParts scratch([&](Arena& arena) { stage = arena.Take(StageSize(c)); });
      pack(head / c.K, head % c.K, j0, j0 + key_block_ < c.Skv ? key_block_ : c.Skv - j0, stage, &blocks_[index]);
    });
  }

  // The block of key head b * K + k that begins at key j0.
  const Block& At(int64_t head, int64_t j0) const { return blocks_[(head - first_) * per_head_ + j0 / key_block_]; }

 private:
  const int64_t first_, key_block_, per_head_, count_;
  float* floats_ = nullptr;
  Block* blocks_ = nullptr;
  const BufferParts memory_;  // the last member, as it fills in those above
};

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
