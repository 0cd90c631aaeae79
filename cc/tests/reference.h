// Attention by its definition, in double, and how far a float computation of it may be off.
//
//   s = cap tanh((scale q.k + bias - slope distance) / cap),  m = max s,  l = sum exp(s - m),  p = exp(s - m) / l
//   out = sum keep p v / keep_prob,  ds = p (keep dout.v / keep_prob - delta) cap',  delta = dout.out - dlogsumexp
//   dq = scale ds k,  dk = scale ds^T q,  dv = (keep p / keep_prob)^T dout,  dbias = ds,  dslope = -ds distance
//   the tangent of s is T = (1 - t^2) x' + (t - u (1 - t^2)) cap', x' that of scale q.k + bias - slope distance;
//   those of log-sum-exp and out are tau = sum p T,  sum keep p (T - tau) v / keep_prob + sum keep p v' / keep_prob
//   a sink is one more logit of each row, without a value: it is in m and l alone
//   dscale = ds q.k,  dcap = p (keep dout.v / keep_prob - delta) (t - u (1 - t^2)) where s = cap t, t = tanh u
//
// A bias of -inf gives a logit of -inf, whatever the cap.
// Sums run over the visible keys only, so what is hidden is never read. Next to every number stands a bound of
// the rounding errors, to first order, from the magnitudes that enter its sums: an error of one lost key, a
// wrong neighbour or a shifted bit is far beyond it.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "array.h"

namespace jax_fa_test {

struct Problem {
  int64_t B1 = 1, B2 = 1, Sq = 1, Skv = 1, N = 1, K = 1, D = 1, Dv = 1;
  double scale = 1.0, keep_prob = 1.0, cap = 0.0;
  jax_fa::Alibi alibi = jax_fa::Alibi::kNone;
  uint32_t threshold = 0;
  bool bias_apart = false;
  Array query, key, value, bias, mask, lower, upper, slopes, seed, stream, drop_bits, drop_offset;
  Array bias_offset, position, segment_row, segment_key, scale_of_head, cap_of_head, threshold_of_head, dropout_start;
  Array sinks;
  bool partial = false;       // the backward takes the sink for keys that are elsewhere
  Array blocks, block_pairs;  // a pair of rows and keys of a block is one column
  int64_t block_rows = 1, block_keys = 1;
  Array dout, dlogsumexp, dout_tangent, dlogsumexp_tangent;
  Array query_tangent, key_tangent, value_tangent, bias_tangent, slopes_tangent, scale_tangent, cap_tangent;
  Array out_tangent, logsumexp_tangent;
  Array out, rounding, m, l, dquery, dkey, dvalue, dbias, dslopes, dscale, dcap;

