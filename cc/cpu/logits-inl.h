// From products q.k to logits: bias, slopes, soft cap, mask.
#pragma once

#include "call.h"
#include "cpu/arrays-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/simd-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// Whether a mask by blocks shows the row all keys of [j0, j1).
inline bool AreBlocksFull(const Call& c, const Row& row, int64_t j0, int64_t j1) {
  if (j0 >= j1) return true;
  const RowBlocks of(c, row);
  for (int64_t block = j0 / c.block_keys; block <= (j1 - 1) / c.block_keys; ++block)
    if (of.Kind(block) != 1) return false;
  return true;
}

// Whether a row's logits of keys j0 + v are just its products, times the scale.
inline bool IsPlain(const Call& c, const Row& row, int64_t j0, Range v) {
  return !c.bias && !c.slopes && !c.mask && !c.segment_row && SoftCapOf(c, row) == 0.0f && ScaleOf(c, row) > 0.0f &&
         (!c.blocks || AreBlocksFull(c, row, j0 + v.lo, j0 + v.hi));
}

// The element of an indexed bias for the row's key j.
inline int64_t BiasIndex(const Call& c, const Row& row, int64_t j) {
  return *c.bias_offset.At<int32_t>(row.b, row.n, row.i) + j;
}

// Those of n elements from `first` on that an indexed bias has; where it lacks some, their pairs are masked.
inline Range BiasElements(const Call& c, int64_t first, int64_t n) {
  const int64_t end = c.bias_elements - first;
  const Range given{first < 0 ? -first : 0, end < n ? end : n};
  return given.Empty() ? Range{0, 0} : given;
}

// The part of the row's bias, or of its tangent, for keys j0 + [from, to), as floats: in place, or in `tmp`.
inline const float* BiasOf(const Call& c, const View& bias, const Row& row, int64_t j0, int64_t from, int64_t to,
                           float* tmp) {
  if (c.bias_offset) {
    const int64_t first = BiasIndex(c, row, j0 + from), n = to - from;
    const Range given = BiasElements(c, first, n);
    Fill(tmp, 0, given.lo, 0.0f);
    Fill(tmp, given.hi, n, 0.0f);
    if (given.Empty()) return tmp;
    const char* src = bias.Bytes(row.b, row.n, 0, first + given.lo);
    if (given.hi - given.lo == n && bias.dtype == DType::kF32 && bias.col == 1)
      return reinterpret_cast<const float*>(src);
    LoadRow(src, bias.dtype, bias.col, given.hi - given.lo, tmp + given.lo);
    return tmp;
  }
  if (bias.col == 0) {
    LoadRow(bias.Bytes(row.b, row.n, row.i), bias.dtype, 1, 1, tmp);
    Fill(tmp, 0, to - from, tmp[0]);
    return tmp;
  }
  const char* src = bias.Bytes(row.b, row.n, row.i, j0 + from);
  if (bias.dtype == DType::kF32 && bias.col == 1) return reinterpret_cast<const float*>(src);
  LoadRow(src, bias.dtype, bias.col, to - from, tmp);
  return tmp;
}

// How a vector is read and written: as a whole, or its first n lanes, with nothing behind them read or written. Masked
// stores are slow on some processors, so only the end of a row takes them.
struct AllLanes {
  static JAX_FA_INLINE F Get(const float* p) { return Load(p); }
  static JAX_FA_INLINE void Put(float* p, F x) { Store(p, x); }
  static JAX_FA_INLINE Mask Flags(const uint8_t* p) { return NonZero(p); }
  static JAX_FA_INLINE Mask Same(const int32_t* p, int32_t x) { return Equal(p, x); }
};
struct FirstLanes {
  int n;
  JAX_FA_INLINE F Get(const float* p) const { return LoadFirst(p, n); }
  JAX_FA_INLINE void Put(float* p, F x) const { StoreFirst(p, x, n); }
  JAX_FA_INLINE Mask Flags(const uint8_t* p) const {
    uint8_t flags[kLanes] = {};
    for (int i = 0; i < n; ++i) flags[i] = p[i];
    return NonZero(flags);
  }
  JAX_FA_INLINE Mask Same(const int32_t* p, int32_t x) const {
    int32_t y[kLanes];
    for (int i = 0; i < kLanes; ++i) y[i] = p[i < n ? i : 0];
    return Equal(y, x);
  }
};

