// Which of CANN's functions serves a call, from what the library exports.
#pragma once

#include "cann/call.h"
#include "cann/library.h"

namespace jax_fa::cann {

// Throws Failure where none does.
Function Choose(const Library& library, const Call& call);

// The call as the short op takes it: BSH with rank 3.
Call AsShort(const Call& call);

}  // namespace jax_fa::cann
