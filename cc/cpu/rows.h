// What happens to rows of logits between the two products: bias, slopes, soft cap, mask, softmax, dropout.
//
// Rows of a task are query rows of one key head: row r is position r % Sq of query head k * G + r / Sq, so
// that the heads of a group share every packed key and value.

struct Row {
  int64_t b, n, i;  // batch entry, query head, position
};

inline Row RowAt(const Call& c, int64_t b, int64_t k, int64_t r) {
  return {b, k * c.G() + r / c.Sq, r % c.Sq};
}

// The row after it, without the divisions.
inline Row After(const Call& c, Row row) {
  if (++row.i == c.Sq) row.i = 0, ++row.n;
  return row;
}

struct Range {
  int64_t lo, hi;
  bool Empty() const { return lo >= hi; }
};

inline Range Visible(const Call& c, const Row& row) {
  const int64_t lo = c.lower ? *c.lower.At<int32_t>(row.b, row.n, row.i) : 0;
  const int64_t hi = c.upper ? *c.upper.At<int32_t>(row.b, row.n, row.i) : c.Skv;
  return {lo < 0 ? 0 : lo, hi > c.Skv ? c.Skv : hi};
}

// Lanes of a vector at most.
inline int Rest(int64_t n) { return n < kLanes ? static_cast<int>(n) : kLanes; }

inline bool IsMasked(const Call& c) { return c.lower || c.upper || c.mask || c.segment_row; }

// What is one number for the call, or one for each head.
inline float ScaleOf(const Call& c, int64_t b, int64_t n) {
  return c.scale_of_head ? *c.scale_of_head.At<float>(b, n) : c.scale;
}
inline float ScaleOf(const Call& c, const Row& row) { return ScaleOf(c, row.b, row.n); }
inline float SoftCapOf(const Call& c, const Row& row) {
  return c.soft_cap_of_head ? *c.soft_cap_of_head.At<float>(row.b, row.n) : c.soft_cap;
}
inline uint32_t ThresholdOf(const Call& c, const Row& row) {
  return c.threshold_of_head ? *c.threshold_of_head.At<uint32_t>(row.b, row.n) : c.threshold;
}
inline float KeepProbOf(const Call& c, const Row& row) {
  if (!c.threshold_of_head) return c.keep_prob;
  return static_cast<float>(*c.threshold_of_head.At<uint32_t>(row.b, row.n)) * 0x1p-16f;
}

// Where a row stands among the keys, for ALiBi.
inline int64_t PositionOf(const Call& c, const Row& row) {
  return c.position ? *c.position.At<int32_t>(row.b, row.n, row.i) : row.i;
}

// Whether a row's logits are just its products, times the scale.
inline bool IsPlain(const Call& c, const Row& row) {
  return !c.bias && !c.slopes && !c.mask && !c.segment_row && SoftCapOf(c, row) == 0.0f && ScaleOf(c, row) > 0.0f;
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

// The part of the row's bias for keys j0 + [from, to), as floats: where it lies, or in `tmp`.
inline const float* BiasOf(const Call& c, const Row& row, int64_t j0, int64_t from, int64_t to, float* tmp) {
  if (c.bias_offset) {
    const int64_t first = BiasIndex(c, row, j0 + from), n = to - from;
    const Range given = BiasElements(c, first, n);
    Fill(tmp, 0, given.lo, 0.0f);
    Fill(tmp, given.hi, n, 0.0f);
    if (given.Empty()) return tmp;
    const char* src = c.bias.Bytes(row.b, row.n, 0, first + given.lo);
    if (given.hi - given.lo == n && c.bias.dtype == DType::kF32 && c.bias.col == 1)
      return reinterpret_cast<const float*>(src);
    LoadRow(src, c.bias.dtype, c.bias.col, given.hi - given.lo, tmp + given.lo);
    return tmp;
  }
  if (c.bias.col == 0) {
    LoadRow(c.bias.Bytes(row.b, row.n, row.i), c.bias.dtype, 1, 1, tmp);
    Fill(tmp, 0, to - from, tmp[0]);
    return tmp;
  }
  const char* src = c.bias.Bytes(row.b, row.n, row.i, j0 + from);
  if (c.bias.dtype == DType::kF32 && c.bias.col == 1) return reinterpret_cast<const float*>(src);
  LoadRow(src, c.bias.dtype, c.bias.col, to - from, tmp);
  return tmp;
}

// x[j] = what(x[j], more[j]) for j < n, vector by vector; the last one is not written, nor `more` read, past n.
template <typename What>
inline void Combine(int64_t n, float* x, const float* more, const What& what) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) Store(x + j, what(Load(x + j), Load(more + j)));
  if (j < n) {
    const int rest = static_cast<int>(n - j);
    StoreFirst(x + j, what(LoadFirst(x + j, rest), LoadFirst(more + j, rest)), rest);
  }
}

