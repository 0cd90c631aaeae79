// Where CANN's libraries are looked for, from the environment.
#pragma once

#include <string>
#include <vector>

namespace jax_fa::cann {

struct SearchPath {
  std::vector<std::string> directories;  // absolute, in order
  bool loader = true;                    // at the end, bare names: the loader's own search
  bool emulator = false;                 // JAX_FA_CANN_EMULATOR is set: that directory and nothing else

  std::string Text() const;  // for messages
};

// JAX_FA_CANN_EMULATOR, or else JAX_FA_CANN_PATH, ASCEND_CUSTOM_OPP_PATH, ASCEND_OPP_PATH, ASCEND_HOME_PATH.
SearchPath ReadSearchPath();

// The value of an environment variable, "" where it is not set.
std::string Environment(const char* name);

}  // namespace jax_fa::cann
