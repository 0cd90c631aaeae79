// 16-bit and 8-bit floats, one at a time. Rounds to nearest even; NaN stays NaN.
#pragma once

#include <stdint.h>

#include "call.h"
#include "cpu/target-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

inline float BitsToFloat(uint32_t x) {
  float f;
  __builtin_memcpy(&f, &x, 4);
  return f;
}
inline uint32_t FloatToBits(float f) {
  uint32_t x;
  __builtin_memcpy(&x, &f, 4);
  return x;
}

inline float ToFloatBF16(uint16_t h) { return BitsToFloat(static_cast<uint32_t>(h) << 16); }

inline uint16_t FromFloatBF16(float f) {
  const uint32_t x = FloatToBits(f);
  if ((x & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((x >> 16) | 0x40u);
  return static_cast<uint16_t>((x + 0x7fffu + ((x >> 16) & 1u)) >> 16);
}

inline float ToFloatF16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return BitsToFloat(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Subnormal halves count units of 2^-24. No subnormal float on the way: XLA's threads take those for 0.
  if (magnitude < 0x400u)
    return BitsToFloat(sign |
                       FloatToBits(static_cast<float>(static_cast<int32_t>(magnitude)) * BitsToFloat(0x33800000u)));
  return BitsToFloat(sign | ((magnitude << 13) + 0x38000000u));
}

// The upper half of a half.
inline float ToFloatF8E5M2(uint8_t x) { return ToFloatF16(static_cast<uint16_t>(x << 8)); }

// Its bits are those of a half, but for a bias of 7 instead of 15, a NaN of all ones, and no infinity.
inline float ToFloatF8E4M3(uint8_t x) {
  const int magnitude = x & 0x7f, sign = (x & 0x80) << 8;
  if (magnitude == 0x7f) return BitsToFloat(0x7fc00000u);
  return ToFloatF16(static_cast<uint16_t>(sign | magnitude << 7)) * 256.0f;
}

// The bfloat16 that is m 2^e, where m has at most 8 bits and the result is a normal number.
constexpr uint32_t ExactBF16(uint32_t m, int e) {
  if (m == 0) return 0;
  for (; m < 0x80; m <<= 1) --e;
  return static_cast<uint32_t>(e + 7 + 127) << 7 | (m & 0x7f);
}

// ... that 8 bits without a sign stand for: all are exact.
constexpr uint32_t MagnitudeBF16(DType t, uint32_t x) {
  if (t == DType::kI8) return ExactBF16(x, 0);
  const uint32_t digits = t == DType::kF8E4M3 ? 3 : 2, bias = t == DType::kF8E4M3 ? 7 : 15;
  const uint32_t e = x >> digits, m = x & ((1u << digits) - 1);
  if (t == DType::kF8E4M3 ? x == 0x7f : x > 0x7c) return 0x7fc0;
  if (t == DType::kF8E5M2 && x == 0x7c) return 0x7f80;
  return ExactBF16(e == 0 ? m : m + (1u << digits), static_cast<int>(e == 0 ? 1 : e) - static_cast<int>(bias + digits));
}

inline uint16_t FromFloatF16(float f) {
  const uint32_t x = FloatToBits(f);
  const uint16_t sign = static_cast<uint16_t>((x >> 16) & 0x8000u);
  const uint32_t magnitude = x & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 2^16 or more
  if (magnitude < 0x38800000u) {  // subnormal: adding 2^-1 lines the bits up and rounds
    const uint32_t y = FloatToBits(BitsToFloat(magnitude) + 0.5f) - 0x3f000000u;
    return static_cast<uint16_t>(sign | y);
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
