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

struct Range {
  int64_t lo, hi;
  bool Empty() const { return lo >= hi; }
};

inline Range Visible(const Call& c, const Row& row) {
  const int64_t lo = c.lower ? *c.lower.At<int32_t>(row.b, row.n, row.i) : 0;
  const int64_t hi = c.upper ? *c.upper.At<int32_t>(row.b, row.n, row.i) : c.Skv;
  return {lo < 0 ? 0 : lo, hi > c.Skv ? c.Skv : hi};
}

inline bool IsMasked(const Call& c) { return c.lower || c.upper || c.mask; }

// Turns products q.k (already scaled) of keys j0 + [from, to) into logits, in place; `slope` (may be null)
// takes the derivative of the soft cap. Columns are relative to key j0; `tmp` holds to - from floats.
inline void ToLogits(const Call& c, const Row& row, int64_t j0, int64_t from, int64_t to,
                     const float* poison, float* s, float* slope, float* tmp) {
  const int64_t n = to - from;
  s += from;
  if (c.bias) {
    if (c.bias.col == 0) {
      LoadRow(c.bias.Bytes(row.b, row.n, row.i), c.bias.dtype, 1, 1, tmp);
      const F x = Set(tmp[0]);
      for (int64_t j = 0; j < n; j += kLanes) Store(s + j, Load(s + j) + x);
    } else {
      LoadRow(c.bias.Bytes(row.b, row.n, row.i, j0 + from), c.bias.dtype, c.bias.col, n, tmp);
      for (int64_t j = 0; j < n; ++j) s[j] += tmp[j];
    }
  }
  if (c.slopes) {
    const float a = *c.slopes.At<float>(row.b, row.n);
    const int64_t base = j0 + from - row.i;
    if (c.alibi == Alibi::kSqrt) {
      for (int64_t j = 0; j < n; ++j) s[j] -= a * __builtin_sqrtf(__builtin_fabsf(static_cast<float>(base + j)));
    } else {
      for (int64_t j = 0; j < n; ++j) s[j] -= a * __builtin_fabsf(static_cast<float>(base + j));
    }
  }
  if (c.soft_cap != 0.0f) {
    const float inverse = 1.0f / c.soft_cap;
    for (int64_t j = 0; j < n; j += kLanes) {
      const F t = Tanh(Load(s + j) * Set(inverse));
      Store(s + j, t * Set(c.soft_cap));
      if (slope != nullptr) Store(slope + from + j, Set(1.0f) - t * t);
    }
  }
  if (poison != nullptr)
    for (int64_t j = 0; j < n; ++j) s[j] += poison[from + j];
  if (c.mask) {
    const uint8_t* visible = c.mask.At<uint8_t>(row.b, row.n, row.i, j0 + from);
    for (int64_t j = 0; j < n; ++j)
      if (!visible[j * c.mask.col]) s[j] = -__builtin_inff();
  }
}

// Zeroes those of p[from..to) that dropout drops.
inline void Drop(const Call& c, const Row& row, int64_t j0, int64_t from, int64_t to, float* p) {
  if (c.seed) {
    const uint32_t* seed = c.seed.At<uint32_t>(row.b, 0);
    const uint32_t* stream = c.stream.At<uint32_t>(row.b, row.n);
    uint8_t keep[kKeepColumns];
    for (int64_t j = j0 + from; j < j0 + to;) {
      const int64_t block = j / kKeepColumns;
      KeepColumns(seed, stream, static_cast<uint32_t>(row.i), static_cast<uint32_t>(block), c.threshold, keep);
      const int64_t end = (block + 1) * kKeepColumns < j0 + to ? (block + 1) * kKeepColumns : j0 + to;
      for (; j < end; ++j)
        if (!keep[j - block * kKeepColumns]) p[j - j0] = 0.0f;
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

inline float RowMax(const float* s, int64_t from, int64_t to, float m) {
  F a = Set(m), b = a;
  int64_t j = from;
  for (; j + 2 * kLanes <= to; j += 2 * kLanes) {
    a = Max(a, Load(s + j));
    b = Max(b, Load(s + j + kLanes));
  }
  for (; j + kLanes <= to; j += kLanes) a = Max(a, Load(s + j));
  a = Max(a, b);
  float lanes[kLanes];
  Store(lanes, a);
  for (int i = 0; i < kLanes; ++i) m = lanes[i] > m ? lanes[i] : m;
  for (; j < to; ++j) m = s[j] > m ? s[j] : m;
  return m;
}

// p = exp(s - m) in place over a whole number of vectors; returns the sum.
inline float RowExp(float* s, int64_t from, int64_t to, float m) {
  const F mv = Set(m);
  F a = Set(0.0f), b = a;
  int64_t j = from;
  for (; j + 2 * kLanes <= to; j += 2 * kLanes) {
    const F x = Exp(Load(s + j) - mv), y = Exp(Load(s + j + kLanes) - mv);
    Store(s + j, x);
    Store(s + j + kLanes, y);
    a = a + x;
    b = b + y;
  }
  for (; j < to; j += kLanes) {
    const F x = Exp(Load(s + j) - mv);
    Store(s + j, x);
    a = a + x;
  }
  return Sum(a + b);
}