// Calls each(j, lanes) for every vector of n elements.
template <typename Each>
JAX_FA_INLINE void EachVector(int64_t n, const Each& each) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) each(j, AllLanes{});
  if (j < n) each(j, FirstLanes{static_cast<int>(n - j)});
}

// x[j] = what(x[j], more[j]) for j < n, vector by vector; the last one is not written, nor `more` read, past n.
template <typename What>
inline void Combine(int64_t n, float* x, const float* more, const What& what) {
  EachVector(n, [&](int64_t j, auto lanes) { lanes.Put(x + j, what(lanes.Get(x + j), lanes.Get(more + j))); });
}

// Flags of up to a block of keys.
struct Flags {
  uint8_t of[kMostKeys];
};

// The flags that a mask by blocks has for the row's keys [j0, j1): null where all are visible, else in place or in `own`.
inline const uint8_t* FlagsOfBlocks(const Call& c, const Row& row, int64_t j0, int64_t j1, Flags* own) {
  if (AreBlocksFull(c, row, j0, j1)) return nullptr;
  const RowBlocks of(c, row);
  for (int64_t j = j0; j < j1;) {
    const int64_t block = j / c.block_keys, first = block * c.block_keys;
    const int64_t end = first + c.block_keys < j1 ? first + c.block_keys : j1;
    const size_t n = static_cast<size_t>(end - j);
    uint8_t* const to = own->of + (j - j0);
    if (of.Kind(block) == 1 || !of.IsVisible(block)) {
      __builtin_memset(to, of.Kind(block) == 1, n);
    } else {
      const uint8_t* from = c.block_pairs.At<uint8_t>(row.b, row.n, of.Kind(block) - 2) +
                            row.i % c.block_rows * c.block_keys + (j - first);
      if (j == j0 && end == j1) return from;
      __builtin_memcpy(to, from, n);
    }
    j = end;
  }
  return own->of;
}

// The flags of the row's keys j0 + [from, to), in place or in `own`, where they are all that masks keys one by one and lie
// side by side.
inline const uint8_t* FlagsOf(const Call& c, const Row& row, int64_t j0, int64_t from, int64_t to, Flags* own) {
  if (c.segment_row) return nullptr;
  if (c.blocks) return c.mask ? nullptr : FlagsOfBlocks(c, row, j0 + from, j0 + to, own);
  if (!c.mask || c.mask.col != 1) return nullptr;
  return c.mask.At<uint8_t>(row.b, row.n, row.i, j0 + from);
}

// Sets x[0..n) to `value` where there is no flag.
inline void MaskByFlags(const uint8_t* flags, int64_t n, float value, float* x) {
  EachVector(n, [&](int64_t j, auto lanes) {
    lanes.Put(x + j, Select(lanes.Flags(flags + j), lanes.Get(x + j), Set(value)));
  });
}

// Sets x[0..n) to `value` where the row's segment is not that of the key.
inline void MaskOtherSegments(const Call& c, const Row& row, int64_t first, int64_t n, float value, float* x) {
  const int32_t segment = *c.segment_row.At<int32_t>(row.b, row.n, row.i);
  if (segment < 0) return;
  const int32_t* keys = c.segment_key.At<int32_t>(row.b, row.n, 0, first);
  EachVector(n, [&](int64_t j, auto lanes) {
    lanes.Put(x + j, Select(lanes.Same(keys + j, segment), lanes.Get(x + j), Set(value)));
  });
}