  int64_t B() const { return B1 * B2; }
  int64_t G() const { return N / K; }
  // out before it was rounded to its dtype, where that is known.
  double Exact(size_t at) const {
    return rounding ? out.value[at] + rounding.value[at] * HalfUlp(out.dtype) : out.value[at];
  }
  bool Masked() const { return lower || upper || mask || segment_row || blocks; }
  double Scale(int64_t b, int64_t n) const { return scale_of_head ? scale_of_head.at(b, n) : scale; }
  double Cap(int64_t b, int64_t n) const { return cap_of_head ? cap_of_head.at(b, n) : cap; }
  double Threshold(int64_t b, int64_t n) const { return threshold_of_head ? threshold_of_head.at(b, n) : threshold; }
  double KeepProb(int64_t b, int64_t n) const {
    return threshold_of_head ? threshold_of_head.at(b, n) / 65536 : keep_prob;
  }
  // Of an element of bias, or of its gradient, which is as large; or of its tangent.
  size_t BiasIndex(int64_t b, int64_t n, int64_t i, int64_t j) const { return BiasIndex(bias, b, n, i, j); }
  size_t BiasIndex(const Array& x, int64_t b, int64_t n, int64_t i, int64_t j) const {
    if (!bias_offset) return x.Index(b, n, i, j);
    return x.Index(b, n, 0, static_cast<int64_t>(bias_offset.at(b, n, i)) + j);
  }
  bool Visible(int64_t b, int64_t n, int64_t i, int64_t j) const {
    return !(lower && static_cast<double>(j) < lower.at(b, n, i)) &&
           !(upper && static_cast<double>(j) >= upper.at(b, n, i)) && !(mask && mask.at(b, n, i, j) == 0.0) &&
           !(segment_row && segment_row.at(b, n, i) >= 0.0 && segment_row.at(b, n, i) != segment_key.at(b, n, 0, j)) &&
           (!blocks || VisibleByBlocks(b, n, i, j));
  }
  bool VisibleByBlocks(int64_t b, int64_t n, int64_t i, int64_t j) const {
    const auto kind = static_cast<int64_t>(blocks.at(b, n, i / block_rows, j / block_keys));
    if (kind < 2 || kind - 2 >= block_pairs.dims[kRow]) return kind == 1;
    return block_pairs.at(b, n, kind - 2, i % block_rows * block_keys + j % block_keys) != 0.0;
  }
  bool Kept(int64_t b, int64_t n, int64_t i, int64_t j) const {
    if (seed) {
      const auto u = [](double x) { return static_cast<uint32_t>(x); };
      const auto start = [&](int64_t at) {
        return dropout_start ? static_cast<int64_t>(dropout_start.at(b, 0, 0, at)) : 0;
      };
      const int64_t row = i + start(0), column = j + start(1);
      const auto c = static_cast<uint32_t>(4 * (column / 32) + column % 8 / 2);
      const Philox x(c, static_cast<uint32_t>(row), u(stream.at(b, n, 0, 0)), u(stream.at(b, n, 0, 1)),
                     u(seed.at(b, 0, 0, 0)), u(seed.at(b, 0, 0, 1)));
      const uint32_t word = x.word[column / 8 % 4];
      if ((column % 2 ? word >> 16 : word & 0xFFFF) >= Threshold(b, n)) return false;
    }
    if (drop_bits) {
      const auto bit = static_cast<int64_t>(drop_offset.at(b, n, i, 0) * 8 + drop_offset.at(b, n, i, 1)) + j;
      if (!((static_cast<int>(drop_bits.at(b, 0, 0, bit / 8)) >> (bit % 8)) & 1)) return false;
    }
    return true;
  }
};

// What a result should be, its error bound, and whether a number that is not finite reached it by way of the
// softmax; then it may be NaN even where the definition gives a number, since kernels give up whole rows.
struct Quantity {
  static constexpr uint8_t kCertain = 1, kPossible = 2;
  std::vector<double> value, error;
  std::vector<double> terms;     // the sum of the magnitudes of its weighted terms
  std::vector<double> moved;     // what may be put on another key where weights are rounded to 16 bits
  std::vector<uint8_t> tainted;  // kCertain: it reaches the row by a pair that has weight, and not only kPossible
  void Resize(size_t n) {
    value.assign(n, 0.0);
    error.assign(n, 0.0);
    terms.assign(n, 0.0);
    moved.assign(n, 0.0);
    tainted.assign(n, 0);
  }
  void Add(size_t at, double x, double e) {
    value[at] += x;
    terms[at] += std::fabs(x);
    error[at] += e;
  }
};

class Reference {
 public:
  explicit Reference(const Problem& p) : p_(p) {}

  Quantity out, m, l, dquery, dkey, dvalue, dbias, dslopes, dscale, dcap;
  Quantity out_tangent, logsumexp_tangent;

  void Forward() {
    out.Resize(p_.out.value.size()), m.Resize(p_.m.value.size()), l.Resize(p_.l.value.size());
    ForEachRow([&](int64_t b, int64_t n, int64_t i) {
      Look(b, n, i);
      const size_t stat = p_.m.Index(b, n, i), first = p_.out.Index(b, n, i);
      m.value[stat] = row_.m, l.value[stat] = row_.l;
      double most = 0.0;
      for (const Seen& x : seen_) most = x.p > 0.0 ? std::max(most, x.logit_error) : most;
      m.error[stat] = kEps * most;
      for (const Seen& x : seen_) l.error[stat] += x.p * row_.l * (x.error + std::expm1(kEps * 2 * most));
      if (row_.sink > 0.0) l.error[stat] += row_.sink * row_.l * (row_.sink_error + std::expm1(kEps * 2 * most));
      m.tainted[stat] = l.tainted[stat] = row_.tainted;
      for (int64_t d = 0; d < p_.Dv; ++d) out.tainted[first + static_cast<size_t>(d)] = row_.tainted;
      for (const Seen& x : seen_) {
        if (x.keep == 0.0 || row_.l == 0.0) continue;
        const double* v = p_.value.value.data() + p_.value.Index(b, n / p_.G(), x.j);
        for (int64_t d = 0; d < p_.Dv; ++d)
          out.Add(first + static_cast<size_t>(d), x.keep * x.p * v[d],
                  x.keep * (x.p * x.error + kTiny) * std::fabs(v[d]));
      }
    });
  }

