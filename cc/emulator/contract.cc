// What CANN checks of a call, and the meaning of its sparse modes.
#include <algorithm>
#include <limits>

#include "emulator/op.h"

namespace cann_emulator {
namespace {

using Dims = std::vector<int64_t>;

std::string Text(const Dims& dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? "," : "") + std::to_string(dims[i]);
  return text + "]";
}

Verdict Invalid(const std::string& text) { return {161002, text, false}; }
Verdict Null(const std::string& text) { return {161001, text, false}; }
Verdict Tiling(const std::string& text) { return {561103, "Tiling Failed: " + text, true}; }

bool Float(int dtype) { return dtype == kFloat || dtype == kFloat16 || dtype == kBF16; }

// Types, layout, heads: checked by the API itself.
Verdict JudgeInterface(const Op& op) {
  for (const Array* x : {&op.query, &op.key, &op.value})
    if (!Float(x->dtype))
      return Invalid("dtype of query, key, value must be FLOAT, FLOAT16 or BF16, got " + Name(x->dtype) + ".");
  if (op.key.dtype != op.query.dtype || op.value.dtype != op.query.dtype)
    return Invalid("dtypes of query, key and value differ.");
  if (op.varlen != (op.layout == "TND")) return Invalid("layout " + op.layout + " does not belong to " + op.name + ".");
  const bool known =
      op.layout == "BSH" || op.layout == "SBH" || op.layout == "BSND" || op.layout == "BNSD" || op.layout == "TND";
  if (!known) return Invalid("layout " + op.layout + " is unknown.");
  for (const Array* x : {&op.query, &op.key, &op.value})
    if (x->dims.size() != op.layout.size())
      return Invalid("rank of query, key, value does not fit layout " + op.layout + ".");
  if (op.heads <= 0 || op.heads > 256)
    return Invalid("headNum must be in 1..256, got " + std::to_string(op.heads) + ".");
  if (op.softmax_layout != nullptr && *op.softmax_layout != 0 && std::string(op.softmax_layout) != "same_as_input")
    return Invalid(std::string("softmax layout ") + op.softmax_layout + " is unknown.");
  if (op.layout.back() == 'H' && (op.query.dims[2] % op.heads != 0 || op.query.dims[2] == 0))
    return Invalid("H of query is no multiple of headNum.");
  const Sizes s = SizesOf(op);
  if (s.N != op.heads) return Invalid("headNum differs from query's number of heads " + std::to_string(s.N) + ".");
  if (s.D > 768) return Invalid("head dim must be at most 768, got " + std::to_string(s.D) + ".");
  if (s.Dv > s.D) return Invalid("head dim of value is larger than of key.");
  if (op.layout.back() != 'H' && op.key.dims.back() != s.D) return Invalid("head dims of query and key differ.");
  if (op.pse.present() && op.pse.dtype != (op.pse_type >= 2 ? static_cast<int>(kFloat) : op.query.dtype))
    return Invalid("dtype of realShift is " + Name(op.pse.dtype) + ".");
  if (op.pse_type >= 2 && !op.pse.present()) return Null("realShift must not be null for pseType 2 and 3.");
  return {};
}

// Of the functions with a sink, what their documentation says.
Verdict JudgeSink(const Op& op, const Sizes& s) {
  if (op.query_rope.present() || op.key_rope.present()) return Invalid("queryRope and keyRope are not emulated.");
  if (!op.sink.present()) return op.dsink.present() ? Tiling("dsink without sink.") : Verdict{};
  if (op.sink.dtype != kFloat) return Invalid("dtype of sink must be FLOAT, got " + Name(op.sink.dtype) + ".");
  if (op.sink.dims != Dims{s.N}) return Tiling("sink must be " + Text({s.N}) + ", got " + Text(op.sink.dims) + ".");
  if (!op.backward) return {};
  if (op.query.dtype == kFloat) return Invalid("dtype FLOAT is not for the backward with a sink.");
  if (op.varlen && s.D != s.Dv) return Tiling("with a sink, the head dims of query and value must be the same.");
  if (op.dsink.dtype != kFloat || op.dsink.dims != Dims{s.N}) return Null("dsink must be FLOAT" + Text({s.N}) + ".");
  return {};
}

Dims WithLast(Dims dims, int64_t last) {
  dims.back() = last;
  return dims;
}

Verdict JudgeOutputs(const Op& op, const Sizes& s) {
  const int64_t T = op.varlen ? op.query.dims[0] : 0;
  const Dims stats = op.varlen ? Dims{T, s.N, 8} : Dims{s.B, s.N, s.sq.empty() ? 0 : s.sq[0], 8};
  const Dims out = op.layout.back() == 'H' ? WithLast(op.query.dims, s.N * s.Dv) : WithLast(op.query.dims, s.Dv);
  const auto check = [&](const Array& x, const Dims& dims, int dtype, const char* name) {
    return x.dims == dims && x.dtype == dtype ? std::string()
                                              : std::string(name) + " must be " + Name(dtype) + Text(dims) + ", got " +
                                                    Name(x.dtype) + Text(x.dims) + ".";
  };
  std::string wrong = check(op.max, stats, kFloat, "softmaxMax");
  if (wrong.empty()) wrong = check(op.sum, stats, kFloat, "softmaxSum");
  if (wrong.empty()) wrong = check(op.out, out, op.query.dtype, "attention");
  if (wrong.empty() && op.backward) {
    wrong = check(op.dy, out, op.query.dtype, "dy");
    if (wrong.empty()) wrong = check(op.dq, op.query.dims, op.query.dtype, "dq");
    if (wrong.empty()) wrong = check(op.dk, op.key.dims, op.query.dtype, "dk");
    if (wrong.empty()) wrong = check(op.dv, op.value.dims, op.query.dtype, "dv");
  }
  return wrong.empty() ? Verdict{} : Null(wrong);
}

Verdict JudgeSequences(const Op& op, const Sizes& s) {
  if (!op.varlen) return {};
  if (!op.has_seq || op.q_ends.empty() || op.q_ends.size() != op.kv_ends.size())
    return Tiling("actualSeqQLen and actualSeqKvLen must have the same length, at least 1.");
  for (int64_t n : s.sq)
    if (n < 0) return Tiling("actualSeqQLen decreases.");
  for (int64_t n : s.skv)
    if (n < 0) return Tiling("actualSeqKvLen decreases.");
  if (op.q_ends.back() != op.query.dims[0] || op.kv_ends.back() != op.key.dims[0])
    return Tiling("the last actualSeq value is not T.");
  return {};
}

int64_t Most(const std::vector<int64_t>& values) {
  return values.empty() ? 0 : *std::max_element(values.begin(), values.end());
}

Verdict JudgeMask(const Op& op, const Sizes& s) {
  if (!op.mask.present()) return {};
  if (op.mask.dtype != kBool && op.mask.dtype != kUint8)
    return Tiling("dtype of atten_mask is " + Name(op.mask.dtype) + ".");
  const Dims& d = op.mask.dims;
  const std::string got =
      " in sparse mode " + std::to_string(op.sparse_mode) + ", got atten_mask shape " + Text(d) + ".";
  if (Compressed(op)) {
    const Dims wanted = {op.sparse_mode == 6 ? 3072 : 2048, 2048};
    return d == wanted ? Verdict{} : Tiling("a compressed mask " + Text(wanted) + " is needed" + got);
  }
  if (op.varlen) {
    const Dims longest = {Most(s.sq), Most(s.skv)}, total = {op.q_ends.back(), op.kv_ends.back()};
    return d == longest || d == total ? Verdict{}
                                      : Tiling("the mask must be " + Text(longest) + " or " + Text(total) + got);
  }
  const Dims full = {s.B, s.N, s.sq[0], s.skv[0]}, batch = {s.B, 1, s.sq[0], s.skv[0]};
  const Dims one = {1, 1, s.sq[0], s.skv[0]}, plain = {s.sq[0], s.skv[0]};
  const bool fits = d == full || d == batch || (op.sparse_mode != 5 && (d == one || d == plain));
  return fits ? Verdict{} : Tiling("a full mask is needed" + got);
}

Verdict JudgeTokens(const Op& op, const Sizes& s) {
  if (!op.mask.present()) return {};
  const int64_t pre = op.pre, next = op.next;
  Verdict bad = Tiling("preTokens " + std::to_string(pre) + " and nextTokens " + std::to_string(next) +
                       " do not fit sparse mode " + std::to_string(op.sparse_mode) + ".");
  if (op.varlen) {
    int64_t last = -1, first = -1;
    for (int64_t b = 0; b < s.B; ++b)
      if (s.sq[b] > 0) {
        last = b;
        if (first < 0) first = b;
      }
    for (int64_t b = 0; b < s.B; ++b) {
      if (s.sq[b] == 0) continue;
      switch (op.sparse_mode) {
        case 0:
          if (next < 0 || s.skv[b] + pre < s.sq[b] || (op.backward && pre + next <= 0)) return bad;
          break;
        case 3:
          if (s.sq[b] > s.skv[b]) return bad;
          break;
        case 4:
          if (pre < 0 || pre + next < (op.backward ? 1 : 0) || s.sq[b] - next > s.skv[b]) return bad;
          break;
        case 7:
          if (b == last ? pre < s.skv[b] || next > 0 || s.sq[b] - next > s.skv[b] : s.sq[b] > s.skv[b]) return bad;
          break;
        case 8:
          if (b == first && (pre < s.skv[b] || s.sq[b] - next > s.skv[b])) return bad;
          break;
        default: break;
      }
    }
    return {};
  }
  if (op.sparse_mode != 0 && op.sparse_mode != 4) return {};
  const int64_t Sq = s.sq[0], Skv = s.skv[0], d = op.sparse_mode == 4 ? Skv - Sq : 0;
  if (op.sparse_mode == 4 && (pre + std::abs(d) > INT32_MAX || next + std::abs(d) > INT32_MAX)) return bad;
  const int64_t p = pre - d, n = next + d;
  if (p < 0 && n < 0) return bad;
  if (p < 0 && !(n >= -p && -p < Skv)) return bad;
  if (n < 0 && !(p >= -n && -n < Sq)) return bad;
  return {};
}

Verdict JudgePrefix(const Op& op, const Sizes& s) {
  if (op.sparse_mode != 5 && op.sparse_mode != 6) return {};
  if (!op.mask.present()) return {};
  if (op.sparse_mode == 5 && op.varlen) return Tiling("sparse mode 5 is not for TND.");
  if (op.prefix.size() != static_cast<size_t>(s.B))
    return Tiling("prefix must have " + std::to_string(s.B) + " values, got " + std::to_string(op.prefix.size()) + ".");
  if (s.B > (op.varlen ? 1024 : 2048)) return Tiling("too many batch entries with prefix.");
  for (int64_t b = 0; b < s.B; ++b)
    if (op.prefix[b] < std::max<int64_t>(0, s.skv[b] - s.sq[b]) || op.prefix[b] > s.skv[b])
      return Tiling("prefix " + std::to_string(op.prefix[b]) + " is out of range.");
  return {};
}

Verdict JudgePse(const Op& op, const Sizes& s) {
  if (op.typed_pse && (op.pse_type < 0 || op.pse_type > 3)) return Tiling("pseType must be in 0..3.");
  if (!op.pse.present()) return op.pse_type == 1 ? Verdict{} : Tiling("realShift is null and pseType is not 1.");
  const Dims& d = op.pse.dims;
  const std::string got = "realShift shape " + Text(d) + " does not fit.";
  if (op.sparse_mode == 7 || op.sparse_mode == 8) return Tiling("realShift is not for sparse modes 7 and 8.");
  if (op.varlen)
    for (int64_t b = 0; b < s.B; ++b)
      if (s.sq[b] == 0 || s.skv[b] == 0) return Tiling("realShift is not for empty sequences.");
  if (op.pse_type >= 2) {
    for (int64_t b = 0; b < s.B; ++b)
      if (s.sq[b] != s.skv[b]) return Tiling("pseType 2 and 3 need query and key of one length.");
    return d == Dims{s.N} || d == Dims{s.B, s.N} ? Verdict{} : Tiling(got);
  }
  const bool table = d.size() == 4 && d[2] == 1024;
  if (op.varlen) {
    if (table) return Tiling("an ALiBi table is not for layout TND on this device.");
    int64_t full = 0, row = 0;
    for (int64_t b = 0; b < s.B; ++b) {
      full += s.sq[b] * s.skv[b] * s.N;
      row += s.skv[b] * s.N;
    }
    return d == Dims{full} || d == Dims{row} ? Verdict{} : Tiling(got);
  }
  const int64_t Sq = s.sq[0], Skv = s.skv[0];
  if (d.size() != 4 || (d[0] != 1 && d[0] != s.B) || d[1] != s.N || d[3] != Skv) return Tiling(got);
  if (d[2] == Sq || (d[2] == 1 && (d[0] == s.B || !op.backward))) return {};
  const bool causal = op.sparse_mode == 2 || op.sparse_mode == 3 ||
                      (op.sparse_mode == 0 && op.mask.present() && op.pre >= Sq && op.next == 0);
  if (!table || Sq <= 1024 || Sq != Skv || !causal) return Tiling(got);
  const bool fits = !op.backward || (op.pre >= Sq && op.next == 0);
  return fits ? Verdict{}
              : Tiling("the backward takes an ALiBi table with preTokens of at least Sq and nextTokens of 0.");
}

Verdict JudgeDrop(const Op& op, const Sizes& s) {
  if (!(op.keep_prob > 0 && op.keep_prob <= 1)) return Tiling("keepProb must be in (0, 1].");
  if (!op.drop.present()) {
    if (op.backward && op.keep_prob < 1) return Tiling("keepProb is below 1 without dropMask.");
    return {};
  }
  if (op.drop.dtype != kUint8) return Tiling("dtype of dropMask is " + Name(op.drop.dtype) + ".");
  int64_t bits = 0;
  for (int64_t b = 0; b < s.B; ++b) bits += s.N * s.sq[b] * s.skv[b];
  return op.drop.size() * 8 < bits ? Tiling("dropMask is too small.") : Verdict{};
}

}  // namespace