// Sets x[0..n) to `value` where the row's segment is not that of the key.
inline void HideOtherSegments(const Call& c, const Row& row, int64_t first, int64_t n, float value, float* x) {
  const int32_t segment = *c.segment_row.At<int32_t>(row.b, row.n, row.i);
  if (segment < 0) return;
  const int32_t* keys = c.segment_key.At<int32_t>(row.b, row.n, 0, first);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) Store(x + j, Select(Equal(keys + j, segment), Load(x + j), Set(value)));
  for (; j < n; ++j)
    if (keys[j] != segment) x[j] = value;
}

// Sets x[from..to) to `value` where the key is masked for this row, by the mask or by segments.
inline void Hide(const Call& c, const Row& row, int64_t j0, int64_t from, int64_t to, float value, float* x) {
  if (c.segment_row) HideOtherSegments(c, row, j0 + from, to - from, value, x + from);
  if (!c.mask) return;
  const uint8_t* visible = c.mask.At<uint8_t>(row.b, row.n, row.i, j0 + from);
  x += from;
  const int64_t n = to - from;
  if (c.mask.col == 0) {
    if (!*visible) Fill(x, 0, n, value);
    return;
  }
  int64_t j = 0;
  if (c.mask.col == 1) {
    // Not up to the last vector: a vector of flags may be read in one piece that is longer than a vector of floats.
    for (; j + 16 <= n; j += kLanes) Store(x + j, Select(NonZero(visible + j), Load(x + j), Set(value)));
  }
  for (; j < n; ++j)
    if (!visible[j * c.mask.col]) x[j] = value;
}

// The derivative of cap * tanh(x / cap) by cap, tanh u - u (1 - tanh^2 u), from u = x / cap and t = tanh u. Where u is
// small the two cancel, so there its series is summed.
inline F ByCap(F u, F t) {
  const F v = Max(Set(-9.0f), Set(0.0f) - Max(Set(-9.0f), Set(0.0f) - u)), y = v * v;  // beyond 9, t is 1
  F p = Set(-0.043105f);
  p = Fma(p, y, Set(0.0886323f));
  p = Fma(p, y, Set(-0.17495591f));
  p = Fma(p, y, Set(0.32380952f));
  p = Fma(p, y, Set(-0.53333333f));
  p = Fma(p, y, Set(0.66666667f));
  const F small = p * y * v, large = t - v * (Set(1.0f) - t * t), limit = Set(0.35f);
  return Select(Equal(Max(Abs(v), limit), limit), small, large);
}

// Turns products q.k of keys j0 + [from, to) into logits, in place; `by_x` and `by_cap` (may be null) take the
// derivatives of the soft cap. Columns are relative to key j0; `tmp` holds to - from floats. `poison` (may be null) is
// added. A bias of -inf masks its key, whatever comes after.
inline void ToLogits(const Call& c, const Row& row, int64_t j0, int64_t from, int64_t to, const float* poison,
                     float* s, float* by_x, float* by_cap, float* tmp) {
  const int64_t n = to - from;
  const F scale = Set(ScaleOf(c, row));
  s += from;
  const float* bias = nullptr;
  if (c.bias) {
    bias = BiasOf(c, row, j0, from, to, tmp);
    Combine(n, s, bias, [&](F x, F y) { return Fma(x, scale, y); });
  } else {
    Combine(n, s, s, [&](F x, F) { return x * scale; });
  }
  if (c.slopes) {
    const F minus = Set(-*c.slopes.At<float>(row.b, row.n, row.i)), count = Count();
    const int64_t base = j0 + from - PositionOf(c, row);  // as a float exact up to 2^24, as slopes are defined
    for (int64_t j = 0; j < n; j += kLanes) {
      const F away = Abs(count + Set(static_cast<float>(base + j)));
      const F x = Fma(minus, c.alibi == Alibi::kSqrt ? Sqrt(away) : away, LoadFirst(s + j, Rest(n - j)));
      StoreFirst(s + j, x, Rest(n - j));
    }
  }
  if (const float soft_cap = SoftCapOf(c, row); soft_cap != 0.0f) {
    const F inverse = Set(1.0f / soft_cap), cap = Set(soft_cap), none = Set(0.0f), hidden = Set(-__builtin_inff());
    for (int64_t j = 0; j < n; j += kLanes) {
      const int rest = Rest(n - j);
      const F u = LoadFirst(s + j, rest) * inverse, t = Tanh(u), b = bias ? LoadFirst(bias + j, rest) : none;
      const Mask hides = Equal(b, hidden);
      StoreFirst(s + j, Select(hides, hidden, t * cap), rest);
      if (by_x != nullptr) StoreFirst(by_x + from + j, Select(hides, none, Set(1.0f) - t * t), rest);
      if (by_cap != nullptr) StoreFirst(by_cap + from + j, Select(hides, none, ByCap(u, t)), rest);
    }
  }
  if (poison != nullptr) Combine(n, s, poison + from, [](F x, F more) { return x + more; });
  Hide(c, row, j0, from, to, -__builtin_inff(), s - from);
}

