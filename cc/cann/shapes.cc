// What the extents of a call's arrays must be. CANN reads and writes where its own arithmetic on some of them says, and
// older releases do not compare that with the others: what would lie beyond an array is stopped here.
#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

#include "cann/call.h"
#include "cann/status.h"

namespace jax_fa::cann {
namespace {

using Dims = std::vector<int64_t>;
constexpr int64_t kSide = 2048, kPrefixRows = 1024, kTableRows = 1024;

[[noreturn]] void Refuse(const std::string& what) { throw Failure(Outcome::kInvalidArgument, what); }

std::string Text(const Dims& dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

void Must(const char* name, const Array& x, const std::vector<Dims>& allowed) {
  if (std::find(allowed.begin(), allowed.end(), x.dims) != allowed.end()) return;
  std::string text;
  for (size_t i = 0; i < allowed.size(); ++i) {
    const auto here = allowed.begin() + static_cast<std::ptrdiff_t>(i);
    if (std::find(allowed.begin(), here, allowed[i]) != here) continue;
    text += (i ? " or " : "") + Text(allowed[i]);
  }
  Refuse(std::string(name) + " must have shape " + text + "; got " + Text(x) + ".");
}

// The sizes of a call, from head_num and those dims of query, key and value that no other array has to repeat.
struct Extents {
  int64_t B = 1, Sq, Skv, N, K, D, Dv;  // TND: Sq and Skv are the rows of all sequences
  Dims sq, skv;                         // of each sequence: of the packed ones, or one for all
};

int64_t DimOf(const Array& x, const std::string& layout, char letter) { return x.dims[layout.find(letter)]; }

int64_t Divide(const char* name, const Array& x, int64_t size, const char* what, int64_t by) {
  if (by <= 0 || size <= 0 || size % by != 0)
    Refuse(std::string(name) + " must have a last dim that is a positive multiple of " + what + "=" +
           std::to_string(by) + "; got " + Text(x) + ".");
  return size / by;
}

Dims Lengths(const char* name, const std::vector<int64_t>& ends, const char* array, int64_t total) {
  Dims lengths;
  int64_t before = 0;
  for (int64_t end : ends) {
    if (end < before || end > total)
      Refuse(std::string(name) + " must hold cumulative ends in 0.." + std::to_string(total) + ", the rows of " +
             array + "; got " + std::to_string(end) + " after " + std::to_string(before) + ".");
    lengths.push_back(end - before);
    before = end;
  }
  return lengths;
}

Extents ExtentsOf(const Call& c) {
  const std::string& layout = c.input_layout;
  Extents e;
  e.N = c.head_num;
  if (layout.back() == 'H') {
    e.D = Divide("query", c.query, c.query.dims.back(), "head_num", e.N);
    e.K = Divide("key", c.key, c.key.dims.back(), "query's head_dim", e.D);
    e.Dv = Divide("value", c.value, c.value.dims.back(), "key's number of heads", e.K);
  } else {
    e.D = c.query.dims.back();
    e.K = DimOf(c.key, layout, 'N');
    e.Dv = c.value.dims.back();
  }
  if (e.K <= 0 || e.N % e.K != 0)
    Refuse("key must have a number of heads that divides head_num=" + std::to_string(e.N) + "; got " +
           std::to_string(e.K) + " of " + Text(c.key) + ".");
  const char rows = c.varlen() ? 'T' : 'S';
  e.Sq = DimOf(c.query, layout, rows);
  e.Skv = DimOf(c.key, layout, rows);
  e.sq = {e.Sq};
  e.skv = {e.Skv};
  if (c.varlen()) {
    e.sq = Lengths("actual_seq_qlen", c.actual_seq_qlen, "query", e.Sq);
    e.skv = Lengths("actual_seq_kvlen", c.actual_seq_kvlen, "key", e.Skv);
    e.B = static_cast<int64_t>(e.sq.size());
  } else {
    e.B = DimOf(c.query, layout, 'B');
  }
  return e;
}

// Rows of query, key, value or their kin in the layout.
Dims Stored(const std::string& layout, const Extents& e, int64_t rows, int64_t heads, int64_t width) {
  if (layout == "TND") return {rows, heads, width};
  if (layout == "BSH") return {e.B, rows, heads * width};
  if (layout == "SBH") return {rows, e.B, heads * width};
  if (layout == "BNSD") return {e.B, heads, rows, width};
  return {e.B, rows, heads, width};
}

int64_t Longest(const Dims& lengths) { return *std::max_element(lengths.begin(), lengths.end()); }

int64_t Total(const Dims& lengths) {
  int64_t total = 0;
  for (int64_t n : lengths) total += n;
  return total;
}

// Logits of one head, in all sequences together.
int64_t Logits(const Extents& e) {
  int64_t total = 0;
  for (size_t b = 0; b < e.sq.size(); ++b) total += e.sq[b] * e.skv[b];
  return e.sq.size() == 1 ? total * e.B : total;
}

void ValidatePse(const Call& c, const Extents& e) {
  if (!c.pse.present()) return;
  std::vector<Dims> allowed;
  if (c.pse_type == 2 || c.pse_type == 3) {
    allowed = {{e.N}, {e.B, e.N}};
  } else if (c.varlen()) {
    allowed = {{e.N * Logits(e)}, {e.N * Total(e.skv)}};
    for (int64_t B : {int64_t{1}, e.B}) allowed.push_back({B, e.N, kTableRows, Longest(e.skv)});
  } else {
    for (int64_t B : {e.B, int64_t{1}})
      for (int64_t rows : {e.Sq, int64_t{1}}) allowed.push_back({B, e.N, rows, e.Skv});
    if (e.Sq > kTableRows)
      for (int64_t B : {e.B, int64_t{1}}) allowed.push_back({B, e.N, kTableRows, e.Skv});
  }
  Must("pse", c.pse, allowed);
}

void ValidateMask(const Call& c, const Extents& e) {
  if (!c.atten_mask.present()) return;
  const int64_t mode = c.sparse_mode;
  std::vector<Dims> allowed;
  if (mode == 6) {
    allowed = {{kSide + kPrefixRows, kSide}};
  } else if (mode >= 2 && mode != 5) {
    allowed = {{kSide, kSide}};
  } else if (c.varlen()) {
    allowed = {{Longest(e.sq), Longest(e.skv)}, {Total(e.sq), Total(e.skv)}};
  } else {
    allowed = {{e.B, e.N, e.Sq, e.Skv}, {e.B, 1, e.Sq, e.Skv}};
    if (mode != 5) allowed.insert(allowed.end(), {{1, 1, e.Sq, e.Skv}, {e.Sq, e.Skv}});
  }
  Must("atten_mask", c.atten_mask, allowed);
}

void ValidateDrop(const Call& c, const Extents& e) {
  if (!c.drop_mask.present()) return;
  const int64_t bytes = (e.N * Logits(e) + 7) / 8;
  if (c.drop_mask.elements() < bytes)
    Refuse("drop_mask must have at least " + std::to_string(bytes) + " bytes, one bit per weight; got " +
           Text(c.drop_mask) + ".");
}

}  // namespace

void ValidateShapes(const Call& c) {
  const Extents e = ExtentsOf(c);
  const auto stored = [&](int64_t rows, int64_t heads, int64_t width) {
    return std::vector<Dims>{Stored(c.input_layout, e, rows, heads, width)};
  };
  Must("query", c.query, stored(e.Sq, e.N, e.D));
  Must("key", c.key, stored(e.Skv, e.K, e.D));
  Must("value", c.value, stored(e.Skv, e.K, e.Dv));
  const std::vector<Dims> stats = {c.varlen() ? Dims{e.Sq, e.N, 8} : Dims{e.B, e.N, e.Sq, 8}};
  Must("softmax_max", c.softmax_max, stats);
  Must("softmax_sum", c.softmax_sum, stats);
  Must("attention", c.attention, stored(e.Sq, e.N, e.Dv));
  ValidatePse(c, e);
  ValidateMask(c, e);
  ValidateDrop(c, e);
  if (!c.prefix.empty() && static_cast<int64_t>(c.prefix.size()) != e.B)
    Refuse("prefix must have one value per batch entry, " + std::to_string(e.B) + "; got " +
           std::to_string(c.prefix.size()) + ".");
  if (c.sink.present()) Must("sink", c.sink, {{e.N}});
  if (!c.backward()) return;
  if (c.sink.present() != c.dsink.present()) Refuse("sink and dsink go together in the backward.");
  if (c.dsink.present()) Must("dsink", c.dsink, {{e.N}});
  Must("dy", c.dy, stored(e.Sq, e.N, e.Dv));
  Must("dq", c.dq, {c.query.dims});
  Must("dk", c.dk, {c.key.dims});
  Must("dv", c.dv, {c.value.dims});
}

}  // namespace jax_fa::cann