Sizes SizesOf(const Op& op) {
  Sizes s;
  const Dims &q = op.query.dims, &k = op.key.dims, &v = op.value.dims;
  if (op.layout == "TND") {
    s.N = q[1];
    s.K = k[1];
    s.D = q[2];
    s.Dv = v[2];
    s.B = static_cast<int64_t>(std::min(op.q_ends.size(), op.kv_ends.size()));
    for (int64_t b = 0; b < s.B; ++b) {
      s.q_begin.push_back(b ? op.q_ends[b - 1] : 0);
      s.kv_begin.push_back(b ? op.kv_ends[b - 1] : 0);
      s.sq.push_back(op.q_ends[b] - s.q_begin[b]);
      s.skv.push_back(op.kv_ends[b] - s.kv_begin[b]);
    }
    return s;
  }
  const size_t b_at = op.layout.find('B'), s_at = op.layout.find('S');
  s.B = q[b_at];
  s.N = op.heads;
  if (op.layout.back() == 'H') {
    s.D = q[2] / op.heads;
    s.K = s.D ? k[2] / s.D : 0;
    s.Dv = s.K ? v[2] / s.K : 0;
  } else {
    s.N = q[op.layout.find('N')];
    s.K = k[op.layout.find('N')];
    s.D = q.back();
    s.Dv = v.back();
  }
  s.sq.assign(s.B, q[s_at]);
  s.skv.assign(s.B, k[s_at]);
  s.q_begin.assign(s.B, 0);
  s.kv_begin.assign(s.B, 0);
  return s;
}

