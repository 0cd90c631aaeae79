// The arrays of a call whose keys lie in pages, and the check of what they are, on plain shapes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "operands.h"
#include "shapes.h"

namespace jax_fa {

// The bits of `present`: arrays that may be absent. backends/cpu.py sends the same.
enum PagedBit : uint32_t {
  kPagedValue = 1,  // without it, values are the first elements of keys
  kPagedKeyScale = 2,
  kPagedValueScale = 4,
  kPagedScale = 8,
  kPagedSoftCap = 16,
};

constexpr uint32_t kPageElements = kFloats | Bit(Element::kI8) | Bit(Element::kF8E4M3) | Bit(Element::kF8E5M2);

// `sizes`: B batch entries, S rows of each, N query and K key heads, D V head_dim, P pages, T keys of a page, M pages of a
// batch entry; in lower case, 1 does too. `bit`: that of `present` where it may be absent, else 0.
struct PagedForm {
  const char *name, *sizes;
  uint32_t elements, bit;
};

enum PagedArg : uint8_t {
  kPagedQuery,
  kPagedKeys,
  kPagedValues,
  kPagedTable,
  kPagedLengths,
  kPagedLower,
  kPagedUpper,
  kPagedKeyFactors,
  kPagedValueFactors,
  kPagedLogitFactor,
  kPagedCap,
  kPagedArgs
};
constexpr PagedForm kPagedForms[kPagedArgs] = {
    {"query", "BSND", kFloats, 0},
    {"key_pages", "PTKD", kPageElements, 0},
    {"value_pages", "PTKV", kPageElements, kPagedValue},
    {"page_table", "BM", kInt, 0},
    {"lengths", "B", kInt, 0},
    {"lower", "BS", kInt, 0},
    {"upper", "BS", kInt, 0},
    {"key_scale", "ptk", kFloat, kPagedKeyScale},
    {"value_scale", "ptk", kFloat, kPagedValueScale},
    {"scale", "b", kFloat, kPagedScale},
    {"soft_cap", "b", kFloat, kPagedSoftCap},
};
constexpr PagedForm kPagedResults[] = {
    {"out", "BSNV", kFloats, 0}, {"softmax max", "BNS", kFloat, 0}, {"softmax sum", "BNS", kFloat, 0}};
constexpr size_t kPagedResultCount = sizeof(kPagedResults) / sizeof(kPagedResults[0]);

struct PagedSizes {
  int64_t B = 0, Sq = 0, N = 0, K = 0, D = 0, Dv = 0, count = 0, size = 0, each = 0;

  int64_t Of(char letter) const {  // of PagedForm
    switch (letter) {
      case 'B':
      case 'b': return B;
      case 'S': return Sq;
      case 'N': return N;
      case 'K':
      case 'k': return K;
      case 'D': return D;
      case 'V': return Dv;
      case 'P':
      case 'p': return count;
      case 'T':
      case 't': return size;
      default: return each;
    }
  }
};

class PagedCheck {
 public:
  // Throws BadCall, which names the array, what it is and what it should be.
  static PagedSizes Of(uint32_t present, const std::vector<Shape>& args, const std::vector<Shape>& rets) {
    constexpr uint32_t kEvery = 2 * kPagedSoftCap - 1;
    if ((present & ~kEvery) != 0) throw BadCall("`present` has bits for arrays that there are not");
    std::vector<const PagedForm*> forms;
    for (const PagedForm& form : kPagedForms)
      if (form.bit == 0 || (present & form.bit) != 0) forms.push_back(&form);
    Count("arguments", args.size(), forms.size());
    Count("results", rets.size(), kPagedResultCount);
    const Shape &query = args[0], &keys = args[1], &table = args[(present & kPagedValue) != 0 ? 3 : 2], &out = rets[0];
    for (const auto& [name, x, rank] : {Ranked{"query", query, 4}, Ranked{"key_pages", keys, 4},
                                        Ranked{"page_table", table, 2}, Ranked{"out", out, 4}})
      if (x.rank != rank)
        throw BadCall(std::string(name) + " is " + ShapeText(x) + "; expected rank " + std::to_string(rank));
    PagedSizes s;
    s.B = query.dims[0], s.Sq = query.dims[1], s.N = query.dims[2], s.D = query.dims[3];
    s.count = keys.dims[0], s.size = keys.dims[1], s.K = keys.dims[2], s.Dv = out.dims[3], s.each = table.dims[1];
    if (s.D < 1 || s.count < 1 || s.size < 1)
      throw BadCall("key_pages is " + ShapeText(keys) + "; expected a page, a key and a head_dim of at least 1");
    if (s.K < 1 || s.N % s.K != 0)
      throw BadCall("key_pages is " + ShapeText(keys) + ", that is " + std::to_string(s.K) +
                    " heads; expected a divisor of " + std::to_string(s.N));
    if ((present & kPagedValue) == 0 && s.Dv > s.D)
      throw BadCall("out is " + ShapeText(out) + "; expected at most key_pages' " + std::to_string(s.D) + " elements");
    for (size_t i = 0; i < forms.size(); ++i) Check(*forms[i], s, args[i]);
    for (size_t i = 0; i < kPagedResultCount; ++i) Check(kPagedResults[i], s, rets[i]);
    if ((present & kPagedValue) != 0 && args[2].element != keys.element)
      throw BadCall("value_pages is " + ShapeText(args[2]) + "; expected key_pages' " + ElementName(keys.element));
    return s;
  }

 private:
  struct Ranked {
    const char* name;
    const Shape& x;
    size_t rank;
  };

  static void Count(const char* what, size_t got, size_t want) {
    if (got != want)
      throw BadCall("there are " + std::to_string(got) + " " + what + "; expected " + std::to_string(want));
  }

  static void Check(const PagedForm& form, const PagedSizes& s, const Shape& x) {
    bool fits = (form.elements & Bit(x.element)) != 0 && x.rank == std::string(form.sizes).size();
    std::vector<std::string> dims;
    for (size_t i = 0; form.sizes[i] != 0; ++i) {
      const char letter = form.sizes[i];
      const int64_t size = s.Of(letter);
      const bool may_be_one = letter >= 'a';
      dims.push_back(std::to_string(size) + (may_be_one && size != 1 ? " or 1" : ""));
      fits = fits && (x.dims[i] == size || (may_be_one && x.dims[i] == 1));
    }
    if (!fits) Differs(form.name, x, form.elements, dims);
  }
};

}  // namespace jax_fa
