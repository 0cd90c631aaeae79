#include "cann/choose.h"

#include <string>
#include <vector>

#include "cann/status.h"

namespace jax_fa::cann {
namespace {

[[noreturn]] void Refuse(const std::string& what) { throw Failure(Outcome::kUnimplemented, what); }

bool PositionsStartElsewhere(const Call& c) { return c.q_start != 0 || c.kv_start != 0; }

// The long functions that can serve a call, best first. The first ones have no pse_type: they are all of type 1.
std::vector<Function> Candidates(const Call& c) {
  struct Family {
    Function sink, v2, v1;
  };
  static constexpr Family kFamilies[2][2] = {
      {{kScoreV3, kScoreV2, kScore}, {kVarLenScoreV5, kVarLenScoreV2, kVarLenScore}},
      {{kScoreGradV3, kScoreGradV2, kScoreGrad}, {kUnpaddingScoreGradV5, kUnpaddingScoreGradV2, kUnpaddingScoreGrad}}};
  const Family& family = kFamilies[c.backward()][c.varlen()];
  if (c.sink.present()) return {family.sink};
  if (!c.softmax_layout.empty()) return {c.backward() ? kUnpaddingScoreGradV4 : kVarLenScoreV4};
  if (PositionsStartElsewhere(c) || (c.pse.present() && c.pse_type != 1)) return {family.v2};
  return {family.v2, family.v1};
}

// The limits of the short op. It does not report a call beyond them: it leaves the result undefined.
std::vector<std::string> BeyondShort(const Call& c) {
  std::vector<std::string> reasons;
  const auto unless = [&](bool held, std::string sentence) {
    if (!held) reasons.push_back(std::move(sentence));
  };
  unless(!c.backward(), "it has no backward");
  const bool layout = c.input_layout == "BSH" || c.input_layout == "BSND";
  unless(layout, "it takes layouts BSH and BSND, not " + c.input_layout);
  unless(c.query.dtype == ACL_FLOAT16, "it takes float16 only; query is " + Text(c.query));
  unless(!c.pse.present(), "it takes no pse");
  unless(!c.drop_mask.present(), "it takes no drop_mask");
  unless(!c.atten_mask.present(), "it takes no atten_mask");
  unless(!c.sink.present(), "it takes no sink");
  if (!layout) return reasons;
  const Call s = AsShort(c);
  const int64_t width = s.query.dims[2], kv_width = s.key.dims[2], kv_length = s.key.dims[1];
  unless(kv_length > 1024, "it needs more than 1024 keys; got " + std::to_string(kv_length));
  const int64_t D = width / c.head_num;
  const bool whole = D > 0 && width % c.head_num == 0 && kv_width > 0 && kv_width % D == 0 && width % kv_width == 0;
  unless(whole, "the last dim of query (" + std::to_string(width) + ") must be a multiple of head_num (" +
                    std::to_string(c.head_num) + ") and of that of key (" + std::to_string(kv_width) +
                    "), and that of key a multiple of head_dim");
  unless(s.value.dims == s.key.dims, "value must have the shape of key; got " + Text(c.value) + " and " + Text(c.key));
  unless(D <= 576, "head_dim must be at most 576; got " + std::to_string(D));
  unless(s.key.dims[0] == s.query.dims[0], "key must have the batch of query; got " + Text(c.key));
  return reasons;
}

void Flatten(Array& x) {
  if (x.dims.size() != 4) return;
  x.dims[2] *= x.dims[3];
  x.dims.pop_back();
}

}  // namespace

Call AsShort(const Call& call) {
  Call c = call;
  for (Array Call::* array : {&Call::query, &Call::key, &Call::value, &Call::attention}) Flatten(c.*array);
  c.input_layout = "BSH";
  return c;
}

Function Choose(const Library& library, const Call& call) {
  const bool short_op = static_cast<bool>(library[kShortScore]);
  if (short_op && library.prefer_short && BeyondShort(call).empty()) return kShortScore;
  const std::vector<Function> candidates = Candidates(call);
  if (!call.sink.present() && call.pse.present() && call.pse_type != 1 && !call.softmax_layout.empty())
    Refuse(std::string(kFunctionTable[candidates.front()].phase2) +
           ", which softmax_layout same_as_input needs, takes " + "pse of type 1 only; got pse_type " +
           std::to_string(call.pse_type) + ".");
  for (Function function : candidates)
    if (library[function]) return function;
  std::string names;
  for (Function function : candidates)
    names += std::string(names.empty() ? "" : " or ") + kFunctionTable[function].phase2;
  std::string why = library.Missing(names);
  if (short_op) {
    const std::vector<std::string> reasons = BeyondShort(call);
    if (reasons.empty()) return kShortScore;
    why += " The short op of " + library[kShortScore].file + " cannot serve the call either: ";
    for (size_t i = 0; i < reasons.size(); ++i) why += (i ? "; " : "") + reasons[i];
    why += '.';
  }
  Refuse(why);
}

}  // namespace jax_fa::cann
