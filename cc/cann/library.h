// CANN as this process found it: loaded once, on first use, never unloaded.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "cann/abi.h"
#include "cann/functions.h"

namespace jax_fa::cann {

// The two phases of an op, from one file.
struct Resolved {
  void* phase1 = nullptr;
  Phase2 phase2 = nullptr;
  std::string file;

  explicit operator bool() const { return phase1 != nullptr; }
};

struct Library {
  std::string error;                // empty if it can be used
  std::vector<std::string> notes;   // files that were passed over, and why
  std::string searched;             // directories, in order
  std::string runtime, nnopbase;    // files of the runtime pair, "" where absent
  std::string long_ops, short_ops;  // the first files with ops of each ABI, "" where absent
  bool emulator = false;            // the runtime is the emulator: device memory is host memory
  bool prefer_short = false;        // JAX_FA_CANN_ABI=short
  Api api;
  std::array<Resolved, kFunctions> functions;

  const Resolved& operator[](Function function) const { return functions[function]; }

  // That no library has the functions `names`, and what to do.
  std::string Missing(const std::string& names) const;

  static const Library& Get();
  static bool Loaded();  // whether Get was ever called
};

}  // namespace jax_fa::cann
