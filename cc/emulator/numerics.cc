// The mathematics, row by row: float32, probabilities and their derivatives rounded to the inputs' dtype.
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "emulator/op.h"

namespace cann_emulator {
namespace {

constexpr float kMax = std::numeric_limits<float>::max();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

float HalfToFloat(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  float x;
  if (exponent == 31)
    x = mantissa ? kNaN : std::numeric_limits<float>::infinity();
  else
    x = exponent ? std::ldexp(1024.0f + static_cast<float>(mantissa), exponent - 25)
                 : std::ldexp(static_cast<float>(mantissa), -24);
  return h >> 15 ? -x : x;
}

// To the nearest half; ties to even, or away from zero.
uint16_t FloatToHalf(float x, bool away) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  x = std::fabs(x);
  if (std::isnan(x)) return sign | 0x7E00;
  if (x >= 65520.0f) return sign | 0x7C00;
  int exponent = 0;
  std::frexp(x, &exponent);
  exponent = std::max(exponent, -13);                 // below: subnormal
  const float scaled = std::ldexp(x, 11 - exponent);  // the mantissa with its hidden bit as an integer
  const float rounded = away ? std::floor(scaled + 0.5f) : std::nearbyint(scaled);
  const int mantissa = static_cast<int>(rounded);
  if (mantissa == 0) return sign;
  // A subnormal has no hidden bit; a mantissa that rounded up carries into the exponent by itself.
  return static_cast<uint16_t>(sign | (mantissa + ((exponent + 13) << 10)));
}

float BF16ToFloat(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

uint16_t FloatToBF16(float x, bool away) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return static_cast<uint16_t>(bits >> 16 | 64);
  return static_cast<uint16_t>((bits + (away ? 0x8000 : 0x7FFF + (bits >> 16 & 1))) >> 16);
}

float Load(const char* data, int64_t at, int dtype) {
  if (dtype == kFloat) {
    float x;
    std::memcpy(&x, data + 4 * at, 4);
    return x;
  }
  uint16_t h;
  std::memcpy(&h, data + 2 * at, 2);
  return dtype == kBF16 ? BF16ToFloat(h) : HalfToFloat(h);
}

void Store(char* data, int64_t at, int dtype, float x) {
  if (dtype == kFloat) {
    std::memcpy(data + 4 * at, &x, 4);
    return;
  }
  const uint16_t h = dtype == kBF16 ? FloatToBF16(x, false) : FloatToHalf(x, false);
  std::memcpy(data + 2 * at, &h, 2);
}

// What the matrix unit is given of a float32 number.
float Narrow(float x, int dtype) {
  if (dtype == kBF16) return BF16ToFloat(FloatToBF16(x, true));
  return dtype == kFloat16 ? HalfToFloat(FloatToHalf(x, true)) : x;
}

// Rows of query, key, value or their kin: where element (b, s, n, d) lies.
class Rows {
 public:
  Rows(const Op& op, const Array& x, int64_t width, const std::vector<int64_t>& begin)
      : x_(x), begin_(begin), varlen_(op.varlen), width_(width) {
    const std::string& l = op.layout;
    const auto stride = [&](char c) { return l.find(c) == std::string::npos ? 0 : x.strides[l.find(c)]; };
    b_ = stride('B');
    s_ = varlen_ ? stride('T') : stride('S');
    d_ = x.strides.back();
    n_ = l.back() == 'H' ? width * d_ : stride('N');
  }
  int64_t At(int64_t b, int64_t s, int64_t n, int64_t d) const {
    return x_.offset + b * b_ + (begin_[b] + s) * s_ + n * n_ + d * d_;
  }
  void Get(int64_t b, int64_t s, int64_t n, float* to) const {
    for (int64_t d = 0; d < width_; ++d) to[d] = Load(x_.data, At(b, s, n, d), x_.dtype);
  }
  void Put(int64_t b, int64_t s, int64_t n, const float* from, float factor) const {
    for (int64_t d = 0; d < width_; ++d) Store(x_.data, At(b, s, n, d), x_.dtype, factor * from[d]);
  }