  // After Forward. `fused`: together with it. From sums of values, or from the `out` that was stored.
  void Tangent(bool fused) {
    out_tangent.Resize(out.value.size()), logsumexp_tangent.Resize(m.value.size());
    const double growth = kEps * Growth(p_.Skv), u = HalfUlp(p_.out.dtype);
    // What rounding took from the stored `out`, relative to it; a forward of bfloat16 may have rounded its weights, too.
    const bool by_place = p_.bias_tangent || p_.slopes_tangent || p_.scale_tangent || p_.cap_tangent;
    const bool with_sums = fused || by_place, moves = by_place || p_.query_tangent || p_.key_tangent;
    const double rounded = with_sums ? kEps : p_.rounding ? u * u : u;
    const double lost = !with_sums && p_.out.dtype == DType::kF16 ? 0x1p-25 : 0.0;
    const double weights_rounded = !with_sums && p_.out.dtype == DType::kBF16 ? 0x1.02p-8 : 0.0;
    std::vector<Moved> moved;
    ForEachRow([&](int64_t b, int64_t n, int64_t i) {
      Look(b, n, i);
      const size_t stat = p_.m.Index(b, n, i), first = p_.out.Index(b, n, i);
      const int64_t k = n / p_.G();
      bool tainted = row_.tainted;
      moved.clear();
      double tau = 0.0;
      for (const Seen& x : seen_) {
        moved.push_back(TangentOf(b, n, i, x));
        tainted |= !std::isfinite(moved.back().t);
        if (p_.value_tangent && !Drops(x))
          tainted |= !AllFinite(p_.value_tangent.value.data() + p_.value_tangent.Index(b, k, x.j), p_.Dv);
        if (x.p > 0.0) tau += x.p * moved.back().t;
      }
      // Kernels count tangents from a mean of some of them, which is no further from tau than the furthest; with sums of values,
      // from one over keys that have a good part of all weight.
      double furthest = 0.0, tau_error = 0.0;
      for (size_t at = 0; at < seen_.size(); ++at) {
        const double away = std::fabs(moved[at].t - tau);
        if (seen_[at].p > 0.0) furthest = with_sums ? furthest + 8.0 * seen_[at].p * away : std::max(furthest, away);
      }
      const auto away_error = [&](size_t at) {  // of p times a tangent from that mean
        const Seen& x = seen_[at];
        const double away = std::fabs(moved[at].t - tau) + furthest;
        return (x.p * (x.error + growth + 2 * kEps) + kTiny) * away + x.p * moved[at].error;
      };
      for (size_t at = 0; at < seen_.size(); ++at) tau_error += away_error(at);
      // With a sink, tau is what the mean over keys has of all weights.
      if (row_.sink > 0.0) tau_error += (row_.sink_error + growth) * (std::fabs(tau) + furthest);
      logsumexp_tangent.value[stat] = row_.l == 0.0 ? 0.0 : tau;
      logsumexp_tangent.error[stat] = tau_error + 4 * kEps * (std::fabs(tau) + furthest);
      logsumexp_tangent.tainted[stat] = tainted;
      for (int64_t d = 0; d < p_.Dv; ++d) {
        const size_t at = first + static_cast<size_t>(d);
        out_tangent.tainted[at] = tainted;
        out_tangent.error[at] = tau_error * std::fabs(out.value[at]) +
                                furthest * (out.error[at] + lost + (rounded + 8 * kEps) * std::fabs(out.value[at]) +
                                            weights_rounded * out.terms[at]);
      }
      for (size_t at = 0; at < seen_.size(); ++at) {
        const Seen& x = seen_[at];
        if (x.keep == 0.0 || row_.l == 0.0 || Drops(x)) continue;
        const double* v = p_.value.value.data() + p_.value.Index(b, k, x.j);
        const double* e =
            p_.value_tangent ? p_.value_tangent.value.data() + p_.value_tangent.Index(b, k, x.j) : nullptr;
        for (int64_t d = 0; d < p_.Dv; ++d) {
          const size_t to = first + static_cast<size_t>(d);
          if (moves && (x.p > 0.0 || std::isnan(x.p)))
            out_tangent.value[to] += x.keep * x.p * (moved[at].t - tau) * v[d];
          out_tangent.error[to] += x.keep * away_error(at) * std::fabs(v[d]);
          if (e == nullptr) continue;
          out_tangent.value[to] += x.keep * x.p * e[d];
          out_tangent.error[to] += x.keep * (x.p * (x.error + growth + 2 * kEps) + kTiny) * std::fabs(e[d]);
        }
      }
    });
  }

