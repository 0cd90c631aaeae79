// Philox in loops that the compiler turns into vectors.
#pragma once

#include "cpu/philox.h"
#include "cpu/target-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// See philox.h.
inline void KeepColumns(const uint32_t seed[2], const uint32_t stream[2], uint32_t row, uint32_t block,
                        uint32_t threshold, uint32_t keep[4]) {
  uint32_t c0[16], c1[16], c2[16], c3[16];
  for (uint32_t i = 0; i < 16; ++i) {
    c0[i] = block * 16 + i;
    c1[i] = row;
    c2[i] = stream[0];
    c3[i] = stream[1];
  }
  uint32_t k0 = seed[0], k1 = seed[1];
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < 16; ++i) {
      const uint64_t p0 = static_cast<uint64_t>(c0[i]) * kMul0;
      const uint64_t p1 = static_cast<uint64_t>(c2[i]) * kMul1;
      const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
      const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
      c0[i] = n0;
      c1[i] = static_cast<uint32_t>(p1);
      c2[i] = n2;
      c3[i] = static_cast<uint32_t>(p0);
    }
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  const uint32_t* words[4] = {c0, c1, c2, c3};
  for (int b = 0; b < 4; ++b) {
    uint32_t bits = 0;
    for (int w = 0; w < 4; ++w) {
      for (int i = 0; i < 4; ++i) {
        const uint32_t x = words[w][4 * b + i];
        bits |= static_cast<uint32_t>((x & 0xFFFFu) < threshold) << (8 * w + 2 * i);
        bits |= static_cast<uint32_t>((x >> 16) < threshold) << (8 * w + 2 * i + 1);
      }
    }
    keep[b] = bits;
  }
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
