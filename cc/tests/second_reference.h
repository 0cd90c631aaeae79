// The second derivative by its definition, in double, and how far a float computation of it may be off: each number
// carries the error of what it is made of, to first order.
//
//   T tangent of a logit,  U of keep dout.v / keep_prob,  tau = sum p T,  ds = p inner cap',  inner = dp - sum p dp + dlse
//   sigma = sum p inner (T - tau) + sum p U - dlse',  G = p (inner (T - tau) + U - sigma)
//   GX = G cap' + p inner r,  dX = p inner cap',  r the tangent of cap'
#pragma once

#include "reference.h"

namespace jax_fa_test {

// A number and a bound of its error. A product or a sum of two is rounded.
struct Bounded {
  double value = 0.0, error = 0.0;

  Bounded operator*(const Bounded& x) const {
    const double product = value * x.value;
    return {product,
            std::fabs(value) * x.error + std::fabs(x.value) * error + error * x.error + kEps * std::fabs(product)};
  }
  Bounded operator*(double x) const { return *this * Bounded{x, 0.0}; }
  Bounded operator+(const Bounded& x) const {
    return {value + x.value, error + x.error + kEps * (std::fabs(value) + std::fabs(x.value))};
  }
  Bounded operator-(const Bounded& x) const { return *this + Bounded{-x.value, x.error}; }
  // Of a sum of `terms` of that size in all.
  Bounded Summed(double growth, double size) const { return {value, error + kEps * growth * size}; }

  static constexpr double kEps = 0x1p-24;
};

class SecondReference : public Reference {
 public:
  using Reference::Reference;

  // From the `out` that the forward stored.
  void Second() {
    for (auto [to, of] :
         {std::pair(&dquery, &p_.dquery), std::pair(&dkey, &p_.dkey), std::pair(&dvalue, &p_.dvalue),
          std::pair(&dbias, &p_.dbias), std::pair(&dslopes, &p_.dslopes), std::pair(&dscale, &p_.dscale),
          std::pair(&dcap, &p_.dcap), std::pair(&out_tangent, &p_.out_tangent),
          std::pair(&logsumexp_tangent, &p_.logsumexp_tangent)})
      to->Resize(of->value.size());
    const int64_t pairs = p_.B() * p_.N * p_.Sq * p_.Skv;
    per_row_ = Growth(p_.Skv), per_key_ = Growth(p_.G() * p_.Sq), per_all_ = Growth(pairs);
    ForEachRow([&](int64_t b, int64_t n, int64_t i) {
      Look(b, n, i);
      FirstPass(b, n, i);
      for (size_t at = 0; at < seen_.size(); ++at) SecondPass(b, n, i, at);
    });
  }

 private:
  // What there is of each pair.
  struct Pair {
    Bounded p, t, inner, u, by_x, curve, dot, dot_tangent;
    double by_cap, by_cap_error;
  };

  static const double* RowOf(const Array& x, int64_t b, int64_t h, int64_t r) {
    return x.value.data() + x.Index(b, h, r);
  }
  static Bounded Dot(const double* x, const double* y, int64_t n) {
    Bounded sum;
    double size = 0.0;
    for (int64_t d = 0; d < n; ++d) sum.value += x[d] * y[d], size += std::fabs(x[d] * y[d]);
    return sum.Summed(Growth(n), size);
  }
  bool LogitsMove() const {  // else the weights stay
    return p_.query_tangent || p_.key_tangent || p_.bias_tangent || p_.slopes_tangent || p_.scale_tangent ||
           p_.cap_tangent;
  }
  uint8_t Taint(bool tainted) const { return !tainted ? 0 : certain_ ? Quantity::kCertain : Quantity::kPossible; }
  static double FiniteSize(double x) { return std::isfinite(x) ? std::fabs(x) : 0.0; }

