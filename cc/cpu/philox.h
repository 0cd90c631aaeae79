// Keep bits of dropout: Philox4x32-10 in the layout that jax_fa/dropout.py defines.
//
// A row's bits come in blocks of 128 columns, made of 16 counters of four words. Columns 32 b + 8 w + 2 i + h are
// the 16-bit halves h of word w of counter 4 b + i. KeepColumns of each instruction set fills `keep`: bit c % 32 of
// keep[c / 32] is 1 where column `block * kKeepColumns + c` of a row is kept, that is where its half is below the
// threshold.
#pragma once

#include <stdint.h>

namespace jax_fa {

constexpr int64_t kKeepColumns = 128;
constexpr uint32_t kMul0 = 0xD2511F53u, kMul1 = 0xCD9E8D57u, kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

}  // namespace jax_fa
