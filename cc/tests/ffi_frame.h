// A call as XLA hands it to an FFI handler, by the public C interface, and what XLA does for a handler.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpu_ffi.h"
#include "numbers.h"
#include "xla/ffi/api/c_api.h"

// What the interface leaves open.
struct XLA_FFI_Error {
  std::string message;
};
struct XLA_FFI_ExecutionContext {
  int64_t threads;
  void* state;  // what the handler made of the compiled call
};

namespace jax_fa_test {

constexpr const char* kSuccess = "computed";

// Any that there is.
inline XLA_FFI_DataType AnyType(Random& random) {
  int64_t type = 0;
  do type = random.Below(XLA_FFI_DataType_F8E8M0FNU + 1);
  while (type == 13 || type == 14);
  return static_cast<XLA_FFI_DataType>(type);
}

// An array, with exactly the bytes that its shape takes.
struct FrameArray {
  std::string name;
  XLA_FFI_DataType dtype = XLA_FFI_DataType_F32;
  std::vector<int64_t> dims;
  size_t bytes = 0;
  std::unique_ptr<char, decltype(&std::free)> data{nullptr, &std::free};

  void Allocate() {
    bytes = ItemSize();
    for (int64_t size : dims) bytes *= static_cast<size_t>(size);
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes) != 0) std::abort();
    data.reset(static_cast<char*>(memory));
  }

 private:
  size_t ItemSize() const {
    switch (dtype) {
      case XLA_FFI_DataType_C128: return 16;
      case XLA_FFI_DataType_F64:
      case XLA_FFI_DataType_S64:
      case XLA_FFI_DataType_U64:
      case XLA_FFI_DataType_C64: return 8;
      case XLA_FFI_DataType_F32:
      case XLA_FFI_DataType_S32:
      case XLA_FFI_DataType_U32: return 4;
      case XLA_FFI_DataType_F16:
      case XLA_FFI_DataType_BF16:
      case XLA_FFI_DataType_S16:
      case XLA_FFI_DataType_U16: return 2;
      default: return 1;
    }
  }
};

class Frame {
 public:
  std::vector<FrameArray> args, rets;

  static void Add(std::vector<FrameArray>& list, std::string name, XLA_FFI_DataType dtype, std::vector<int64_t> dims) {
    FrameArray x;
    x.name = std::move(name), x.dtype = dtype, x.dims = std::move(dims);
    list.push_back(std::move(x));
  }

  // --- the attribute `problem`

  void Set(const std::string& name, uint32_t x) { SetScalar(name, XLA_FFI_DataType_U32, x); }
  void Set(const std::string& name, uint8_t x) { SetScalar(name, XLA_FFI_DataType_U8, x); }
  void Set(const std::string& name, float x) {
    uint32_t bits = 0;
    std::memcpy(&bits, &x, sizeof bits);
    SetScalar(name, XLA_FFI_DataType_F32, bits);
  }
  void Set(const std::string& name, const std::string& text) {
    Attribute& x = Of(name);
    x.type = XLA_FFI_AttrType_STRING, x.text = text;
  }
  uint32_t Unsigned(const std::string& name) { return static_cast<uint32_t>(Of(name).value); }

  // Of another type, away, under another name, or one more.
  void SpoilAttribute(Random& random) {
    if (attributes_.empty()) return;
    const auto at = static_cast<size_t>(random.Below(static_cast<int64_t>(attributes_.size())));
    Attribute& x = attributes_[at];
    switch (random.Below(5)) {
      case 0: x.dtype = AnyType(random); return;
      case 1:
        x.type = static_cast<XLA_FFI_AttrType>(random.OneIn(2) ? XLA_FFI_AttrType_STRING : XLA_FFI_AttrType_SCALAR);
        return;
      case 2: attributes_.erase(attributes_.begin() + static_cast<std::ptrdiff_t>(at)); return;
      case 3: x.name += "_"; return;
      default: with_problem_ = random.OneIn(2); Set("one_more", uint32_t{1});
    }
  }

