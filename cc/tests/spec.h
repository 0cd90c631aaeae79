// A case in numbers, and the problem made of it.
#pragma once

#include <string>

#include "reference.h"

namespace jax_fa_test {

enum class Bounds { kNone, kCausal, kCausalEnd, kWindow, kAnything, kLengths, kFrom };
constexpr int kNoAxes = -1;  // of an operand: absent; else a bit per axis in which it is full size, batch first

struct Spec {
  int64_t B1 = 1, B2 = 1, Sq = 1, Skv = 1, N = 1, K = 1, D = 16, Dv = 16;
  DType dtype = DType::kF32;
  Bounds bounds = Bounds::kNone;
  int bound_axes = 8;
  int mask = kNoAxes, bias = kNoAxes;
  bool infinite_bias = false;  // some of it -inf
  double scale = 0.25, amplitude = 1.0, query_amplitude = 1.0, cap = 0.0, keep = 1.0;
  jax_fa::Alibi alibi = jax_fa::Alibi::kNone;
  int slope_axes = 7, position = kNoAxes;
  int indexed = kNoAxes;  // bias by index: axes of its offsets; `bias` gives those of the elements
  bool apart = false;     // ... and each key head has elements of its own
  int segments = kNoAxes;
  int scales = kNoAxes, caps = kNoAxes, rates = kNoAxes;  // axes of what is given per head instead
  int sinks = kNoAxes;
  bool partial = false;  // the backward takes the sink for keys that are elsewhere
  bool philox = false, bits = false, dlogsumexp = false;
  int layout = 0;               // 0: B S N D without gaps; else any order, drawn from the seed
  bool rounding = true;         // of a 16-bit out is saved for the backward
  double common_key = 0.0;      // a component that all keys share, as large as that
  double common_logit = 0.0;    // what all logits have in common
  double common_tangent = 0.0;  // what all tangents of the bias have in common
  double garbage = 0.0;         // NaN or infinity: where nobody sees it, and in a few places that are seen
  bool seen_garbage = false;
  int cotangents = 3;  // a bit for the tangent of each cotangent
  int tangents = 127;  // a bit for each operand that may have one, in the order of kDifferentiable
  uint64_t seed = 1;

  std::string Text() const {
    static const char* const kDTypes[] = {"f32", "bf16", "f16"};
    static const char* const kBounds[] = {"none", "causal", "causal-end", "window", "anything", "lengths", "from"};
    char text[512];
    std::snprintf(
        text, sizeof text,
        "B=%lldx%lld Sq=%lld Skv=%lld N=%lld K=%lld D=%lld Dv=%lld %s bounds=%s/%d mask=%d bias=%d%s "
        "scale=%g amplitude=%g/%g common=%g/%g cap=%g alibi=%d/%d/%d indexed=%d%s segments=%d per-head=%d/%d/%d "
        "sinks=%d%s dropout=%s%skeep=%g dlse=%d layout=%d garbage=%g%s tangents=%d/%d seed=%llu",
        Int(B1), Int(B2), Int(Sq), Int(Skv), Int(N), Int(K), Int(D), Int(Dv), kDTypes[static_cast<int>(dtype)],
        kBounds[static_cast<int>(bounds)], bound_axes, mask, bias, infinite_bias ? "(-inf)" : "", scale, amplitude,
        query_amplitude, common_key, common_logit, cap, static_cast<int>(alibi), slope_axes, position, indexed,
        apart ? "(apart)" : "", segments, scales, caps, rates, sinks, partial ? "(partial)" : "",
        philox ? "philox " : "", bits ? "bits " : "", keep, dlogsumexp, layout, garbage, seen_garbage ? "(seen)" : "",
        tangents, cotangents, static_cast<unsigned long long>(seed));
    return text;
  }

 private:
  static long long Int(int64_t x) { return static_cast<long long>(x); }
};

class Maker {
 public:
  Maker(const Spec& s, Problem& p) : s_(s), p_(p), random_(s.seed) {}

