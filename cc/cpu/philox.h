// Keep bits of dropout: Philox4x32-10 in the layout that jax_fa/dropout.py defines.

constexpr int64_t kKeepColumns = 128;  // columns made at once: 16 counters of 8 numbers

// keep[c] = 1 where column `block * kKeepColumns + c` of a row is kept, else 0.
inline void KeepColumns(const uint32_t seed[2], const uint32_t stream[2], uint32_t row, uint32_t block,
                        uint32_t threshold, uint8_t keep[kKeepColumns]) {
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
      const uint64_t p0 = static_cast<uint64_t>(c0[i]) * 0xD2511F53u;
      const uint64_t p1 = static_cast<uint64_t>(c2[i]) * 0xCD9E8D57u;
      const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
      const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
      c0[i] = n0;
      c1[i] = static_cast<uint32_t>(p1);
      c2[i] = n2;
      c3[i] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const uint32_t* words[4] = {c0, c1, c2, c3};
  for (int i = 0; i < 16; ++i) {
    for (int w = 0; w < 4; ++w) {  // 32-column block i / 4, column pair i % 4 of each group of 8
      uint8_t* k = keep + (i / 4) * 32 + w * 8 + (i % 4) * 2;
      k[0] = (words[w][i] & 0xFFFFu) < threshold;
      k[1] = (words[w][i] >> 16) < threshold;
    }
  }
}
