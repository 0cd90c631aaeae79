// Gradients that are sums over many pairs: of bias, ALiBi slopes, scale and soft cap.
#pragma once

#include "call.h"
#include "cpu/logits-inl.h"
#include "cpu/rows-inl.h"
#include "cpu/scratch-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

// The part of dbias that a row of ds adds. `first`: this head is the first to come to its numbers (see WritesAllBias).
inline void AddToBias(const Call& c, bool first, const Row& row, int64_t j0, int64_t from, int64_t to,
                      const float* ds) {
  float* db = nullptr;
  if (c.bias_offset) {
    const int64_t begin = BiasIndex(c, row, j0 + from);
    const Range given = BiasElements(c, begin, to - from);
    if (given.Empty()) return;
    db = c.dbias.At<float>(row.b, row.n, 0, begin + given.lo);
    to = from + given.hi, from += given.lo;
    if (c.bias_apart && (c.mask || c.segment_row || c.blocks)) {  // the element of a masked pair may be another head's
      for (int64_t j = from; j < to; ++j)
        if (ds[j] != 0.0f) db[(j - from) * c.dbias.col] += ds[j];
      return;
    }
  } else {
    db = c.dbias.At<float>(row.b, row.n, row.i, j0 + from);
  }
  if (first && (c.dbias.head != 0 || row.n % c.G() == 0)) {
    __builtin_memcpy(db, ds + from, sizeof(float) * static_cast<size_t>(to - from));
  } else if (c.dbias.col == 0) {
    float sum = 0.0f;
    for (int64_t j = from; j < to; ++j) sum += ds[j];
    *db += sum;
  } else if (c.dbias.col == 1) {
    Combine(to - from, db, ds + from, [](F x, F more) { return x + more; });
  } else {
    for (int64_t j = from; j < to; ++j) db[(j - from) * c.dbias.col] += ds[j];
  }
}

// Minus the sum of ds times the distance, which is a row's part of the gradient of the slope.
inline double SlopeGradient(const Call& c, const Row& row, int64_t j0, int64_t from, int64_t to, const float* ds) {
  double sum = 0.0;
  const int64_t base = j0 - PositionOf(c, row);
  for (int64_t j = from; j < to; ++j) {
    const float away = __builtin_fabsf(static_cast<float>(base + j));
    sum -= ds[j] * (c.alibi == Alibi::kSqrt ? __builtin_sqrtf(away) : away);
  }
  return sum;
}

// The sums of each query head of a key head, over its rows and a range of keys; null where not asked for.
struct HeadSums {
  double *slopes = nullptr, *scale = nullptr, *soft_cap = nullptr;
  int64_t slope_rows = 1;    // Sq where each row has a slope of its own
  bool writes_bias = false;  // the gradient of the bias has nothing yet where these heads add to it
};

// A row's part of the gradient of the scale or the soft cap: the sum of ds times, say, the product q.k, which may be
// anything where masked.
inline double WeightedSum(const float* products, int64_t from, int64_t to, const float* ds) {
  F sum = Set(0.0f);
  for (int64_t j = from; j < to; j += kLanes) {
    const F x = LoadFirst(ds + j, Rest(to - j));
    sum = sum + Select(IsZero(x), x, x * LoadFirst(products + j, Rest(to - j)));
  }
  return Sum(sum);
}

// Adds part(b, n, i) to x for all batch entries, heads and its rows. Neighbours that go to the same element are added
// up in double.
template <typename Part>
inline void AddAll(const Call& c, const View& x, int64_t rows, const Part& part) {
  const auto each = [&](const auto& fn) {
    for (int64_t n = 0; n < c.N; ++n)
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t b = 0; b < c.B; ++b) fn(b, n, i);
  };
  each([&](int64_t b, int64_t n, int64_t i) { *x.At<float>(b, n, i) = 0.0f; });
  float none = 0.0f, *at = &none;
  double sum = 0.0;
  each([&](int64_t b, int64_t n, int64_t i) {
    float* to = x.At<float>(b, n, i);
    if (to != at) {
      *at += static_cast<float>(sum);
      at = to, sum = 0.0;
    }
    sum += part(b, n, i);
  });
  *at += static_cast<float>(sum);
}

// The sums of all key heads and of the parts that each is split into.
class AllSums {
 public:
  AllSums(const Call& c, int64_t splits)
      : c_(c),
        splits_(splits),
        rows_(c.dslopes.row != 0 ? c.Sq : 1),
        slopes_(c.dslopes ? c.G() * rows_ : 0),
        scale_(c.dscale ? c.G() : 0),
        soft_cap_(c.dsoft_cap ? c.G() : 0),
        writes_all_bias_(c.dbias && WritesAllBias(c)),
        memory_(2 * c.B * c.K * splits_ * Size()) {
    for (int64_t i = 0; i < c.B * c.K * splits_ * Size(); ++i) memory_.doubles()[i] = 0.0;
  }

  // `first`: of the heads that share a bias.
  HeadSums Of(int64_t head, int64_t split, bool first) const {
    double* p = memory_.doubles() + (head * splits_ + split) * Size();
    return {slopes_ ? p : nullptr, scale_ ? p + slopes_ : nullptr, soft_cap_ ? p + slopes_ + scale_ : nullptr, rows_,
            writes_all_bias_ && first};
  }

  void Store() const {
    const int64_t G = c_.G();
    const auto total = [&](int64_t b, int64_t n, int64_t at) {
      double sum = 0.0;
      for (int64_t split = 0; split < splits_; ++split)
        sum += memory_.doubles()[((b * c_.K + n / G) * splits_ + split) * Size() + at];
      return sum;
    };
    if (slopes_)
      AddAll(c_, c_.dslopes, rows_, [&](int64_t b, int64_t n, int64_t i) { return total(b, n, n % G * rows_ + i); });
    if (scale_) AddAll(c_, c_.dscale, 1, [&](int64_t b, int64_t n, int64_t) { return total(b, n, slopes_ + n % G); });
    if (soft_cap_)
      AddAll(c_, c_.dsoft_cap, 1, [&](int64_t b, int64_t n, int64_t) { return total(b, n, slopes_ + scale_ + n % G); });
  }

 private:
  int64_t Size() const { return slopes_ + scale_ + soft_cap_; }  // of one key head and split

  const Call& c_;
  const int64_t splits_, rows_, slopes_, scale_, soft_cap_;
  const bool writes_all_bias_;
  const Buffer memory_;
};

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