// Zeroes those of p[from..to) that dropout drops.
inline void Drop(const Call& c, const Row& row, int64_t j0, int64_t from, int64_t to, float* p) {
  if (c.seed) {
    const uint32_t* seed = c.seed.At<uint32_t>(row.b, 0);
    const uint32_t* stream = c.stream.At<uint32_t>(row.b, row.n);
    for (int64_t block = (j0 + from) / kKeepColumns; block * kKeepColumns < j0 + to; ++block) {
      uint32_t keep[4];
      KeepColumns(seed, stream, static_cast<uint32_t>(row.i), static_cast<uint32_t>(block), ThresholdOf(c, row), keep);
      const int64_t first = block * kKeepColumns - j0;  // may lie before `from`, even before 0
      for (int64_t j = 0; j < kKeepColumns; j += kLanes) {
        const int64_t at = first + j;
        const Mask kept = Bits(keep[j / 32] >> (j % 32));
        if (at >= from && at + kLanes <= to) {
          Store(p + at, Select(kept, Load(p + at), Set(0.0f)));
        } else {
          for (int64_t i = at < from ? from - at : 0; i < kLanes && at + i < to; ++i)
            if (!(keep[j / 32] >> (j % 32 + i) & 1)) p[at + i] = 0.0f;
        }
      }
    }
  }
  if (c.drop_bits) {
    const uint8_t* bits = c.drop_bits.At<uint8_t>(row.b, 0);
    const int32_t* offset = c.drop_offset.At<int32_t>(row.b, row.n, row.i);
    for (int64_t j = from; j < to; ++j) {
      const int64_t bit = static_cast<int64_t>(offset[0]) * 8 + offset[1] + j0 + j;
      const int64_t byte = bit >> 3;
      const bool inside = byte >= 0 && byte < c.drop_bytes;
      if (inside && !((bits[byte] >> (bit & 7)) & 1)) p[j] = 0.0f;
    }
  }
}

// Of a row with a NaN any number, or NaN: its sum is NaN all the same.
inline float RowMax(const float* s, int64_t from, int64_t to) {
  float m = -__builtin_inff();
  F a = Set(m), b = a;
  int64_t j = from;
  for (; j + 2 * kLanes <= to; j += 2 * kLanes) {
    a = Max(a, Load(s + j));
    b = Max(b, Load(s + j + kLanes));
  }
  for (; j + kLanes <= to; j += kLanes) a = Max(a, Load(s + j));
  m = MaxOf(Max(a, b));
  for (; j < to; ++j) m = s[j] > m ? s[j] : m;
  return m;
}

// exp(scale x - m), the one formula of both passes: the weights of the backward are those that the sum l is made of. The
// logit scale x is rounded like the max among them, so that the largest weight is 1 exactly.
JAX_FA_INLINE F Weight(F x, F scale, F m) { return Exp2((Rounded(x * scale) - m) * Set(kLog2E)); }