  // From the `out` that the forward stored.
  void Backward() {
    dquery.Resize(p_.dquery.value.size());
    dkey.Resize(p_.dkey.value.size()), dvalue.Resize(p_.dvalue.value.size());
    dbias.Resize(p_.dbias.value.size()), dslopes.Resize(p_.dslopes.value.size());
    dscale.Resize(p_.dscale.value.size()), dcap.Resize(p_.dcap.value.size());
    const int64_t pairs = p_.B() * p_.N * p_.Sq * p_.Skv;
    const double per_key = Growth(p_.G() * p_.Sq), per_row = Growth(p_.Skv);
    const double per_bias =
        Growth(p_.bias_offset ? pairs : pairs / std::max<int64_t>(1, static_cast<int64_t>(dbias.value.size())));
    ForEachRow([&](int64_t b, int64_t n, int64_t i) {
      Look(b, n, i);
      const int64_t k = n / p_.G();
      const double* q = p_.query.value.data() + p_.query.Index(b, n, i);
      const double* dout = p_.dout.value.data() + p_.dout.Index(b, n, i);
      const size_t o = p_.out.Index(b, n, i);
      double delta = p_.dlogsumexp ? -p_.dlogsumexp.at(b, n, i) : 0.0, delta_size = std::fabs(delta);
      for (int64_t d = 0; d < p_.Dv; ++d) {
        const double term = dout[d] * p_.Exact(o + static_cast<size_t>(d));
        delta += term, delta_size += std::fabs(term);
      }
      // What storing `out` rounded.
      const double unit = HalfUlp(p_.out.dtype), stored = p_.rounding ? unit * unit : unit;
      const bool weights_tainted = row_.tainted || !AllFinite(dout, p_.Dv);
      const double scale = p_.Scale(b, n), cap = p_.Cap(b, n);
      const bool tainted = !seen_.empty() && (weights_tainted || !std::isfinite(delta));
      const size_t to_q = p_.dquery.Index(b, n, i);
      for (int64_t d = 0; d < p_.D; ++d) dquery.tainted[to_q + static_cast<size_t>(d)] |= tainted;
      // What is missing from the sum of ds, of which the sink has a part.
      double missing = (p_.dlogsumexp ? p_.dlogsumexp.at(b, n, i) : 0.0) + row_.sink * delta;
      double ds_size = 0.0, ds_errors = 0.0;
      std::vector<double> largest_key(static_cast<size_t>(p_.D), 0.0);
      for (const Seen& x : seen_) {
        const size_t at_k = p_.key.Index(b, k, x.j), at_v = p_.value.Index(b, k, x.j);
        if (x.hidden) {  // adds nothing, or in a tainted row anything
          for (int64_t d = 0; d < p_.D; ++d) dkey.tainted[at_k + static_cast<size_t>(d)] |= tainted;
          for (int64_t d = 0; d < p_.Dv; ++d) dvalue.tainted[at_v + static_cast<size_t>(d)] |= weights_tainted;
          if (p_.dbias) dbias.tainted[p_.BiasIndex(b, n, i, x.j)] |= tainted;
          if (p_.dslopes) dslopes.tainted[p_.dslopes.Index(b, n, i)] |= tainted;
          if (p_.dscale) dscale.tainted[p_.dscale.Index(b, n)] |= tainted;
          if (p_.dcap) dcap.tainted[p_.dcap.Index(b, n)] |= tainted;
          continue;
        }
        const double *key = p_.key.value.data() + at_k, *value = p_.value.value.data() + at_v;
        double dp = 0.0, dp_size = 0.0;
        for (int64_t d = 0; d < p_.Dv; ++d) dp += dout[d] * value[d], dp_size += std::fabs(dout[d] * value[d]);
        const double inner = (x.keep == 0.0 ? 0.0 : x.keep * dp) - delta;
        const double ds = x.p * inner * x.slope;
        // Of a key with nearly all the weight that dropout multiplies, out shows no more than its digits hold.
        const double by_out = x.p > 1.0 - 0x1p-20 && x.keep > 1.0 ? stored * delta_size : 0.0;
        const double inner_error =
            kEps * (Growth(p_.Dv) * x.keep * dp_size + 4 * delta_size + 4 * std::fabs(inner)) + by_out;
        const double ds_error = (x.p * x.error + kTiny) * std::fabs(inner) * x.slope +
                                x.p * (x.slope * inner_error + kEps * x.slope_error * std::fabs(inner));
        missing -= ds, ds_size += std::fabs(ds), ds_errors += ds_error;
        for (size_t d = 0; d < largest_key.size() && (ds != 0.0 || x.p > 0.5); ++d)
          largest_key[d] = std::max(largest_key[d], std::fabs(key[d]));
        const double in_row = std::fabs(scale) * (ds_error + kEps * per_row * std::fabs(ds));
        const double in_key = std::fabs(scale) * (ds_error + kEps * per_key * std::fabs(ds));
        const double weight = x.keep * x.p, weight_error = x.keep * (x.p * x.error + kTiny) + kEps * per_key * weight;
        for (int64_t d = 0; d < p_.D; ++d) {
          const auto at = static_cast<size_t>(d);
          dquery.Add(to_q + at, scale * ds * key[d], in_row * std::fabs(key[d]));
          dkey.Add(at_k + at, scale * ds * q[d], in_key * std::fabs(q[d]));
          dkey.tainted[at_k + at] |= tainted;
        }
        for (int64_t d = 0; d < p_.Dv; ++d) {
          const auto at = static_cast<size_t>(d);
          if (x.keep != 0.0) dvalue.Add(at_v + at, weight * dout[d], weight_error * std::fabs(dout[d]));
          dvalue.tainted[at_v + at] |= weights_tainted;
        }
        if (p_.dbias) {
          const size_t at = p_.BiasIndex(b, n, i, x.j);
          dbias.Add(at, ds, ds_error + kEps * per_bias * std::fabs(ds));
          dbias.tainted[at] |= tainted;
        }
        if (p_.dslopes) {
          const size_t at = p_.dslopes.Index(b, n, i);
          const double away = Distance(b, n, i, x.j);
          dslopes.Add(at, -ds * away, (ds_error + kEps * Growth(pairs) * std::fabs(ds)) * away);
          dslopes.tainted[at] |= tainted;
        }
        if (p_.dscale) {
          const size_t at = p_.dscale.Index(b, n);
          double dot = 0.0, size = 0.0;
          for (int64_t d = 0; d < p_.D; ++d) dot += q[d] * key[d], size += std::fabs(q[d] * key[d]);
          dscale.Add(at, ds * dot,
                     (ds_error + kEps * Growth(pairs) * std::fabs(ds)) * std::fabs(dot) +
                         kEps * Growth(p_.D) * std::fabs(ds) * size);
          dscale.tainted[at] |= tainted;
        }
        if (p_.dcap) {
          const size_t at = p_.dcap.Index(b, n);
          const double before = x.p * inner, by_cap = ByCap(x.u);
          const double by_error = ByCapError(x, cap, by_cap);
          const double before_error = (x.p * x.error + kTiny) * std::fabs(inner) + x.p * inner_error;
          dcap.Add(at, before * by_cap, before_error * std::fabs(by_cap) + by_error * std::fabs(before));
          dcap.tainted[at] |= tainted;
        }
      }
      for (size_t d = 0; d < largest_key.size() && !seen_.empty(); ++d)
        // (What each ds is off is missing, too: where one key has nearly all of the weight, its ds is a small difference, whose
        // error goes to the key with the largest.)
        dquery.moved[to_q + d] +=
            std::fabs(scale) * (std::fabs(missing) + 0x1p-8 * ds_size + ds_errors) * largest_key[d];
    });
  }

