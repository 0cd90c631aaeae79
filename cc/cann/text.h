// Text of others, such as CANN's messages and the names of files.
#pragma once

#include <string>

namespace jax_fa::cann {

// The bytes as UTF-8, which XLA and Python require: what is not, such as another encoding or the end of a text that was cut within
// a character, becomes U+FFFD.
std::string Readable(const std::string& bytes);

}  // namespace jax_fa::cann