  // Compiles the call and executes it twice, as a program in a loop. Returns kSuccess, or the text of the error.
  std::string Call(const jax_fa::FfiTarget& target, int64_t threads) {
    XLA_FFI_ExecutionContext context{threads, nullptr};
    XLA_FFI_CallFrame frame = {};
    frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
    frame.api = Api(), frame.ctx = &context, frame.stage = XLA_FFI_ExecutionStage_INSTANTIATE;
    Dictionary problem(attributes_);
    const char* const name = "problem";
    XLA_FFI_ByteSpan span{name, std::strlen(name)};
    XLA_FFI_ByteSpan* names[] = {&span};
    XLA_FFI_AttrType types[] = {XLA_FFI_AttrType_DICTIONARY};
    void* values[] = {&problem.attributes};
    frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr, with_problem_ ? 1 : 0, types, names, values};
    if (target.instantiate != nullptr) {
      const std::unique_ptr<XLA_FFI_Error> error(target.instantiate(&frame));
      if (error) return error->message;
      problem.Forget();  // it is gone when the call is executed, which does not read it
    }
    std::string text = kSuccess;
    for (int i = 0; i < 2 && text == kSuccess; ++i) text = Execute(target, frame);
    if (context.state != nullptr)
      static_cast<const XLA_FFI_TypeInfo*>(jax_fa::CompiledCallTypeInfo())->deleter(context.state);
    return text;
  }

  std::string Text() const {
    std::string text;
    for (const auto* list : {&args, &rets}) {
      text += list == &args ? "" : " -> ";
      for (const FrameArray& x : *list) {
        text += x.name + " " + std::to_string(static_cast<int>(x.dtype)) + "(";
        for (int64_t size : x.dims) text += std::to_string(size) + ",";
        text += ") ";
      }
    }
    for (const Attribute& x : attributes_)
      text += x.name + "=" + (x.text.empty() ? std::to_string(x.value) : x.text) + " ";
    return text;
  }

 private:
  struct Attribute {
    std::string name;
    XLA_FFI_AttrType type = XLA_FFI_AttrType_SCALAR;
    XLA_FFI_DataType dtype = XLA_FFI_DataType_U32;
    uint64_t value = 0;
    std::string text;
  };

  std::string Execute(const jax_fa::FfiTarget& target, XLA_FFI_CallFrame frame) {
    Buffers arguments(args), results(rets);
    std::vector<XLA_FFI_ArgType> arg_types(args.size(), XLA_FFI_ArgType_BUFFER);
    std::vector<XLA_FFI_RetType> ret_types(rets.size(), XLA_FFI_RetType_BUFFER);
    frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
    frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(args.size()), arg_types.data(),
                  arguments.pointers.data()};
    frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(rets.size()), ret_types.data(),
                  results.pointers.data()};
    const std::unique_ptr<XLA_FFI_Error> error(target.execute(&frame));
    return error ? error->message : kSuccess;
  }

  struct Buffers {
    std::vector<XLA_FFI_Buffer> buffers;
    std::vector<void*> pointers;

    explicit Buffers(std::vector<FrameArray>& list) {
      for (FrameArray& x : list)
        buffers.push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, x.dtype, x.data.get(),
                           static_cast<int64_t>(x.dims.size()), x.dims.data()});
      for (XLA_FFI_Buffer& x : buffers) pointers.push_back(&x);
    }
  };

  // Names are sorted, as XLA does.
  struct Dictionary {
    XLA_FFI_Attrs attributes = {};
    std::vector<Attribute> list;
    std::deque<XLA_FFI_ByteSpan> spans;
    std::deque<XLA_FFI_Scalar> scalars;
    std::vector<XLA_FFI_ByteSpan*> names;
    std::vector<XLA_FFI_AttrType> types;
    std::vector<void*> values;

    explicit Dictionary(std::vector<Attribute> given) : list(std::move(given)) {
      std::sort(list.begin(), list.end(), [](const Attribute& a, const Attribute& b) { return a.name < b.name; });
      for (Attribute& x : list) {
        names.push_back(&spans.emplace_back(XLA_FFI_ByteSpan{x.name.data(), x.name.size()}));
        types.push_back(x.type);
        if (x.type == XLA_FFI_AttrType_STRING) {
          values.push_back(&spans.emplace_back(XLA_FFI_ByteSpan{x.text.data(), x.text.size()}));
        } else {
          values.push_back(&scalars.emplace_back(XLA_FFI_Scalar{x.dtype, &x.value}));
        }
      }
      attributes = {XLA_FFI_Attrs_STRUCT_SIZE,
                    nullptr,
                    static_cast<int64_t>(list.size()),
                    types.data(),
                    names.data(),
                    values.data()};
    }

    void Forget() {
      for (Attribute& x : list) x.text.assign(x.text.size(), '?');
    }
  };

  void SetScalar(const std::string& name, XLA_FFI_DataType dtype, uint64_t value) {
    Attribute& x = Of(name);
    x.type = XLA_FFI_AttrType_SCALAR, x.dtype = dtype, x.value = value;
  }

  Attribute& Of(const std::string& name) {
    for (Attribute& x : attributes_)
      if (x.name == name) return x;
    attributes_.emplace_back();
    attributes_.back().name = name;
    return attributes_.back();
  }

  static const XLA_FFI_Api* Api() {
    static const XLA_FFI_Api kApi = [] {
      XLA_FFI_Api api = {};
      api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
      api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
      api.XLA_FFI_Error_Create = [](XLA_FFI_Error_Create_Args* x) { return new XLA_FFI_Error{x->message}; };
      api.XLA_FFI_Error_GetMessage = [](XLA_FFI_Error_GetMessage_Args* x) { x->message = x->error->message.c_str(); };
      api.XLA_FFI_Error_Destroy = [](XLA_FFI_Error_Destroy_Args* x) { delete x->error; };
      api.XLA_FFI_ThreadPool_NumThreads = [](XLA_FFI_ThreadPool_NumThreads_Args* x) -> XLA_FFI_Error* {
        *x->num_threads = x->ctx->threads;
        return nullptr;
      };
      api.XLA_FFI_State_Set = [](XLA_FFI_State_Set_Args* x) -> XLA_FFI_Error* {
        x->ctx->state = x->state;
        return nullptr;
      };
      api.XLA_FFI_State_Get = [](XLA_FFI_State_Get_Args* x) -> XLA_FFI_Error* {
        x->state = x->ctx->state;
        return nullptr;
      };
      // (A helper that has done all before its caller begins.)
      api.XLA_FFI_ThreadPool_Schedule = [](XLA_FFI_ThreadPool_Schedule_Args* x) -> XLA_FFI_Error* {
        x->task(x->data);
        return nullptr;
      };
      return api;
    }();
    return &kApi;
  }

  std::vector<Attribute> attributes_;
  bool with_problem_ = true;
};

}  // namespace jax_fa_test
