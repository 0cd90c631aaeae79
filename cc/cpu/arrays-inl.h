// Rows of arrays, of any dtype and strides, to floats or units, and back.
#pragma once

#include "call.h"
#include "cpu/convert-inl.h"
#include "cpu/simd-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// n elements that lie side by side vector by vector, the last one moved back so that it ends with them; else one by one.
template <typename Vector, typename Element>
JAX_FA_INLINE void EachElement(int64_t n, int64_t stride, const Vector& vector, const Element& element) {
  int64_t i = 0;
  if (stride == 1 && n >= kLanes) {
    for (; i + kLanes <= n; i += kLanes) vector(i);
    if (i < n) vector(n - kLanes);
    return;
  }
  for (; i < n; ++i) element(i);
}

// A vector of 8-bit elements.
template <DType kType>
JAX_FA_INLINE F LoadBytes(const char* p) {
  if constexpr (kType == DType::kI8) {
    return LoadI8(reinterpret_cast<const int8_t*>(p));
  } else if constexpr (kType == DType::kF8E4M3) {
    return LoadF8E4M3(reinterpret_cast<const uint8_t*>(p));
  } else {
    return LoadF8E5M2(reinterpret_cast<const uint8_t*>(p));
  }
}

// The first n < kLanes of them, then zeros; nothing behind them is read.
template <DType kType>
JAX_FA_INLINE F LoadFirstBytes(const char* p, int n) {
  char x[kLanes] = {};
  for (int i = 0; i < n; ++i) x[i] = p[i];
  return LoadBytes<kType>(x);
}

// Neighbours to floats.
template <DType kType>
inline void LoadByteRow(const char* src, int64_t n, float* dst) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) Store(dst + i, LoadBytes<kType>(src + i));
  if (const int rest = static_cast<int>(n - i); rest > 0)
    StoreFirst(dst + i, LoadFirstBytes<kType>(src + i, rest), rest);
}

// `n` elements with the given stride to contiguous floats. 8-bit ones are neighbours.
inline void LoadRow(const void* src, DType dtype, int64_t stride, int64_t n, float* dst) {
  const float* s = static_cast<const float*>(src);
  const uint16_t* h = static_cast<const uint16_t*>(src);
  if (dtype == DType::kF32) {
    EachElement(n, stride, [&](int64_t i) { Store(dst + i, Load(s + i)); }, [&](int64_t i) { dst[i] = s[i * stride]; });
  } else if (dtype == DType::kBF16) {
    EachElement(
        n, stride, [&](int64_t i) { Store(dst + i, LoadBF16(h + i)); },
        [&](int64_t i) { dst[i] = ToFloatBF16(h[i * stride]); });
  } else if (dtype == DType::kF16) {
    EachElement(
        n, stride, [&](int64_t i) { Store(dst + i, LoadF16(h + i)); },
        [&](int64_t i) { dst[i] = ToFloatF16(h[i * stride]); });
  } else if (dtype == DType::kI8) {
    LoadByteRow<DType::kI8>(static_cast<const char*>(src), n, dst);
  } else if (dtype == DType::kF8E4M3) {
    LoadByteRow<DType::kF8E4M3>(static_cast<const char*>(src), n, dst);
  } else {
    LoadByteRow<DType::kF8E5M2>(static_cast<const char*>(src), n, dst);
  }
}

// The same, filled up with zeros to whole vectors, for which `dst` has room.
inline void LoadWholeRow(const void* src, DType dtype, int64_t stride, int64_t n, float* dst) {
  const int64_t whole = (n + kLanes - 1) / kLanes * kLanes;
  if (stride == 1 && n > 0 && n < kLanes && !IsByte(dtype)) {
    const uint16_t* h = static_cast<const uint16_t*>(src);
    const int few = static_cast<int>(n);
    Store(dst, dtype == DType::kF32    ? LoadFirst(static_cast<const float*>(src), few)
               : dtype == DType::kBF16 ? LoadFirstBF16(h, few, false)
                                       : LoadFirstF16(h, few, false));
    return;
  }
  LoadRow(src, dtype, stride, n, dst);
  for (int64_t i = n; i < whole; ++i) dst[i] = 0.0f;
}