  void FirstPass(int64_t b, int64_t n, int64_t i) {
    const int64_t k = n / p_.G();
    const double *q = RowOf(p_.query, b, n, i), *dout = RowOf(p_.dout, b, n, i), cap = p_.Cap(b, n);
    const double* out = RowOf(p_.out, b, n, i);
    tainted_ = row_.tainted || !AllFinite(dout, p_.Dv);
    const auto finite = [&](const Array& x, int64_t width) { return !x || AllFinite(RowOf(x, b, n, i), width); };
    tainted_ |= !finite(p_.query_tangent, p_.D);
    certain_ = tainted_;  // of both_tainted_, too
    tainted_ |= !finite(p_.dout_tangent, p_.Dv);
    const double dlse = p_.dlogsumexp ? p_.dlogsumexp.at(b, n, i) : 0.0;
    const double dlse_tangent = p_.dlogsumexp_tangent ? p_.dlogsumexp_tangent.at(b, n, i) : 0.0;
    bool gradients_tainted = !std::isfinite(dlse) || !std::isfinite(dlse_tangent);
    pairs_.clear();
    double t_size = 0.0, dp_size = FiniteSize(dlse);
    for (int64_t d = 0; d < p_.Dv; ++d) dp_size += FiniteSize(dout[d] * out[d]);
    Bounded tau, delta{-dlse, 0.0};
    for (const Seen& x : seen_) {
      const double *key = RowOf(p_.key, b, k, x.j), *value = RowOf(p_.value, b, k, x.j);
      const Moved moved = TangentOf(b, n, i, x);
      Pair y{};
      y.p = {x.p, x.p * x.error + kTiny};
      y.t = {moved.t, moved.error};
      y.dot = Dot(q, key, p_.D);
      if (p_.query_tangent) y.dot_tangent = y.dot_tangent + Dot(RowOf(p_.query_tangent, b, n, i), key, p_.D);
      if (p_.key_tangent) y.dot_tangent = y.dot_tangent + Dot(q, RowOf(p_.key_tangent, b, k, x.j), p_.D);
      if (x.keep != 0.0) y.inner = Dot(dout, value, p_.Dv) * x.keep;
      const bool masked = x.s == -std::numeric_limits<double>::infinity();
      if (x.keep != 0.0 && !masked) {
        if (p_.dout_tangent) y.u = y.u + Dot(RowOf(p_.dout_tangent, b, n, i), value, p_.Dv);
        if (p_.value_tangent) y.u = y.u + Dot(dout, RowOf(p_.value_tangent, b, k, x.j), p_.Dv);
        y.u = y.u * x.keep;
      }
      y.by_x = {1.0, 0.0};
      if (cap != 0.0 && !masked) CapOf(b, n, x, moved, &y);
      if (masked) y.by_x.value = cap != 0.0 ? 0.0 : 1.0;
      // What is dropped has no weight: tangents of dout and value at such a pair may be anything.
      const bool of_value = p_.value_tangent && !Drops(x) && !AllFinite(RowOf(p_.value_tangent, b, k, x.j), p_.Dv);
      tainted_ |= !std::isfinite(moved.t) || of_value;
      certain_ |= !std::isfinite(moved.t) || (x.keep != 0.0 && (of_value || !finite(p_.dout_tangent, p_.Dv)));
      if (p_.key_tangent && !p_.Masked()) gradients_tainted |= !AllFinite(RowOf(p_.key_tangent, b, k, x.j), p_.D);
      gradients_tainted |= !std::isfinite(y.u.value) || !std::isfinite(y.inner.value);
      if (x.p > 0.0) {
        tau = {tau.value + x.p * moved.t, tau.error + y.p.error * std::fabs(moved.t) + x.p * moved.error};
        delta = {delta.value + x.p * y.inner.value,
                 delta.error + y.p.error * std::fabs(y.inner.value) + x.p * y.inner.error};
        t_size += x.p * std::fabs(moved.t), dp_size += x.p * std::fabs(y.inner.value);
      }
      pairs_.push_back(y);
    }
    tau_ = tau.Summed(per_row_, t_size);
    delta = delta.Summed(per_row_, dp_size);
    // Kernels take the delta of the stored `out` first, and what it is off from all ds later.
    const double off = p_.out.dtype == DType::kF32 ? 0.0 : 0x1p-8 * dp_size;
    double ds_size = 0.0, u_size = 0.0;
    Bounded sigma;
    for (size_t at = 0; at < seen_.size(); ++at) {
      Pair& y = pairs_[at];
      y.inner = LogitsMove() ? y.inner - delta : Bounded{};  // else nothing asks for it, and it may be anything
      y.inner.error += 4 * Bounded::kEps * off;
      if (seen_[at].p == 0.0) continue;
      const Bounded terms = y.p * y.inner * (y.t - tau_) + y.p * y.u;
      sigma.value += terms.value, sigma.error += terms.error;
      const double p = y.p.value, t = std::fabs(y.t.value) + std::fabs(tau_.value);
      ds_size += p * (std::fabs(y.inner.value) + off) * t, u_size += p * std::fabs(y.u.value);
    }
    sigma_ = (sigma - Bounded{dlse_tangent, 0.0}).Summed(per_row_, ds_size + u_size);
    both_tainted_ = tainted_ || gradients_tainted;
    if (seen_.empty()) tainted_ = both_tainted_ = false;
    // Without weight, by a bias of -inf, or where logits do not move, less is computed.
    certain_ = (certain_ || gradients_tainted) && row_.l != 0.0 && LogitsMove();
    const size_t stat = p_.logsumexp_tangent.Index(b, n, i);
    logsumexp_tangent.value[stat] = row_.l == 0.0 ? 0.0 : tau_.value;
    logsumexp_tangent.error[stat] = tau_.error;
    logsumexp_tangent.tainted[stat] = Taint(tainted_);
  }