// Sets x[from..to) to `value` where the key is masked for this row, by the mask, by blocks or by segments.
inline void MaskOut(const Call& c, const Row& row, int64_t j0, int64_t from, int64_t to, float value, float* x) {
  if (c.segment_row) MaskOtherSegments(c, row, j0 + from, to - from, value, x + from);
  if (c.blocks) {
    Flags own;
    if (const uint8_t* flags = FlagsOfBlocks(c, row, j0 + from, j0 + to, &own); flags != nullptr)
      MaskByFlags(flags, to - from, value, x + from);
  }
  if (!c.mask) return;
  const uint8_t* visible = c.mask.At<uint8_t>(row.b, row.n, row.i, j0 + from);
  x += from;
  const int64_t n = to - from;
  if (c.mask.col == 0) {
    if (!*visible) Fill(x, 0, n, value);
    return;
  }
  if (c.mask.col == 1) {
    MaskByFlags(visible, n, value, x);
    return;
  }
  for (int64_t j = 0; j < n; ++j)
    if (!visible[j * c.mask.col]) x[j] = value;
}

// Asks for the bias and the flags of n rows' keys j0 + [from, to), and for the bias's `gradient`. A row is read in pieces of a
// block of keys, too short for the processor's own prefetching, from memory or the third cache; asked for at once they would
// wait for each other, so it is done bit by bit, beside products. Inlined, as GCC takes a function that only prefetches for one
// without effect and drops its calls.
JAX_FA_INLINE void PrefetchLogits(const Call& c, const Row& row, int64_t n, int64_t j0, int64_t from, int64_t to,
                                  bool gradient = false) {
  if (!c.bias && !c.mask) return;
  const View none, views[] = {c.bias_offset ? none : c.bias, c.mask, c.bias_offset || !gradient ? none : c.dbias};
  Row at = row;
  for (int64_t i = 0; i < n; ++i, at = After(c, at)) {
    for (const View& x : views) {
      if (!x || x.col != 1) continue;
      const char *p = x.Bytes(at.b, at.n, at.i, j0 + from), *end = x.Bytes(at.b, at.n, at.i, j0 + to);
      for (; p < end; p += 64) __builtin_prefetch(p);
    }
  }
}

inline F Within9(F u) { return Max(Set(-9.0f), Set(0.0f) - Max(Set(-9.0f), Set(0.0f) - u)); }

// The derivative of cap * tanh(x / cap) by cap, tanh u - u (1 - tanh^2 u), from u = x / cap and t = tanh u. Where u is
// small the two cancel, so there its series is summed.
inline F ByCap(F u, F t) {
  const F v = Within9(u), y = v * v;  // beyond 9, t is 1
  F p = Set(-0.043105f);
  p = Fma(p, y, Set(0.0886323f));
  p = Fma(p, y, Set(-0.17495591f));
  p = Fma(p, y, Set(0.32380952f));
  p = Fma(p, y, Set(-0.53333333f));
  p = Fma(p, y, Set(0.66666667f));
  const F small = p * y * v, large = t - v * (Set(1.0f) - t * t), limit = Set(0.35f);
  return Select(Equal(Max(Abs(v), limit), limit), small, large);
}

// Rows that take derivatives of the soft cap f(x) = cap tanh(x / cap), where not null: by x, by cap and twice by x, and
// x / cap, within [-9, 9] as tanh is constant beyond; all 0 where a bias of -inf masks the key. The mixed derivative is
// -u by_xx, and that twice by cap u^2 by_xx, with that quotient as u.
struct SoftCapRows {
  float *by_x = nullptr, *by_cap = nullptr, *by_xx = nullptr, *u = nullptr;
};