 private:
  const Array& x_;
  const std::vector<int64_t>& begin_;
  bool varlen_;
  int64_t width_, b_, s_, n_, d_;
};

// The statistics' memory order: blocks [N, Sq_b] of sequences, or rows first.
int64_t StatsAt(const Op& op, const Sizes& s, int64_t b, int64_t n, int64_t i) {
  if (op.varlen && op.softmax_layout != nullptr && *op.softmax_layout) return ((s.q_begin[b] + i) * s.N + n) * 8;
  if (op.varlen) return (s.q_begin[b] * s.N + n * s.sq[b] + i) * 8;
  return ((b * s.N + n) * s.sq[b] + i) * 8;
}

class Call {
 public:
  explicit Call(const Op& op)
      : op(op), s(SizesOf(op)), scale(static_cast<float>(op.scale)), keep_prob(static_cast<float>(op.keep_prob)) {
    int64_t bits = 0, blocks = 0, rows = 0;
    for (int64_t b = 0; b < s.B; ++b) {
      drop_begin_.push_back(bits);
      pse_begin_.push_back(blocks);
      pse_row_begin_.push_back(rows);
      bits += s.N * s.sq[b] * s.skv[b];
      blocks += s.N * s.sq[b] * s.skv[b];
      rows += s.N * s.skv[b];
      longest_q_ = std::max(longest_q_, s.sq[b]);
      longest_kv_ = std::max(longest_kv_, s.skv[b]);
    }
    one_row_ = op.varlen && op.pse.present() && op.pse.dims.size() == 1 && op.pse.size() == rows;
  }

  const Op& op;
  const Sizes s;
  const float scale, keep_prob;

  // Whether the mask operand is as the sparse mode needs it; the text of the error if not.
  std::string CheckMask() const {
    if (!op.mask.present()) return "";
    if (Compressed(op)) {
      for (int64_t i = 0; i < op.mask.dims[0]; ++i)
        for (int64_t j = 0; j < 2048; ++j) {
          const bool wanted = i < 2048 ? j > i : j >= 1024;
          if (Masked(i * op.mask.strides[0] + j * op.mask.strides[1]) != wanted)
            return "the compressed mask has another pattern than sparse mode " + std::to_string(op.sparse_mode) +
                   " needs";
        }
      return "";
    }
    if (op.sparse_mode != 0 && op.sparse_mode != 5) return "";
    for (int64_t b = 0; b < s.B; ++b)
      for (int64_t n = 0; n < s.N; ++n)
        for (int64_t i = 0; i < s.sq[b]; ++i)
          for (int64_t j = 0; j < s.skv[b]; ++j)
            if (!FullMask(b, n, i, j) && !InStructure(op, s, b, i, j))
              return "the mask lets a row see a key that sparse mode " + std::to_string(op.sparse_mode) + " leaves out";
    return "";
  }

  // Logits of a row; returns how many keys it sees. Masked ones are -FLT_MAX.
  int64_t Logits(int64_t b, int64_t n, int64_t i, const float* q, const std::vector<float>& kt, float* x,
                 char* seen) const {
    const int64_t skv = s.skv[b];
    // Rounded once: in which order a matrix unit sums is no part of the contract.
    std::vector<double> products(skv);
    for (int64_t d = 0; d < s.D; ++d) {
      const float* const row = kt.data() + d * skv;
      const double factor = q[d];
      for (int64_t j = 0; j < skv; ++j) products[j] += factor * row[j];
    }
    for (int64_t j = 0; j < skv; ++j) x[j] = static_cast<float>(products[j]);
    int64_t count = 0;
    for (int64_t j = 0; j < skv; ++j) {
      if (!op.pse.present())
        x[j] *= scale;
      else if (op.pse_type == 1)
        x[j] = (x[j] + Pse(b, n, i, j)) * scale;
      else
        x[j] = x[j] * scale + Pse(b, n, i, j);
      const bool visible = !op.mask.present() || (Compressed(op) ? InStructure(op, s, b, i, j) : !FullMask(b, n, i, j));
      seen[j] = visible;
      count += visible;
      if (!visible) x[j] = -kMax;
    }
    return count;
  }

