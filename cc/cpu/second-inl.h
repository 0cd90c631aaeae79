#pragma once

#include "call.h"
#include "cpu/simd-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

inline void SecondAs(const Call&, const Runner&) {}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