 protected:
  static constexpr double kEps = 0x1p-24, kTiny = 1e-37;  // kernels have no exp(x) below the normal numbers

  struct Seen {
    int64_t j;
    double s, p, keep;          // keep: 0 or 1 / keep_prob
    double slope, slope_error;  // of the soft cap; errors in units of kEps
    double logit_error;
    double u, before_error;  // before the soft cap: in caps, and its error
    double error;            // of p, relative, not in units
    bool hidden;             // by a bias of -inf under a soft cap
  };
  struct Row {
    double m, l;
    bool tainted;
    double sink = 0.0, sink_error = 0.0;  // its weight, and the relative error of that
  };
  struct Moved {
    double t, error;  // the tangent of a logit, and its error
  };

  // Rounding errors of a float sum of n terms, in units of kEps times the sum of their magnitudes.
  static double Growth(int64_t n) { return 4.0 + 2.0 * std::sqrt(static_cast<double>(n)); }

  static bool AllFinite(const double* x, int64_t n) {
    return std::all_of(x, x + n, [](double y) { return std::isfinite(y); });
  }

  // The derivative of cap tanh(x / cap) by cap, for u = x / cap; that of -inf is not asked for.
  static double ByCap(double u) {
    if (!std::isfinite(u)) return std::isnan(u) ? u : u > 0 ? 1.0 : 0.0;
    const double t = std::tanh(u), c = std::cosh(std::min(300.0, std::fabs(u)));
    // Where the difference loses digits, by the series of tanh.
    if (std::fabs(u) < 0.05) return 2.0 / 3 * std::pow(u, 3) - 8.0 / 15 * std::pow(u, 5) + 34.0 / 105 * std::pow(u, 7);
    return t - u / (c * c);
  }