  // The sink of a head, in rows that see a key; without one, no logit.
  float Sink(int64_t n) const {
    return op.sink.present() ? Load(op.sink.data, op.sink.offset + n, kFloat) : -std::numeric_limits<float>::infinity();
  }

  // 0, or 1 / keepProb.
  float Kept(int64_t b, int64_t n, int64_t i, int64_t j) const {
    if (!op.drop.present()) return 1.0f;
    const int64_t bit = drop_begin_[b] + (n * s.sq[b] + i) * s.skv[b] + j;
    const auto byte = static_cast<unsigned char>(op.drop.data[op.drop.offset + (bit >> 3)]);
    return byte >> (bit & 7) & 1 ? 1.0f / keep_prob : 0.0f;
  }

  // Keys or values of one head, `width x keys`, so that the loop over keys is the inner one.
  std::vector<float> Transposed(const Rows& rows, int64_t b, int64_t head, int64_t width) const {
    std::vector<float> row(width), all(width * s.skv[b]);
    for (int64_t j = 0; j < s.skv[b]; ++j) {
      rows.Get(b, j, head, row.data());
      for (int64_t d = 0; d < width; ++d) all[d * s.skv[b] + j] = row[d];
    }
    return all;
  }

 private:
  bool Masked(int64_t at) const { return op.mask.data[op.mask.offset + at] != 0; }

  bool FullMask(int64_t b, int64_t n, int64_t i, int64_t j) const {
    const std::vector<int64_t>&d = op.mask.dims, &t = op.mask.strides;
    if (d.size() == 4) return Masked((d[0] == 1 ? 0 : b * t[0]) + (d[1] == 1 ? 0 : n * t[1]) + i * t[2] + j * t[3]);
    const bool longest = !op.varlen || (d[0] == longest_q_ && d[1] == longest_kv_);
    return longest ? Masked(i * t[0] + j * t[1]) : Masked((s.q_begin[b] + i) * t[0] + (s.kv_begin[b] + j) * t[1]);
  }

  float Pse(int64_t b, int64_t n, int64_t i, int64_t j) const {
    const std::vector<int64_t>& d = op.pse.dims;
    const auto load = [&](int64_t at) { return Load(op.pse.data, op.pse.offset + at, op.pse.dtype); };
    if (op.pse_type >= 2) {
      const int64_t q0 = op.q_start.empty() ? 0 : op.q_start[0], k0 = op.kv_start.empty() ? 0 : op.kv_start[0];
      const float away = static_cast<float>(std::abs((j + k0) - (i + q0)));
      const float slope = load(d.size() == 1 ? n : b * s.N + n);
      return -slope * (op.pse_type == 2 ? away : std::sqrt(away));
    }
    if (d.size() == 1)
      return load(one_row_ ? pse_row_begin_[b] + n * s.skv[b] + j : pse_begin_[b] + (n * s.sq[b] + i) * s.skv[b] + j);
    const int64_t head = ((d[0] == 1 ? 0 : b) * s.N + n) * d[2];
    if (d[2] == 1) return load(head * d[3] + j);
    if (d[2] == s.sq[b]) return load((head + i) * d[3] + j);
    const int64_t threshold = s.sq[b] - 1024;
    if (i >= threshold) return load((head + i - threshold) * d[3] + j);
    const int64_t r = i % 1024, c = s.skv[b] - (i - j) - (1024 - r);
    return j > i ? 0.0f : load((head + r) * d[3] + c);
  }

  std::vector<int64_t> drop_begin_, pse_begin_, pse_row_begin_;
  int64_t longest_q_ = 0, longest_kv_ = 0;
  bool one_row_ = false;
};

void PutStats(const Op& op, int64_t at, float m, float l) {
  for (int lane = 0; lane < 8; ++lane) {
    Store(op.max.data, op.max.offset + at + lane, kFloat, m);
    Store(op.sum.data, op.sum.offset + at + lane, kFloat, l);
  }
}

int BadMask(const std::string& text) { return Fail(507015, "aicore exception: " + text + "."); }

}  // namespace