  // The soft cap: its derivative, and the tangent of that.
  void CapOf(int64_t b, int64_t n, const Seen& x, const Moved& moved, Pair* y) const {
    const double cap = p_.Cap(b, n), t = std::tanh(x.u), u = x.u,
                 off = kEps * (x.before_error / cap + 4 * std::fabs(u));
    y->by_x = {x.slope, kEps * x.slope_error};
    y->by_cap = ByCap(u), y->by_cap_error = ByCapError(x, cap, y->by_cap);
    const double tangent = p_.cap_tangent ? p_.cap_tangent.at(b, n) : 0.0;
    // T = f' x' + f_cap cap', so that f' (x' - u cap') = T - t cap'.
    const double along = moved.t - t * tangent;
    const double along_error = moved.error + y->by_cap_error * std::fabs(tangent) +
                               (std::fabs(u) * kEps * x.slope_error + x.slope * off + 8 * kEps) * std::fabs(tangent);
    y->curve = {
        -2.0 * t * along / cap,
        2.0 / cap * ((x.slope * off + 16 * kEps * std::fabs(t)) * std::fabs(along) + std::fabs(t) * along_error)};
  }

  void SecondPass(int64_t b, int64_t n, int64_t i, size_t at) {
    const Seen& x = seen_[at];
    const Pair& y = pairs_[at];
    const int64_t k = n / p_.G();
    const double scale = p_.Scale(b, n), scale_tangent = p_.scale_tangent ? p_.scale_tangent.at(b, n) : 0.0;
    const bool nothing = x.p == 0.0;  // no weight: its tangents may be anything
    const Bounded from_mean = y.t - tau_, ds = nothing ? Bounded{} : y.p * y.inner;
    const Bounded g = nothing ? Bounded{} : ds * from_mean + y.p * (y.u - sigma_);
    const Bounded gx = nothing ? Bounded{} : g * y.by_x + ds * y.curve, dx = nothing ? Bounded{} : ds * y.by_x;
    const Bounded kept = nothing || x.keep == 0.0 ? Bounded{} : y.p * x.keep;
    const bool logits = LogitsMove();
    const Bounded weight = nothing || x.keep == 0.0 || !logits ? Bounded{} : kept * from_mean;
    const Bounded of_key = gx * scale + dx * scale_tangent, of_tangent = dx * scale;

    const auto add = [&](Quantity& to, size_t first, const Bounded& by, const double* row, int64_t width, double growth,
                         bool tainted) {
      for (int64_t d = 0; d < width; ++d) {
        to.tainted[first + static_cast<size_t>(d)] |= Taint(tainted);
        if (row == nullptr || (by.value == 0.0 && by.error == 0.0)) continue;
        to.Add(first + static_cast<size_t>(d), by.value * row[d],
               (by.error + kEps * growth * std::fabs(by.value)) * std::fabs(row[d]));
      }
    };
    const bool v_tainted = tainted_ && (logits || p_.dout_tangent),
               out_tainted = tainted_ && (logits || p_.value_tangent);
    const auto row_of = [&](const Array& z, int64_t h, int64_t r) { return z ? RowOf(z, b, h, r) : nullptr; };
    const size_t to_q = p_.dquery.Index(b, n, i), to_k = p_.dkey.Index(b, k, x.j);
    const size_t to_v = p_.dvalue.Index(b, k, x.j), to_out = p_.out_tangent.Index(b, n, i);
    add(dquery, to_q, of_key, row_of(p_.key, k, x.j), p_.D, per_row_, both_tainted_);
    add(dquery, to_q, of_tangent, row_of(p_.key_tangent, k, x.j), p_.D, per_row_, both_tainted_);
    add(dkey, to_k, of_key, row_of(p_.query, n, i), p_.D, per_key_, both_tainted_);
    add(dkey, to_k, of_tangent, row_of(p_.query_tangent, n, i), p_.D, per_key_, both_tainted_);
    add(dvalue, to_v, weight, row_of(p_.dout, n, i), p_.Dv, per_key_, v_tainted);
    add(dvalue, to_v, kept, row_of(p_.dout_tangent, n, i), p_.Dv, per_key_, v_tainted);
    add(out_tangent, to_out, weight, row_of(p_.value, k, x.j), p_.Dv, per_row_, out_tainted);
    add(out_tangent, to_out, kept, row_of(p_.value_tangent, k, x.j), p_.Dv, per_row_, out_tainted);
    const auto sum = [&](Quantity& to, size_t index, const Bounded& by) {
      to.tainted[index] |= Taint(both_tainted_);
      to.Add(index, by.value, by.error + kEps * per_all_ * std::fabs(by.value));
    };
    if (p_.dbias) sum(dbias, p_.BiasIndex(b, n, i, x.j), gx);
    if (p_.dslopes) sum(dslopes, p_.dslopes.Index(b, n, i), gx * -Distance(b, n, i, x.j));
    if (p_.dscale) {
      sum(dscale, p_.dscale.Index(b, n), nothing ? Bounded{} : gx * y.dot);
      sum(dscale, p_.dscale.Index(b, n), nothing ? Bounded{} : dx * y.dot_tangent);
    }
    if (p_.dcap) {
      const double u = std::isfinite(x.u) ? x.u : 0.0;
      const Bounded by_u{-u, kEps * (x.before_error / p_.Cap(b, n) + 4 * std::fabs(u))};
      sum(dcap, p_.dcap.Index(b, n), g * Bounded{y.by_cap, y.by_cap_error});
      sum(dcap, p_.dcap.Index(b, n), ds * (nothing ? Bounded{} : by_u * y.curve));
    }
  }

  std::vector<Pair> pairs_;  // those of seen_
  Bounded tau_, sigma_;
  bool certain_ = false;                         // see Quantity::tainted
  bool tainted_ = false, both_tainted_ = false;  // what the weights' tangents give, and the gradients by products too
  double per_row_ = 0.0, per_key_ = 0.0, per_all_ = 0.0;
};

}  // namespace jax_fa_test