// The first n < kLanes elements of a vector.
template <typename T>
JAX_FA_INLINE void CopyFew(const T* src, int64_t n, T* dst) {
#pragma GCC unroll 3
  for (int64_t size = kLanes / 2, i = 0; size > 0; size /= 2) {
    if ((n & size) == 0) continue;
    for (int64_t j = 0; j < size; ++j) dst[i + j] = src[i + j];
    i += size;
  }
}

// The product, with no sign of a zero: where a sum is flushed to zero, that is one of the masked keys behind it, and how many
// there are depends on the tiles, and these on the number of threads.
JAX_FA_INLINE F Scaled(F x, F factor) { return Rounded(x * factor) + Set(0.0f); }
JAX_FA_INLINE float Scaled(float x, float factor) { return Rounded(x * factor) + 0.0f; }

// `n` floats, times `factor`, to where and as what they are stored.
inline void StoreRow(const float* src, float factor, void* dst, DType dtype, int64_t stride, int64_t n) {
  const F f = Set(factor);
  float* d = static_cast<float*>(dst);
  uint16_t* h = static_cast<uint16_t*>(dst);
  if (stride == 1 && n < kLanes) {
    const F x = Scaled(LoadFirst(src, static_cast<int>(n)), f);
    float all[kLanes];
    uint16_t halves[kLanes];
    if (dtype == DType::kF32) {
      Store(all, x);
      return CopyFew(all, n, d);
    }
    dtype == DType::kBF16 ? StoreBF16(halves, x) : StoreF16(halves, x);
    return CopyFew(halves, n, h);
  }
  if (dtype == DType::kF32) {
    EachElement(
        n, stride, [&](int64_t i) { Store(d + i, Scaled(Load(src + i), f)); },
        [&](int64_t i) { d[i * stride] = Scaled(src[i], factor); });
  } else if (dtype == DType::kBF16) {
    EachElement(
        n, stride, [&](int64_t i) { StoreBF16(h + i, Scaled(Load(src + i), f)); },
        [&](int64_t i) { h[i * stride] = FromFloatBF16(Scaled(src[i], factor)); });
  } else {
    EachElement(
        n, stride, [&](int64_t i) { StoreF16(h + i, Scaled(Load(src + i), f)); },
        [&](int64_t i) { h[i * stride] = FromFloatF16(Scaled(src[i], factor)); });
  }
}

// The same for a 16-bit dtype, and to `rounding` the rounding error, in halves of the dtype's epsilon.
// `src` has room for whole vectors.
template <DType kType>
inline void StoreRounded(const float* src, float factor, void* dst, int64_t stride, void* rounding,
                         int64_t rounding_stride, int64_t n) {
  constexpr bool kBF16 = kType == DType::kBF16;
  constexpr float kUnits = kBF16 ? 256.0f : 2048.0f;
  const auto store = [](uint16_t* p, F x) { kBF16 ? StoreBF16(p, x) : StoreF16(p, x); };
  uint16_t *d = static_cast<uint16_t*>(dst), *e = static_cast<uint16_t*>(rounding);
  for (int64_t i = 0; i < n; i += kLanes) {
    uint16_t kept[kLanes], lost[kLanes];
    const bool whole = i + kLanes <= n && stride == 1 && rounding_stride == 1;
    uint16_t *to = whole ? d + i : kept, *rest = whole ? e + i : lost;
    const F x = Scaled(Load(src + i), Set(factor));
    store(to, x);
    store(rest, (x - (kBF16 ? LoadBF16(to) : LoadF16(to))) * Set(kUnits));
    if (whole) continue;
    for (int64_t j = 0; j < kLanes && i + j < n; ++j) {
      d[(i + j) * stride] = kept[j];
      e[(i + j) * rounding_stride] = lost[j];
    }
  }
}

inline int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t Panels(int64_t columns) { return (columns + kPanel - 1) / kPanel; }
inline int64_t PanelEnd(int64_t panel, int64_t columns) {
  return (panel + 1) * kPanel < columns ? (panel + 1) * kPanel : columns;
}

inline void Fill(float* p, int64_t from, int64_t to, float x) {
  const F v = Set(x);
  for (; from + kLanes <= to; from += kLanes) Store(p + from, v);
  for (; from < to; ++from) p[from] = x;
}