int RunForward(const Op& op) {
  const Call c(op);
  const Sizes& s = c.s;
  if (const std::string wrong = c.CheckMask(); !wrong.empty()) return BadMask(wrong);
  const Rows query(op, op.query, s.D, s.q_begin), key(op, op.key, s.D, s.kv_begin),
      value(op, op.value, s.Dv, s.kv_begin), out(op, op.out, s.Dv, s.q_begin);
  const bool zeroes = ZeroesHiddenRows(op, s);
  for (int64_t b = 0; b < s.B; ++b)
    for (int64_t n = 0; n < s.N; ++n) {
      const int64_t skv = s.skv[b], head = n / (s.N / s.K);
      const std::vector<float> kt = c.Transposed(key, b, head, s.D), vt = c.Transposed(value, b, head, s.Dv);
      std::vector<float> q(s.D), x(skv), acc(s.Dv);
      std::vector<char> seen(skv);
      for (int64_t i = 0; i < s.sq[b]; ++i) {
        const int64_t at = StatsAt(op, s, b, n, i);
        std::fill(acc.begin(), acc.end(), 0.0f);
        if (skv == 0 || s.D == 0) {
          PutStats(op, at, 0.0f, 0.0f);
          out.Put(b, i, n, acc.data(), 0.0f);
          continue;
        }
        query.Get(b, i, n, q.data());
        const int64_t count = c.Logits(b, n, i, q.data(), kt, x.data(), seen.data());
        if (count == 0 && (zeroes || op.varlen)) {
          // In layout TND such rows are not supported: whatever comes must not be relied on.
          if (op.varlen) std::fill(acc.begin(), acc.end(), kNaN);
          PutStats(op, at, -kMax, op.varlen ? static_cast<float>(skv) : kMax);
          out.Put(b, i, n, acc.data(), 1.0f);
          continue;
        }
        float m = std::max(-kMax, c.Sink(n)), l = 0;
        for (int64_t j = 0; j < skv; ++j) m = std::isnan(x[j]) || x[j] > m ? x[j] : m;
        for (int64_t j = 0; j < skv; ++j) l += x[j] = std::exp(x[j] - m);
        // Last: added one by one to a sink that is far above them, keys would be lost.
        if (op.sink.present()) l += std::exp(c.Sink(n) - m);
        for (int64_t j = 0; j < skv; ++j) x[j] = Narrow(x[j] * c.Kept(b, n, i, j), op.query.dtype);
        for (int64_t d = 0; d < s.Dv; ++d) {
          const float* const row = vt.data() + d * skv;
          float sum[8] = {};
          int64_t j = 0;
          for (; j + 8 <= skv; j += 8)
            for (int lane = 0; lane < 8; ++lane) sum[lane] += x[j + lane] * row[j + lane];
          for (; j < skv; ++j) sum[0] += x[j] * row[j];
          acc[d] = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
        }
        PutStats(op, at, m, l);
        for (float& a : acc) a /= l;
        out.Put(b, i, n, acc.data(), 1.0f);
      }
    }
  return 0;
}

