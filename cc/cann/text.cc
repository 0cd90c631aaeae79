#include "cann/text.h"

#include <cstddef>
#include <cstdint>

namespace jax_fa::cann {
namespace {

constexpr const char* kReplacement = "\xef\xbf\xbd";

// Bytes of the character of UTF-8 at `at`; 0 if there is none.
size_t CharacterAt(const std::string& bytes, size_t at) {
  // Of each length: the fixed bits of the first byte, which bits these are, and the least code point.
  struct Form {
    uint32_t lead, mask, least;
  };
  constexpr Form kForms[] = {{0x00, 0x80, 0}, {0xc0, 0xe0, 0x80}, {0xe0, 0xf0, 0x800}, {0xf0, 0xf8, 0x10000}};
  const uint32_t lead = static_cast<unsigned char>(bytes[at]);
  size_t size = 0;
  for (const Form& form : kForms) {
    ++size;
    if ((lead & form.mask) != form.lead) continue;
    uint32_t point = lead & ~form.mask;
    for (size_t i = 1; i < size; ++i) {
      if (at + i >= bytes.size()) return 0;
      const uint32_t next = static_cast<unsigned char>(bytes[at + i]);
      if ((next & 0xc0) != 0x80) return 0;
      point = point << 6 | (next & 0x3f);
    }
    const bool surrogate = point >= 0xd800 && point <= 0xdfff;
    return point < form.least || point > 0x10ffff || surrogate ? 0 : size;
  }
  return 0;
}

}  // namespace

std::string Readable(const std::string& bytes) {
  std::string text;
  for (size_t at = 0; at < bytes.size();) {
    const size_t size = CharacterAt(bytes, at);
    if (size > 0) {
      text.append(bytes, at, size);
    } else {
      text += kReplacement;
    }
    at += size > 0 ? size : 1;
  }
  return text;
}

}  // namespace jax_fa::cann
