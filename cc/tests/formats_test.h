// Numbers themselves: 16-bit formats as they are loaded and stored, exp and tanh, and the random bits of dropout.
#pragma once

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include <array>

#include "check.h"
#include "cpu/convert-inl.h"

namespace jax_fa_test {
namespace {

namespace convert = jax_fa::portable;

// As XLA sets its threads: numbers below the normal ones count as zero.
class FlushSubnormals {
 public:
  explicit FlushSubnormals(bool flush) {
    if (flush) Set(before_ | kFlush);
  }
  ~FlushSubnormals() { Set(before_); }

 private:
#if defined(__SSE__)
  static constexpr uint64_t kFlush = 0x8040;
  static uint64_t Get() { return _mm_getcsr(); }
  static void Set(uint64_t x) { _mm_setcsr(static_cast<unsigned>(x)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kFlush = uint64_t{1} << 24;
  static uint64_t Get() {
    uint64_t x;
    asm volatile("mrs %0, fpcr" : "=r"(x));
    return x;
  }
  static void Set(uint64_t x) { asm volatile("msr fpcr, %0" ::"r"(x)); }
#else
  static constexpr uint64_t kFlush = 0;
  static uint64_t Get() { return 0; }
  static void Set(uint64_t) {}
#endif

  const uint64_t before_ = Get();
};

void CheckConversions(int64_t count) {
  Doing("convert-inl.h", "", "");
  for (DType t : {DType::kBF16, DType::kF16}) {
    const bool half = t == DType::kF16;
    const char* name = half ? "f16" : "bf16";
    for (int flush = 0; flush < (half ? 2 : 1); ++flush) {
      for (int h = 0; h < 65536; ++h) {
        const auto bits = static_cast<uint16_t>(h);
        const double expected = Decode16(bits, t);
        float got;
        uint16_t back;
        {
          const FlushSubnormals mode(flush);
          got = half ? convert::ToFloatF16(bits) : convert::ToFloatBF16(bits);
          back = half ? convert::FromFloatF16(got) : convert::FromFloatBF16(got);
        }
        const bool nan = std::isnan(expected);
        if (!Same(got, expected) || (!nan && std::signbit(got) != std::signbit(expected)))
          return Fail("%s 0x%04x is %.9g%s, expected %.9g", name, h, static_cast<double>(got),
                      flush ? " (flushing)" : "", expected);
        if (nan ? !std::isnan(Decode16(back, t)) : back != bits)
          return Fail("%s 0x%04x comes back as 0x%04x", name, h, back);
      }
    }
    const auto check = [&](float f) {
      const double expected = Rounded(f, t);
      const uint16_t got = half ? convert::FromFloatF16(f) : convert::FromFloatBF16(f);
      const bool same = std::isnan(f) ? std::isnan(Decode16(got, t)) : got == Encode16(expected, t);
      if (!same) Fail("%.9g becomes %s 0x%04x, expected %.9g", static_cast<double>(f), name, got, expected);
      return same;
    };
    // Around the middle of any two neighbours, and anywhere.
    for (int h = 0; h < 0x7f80 && h < (half ? 0x7c00 : 0x7f80); ++h) {
      const double a = Decode16(static_cast<uint16_t>(h), t), b = Decode16(static_cast<uint16_t>(h + 1), t);
      const auto middle = static_cast<float>(std::isinf(b) ? FormatOf(t).overflow : (a + b) / 2);
      for (float f : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, HUGE_VALF)})
        if (!check(f) || !check(-f)) return;
    }
    Random random(5);
    for (int64_t i = 0; i < count; ++i)
      if (!check(convert::BitsToFloat(static_cast<uint32_t>(random.Bits())))) return;
  }
}

// Attention to one key returns its value: every number of a format passes through loads and stores as it is.
void CheckEveryNumber() {
  for (DType t : {DType::kBF16, DType::kF16}) {
    for (int variant = 0; variant < (t == DType::kF16 ? 4 : 2); ++variant) {  // strided or not; flushing or not
      Problem p;
      p.B1 = 4, p.N = p.K = 64, p.Dv = 256;
      const Storage storage{"01324", variant % 2 ? 2 : 1};
      const auto array = [&](DType dtype, int64_t col) { return Array(dtype, {4, 1, 64, 1, col}, 1, 4, storage); };
      p.query = array(t, 1), p.key = array(t, 1), p.value = array(t, 256), p.out = array(t, 256);
      p.m = array(DType::kF32, 1), p.l = array(DType::kF32, 1);
      for (size_t i = 0; i < 65536; ++i) p.value.value[i] = Decode16(static_cast<uint16_t>(i), t);
      for (Array* x : {&p.query, &p.key, &p.value}) x->Write();
      for (const Kernels* kernels : Supported()) {
        Doing(kernels->name, "forward", "every number");
        Values got;
        {
          const FlushSubnormals mode(variant >= 2);
          got = Run(kernels->forward, CallOf(p), Serial(false), ForwardResults(p));
        }
        const bool flushes = t == DType::kBF16 && HasPairs(*kernels);
        for (size_t i = 0; i < 65536; ++i)
          if (!Same(got[0][i], p.value.value[i]) &&
              !(flushes && got[0][i] == 0.0 && std::fabs(p.value.value[i]) < 0x1p-126)) {
            Fail("out%s is %.9g, its value %.9g (variant %d)", Place(p.out, i).c_str(), got[0][i], p.value.value[i],
                 variant);
            break;
          }
      }
    }
  }
}

// exp and tanh as the results show them: of two keys with logits 0 and -x and values 0 and 1 comes
// exp(-x) / (1 + exp(-x)); of one key comes its capped logit as the max.
void CheckFunctions() {
  constexpr int64_t kCount = 5000;
  constexpr double kEps = 0x1p-24;
  Problem p;
  p.Sq = kCount, p.Skv = 2;
  const auto array = [](int64_t rows) { return Array(DType::kF32, {1, 1, 1, rows, 1}, 1, 1, Storage()); };
  p.query = array(kCount), p.key = array(2), p.value = array(2);
  p.out = array(kCount), p.m = array(kCount), p.l = array(kCount);
  for (size_t i = 0; i < kCount; ++i) p.query.value[i] = 100.0 * static_cast<double>(i) / kCount;
  p.key.value = {0.0, -1.0}, p.value.value = {0.0, 1.0};
  for (Array* x : {&p.query, &p.key, &p.value}) x->Write();
  for (const Kernels* kernels : Supported()) {
    Doing(kernels->name, "forward", "exp");
    const Values got = Run(kernels->forward, CallOf(p), Serial(false), ForwardResults(p));
    for (size_t i = 0; i < kCount; ++i) {
      const double x = p.query.value[i], expected = std::exp(-x) / (1.0 + std::exp(-x));
      if (std::fabs(got[0][i] - expected) <= expected * kEps * (6.0 + 1.2 * x) + 1e-37) continue;
      Fail("exp(-x) / (1 + exp(-x)) is %.9g, expected %.9g, for x = %.9g", got[0][i], expected, x);
      break;
    }
  }
  p.Skv = 1, p.cap = 1.0;
  p.key.value = {1.0, 0.0};
  for (size_t i = 0; i < kCount; ++i) p.query.value[i] = 12.0 * (2.0 * static_cast<double>(i) / kCount - 1.0);
  for (Array* x : {&p.query, &p.key}) x->Write();
  for (const Kernels* kernels : Supported()) {
    Doing(kernels->name, "forward", "tanh");
    const Values got = Run(kernels->forward, CallOf(p), Serial(false), ForwardResults(p));
    for (size_t i = 0; i < kCount; ++i) {
      const double expected = std::tanh(p.query.value[i]);
      if (std::fabs(got[1][i] - expected) <= std::fabs(expected) * kEps * 6.0) continue;
      Fail("tanh(%.9g) is %.9g, expected %.9g", p.query.value[i], got[1][i], expected);
      break;
    }
  }
}

void CheckPhilox() {  // the known answers of Random123
  Doing("reference", "philox", "");
  const auto check = [](const Philox& x, std::array<uint32_t, 4> expected) {
    for (size_t i = 0; i < 4; ++i)
      if (x.word[i] != expected[i]) Fail("word %zu is %08x", i, x.word[i]);
  };
  check({0, 0, 0, 0, 0, 0}, {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u});
  check({~0u, ~0u, ~0u, ~0u, ~0u, ~0u}, {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu});
  check({0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u, 0xa4093822u, 0x299f31d0u},
        {0xd16cfe09u, 0x94fdcceb, 0x5001e420u, 0x24126ea1u});
}

}  // namespace
}  // namespace jax_fa_test