  double Distance(int64_t b, int64_t n, int64_t i, int64_t j) const {
    const double at = p_.position ? p_.position.at(b, n, i) : static_cast<double>(i);
    const double away = std::fabs(static_cast<double>(j) - at);
    return p_.alibi == jax_fa::Alibi::kSqrt ? std::sqrt(away) : away;
  }

  Moved TangentOf(int64_t b, int64_t n, int64_t i, const Seen& x) const {
    if (x.s == -std::numeric_limits<double>::infinity()) return {0.0, 0.0};  // by a bias: it masks the key
    const int64_t k = n / p_.G();
    const double scale = p_.Scale(b, n), cap = p_.Cap(b, n);
    double before = 0.0, size = 0.0;
    const auto add = [&](double y, double magnitude) { before += y, size += magnitude; };
    const auto products = [&](double factor, const Array& query, const Array& key) {
      const double *q = query.value.data() + query.Index(b, n, i), *other = key.value.data() + key.Index(b, k, x.j);
      for (int64_t d = 0; d < p_.D; ++d) add(factor * q[d] * other[d], std::fabs(factor * q[d] * other[d]));
    };
    if (p_.query_tangent) products(scale, p_.query_tangent, p_.key);
    if (p_.key_tangent) products(scale, p_.query, p_.key_tangent);
    if (p_.scale_tangent) products(p_.scale_tangent.at(b, n), p_.query, p_.key);
    if (p_.bias_tangent) {
      const double y = p_.bias_tangent.value[p_.BiasIndex(p_.bias_tangent, b, n, i, x.j)];
      add(y, std::fabs(y));
    }
    if (p_.slopes_tangent) {
      const double y = p_.slopes_tangent.at(b, n, i) * Distance(b, n, i, x.j);
      add(-y, std::fabs(y));
    }
    Moved moved{x.slope * before, kEps * x.slope * (Growth(2 * p_.D) + 6) * size};
    if (cap == 0.0) return moved;
    moved.error += kEps * (x.slope_error + 2 * x.slope) * std::fabs(before);
    if (!p_.cap_tangent) return moved;
    const double by_cap = ByCap(x.u), tangent = p_.cap_tangent.at(b, n);
    moved.t += by_cap * tangent;
    moved.error += (ByCapError(x, cap, by_cap) + 2 * kEps * std::fabs(by_cap)) * std::fabs(tangent);
    return moved;
  }

  // Whether what is not finite at this key does not even reach the row, as it has no weight at all.
  bool Drops(const Seen& x) const { return p_.Masked() && x.s == -std::numeric_limits<double>::infinity(); }

  // Of tanh u - u (1 - tanh^2 u), with a tanh that is off by 6 units, which the second term takes 2 u times.
  static double ByCapError(const Seen& x, double cap, double by_cap) {
    return kEps * (2 * std::fabs(x.u) * x.slope * x.before_error / cap + 12 * std::fabs(by_cap) +
                   12 * std::min(9.0, std::fabs(x.u)));
  }

