#include "cann/call.h"

#include <sstream>

#include "cann/status.h"

namespace jax_fa::cann {
namespace {

struct DType {
  aclDataType dtype;
  const char* name;
  size_t size;
};
constexpr DType kDTypes[] = {
    {ACL_FLOAT, "float32", 4}, {ACL_FLOAT16, "float16", 2}, {ACL_BF16, "bfloat16", 2},
    {ACL_UINT8, "uint8", 1},   {ACL_BOOL, "bool", 1},       {ACL_DT_UNDEFINED, "absent", 0},
};

const DType& Find(aclDataType dtype) {
  for (const DType& d : kDTypes)
    if (d.dtype == dtype) return d;
  return kDTypes[5];
}

std::string Text(const std::vector<int64_t>& values) {
  // Lists may have one entry per sequence of a large batch.
  constexpr size_t kShown = 16;
  std::string text = "[";
  for (size_t i = 0; i < values.size() && i < kShown; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  if (values.size() > kShown) text += ", ... (" + std::to_string(values.size()) + " values)";
  return text + "]";
}

[[noreturn]] void Refuse(const std::string& what) { throw Failure(Outcome::kInvalidArgument, what); }

bool IsFloat(aclDataType dtype) { return dtype == ACL_FLOAT || dtype == ACL_FLOAT16 || dtype == ACL_BF16; }

void ValidateLayout(const Call& c) {
  bool known = false;
  for (const char* layout : {"BSH", "SBH", "BSND", "BNSD", "TND"}) known = known || c.input_layout == layout;
  if (!known) Refuse("input_layout must be BSH, SBH, BSND, BNSD or TND; got '" + c.input_layout + "'.");
  for (const Slot& slot : kSlots) {
    const bool stored = slot.array == &Call::query || slot.array == &Call::key || slot.array == &Call::value;
    const Array& x = c.*slot.array;
    if (stored && x.dims.size() != c.input_layout.size())
      Refuse(std::string(slot.name) + " must have rank " + std::to_string(c.input_layout.size()) + " for layout " +
             c.input_layout + "; got " + Text(x) + ".");
  }
  if (!c.softmax_layout.empty() && (c.softmax_layout != "same_as_input" || !c.varlen()))
    Refuse("softmax_layout must be empty or, with layout TND, same_as_input; got '" + c.softmax_layout + "' with " +
           c.input_layout + ".");
  if (c.varlen() && (c.actual_seq_qlen.empty() || c.actual_seq_qlen.size() != c.actual_seq_kvlen.size()))
    Refuse("layout TND needs actual_seq_qlen and actual_seq_kvlen of the same length, at least 1; got " +
           std::to_string(c.actual_seq_qlen.size()) + " and " + std::to_string(c.actual_seq_kvlen.size()) + " values.");
  if (c.head_num <= 0) Refuse("head_num must be positive; got " + std::to_string(c.head_num) + ".");
}

void ValidateDTypes(const Call& c) {
  const aclDataType dtype = c.query.dtype;
  if (!IsFloat(dtype)) Refuse("query must be float16, bfloat16 or float32; got " + Text(c.query) + ".");
  const auto same = [&](const char* name, const Array& x, aclDataType wanted) {
    if (x.present() && x.dtype != wanted)
      Refuse(std::string(name) + " must be " + Find(wanted).name + "; got " + Text(x) + ".");
  };
  for (const Slot& slot : kSlots) {
    const Array& x = c.*slot.array;
    const bool mask = slot.array == &Call::drop_mask || slot.array == &Call::atten_mask;
    const bool stats = slot.array == &Call::softmax_max || slot.array == &Call::softmax_sum ||
                       slot.array == &Call::sink || slot.array == &Call::dsink;
    if (stats) same(slot.name, x, ACL_FLOAT);
    if (!mask && !stats && slot.array != &Call::pse) same(slot.name, x, dtype);
  }
  same("pse", c.pse, c.pse_type == 2 || c.pse_type == 3 ? ACL_FLOAT : dtype);
  same("drop_mask", c.drop_mask, ACL_UINT8);
  if (c.atten_mask.present() && c.atten_mask.dtype != ACL_UINT8 && c.atten_mask.dtype != ACL_BOOL)
    Refuse("atten_mask must be uint8 or bool; got " + Text(c.atten_mask) + ".");
}

}  // namespace

int64_t Array::elements() const {
  int64_t n = 1;
  for (int64_t size : dims) n *= size;
  return n;
}

size_t Array::bytes() const { return static_cast<size_t>(elements()) * Find(dtype).size; }

bool Aligned(const Array& array) {
  return array.bytes() == 0 || reinterpret_cast<uintptr_t>(array.data) % kTensorAlignment == 0;
}

void Validate(const Call& call) {
  for (const Slot& slot : kSlots) {
    if (Place(slot, call) == nullptr) continue;
    const Array& x = call.*slot.array;
    if (slot.required && !x.present()) Refuse(std::string(slot.name) + " is missing.");
    if (x.present() && x.data == nullptr && x.bytes() != 0) Refuse(std::string(slot.name) + " has no memory.");
    if (!Aligned(x)) {
      std::ostringstream text;
      text << slot.name << " must start at a multiple of " << kTensorAlignment << " bytes; its address is " << x.data
           << ".";
      Refuse(text.str());
    }
  }
  ValidateLayout(call);
  ValidateDTypes(call);
  ValidateShapes(call);
}

std::string Text(const Array& array) { return Find(array.dtype).name + Text(array.dims); }

std::string Text(const Call& c) {
  std::ostringstream text;
  text << (c.backward() ? "backward" : "forward") << ", layout " << c.input_layout;
  if (!c.softmax_layout.empty()) text << ", softmax_layout " << c.softmax_layout;
  for (const Slot& slot : kSlots)
    if (Place(slot, c) != nullptr && (c.*slot.array).present()) text << ", " << slot.name << " " << Text(c.*slot.array);
  text << ", head_num " << c.head_num << ", scale_value " << c.scale_value << ", keep_prob " << c.keep_prob
       << ", sparse_mode " << c.sparse_mode << ", pre_tokens " << c.pre_tokens << ", next_tokens " << c.next_tokens
       << ", inner_precise " << c.inner_precise << ", pse_type " << c.pse_type;
  if (c.q_start != 0 || c.kv_start != 0) text << ", q_start " << c.q_start << ", kv_start " << c.kv_start;
  if (!c.prefix.empty()) text << ", prefix " << Text(c.prefix);
  if (!c.actual_seq_qlen.empty()) text << ", actual_seq_qlen " << Text(c.actual_seq_qlen);
  if (!c.actual_seq_kvlen.empty()) text << ", actual_seq_kvlen " << Text(c.actual_seq_kvlen);
  return text.str();
}

}  // namespace jax_fa::cann