bool Compressed(const Op& op) {
  const int64_t m = op.sparse_mode;
  return m == 2 || m == 3 || m == 4 || m == 6 || m == 7 || m == 8;
}

Verdict Judge(const Op& op) {
  Verdict verdict = JudgeInterface(op);
  if (verdict.code) return verdict;
  const Sizes s = SizesOf(op);
  verdict = JudgeOutputs(op, s);
  if (verdict.code) return verdict;
  const int64_t most = op.varlen ? 8 : 6;
  if (op.sparse_mode < 0 || op.sparse_mode > most) return Tiling("sparse mode is out of range.");
  if (s.K == 0 || s.N % s.K != 0) return Tiling("the number of query heads is no multiple of that of key heads.");
  for (auto* judge : {JudgeSink, JudgeSequences, JudgeMask, JudgeTokens, JudgePrefix, JudgePse, JudgeDrop}) {
    verdict = judge(op, s);
    if (verdict.code) return verdict;
  }
  return {};
}

bool InStructure(const Op& op, const Sizes& s, int64_t b, int64_t i, int64_t j) {
  const int64_t d = s.skv[b] - s.sq[b];
  const auto apart = [&](bool last) {
    int64_t found = -1;
    for (int64_t e = 0; e < s.B; ++e)
      if (s.sq[e] > 0 && (last || found < 0)) found = e;
    return found == b;
  };
  switch (op.sparse_mode) {
    case 0: return i - op.pre <= j && j <= i + op.next;
    case 2: return j <= i;
    case 3: return j <= i + d;
    case 4: return -op.pre <= j - (i + d) && j - (i + d) <= op.next;
    case 5:
    case 6: return j <= i + d || j < op.prefix[b];
    case 7: return j <= i + d + (apart(true) ? op.next : 0);
    case 8: return apart(false) ? j <= i + d + op.next : j <= i;
    default: return true;
  }
}

bool ZeroesHiddenRows(const Op& op, const Sizes& s) {
  if (op.varlen) return false;
  if (op.inner_precise == 2) return true;
  const int64_t Sq = s.sq[0], Skv = s.skv[0], d = Skv - Sq;
  switch (op.sparse_mode) {
    case 0: return op.pre < Sq - Skv || op.next < 0;
    case 3: return d < 0;
    case 4: return op.pre - d < Sq - Skv || op.next + d < 0;
    case 5:
    case 6: return Sq > Skv && std::any_of(op.prefix.begin(), op.prefix.end(), [](int64_t n) { return n == 0; });
    default: return false;
  }
}

}  // namespace cann_emulator