  void Make() {
    p_.B1 = s_.B1, p_.B2 = s_.B2, p_.Sq = s_.Sq, p_.Skv = s_.Skv, p_.N = s_.N, p_.K = s_.K, p_.D = s_.D, p_.Dv = s_.Dv;
    p_.scale = static_cast<float>(s_.scale), p_.cap = static_cast<float>(s_.cap);
    p_.alibi = s_.alibi;
    p_.query = Stored(s_.dtype, {s_.B1, s_.B2, s_.N, s_.Sq, s_.D});
    p_.key = Stored(s_.dtype, {s_.B1, s_.B2, s_.K, s_.Skv, s_.D});
    p_.value = Stored(s_.dtype, {s_.B1, s_.B2, s_.K, s_.Skv, s_.Dv});
    p_.dout = Stored(s_.dtype, {s_.B1, s_.B2, s_.N, s_.Sq, s_.Dv});
    for (Array* x : {&p_.query, &p_.key}) Draw(*x, s_.amplitude);
    for (double& x : p_.query.value) x *= s_.query_amplitude;
    for (Array* x : {&p_.value, &p_.dout}) Draw(*x, 1.0);
    MakeCommon();
    if (s_.dlogsumexp) Draw(p_.dlogsumexp = Stats(), 1.0);
    MakeMasks();
    if (s_.bias != kNoAxes) {
      if (s_.indexed != kNoAxes) MakeOffsets();
      p_.bias = Plain(random_.OneIn(2) ? s_.dtype : DType::kF32, p_.bias_offset ? Elements() : Full(s_.bias, s_.Skv));
      Draw(p_.bias, 1.0);
      for (double& x : p_.bias.value)
        if (s_.infinite_bias && random_.OneIn(4)) x = -std::numeric_limits<double>::infinity();
      p_.dbias = Plain(DType::kF32, p_.bias.dims);
    }
    if (s_.alibi != jax_fa::Alibi::kNone) {
      p_.slopes = Plain(DType::kF32, Full(s_.slope_axes & 15, 1));
      for (double& x : p_.slopes.value) x = 0.3 * random_.Uniform();
      p_.dslopes = Plain(DType::kF32, p_.slopes.dims);
      if (s_.position != kNoAxes) {
        p_.position = Pairs(DType::kI32, Full(s_.position & 15, 1));
        for (double& x : p_.position.value) x = static_cast<double>(random_.Below(2 * s_.Skv + 40) - 20);
      }
    }
    MakeHeads();
    MakeDropout();
    MakeSinks();
    MakeResults();
    if (s_.garbage != 0.0) Spoil();
    MakeTangents();
    for (Array* x : {&p_.query,
                     &p_.key,
                     &p_.value,
                     &p_.dout,
                     &p_.dlogsumexp,
                     &p_.lower,
                     &p_.upper,
                     &p_.mask,
                     &p_.bias,
                     &p_.slopes,
                     &p_.seed,
                     &p_.stream,
                     &p_.drop_bits,
                     &p_.drop_offset,
                     &p_.bias_offset,
                     &p_.position,
                     &p_.segment_row,
                     &p_.segment_key,
                     &p_.scale_of_head,
                     &p_.cap_of_head,
                     &p_.threshold_of_head,
                     &p_.dropout_start,
                     &p_.sinks,
                     &p_.query_tangent,
                     &p_.key_tangent,
                     &p_.value_tangent,
                     &p_.bias_tangent,
                     &p_.slopes_tangent,
                     &p_.scale_tangent,
                     &p_.cap_tangent,
                     &p_.dout_tangent,
                     &p_.dlogsumexp_tangent})
      if (*x) x->Write();
  }

 private:
  Dims Full(int axes, int64_t col) const {
    return {axes & 1 ? s_.B1 : 1, axes & 2 ? s_.B2 : 1, axes & 4 ? s_.N : 1, axes & 8 ? s_.Sq : 1, axes & 16 ? col : 1};
  }
  Array Make(DType dtype, const Dims& dims, Storage storage) {
    storage.at_end = !random_.OneIn(4);
    return Array(dtype, dims, s_.B2, s_.B1, storage);
  }
  // An operand of the attention: in any order of axes.
  Array Stored(DType dtype, const Dims& dims) {
    static const char* const kOrders[] = {"01324", "01234", "30124", "01243", "42310", "13024"};
    Storage storage{"01324"};
    if (s_.layout != 0) {
      storage.order = random_.Pick(kOrders);
      storage.step = random_.OneIn(6) ? 3 : 1;
      storage.gap = random_.OneIn(3) ? random_.Below(6) : 0;
    }
    return Make(dtype, dims, storage);
  }
  // Stored as its axes are written.
  Array Plain(DType dtype, const Dims& dims) {
    Storage storage;
    if (s_.layout != 0 && random_.OneIn(4)) storage.step = 2, storage.gap = 1;
    return Make(dtype, dims, storage);
  }
  Array Pairs(DType dtype, Dims dims) { return Make(dtype, dims, Storage()); }
  Array Stats() { return Make(DType::kF32, {s_.B1, s_.B2, s_.N, s_.Sq, 1}, Storage()); }