// p = exp(scale s - m) in place over a whole number of vectors; returns the sum. With kPairs the results are
// rounded and stored as pairs of neighbours, from s[from / 2] on, and the last pairs are filled up with zeros.
template <bool kPairs>
inline float RowExp(float* s, int64_t from, int64_t to, float scale, float m) {
  const F mv = Set(m), f = Set(scale);
  F a = Set(0.0f), b = a;
  int64_t j = from;
  for (; j + 2 * kLanes <= to; j += 2 * kLanes) {
    const F x = Weight(Load(s + j), f, mv), y = Weight(Load(s + j + kLanes), f, mv);
    if constexpr (kPairs) {
      Store(s + j / 2, Unit<kPairs>::Join(x, y));
    } else {
      Store(s + j, x);
      Store(s + j + kLanes, y);
    }
    a = a + x;
    b = b + y;
  }
  for (; j < to; j += kLanes) {
    const F x = Weight(Load(s + j), f, mv);
    if constexpr (kPairs) {
      Store(s + j / 2, Unit<kPairs>::Join(x, Set(0.0f)));
    } else {
      Store(s + j, x);
    }
    a = a + x;
  }
  return Sum(a + b);
}

// The same rounding and storing alone.
template <bool kPairs>
inline void RowJoin(float* s, int64_t from, int64_t to) {
  for (int64_t j = from; j < to; j += 2 * kLanes)
    Store(s + j / 2, Unit<kPairs>::Join(Load(s + j), j + kLanes < to ? Load(s + j + kLanes) : Set(0.0f)));
}

// Turns a row's products with keys j0 + [c0, c1) into weights, of which [v.lo, v.hi) are visible, and updates its
// max, sum and output.
template <bool kPairs>
inline void SoftmaxRow(const Call& c, const Row& row, int64_t j0, Range v, int64_t c0, int64_t c1, const float* poison,
                       float* tmp, float* x, float* m, float* l, float* acc) {
  if (v.Empty()) v = {c0, c0};
  const bool plain = IsPlain(c, row);
  const float scale = plain ? ScaleOf(c, row) : 1.0f;  // of what x then holds
  if (!plain) {
    if (!v.Empty()) ToLogits(c, row, j0, v.lo, v.hi, poison, x, nullptr, nullptr, tmp);
  } else if (poison != nullptr) {
    Combine(v.hi - v.lo, x + v.lo, poison + v.lo, [](F y, F more) { return y + more; });
  }
  Fill(x, c0, v.lo, -__builtin_inff());
  Fill(x, v.hi, c1, -__builtin_inff());
  const float most = Rounded(RowMax(x, c0, c1) * scale);
  if (most > *m) {
    const float rescale = __builtin_expf(*m - most);
    const F f = Set(rescale);
    for (int64_t d = 0; d < Panels(c.Dv) * kPanel; d += kLanes) Store(acc + d, Load(acc + d) * f);
    *l *= rescale;
    *m = most;
  }
  if (c.seed || c.drop_bits) {
    *l += RowExp<false>(x, c0, c1, scale, *m);
    Drop(c, row, j0, v.lo, v.hi, x);
    if constexpr (kPairs) RowJoin<kPairs>(x, c0, c1);
  } else {
    *l += RowExp<kPairs>(x, c0, c1, scale, *m);
  }
}

// --- which keys are visible to the rows of a block

struct RowTile {
  int64_t r, n;      // first row within the block, and how many
  int64_t from, to;  // its visible keys, relative to the block of keys
};

// The keys of j0 + [0, width) that are visible to a row with the range [lo, hi), relative to j0; empty as (0, 0).
inline Range Within(int32_t lo, int32_t hi, int64_t j0, int64_t width) {
  const Range v{lo - j0 > 0 ? lo - j0 : 0, hi - j0 < width ? hi - j0 : width};
  return v.Empty() ? Range{0, 0} : v;
}

// Tiles of up to kRows of `rows` rows with ranges lo, hi; fully masked ones are left out. Returns how many.
inline int64_t MakeTiles(const int32_t* lo, const int32_t* hi, int64_t rows, int64_t j0, int64_t width,
                         RowTile* tiles) {
  const int64_t parts = (rows + kRows - 1) / kRows;
  int64_t count = 0;
  for (int64_t t = 0; t < parts; ++t) {
    RowTile tile{rows * t / parts, 0, width, 0};
    tile.n = rows * (t + 1) / parts - tile.r;
    for (int64_t r = tile.r; r < tile.r + tile.n; ++r) {
      const Range v = Within(lo[r], hi[r], j0, width);
      if (v.Empty()) continue;
      tile.from = v.lo < tile.from ? v.lo : tile.from;
      tile.to = v.hi > tile.to ? v.hi : tile.to;
    }
    if (tile.from < tile.to) tiles[count++] = tile;
  }
  return count;
}
