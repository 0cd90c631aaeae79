// What the XLA FFI handlers have in common: arrays, the kernels that run, and errors.
#pragma once

#include <cstring>
#include <exception>
#include <new>
#include <string>

#include "cpu/kernel.h"
#include "operands.h"
#include "shapes.h"
#include "xla/ffi/api/ffi.h"

namespace jax_fa {

namespace ffi = xla::ffi;

inline Element ToElement(ffi::DataType t) {
  switch (t) {
    case ffi::F32: return Element::kF32;
    case ffi::BF16: return Element::kBF16;
    case ffi::F16: return Element::kF16;
    case ffi::S32: return Element::kI32;
    case ffi::U32: return Element::kU32;
    case ffi::U8: return Element::kU8;
    case ffi::PRED: return Element::kBool;
    case ffi::S8: return Element::kI8;
    case ffi::F8E4M3FN: return Element::kF8E4M3;
    case ffi::F8E5M2: return Element::kF8E5M2;
    default: return Element::kOther;
  }
}

inline Shape ShapeOf(const ffi::AnyBuffer& x) {
  return {ToElement(x.element_type()), x.dimensions().begin(), x.dimensions().size()};
}

inline ffi::AnyBuffer Arg(const ffi::RemainingArgs& args, size_t i) {
  auto x = args.get<ffi::AnyBuffer>(i);
  if (!x.has_value()) throw BadCall(x.error().message());
  return *x;
}

inline ffi::AnyBuffer Ret(const ffi::RemainingRets& rets, size_t i) {
  auto x = rets.get<ffi::AnyBuffer>(i);
  if (!x.has_value()) throw BadCall(x.error().message());
  return **x;
}

inline const Kernels& Chosen() {
  const Kernels* kernels = ChosenKernels();
  if (kernels == nullptr) throw BadCall("JAX_FA_CPU_ISA names no instruction set that this machine has");
  if (!CachesAreValid())
    throw BadCall(
        "JAX_FA_CPU_CACHES must be three numbers of bytes, of the first, second and third cache: 32768,524288,16777216");
  return *kernels;
}

template <typename Fn>
ffi::Error Reported(const Fn& fn) {
  try {
    fn();
    return ffi::Error::Success();
  } catch (const BadCall& e) {
    return ffi::Error::InvalidArgument(e.what());
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jax_fa cpu: out of memory for scratch");
  } catch (const std::exception& e) {
    return ffi::Error::Internal(std::string("jax_fa cpu: ") + e.what());
  } catch (...) {
    return ffi::Error::Internal("jax_fa cpu: unknown failure");
  }
}

inline void Clear(const ffi::AnyBuffer& x) {
  if (x.size_bytes() > 0) std::memset(x.untyped_data(), 0, x.size_bytes());
}

// No exception may leave a handler, and the texts of errors take memory of their own.
template <typename Fn>
ffi::Error Guard(const Fn& fn) {
  try {
    return Reported(fn);
  } catch (...) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, std::string());
  }
}

}  // namespace jax_fa
