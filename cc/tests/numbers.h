// Random numbers that are the same everywhere, and 16-bit floats by rounding real numbers: written apart from
// the kernels' bit tricks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "call.h"

namespace jax_fa_test {

using jax_fa::DType;

class Random {  // splitmix64
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t Bits() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  double Uniform() { return static_cast<double>(Bits() >> 11) * 0x1p-53; }
  int64_t Below(int64_t n) { return static_cast<int64_t>(Bits() % static_cast<uint64_t>(n)); }
  bool OneIn(int64_t n) { return Below(n) == 0; }
  double Normal() {  // nearly
    double x = -6.0;
    for (int i = 0; i < 12; ++i) x += Uniform();
    return x;
  }
  template <typename T, size_t n>
  T Pick(const T (&list)[n]) {
    return list[Below(static_cast<int64_t>(n))];
  }

 private:
  uint64_t state_;
};

struct Format {
  int digits;       // of the significand, with the hidden one
  int lowest;       // exponent of the smallest normal number's leading digit
  int bits;         // of the significand that are stored
  double overflow;  // rounds to infinity from here on
};
inline Format FormatOf(DType t) {
  if (t == DType::kBF16) return {8, -126, 7, 0x1.FFp127};
  if (t == DType::kF16) return {11, -14, 10, 65520.0};
  return {24, -126, 23, 0x1.FFFFFFp127};
}

// Half of what 1 is away from the next larger number.
inline double HalfUlp(DType t) { return std::ldexp(1.0, -FormatOf(t).digits); }

// x rounded to nearest, ties to even.
inline double Rounded(double x, DType t) {
  if (!std::isfinite(x) || x == 0.0) return x;
  const Format f = FormatOf(t);
  if (std::fabs(x) >= f.overflow) return std::copysign(std::numeric_limits<double>::infinity(), x);
  const int exponent = std::ilogb(x) > f.lowest ? std::ilogb(x) : f.lowest;
  const double unit = std::ldexp(1.0, exponent - f.digits + 1);
  return std::nearbyint(x / unit) * unit;
}

// All bits of the exponent of a 16-bit format: that of infinity and NaN.
inline int HighestExponent(DType t) { return t == DType::kBF16 ? 0xff : 0x1f; }

// The bits of x, which is a number of that format.
inline uint16_t Encode16(double x, DType t) {
  const Format f = FormatOf(t);
  const int all = HighestExponent(t);
  const int sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return static_cast<uint16_t>(sign | all << f.bits | 1 << (f.bits - 1));
  if (std::isinf(x)) return static_cast<uint16_t>(sign | all << f.bits);
  const double a = std::fabs(x);
  if (a < std::ldexp(1.0, f.lowest))
    return static_cast<uint16_t>(sign | static_cast<int>(std::ldexp(a, f.bits - f.lowest)));
  const int e = std::ilogb(a);
  const int significand = static_cast<int>(std::ldexp(a, f.bits - e)) - (1 << f.bits);
  return static_cast<uint16_t>(sign | (e - f.lowest + 1) << f.bits | significand);
}

inline double Decode16(uint16_t h, DType t) {
  const Format f = FormatOf(t);
  const int all = HighestExponent(t), e = (h >> f.bits) & all, significand = h & ((1 << f.bits) - 1);
  double x = std::ldexp(significand + (e > 0 ? 1 << f.bits : 0), (e > 0 ? e - 1 : 0) + f.lowest - f.bits);
  using Limits = std::numeric_limits<double>;
  if (e == all) x = significand == 0 ? Limits::infinity() : Limits::quiet_NaN();
  return h & 0x8000 ? -x : x;
}

// Philox4x32-10, one counter (Salmon et al., SC'11).
struct Philox {
  uint32_t word[4];  // NOLINT(modernize-use-default-member-init): it has no default

  Philox(uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint32_t k0, uint32_t k1) : word{a, b, c, d} {
    for (int round = 0; round < 10; ++round) {
      const uint64_t p = uint64_t{word[0]} * 0xD2511F53u, q = uint64_t{word[2]} * 0xCD9E8D57u;
      word[0] = static_cast<uint32_t>(q >> 32) ^ word[1] ^ k0;
      word[1] = static_cast<uint32_t>(q);
      word[2] = static_cast<uint32_t>(p >> 32) ^ word[3] ^ k1;
      word[3] = static_cast<uint32_t>(p);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }
};

}  // namespace jax_fa_test