  void Draw(Array& x, double amplitude) {
    for (double& y : x.value) y = amplitude * random_.Normal();
  }

  void MakeCommon() {
    const auto each = [](Array& x, const auto& fn) {
      const int64_t head = x.dims[kRow] * x.dims[kCol];
      for (size_t at = 0; at < x.value.size(); ++at)
        fn(x.value[at], static_cast<int64_t>(at) / head, static_cast<int64_t>(at) % x.dims[kCol]);
    };
    if (s_.common_key != 0.0) {
      each(p_.key, [&](double& x, int64_t head, int64_t d) {
        x += s_.common_key * Random(static_cast<uint64_t>(head * s_.D + d)).Normal();
      });
    }
    if (s_.common_logit != 0.0) {
      each(p_.query, [](double& x, int64_t, int64_t d) { x = d == 0 ? 1.0 : x; });
      each(p_.key, [&](double& x, int64_t, int64_t d) { x = d == 0 ? s_.common_logit / s_.scale : x; });
    }
  }

  void MakeMasks() {
    const auto bound = [&](Array& x, const auto& fn) {
      x = Pairs(DType::kI32, Full(s_.bound_axes & 15, 1));
      for (size_t at = 0; at < x.value.size(); ++at)
        x.value[at] = static_cast<double>(fn(static_cast<int64_t>(at) % std::max<int64_t>(1, x.dims[kRow])));
    };
    const int64_t offset = s_.Skv - s_.Sq, width = s_.Skv / 3 + 1;
    switch (s_.bounds) {
      case Bounds::kNone: break;
      case Bounds::kCausal: bound(p_.upper, [](int64_t i) { return i + 1; }); break;
      case Bounds::kCausalEnd: bound(p_.upper, [&](int64_t i) { return i + 1 + offset; }); break;
      case Bounds::kWindow:
        bound(p_.lower, [&](int64_t i) { return i + offset - width; });
        bound(p_.upper, [&](int64_t i) { return i + offset + width / 2; });
        break;
      case Bounds::kAnything: {  // empty and turned round, before 0 and beyond the end
        const auto any = [&](int64_t) { return random_.Below(s_.Skv + 20) - 10; };
        bound(p_.lower, any);
        bound(p_.upper, any);
        std::vector<double>&lower = p_.lower.value, &upper = p_.upper.value;
        for (size_t at = 0; at < lower.size(); ++at)
          if (!random_.OneIn(4) && lower[at] > upper[at]) std::swap(lower[at], upper[at]);
        if (!upper.empty()) upper[0] = 2147483647.0, lower[0] = -2147483648.0;
        break;
      }
      case Bounds::kLengths: bound(p_.upper, [&](int64_t) { return random_.Below(s_.Skv + 1); }); break;
      case Bounds::kFrom: bound(p_.lower, [&](int64_t) { return random_.Below(s_.Skv + 1); }); break;
    }
    if (s_.segments != kNoAxes) {
      p_.segment_row = Pairs(DType::kI32, Full(s_.segments & 15, 1));
      p_.segment_key = Pairs(DType::kI32, Full((s_.segments & 7) | 16, s_.Skv));
      for (double& x : p_.segment_row.value) x = static_cast<double>(random_.Below(4) - 1);
      for (double& x : p_.segment_key.value) x = static_cast<double>(random_.OneIn(3) ? random_.Below(4) - 1 : 1);
    }
    if (s_.mask == kNoAxes) return;
    p_.mask = Plain(DType::kU8, Full(s_.mask, s_.Skv));
    const int64_t row = std::max<int64_t>(1, p_.mask.dims[kCol]);
    for (size_t at = 0; at < p_.mask.value.size(); ++at) {
      if (static_cast<int64_t>(at) % row == 0) density_ = random_.OneIn(5) ? 0 : 1 + random_.Below(4);
      p_.mask.value[at] = random_.Below(4) < density_ ? 1.0 : 0.0;
    }
  }

