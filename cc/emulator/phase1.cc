#include "emulator/phase1.h"

#include <sstream>

namespace cann_emulator {
namespace {

constexpr uint64_t kReserve = 16 << 20;

std::string Text(const std::vector<int64_t>& values) {
  std::string text = "[";
  for (size_t i = 0; i < values.size(); ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

// An op and the text it points at.
struct Owned {
  Op op;
  std::string softmax_layout;
};

}  // namespace

std::string Phase1::Json(uint64_t workspace) const {
  std::ostringstream json;
  json << "{\"function\": \"" << name_ << "\", \"tensors\": {";
  for (size_t i = 0; i < named_.size(); ++i)
    json << (i ? ", " : "") << '"' << named_[i].first << "\": {\"shape\": " << Text(named_[i].second->dims)
         << ", \"strides\": " << Text(named_[i].second->strides) << ", \"dtype\": \"" << Name(named_[i].second->dtype)
         << "\"}";
  json << "}";
  for (const char* list : {"prefix", "actualSeqQLen", "actualSeqKvLen", "qStartIdx", "kvStartIdx"}) {
    std::string text = "null";
    for (const auto& [name, values] : lists_)
      if (std::string(name) == list && values != nullptr && !values->empty()) text = Text(*values);
    json << ", \"" << list << "\": " << text;
  }
  json << ", \"scaleValue\": " << op_.scale << ", \"keepProb\": " << op_.keep_prob << ", \"preTokens\": " << op_.pre
       << ", \"nextTokens\": " << op_.next << ", \"headNum\": " << op_.heads << ", \"inputLayout\": \"" << op_.layout
       << "\", \"innerPrecise\": " << op_.inner_precise << ", \"sparseMode\": " << op_.sparse_mode
       << ", \"pseType\": " << (op_.typed_pse ? std::to_string(op_.pse_type) : "null")
       << ", \"softmaxLayout\": " << (has_softmax_ ? '"' + softmax_text_ + '"' : "null")
       << ", \"workspaceSize\": " << workspace << "}";
  return json.str();
}

int Phase1::Finish(uint64_t* workspace, aclOpExecutor** executor) {
  if (executor != nullptr) *executor = reinterpret_cast<aclOpExecutor*>(0xBAD0);  // nobody may use it after a failure
  if (fault_) return fault_;
  if (workspace == nullptr || executor == nullptr || !missing_.empty())
    return Fail(161001, std::string(name_) + ": null arguments: " + missing_ + ".");
  const std::string prefix = std::string(name_) + ": ";
  const auto empty = [](const Array& x) { return x.size() == 0; };
  const bool nothing = op_.backward ? empty(op_.dq) && empty(op_.dk) && empty(op_.dv)
                                    : empty(op_.max) && empty(op_.sum) && empty(op_.out);
  const Verdict verdict = op_.short_abi || nothing ? Verdict{} : Judge(op_);
  if (verdict.code && !verdict.tiling) return Fail(verdict.code, prefix + verdict.text);
  if (verdict.code && TilingInPhase1()) return Fail(161001, prefix + "launch kernel failed. " + verdict.text);
  auto owned = std::make_shared<Owned>(Owned{op_, softmax_text_});
  owned->op.softmax_layout = has_softmax_ ? owned->softmax_layout.c_str() : nullptr;
  *workspace = 0;
  Work work;
  if (!nothing && !verdict.code) {
    *workspace = kReserve;
    if (op_.drop.present() && op_.drop.size() % 2) *workspace += 8 * op_.drop.size();  // bits may become bytes
    work = [owned] {
      const Op& op = owned->op;
      return op.short_abi ? RunShort(op) : op.backward ? RunBackward(op) : RunForward(op);
    };
  }
  *executor = NewExecutor(name_, *workspace, std::move(work), tensors_, ints_);
  if (verdict.code) FailInPhase2(*executor, verdict.code, prefix + verdict.text);
  Log(Json(*workspace));
  return 0;
}

}  // namespace cann_emulator