// Zeros in the columns of `rows` rows of panels, to whole vectors: all that is read of sums.
inline void ClearRows(float* p, int64_t rows, int64_t row, int64_t columns) {
  const int64_t width = RoundUp(columns, kLanes);
  if (width == row) return Fill(p, 0, rows * row, 0.0f);
  for (int64_t r = 0; r < rows; ++r) Fill(p + r * row, 0, width, 0.0f);
}

// Whether elements are all finite: sums of them times 0, lane by lane.
class Finite {
 public:
  JAX_FA_INLINE void Take(const float* x, int64_t n) {
    Take(
        n, [&](int64_t i) { return Load(x + i); },
        [&](int64_t i) { return LoadFirst(x + i, static_cast<int>(n - i)); });
  }
  JAX_FA_INLINE void Take(const uint16_t* x, int64_t n) {  // bfloat16
    Take(
        n, [&](int64_t i) { return LoadBF16(x + i); },
        [&](int64_t i) { return LoadFirstBF16(x + i, static_cast<int>(n - i), i > 0); });
  }
  float ZeroOrNaN() const { return Sum(even_ + odd_); }

 private:
  template <typename Whole, typename Part>
  JAX_FA_INLINE void Take(int64_t n, const Whole& whole, const Part& part) {
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      even_ = Fma(whole(i), Set(0.0f), even_);
      odd_ = Fma(whole(i + kLanes), Set(0.0f), odd_);
    }
    if (i + kLanes <= n) even_ = Fma(whole(i), Set(0.0f), even_), i += kLanes;
    if (i < n) odd_ = Fma(part(i), Set(0.0f), odd_);
  }
  F even_ = Set(0.0f), odd_ = Set(0.0f);
};

// 0 if all n elements are finite, else NaN.
template <typename T>
inline float ZeroOrNaN(const T* x, int64_t n) {
  Finite all;
  all.Take(x, n);
  return all.ZeroOrNaN();
}

// Floats that staging rows of a call takes: kLanes rows, or two rows filled up to whole panels.
inline int64_t StagedRows(const Call& c) {
  const int64_t wide = c.D > c.Dv ? c.D : c.Dv, rows = kLanes * RoundUp(wide, kLanes),
                panels = 2 * Panels(wide) * kPanel;
  return RoundUp(rows > panels ? rows : panels, 16);
}

// ... and a block of keys or values that lie in pages.
inline int64_t StageSize(const Call& c) {
  const int64_t wide = c.D > c.Dv ? c.D : c.Dv;
  return StagedRows(c) + (c.pages ? kMostKeys * RoundUp(wide, 2 * kLanes) : 0);
}

// --- rows as units: floats, or the bfloat16 elements as they are

template <bool kPairs>
struct StoredAs {
  using Type = float;
};
template <>
struct StoredAs<true> {
  using Type = uint16_t;
};

// A row of an array as contiguous elements: in place if it can be read from there, else copied to `stage`.
template <bool kPairs>
inline const typename StoredAs<kPairs>::Type* ReadRow(const View& x, int64_t b, int64_t h, int64_t i, int64_t n,
                                                      float* stage) {
  using T = typename StoredAs<kPairs>::Type;
  const char* src = x.Bytes(b, h, i);
  if ((kPairs || x.dtype == DType::kF32) && (x.col == 1 || n == 1)) return reinterpret_cast<const T*>(src);
  if constexpr (kPairs) {
    uint16_t* dst = reinterpret_cast<uint16_t*>(stage);
    const uint16_t* s = reinterpret_cast<const uint16_t*>(src);
    for (int64_t d = 0; d < n; ++d) dst[d] = s[d * x.col];
    return dst;
  } else {
    LoadRow(src, x.dtype, x.col, n, stage);
    return stage;
  }
}

// A row of an array as units, the last one filled up with zero.
template <bool kPairs>
inline void CopyRow(const View& x, int64_t b, int64_t h, int64_t i, int64_t n, float* units) {
  const auto* row = ReadRow<kPairs>(x, b, h, i, n, units);
  if (reinterpret_cast<const void*>(row) != units) __builtin_memcpy(units, row, sizeof(*row) * static_cast<size_t>(n));
  if (kPairs && n % 2 != 0) reinterpret_cast<uint16_t*>(units)[n] = 0;
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