  // Offsets as of a relative position, or any. The elements are those of visible pairs and none beyond.
  void MakeOffsets() {
    const bool relative = random_.OneIn(2);
    p_.bias_apart = s_.apart;
    p_.bias_offset = Pairs(DType::kI32, Full(s_.apart ? 15 : s_.indexed & 15, 1));
    for (size_t at = 0; at < p_.bias_offset.value.size(); ++at) {
      const int64_t i = static_cast<int64_t>(at) % std::max<int64_t>(1, p_.bias_offset.dims[kRow]);
      p_.bias_offset.value[at] = static_cast<double>(relative ? s_.Sq - i : random_.Below(s_.Sq + 20));
    }
    elements_ = 0;
    const int64_t parts = s_.apart ? p_.B() * s_.K : 1, heads = s_.apart ? p_.G() : s_.N;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = s_.apart ? part / s_.K : 0, last = s_.apart ? first + 1 : p_.B();
      const int64_t n0 = s_.apart ? part % s_.K * heads : 0;
      double least = kNone, most = -kNone;
      for (int64_t b = first; b < last; ++b)
        for (int64_t n = n0; n < n0 + heads; ++n)
          for (int64_t i = 0; i < s_.Sq; ++i)
            for (int64_t j = 0; j < s_.Skv; ++j) {
              if (!p_.Visible(b, n, i, j)) continue;
              const double at = p_.bias_offset.at(b, n, i) + static_cast<double>(j);
              least = std::min(least, at), most = std::max(most, at);
            }
      if (least == kNone) least = 0.0, most = -1.0;  // no pair is visible
      std::vector<uint8_t> moved(p_.bias_offset.value.size(), 0);
      for (int64_t b = first; b < last; ++b)
        for (int64_t n = n0; n < n0 + heads; ++n)
          for (int64_t i = 0; i < s_.Sq; ++i) {
            const size_t at = p_.bias_offset.Index(b, n, i);
            if (!moved[at]) p_.bias_offset.value[at] += static_cast<double>(elements_) - least;
            moved[at] = 1;
          }
      elements_ += static_cast<int64_t>(most - least) + 1;
    }
  }
  Dims Elements() const {
    const int axes = s_.apart ? 0 : s_.bias & 7;
    return {axes & 1 ? s_.B1 : 1, axes & 2 ? s_.B2 : 1, axes & 4 ? s_.N : 1, 1, elements_};
  }

  // What one number may be for each head.
  void MakeHeads() {
    const auto make = [&](Array& x, DType dtype, int axes, const auto& fn) {
      if (axes == kNoAxes) return;
      x = Pairs(dtype, Full(axes & 7, 1));
      for (double& y : x.value) y = fn();
    };
    make(p_.scale_of_head, DType::kF32, s_.scales,
         [&] { return random_.OneIn(6) ? 0.0 : s_.scale * random_.Normal(); });
    make(p_.cap_of_head, DType::kF32, s_.caps,
         [&] { return 0.5 + (random_.OneIn(3) ? 50.0 : 5.0) * random_.Uniform(); });
    if (p_.scale_of_head) p_.dscale = Plain(DType::kF32, p_.scale_of_head.dims);
    if (p_.cap_of_head) p_.dcap = Plain(DType::kF32, p_.cap_of_head.dims);
    if (s_.philox)
      make(p_.threshold_of_head, DType::kU32, s_.rates,
           [&] { return random_.OneIn(4) ? 65536.0 : static_cast<double>(20000 + random_.Below(45000)); });
  }