// x[j] = what(x[j], distance between the row and key j0 + j), for j < n.
template <typename What>
inline void WithDistances(const Call& c, const Row& row, int64_t j0, int64_t n, float* x, const What& what) {
  const F count = Count();
  const int64_t base = j0 - PositionOf(c, row);  // as a float exact up to 2^24, as slopes are defined
  EachVector(n, [&](int64_t j, auto lanes) {
    const F away = Abs(count + Set(static_cast<float>(base + j)));
    lanes.Put(x + j, what(lanes.Get(x + j), c.alibi == Alibi::kSqrt ? Sqrt(away) : away));
  });
}

// Turns products q.k of keys j0 + [from, to) into logits, in place; `cap_rows` take derivatives of the soft cap. Columns
// are relative to key j0; `tmp` holds to - from floats. `nan_marker` (may be null) is added. A bias of -inf masks its key,
// whatever comes after.
inline void ToLogits(const Call& c, const Row& row, int64_t j0, int64_t from, int64_t to, const float* nan_marker,
                     float* s, const SoftCapRows& cap_rows, float* tmp) {
  const int64_t n = to - from;
  const F scale = Set(ScaleOf(c, row));
  s += from;
  // What was asked for may have left the near caches again: rows whose stride is a power of 2 share few sets.
  if (row.i + kRows < c.Sq) PrefetchLogits(c, {row.b, row.n, row.i + kRows}, 1, j0, from, to, true);
  const float* bias = c.bias ? BiasOf(c, c.bias, row, j0, from, to, tmp) : nullptr;
  const bool last = !c.slopes && SoftCapOf(c, row) == 0.0f && nan_marker == nullptr;
  Flags own;
  if (const uint8_t* flags = last ? FlagsOf(c, row, j0, from, to, &own) : nullptr; flags != nullptr) {
    const F minus_inf = Set(-__builtin_inff());
    EachVector(n, [&](int64_t j, auto lanes) {
      const F x = lanes.Get(s + j), y = bias != nullptr ? Fma(x, scale, lanes.Get(bias + j)) : x * scale;
      lanes.Put(s + j, Select(lanes.Flags(flags + j), y, minus_inf));
    });
    return;
  }
  if (bias != nullptr) {
    Combine(n, s, bias, [&](F x, F y) { return Fma(x, scale, y); });
  } else {
    Combine(n, s, s, [&](F x, F) { return x * scale; });
  }
  if (c.slopes) {
    const F minus = Set(-*c.slopes.At<float>(row.b, row.n, row.i));
    WithDistances(c, row, j0 + from, n, s, [&](F x, F away) { return Fma(minus, away, x); });
  }
  if (const float soft_cap = SoftCapOf(c, row); soft_cap != 0.0f) {
    const F inverse = Set(1.0f / soft_cap), cap = Set(soft_cap), none = Set(0.0f), minus_inf = Set(-__builtin_inff());
    EachVector(n, [&](int64_t j, auto lanes) {
      const F u = lanes.Get(s + j) * inverse, t = Tanh(u), b = bias != nullptr ? lanes.Get(bias + j) : none;
      const Mask masked = Equal(b, minus_inf);
      lanes.Put(s + j, Select(masked, minus_inf, t * cap));
      const F by_x = Set(1.0f) - t * t;
      const auto put = [&](float* to, F x) { lanes.Put(to + from + j, Select(masked, none, x)); };
      if (cap_rows.by_x != nullptr) put(cap_rows.by_x, by_x);
      if (cap_rows.by_cap != nullptr) put(cap_rows.by_cap, ByCap(u, t));
      if (cap_rows.by_xx != nullptr) put(cap_rows.by_xx, Set(-2.0f) * t * by_x * inverse);
      if (cap_rows.u != nullptr) put(cap_rows.u, Within9(u));
    });
  }
  if (nan_marker != nullptr) Combine(n, s, nan_marker + from, [](F x, F more) { return x + more; });
  MaskOut(c, row, j0, from, to, -__builtin_inff(), s - from);
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