int RunBackward(const Op& op) {
  const Call c(op);
  const Sizes& s = c.s;
  if (const std::string wrong = c.CheckMask(); !wrong.empty()) return BadMask(wrong);
  const Rows query(op, op.query, s.D, s.q_begin), key(op, op.key, s.D, s.kv_begin),
      value(op, op.value, s.Dv, s.kv_begin), out(op, op.out, s.Dv, s.q_begin), dy(op, op.dy, s.Dv, s.q_begin),
      dq(op, op.dq, s.D, s.q_begin), dk(op, op.dk, s.D, s.kv_begin), dv(op, op.dv, s.Dv, s.kv_begin);
  if (op.dpse.present()) std::memset(op.dpse.data, 0xA5, op.dpse.size() * ItemSize(op.dpse.dtype));  // never computed
  const int64_t group = s.N / s.K;
  std::vector<double> dsink(s.N);
  for (int64_t b = 0; b < s.B; ++b)
    for (int64_t head = 0; head < s.K; ++head) {
      const int64_t skv = s.skv[b];
      const std::vector<float> kt = c.Transposed(key, b, head, s.D), vt = c.Transposed(value, b, head, s.Dv);
      std::vector<float> k(skv * s.D), dkeys(skv * s.D), dvalues(skv * s.Dv);
      for (int64_t j = 0; j < skv; ++j) key.Get(b, j, head, k.data() + j * s.D);
      std::vector<float> q(s.D), o(s.Dv), g(s.Dv), x(skv), dp(skv), dquery(s.D);
      std::vector<char> seen(skv);
      for (int64_t n = head * group; n < (head + 1) * group; ++n)
        for (int64_t i = 0; i < s.sq[b]; ++i) {
          const int64_t at = StatsAt(op, s, b, n, i);
          query.Get(b, i, n, q.data());
          out.Get(b, i, n, o.data());
          dy.Get(b, i, n, g.data());
          c.Logits(b, n, i, q.data(), kt, x.data(), seen.data());
          const float m = Load(op.max.data, op.max.offset + at, kFloat),
                      l = Load(op.sum.data, op.sum.offset + at, kFloat);
          float delta = 0;
          for (int64_t d = 0; d < s.Dv; ++d) delta += o[d] * g[d];
          std::fill(dp.begin(), dp.end(), 0.0f);
          for (int64_t d = 0; d < s.Dv; ++d)
            for (int64_t j = 0; j < skv; ++j) dp[j] += g[d] * vt[d * skv + j];
          std::fill(dquery.begin(), dquery.end(), 0.0f);
          for (int64_t j = 0; j < skv; ++j) {
            const float p = std::exp(x[j] - m) / l, kept = c.Kept(b, n, i, j);
            const float ds = Narrow(p * (dp[j] * kept - delta), op.query.dtype), w = Narrow(p * kept, op.query.dtype);
            // From the keys of this call alone, whatever attentionIn is.
            if (op.sink.present()) dsink[n] -= p * kept * dp[j] * (std::exp(c.Sink(n) - m) / l);
            if (p == 0.0f) continue;
            for (int64_t d = 0; d < s.D; ++d) dquery[d] += ds * k[j * s.D + d];
            for (int64_t d = 0; d < s.D; ++d) dkeys[j * s.D + d] += ds * q[d];
            for (int64_t d = 0; d < s.Dv; ++d) dvalues[j * s.Dv + d] += w * g[d];
          }
          dq.Put(b, i, n, dquery.data(), c.scale);
        }
      for (int64_t j = 0; j < skv; ++j) {
        dk.Put(b, j, head, dkeys.data() + j * s.D, c.scale);
        dv.Put(b, j, head, dvalues.data() + j * s.Dv, 1.0f);
      }
    }
  for (int64_t n = 0; op.dsink.present() && n < s.N; ++n)
    Store(op.dsink.data, op.dsink.offset + n, kFloat, static_cast<float>(dsink[n]));
  return 0;
}

// The large-head_dim operator never says that it cannot: what it is not made for leaves garbage.
int RunShort(const Op& op) {
  const Sizes s = SizesOf(op);
  const bool served = op.query.dtype == kFloat16 && op.key.dtype == kFloat16 && op.value.dtype == kFloat16 && s.B > 0 &&
                      s.skv[0] > 1024 && s.D <= 576 && s.K > 0 && s.N % s.K == 0;
  if (served) return RunForward(op);
  for (const Array* x : {&op.max, &op.sum, &op.out})
    if (x->size() > 0) std::memset(x->data, 0xFF, x->size() * ItemSize(x->dtype));
  return 0;
}

}  // namespace cann_emulator