  void MakeDropout() {
    if (s_.philox) {
      p_.threshold = static_cast<uint32_t>(std::lround(s_.keep * 65536));
      p_.keep_prob = static_cast<float>(s_.keep);
      p_.seed = Pairs(DType::kU32, {random_.OneIn(2) ? s_.B1 : 1, s_.B2, 1, 1, 2});
      p_.stream = Pairs(DType::kU32, {s_.B1, s_.B2, s_.N, 1, 2});
      for (Array* x : {&p_.seed, &p_.stream})
        for (double& y : x->value) y = static_cast<double>(random_.Bits() >> 32);
      Random random(s_.seed + 2000003);
      if (random.OneIn(2)) {
        p_.dropout_start = Pairs(DType::kU32, {random.OneIn(2) ? s_.B1 : 1, s_.B2, 1, 1, 2});
        for (double& y : p_.dropout_start.value) y = static_cast<double>(random.Below(1000));
      }
    }
    if (s_.bits) {
      p_.keep_prob = static_cast<float>(s_.keep);
      const bool of_head = random_.OneIn(2);
      p_.drop_offset = Pairs(DType::kI32, {1, 1, of_head ? s_.N : 1, s_.Sq, 2});
      const int64_t rows = p_.drop_offset.dims[kHead] * s_.Sq;
      p_.drop_bits = Pairs(DType::kU8, {s_.B1, random_.OneIn(2) ? s_.B2 : 1, 1, 1, (rows * s_.Skv + 7) / 8 + 1});
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t bit = r * s_.Skv, byte = bit / 8;
        p_.drop_offset.value[static_cast<size_t>(2 * r)] = static_cast<double>(byte);
        p_.drop_offset.value[static_cast<size_t>(2 * r + 1)] = static_cast<double>(bit % 8);
      }
      for (double& x : p_.drop_bits.value)  // each bit kept with probability 3/4
        x = static_cast<double>((random_.Bits() | random_.Bits()) & 255);
    }
  }

  // With numbers of their own: the rest of a case does not depend on them.
  void MakeSinks() {
    if (s_.sinks == kNoAxes) return;
    Random random(s_.seed + 3000017);
    p_.partial = s_.partial;
    p_.sinks = Array(DType::kF32, Full(s_.sinks & 7, 1), s_.B2, s_.B1, Storage());
    for (double& x : p_.sinks.value) {
      x = (random.OneIn(4) ? 100.0 : 3.0) * random.Normal();
      if (random.OneIn(8)) x = -std::numeric_limits<double>::infinity();
    }
  }

  void MakeResults() {
    p_.out = Stored(s_.dtype, p_.dout.dims);
    if (s_.rounding && s_.dtype != DType::kF32) p_.rounding = Stored(s_.dtype, p_.dout.dims);
    p_.m = Stats(), p_.l = Stats();
    p_.dquery = Stored(s_.dtype, p_.query.dims);
    p_.dkey = Stored(s_.dtype, p_.key.dims);
    p_.dvalue = Stored(s_.dtype, p_.value.dims);
  }

  // With numbers of their own: the rest of a case does not depend on them.
  void MakeTangents() {
    random_ = Random(s_.seed + 1000003);
    p_.out_tangent = Stored(s_.dtype, p_.out.dims), p_.logsumexp_tangent = Stats();
    int bit = 1;
    for (const auto& [of, tangent] :
         {std::pair(&p_.query, &p_.query_tangent), std::pair(&p_.key, &p_.key_tangent),
          std::pair(&p_.value, &p_.value_tangent), std::pair(&p_.bias, &p_.bias_tangent),
          std::pair(&p_.slopes, &p_.slopes_tangent), std::pair(&p_.scale_of_head, &p_.scale_tangent),
          std::pair(&p_.cap_of_head, &p_.cap_tangent)}) {
      const bool given = s_.tangents & bit;
      bit *= 2;
      if (!*of || !given) continue;
      Dims dims = of->dims;  // in the batch 1 or full
      if (random_.OneIn(3)) dims[0] = random_.OneIn(2) ? 1 : s_.B1;
      if (random_.OneIn(3)) dims[1] = random_.OneIn(2) ? 1 : s_.B2;
      *tangent = bit <= 8 ? Stored(of->dtype, dims) : Plain(of->dtype, dims);
      Draw(*tangent, bit <= 16 ? 1.0 : 0.2);
    }
    for (double& x : p_.bias_tangent.value) x += s_.common_tangent;
    if (s_.cotangents & 1) Draw(p_.dout_tangent = Stored(s_.dtype, p_.dout.dims), 1.0);
    if (s_.cotangents & 2) Draw(p_.dlogsumexp_tangent = Stats(), 1.0);
    if (s_.garbage == 0.0) return;
    std::vector<uint8_t> seen[6];
    Array* const arrays[] = {&p_.query_tangent, &p_.key_tangent,  &p_.value_tangent,
                             &p_.bias_tangent,  &p_.dout_tangent, &p_.dlogsumexp_tangent};
    for (size_t x = 0; x < 6; ++x) seen[x].assign(arrays[x]->value.size(), 0);
    ForEachVisible([&](int64_t b, int64_t n, int64_t i, int64_t j) {
      const int64_t k = n / p_.G();
      for (int64_t d = 0; p_.query_tangent && d < s_.D; ++d) seen[0][p_.query_tangent.Index(b, n, i, d)] = 1;
      for (int64_t d = 0; p_.key_tangent && d < s_.D; ++d) seen[1][p_.key_tangent.Index(b, k, j, d)] = 1;
      for (int64_t d = 0; p_.value_tangent && d < s_.Dv; ++d) seen[2][p_.value_tangent.Index(b, k, j, d)] = 1;
      for (int64_t d = 0; p_.dout_tangent && d < s_.Dv; ++d) seen[4][p_.dout_tangent.Index(b, n, i, d)] = 1;
      if (p_.dlogsumexp_tangent) seen[5][p_.dlogsumexp_tangent.Index(b, n, i)] = 1;
      if (p_.bias_tangent) seen[3][p_.BiasIndex(p_.bias_tangent, b, n, i, j)] = 1;
    });
    for (size_t x = 0; x < 6; ++x) {
      for (size_t at = 0; at < seen[x].size(); ++at)
        if (!seen[x][at] && random_.OneIn(2)) arrays[x]->value[at] = random_.OneIn(2) ? s_.garbage : -s_.garbage;
      if (s_.seen_garbage && !seen[x].empty() && random_.OneIn(4))
        arrays[x]->value[static_cast<size_t>(random_.Below(static_cast<int64_t>(seen[x].size())))] = s_.garbage;
    }
  }

  template <typename Fn>
  void ForEachVisible(const Fn& fn) const {
    for (int64_t b = 0; b < p_.B(); ++b)
      for (int64_t n = 0; n < s_.N; ++n)
        for (int64_t i = 0; i < s_.Sq; ++i)
          for (int64_t j = 0; j < s_.Skv; ++j)
            if (p_.Visible(b, n, i, j)) fn(b, n, i, j);
  }

  // Puts what is not finite wherever no row or no key is seen, and into a few places that are.
  void Spoil() {
    for (int64_t b = 0; b < p_.B(); ++b) {
      for (int64_t n = 0; n < s_.N; ++n)
        for (int64_t i = 0; i < s_.Sq; ++i) {
          bool sees = false;
          for (int64_t j = 0; j < s_.Skv && !sees; ++j) sees = p_.Visible(b, n, i, j);
          if (sees) continue;
          SpoilRow(p_.query, b, n, i);
          SpoilRow(p_.dout, b, n, i);
          if (p_.dlogsumexp) SpoilRow(p_.dlogsumexp, b, n, i);
        }
      for (int64_t k = 0; k < s_.K; ++k)
        for (int64_t j = 0; j < s_.Skv; ++j) {
          bool seen = false;
          for (int64_t n = k * p_.G(); n < (k + 1) * p_.G() && !seen; ++n)
            for (int64_t i = 0; i < s_.Sq && !seen; ++i) seen = p_.Visible(b, n, i, j);
          if (seen) continue;
          SpoilRow(p_.key, b, k, j);
          SpoilRow(p_.value, b, k, j);
        }
    }
    if (p_.bias) {
      std::vector<uint8_t> seen(p_.bias.value.size(), 0);
      ForEachVisible([&](int64_t b, int64_t n, int64_t i, int64_t j) { seen[p_.BiasIndex(b, n, i, j)] = 1; });
      for (size_t at = 0; at < seen.size(); ++at)
        if (!seen[at]) p_.bias.value[at] = s_.garbage;
    }
    if (!s_.seen_garbage) return;
    for (Array* x : {&p_.query, &p_.key, &p_.value, &p_.dout, &p_.bias, &p_.dlogsumexp})
      if (*x && !x->value.empty() && random_.OneIn(2))
        x->value[static_cast<size_t>(random_.Below(static_cast<int64_t>(x->value.size())))] = s_.garbage;
  }
  // All of a row, or one number of it.
  void SpoilRow(Array& x, int64_t b, int64_t h, int64_t r) {
    const bool all = random_.OneIn(2);
    for (int64_t c = 0; c < x.dims[kCol]; ++c)
      if (all || c == x.dims[kCol] / 2) x.value[x.Index(b, h, r, c)] = random_.OneIn(2) ? s_.garbage : -s_.garbage;
  }

  const Spec& s_;
  Problem& p_;
  Random random_;
  static constexpr double kNone = std::numeric_limits<double>::max();
  int64_t density_ = 0, elements_ = 0;
};

}  // namespace jax_fa_test