  template <typename Fn>
  void ForEachRow(const Fn& fn) {
    for (int64_t b = 0; b < p_.B(); ++b)
      for (int64_t n = 0; n < p_.N; ++n)
        for (int64_t i = 0; i < p_.Sq; ++i) fn(b, n, i);
  }

  // The keys that row i sees, with probabilities, into seen_ and row_.
  void Look(int64_t b, int64_t n, int64_t i) {
    const double none = -static_cast<double>(std::numeric_limits<float>::max());
    seen_.clear();
    row_ = {none, 0.0, false, 0.0, 0.0};
    const int64_t k = n / p_.G();
    const double scale = p_.Scale(b, n), cap = p_.Cap(b, n);
    for (int64_t j = 0; j < p_.Skv; ++j) {
      if (!p_.Visible(b, n, i, j)) continue;
      const double* q = p_.query.value.data() + p_.query.Index(b, n, i);
      const double* key = p_.key.value.data() + p_.key.Index(b, k, j);
      Seen x{j, 0.0, 0.0, p_.Kept(b, n, i, j) ? 1.0 / p_.KeepProb(b, n) : 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, false};
      double dot = 0.0, size = 0.0;
      for (int64_t d = 0; d < p_.D; ++d) dot += q[d] * key[d], size += std::fabs(q[d] * key[d]);
      double z = scale * dot;
      x.logit_error = Growth(p_.D) * std::fabs(scale) * size;
      bool hides = false;
      row_.tainted |= !AllFinite(q, p_.D) || !AllFinite(key, p_.D) ||
                      !AllFinite(p_.value.value.data() + p_.value.Index(b, k, j), p_.Dv);
      if (p_.bias) {
        const double y = p_.bias.value[p_.BiasIndex(b, n, i, j)];
        z += y;
        hides = y == -std::numeric_limits<double>::infinity();
        if (std::isfinite(y)) x.logit_error += 2 * std::fabs(y);
        row_.tainted |= !(y < std::numeric_limits<double>::infinity());
      }
      if (p_.slopes) {
        const double y = p_.slopes.at(b, n, i) * Distance(b, n, i, j);
        z -= y;
        x.logit_error += 6 * std::fabs(y);
      }
      if (cap != 0.0) {
        if (std::isfinite(z)) x.logit_error += 4 * std::fabs(z);
        const double t = std::tanh(z / cap);
        x.u = z / cap, x.before_error = x.logit_error;
        x.slope = 1.0 - t * t;
        x.slope_error = 2.0 * x.slope * x.logit_error / cap + 24.0;
        x.logit_error = x.slope * x.logit_error + 8.0 * cap * std::fabs(t);
        z = cap * t;
      }
      x.hidden = hides && cap != 0.0;
      if (x.hidden) z = -std::numeric_limits<double>::infinity(), x.logit_error = 0.0;
      x.s = z;
      if (!(row_.m >= z)) row_.m = std::isnan(row_.m) ? row_.m : z;
      seen_.push_back(x);
    }
    const double sink = p_.sinks ? p_.sinks.at(b, n) : -std::numeric_limits<double>::infinity();
    if (sink > row_.m) row_.m = sink;
    const bool has_sink = std::isfinite(sink);
    if (has_sink) row_.l = row_.sink = std::exp(sink - row_.m);
    double mean = 0.0;
    for (Seen& x : seen_) {
      x.p = std::exp(x.s - row_.m);
      row_.l += x.p;
      if (x.p > 0.0) mean += x.p * x.logit_error;
    }
    for (Seen& x : seen_) {
      if (x.p == 0.0) continue;
      const double units = 2 * x.logit_error + 2 * mean / row_.l + Growth(p_.Skv) + 16 + 2 * std::fabs(x.s - row_.m);
      x.error = std::expm1(kEps * units);
      x.p /= row_.l;
    }
    if (!has_sink) return;
    row_.sink_error = std::expm1(kEps * (2 * mean / row_.l + Growth(p_.Skv) + 16 + 2 * std::fabs(sink - row_.m)));
    row_.sink /= row_.l;
  }

  const Problem& p_;
  std::vector<Seen> seen_;
  Row row_{};
};

}  // namespace jax_fa_test
