// Flash attention through CANN's two-phase functions.
#pragma once

#include <cstddef>
#include <functional>

#include "cann/call.h"
#include "cann/status.h"

namespace jax_fa::cann {

// Memory of the framework for one call: bytes, alignment -> address, or null. It must stay valid for work queued on the
// call's stream.
using Scratch = std::function<void*(size_t bytes, size_t alignment)>;

// Queues the call on `stream` and returns: never waits for the device. The call's host data may go at once; its device
// memory must outlive the work. `device` is what a thread without a device is given.
Status Enqueue(const Call& call, aclrtStream stream, int device, const Scratch& scratch);

// Runs the call on a stream of the pool and waits for it. For the emulator, whose device memory is host memory.
Status RunAndWait(const Call& call);

// Waits for the calls of RunAndWait, destroys their streams and frees all workspaces. Nothing that Enqueue queued may still
// use them.
Status ReleaseAll();

}  // namespace jax_fa::cann
