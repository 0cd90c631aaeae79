// Views of arrays as the kernels take them, made once for all executions of a compiled call: without addresses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

#include "call.h"
#include "operands.h"
#include "shapes.h"

namespace jax_fa {

// Builds views, without addresses, of arrays whose shapes were checked; owns their tables of batch offsets.
class Views {
 public:
  explicit Views(std::vector<int64_t> batch) : batch_(std::move(batch)) {
    for (int64_t size : batch_) entries_ *= static_cast<size_t>(size);
  }

  // An array stored canonically, `*#B` and then what `roles` names.
  View Canonical(const Shape& x, const char* roles) { return Stored(x, {}, roles); }

  // One that all batch entries have in common, and that has no dims of theirs: `roles` names all of its dims.
  View Shared(const Shape& x, const char* roles) {
    View v;
    v.dtype = ToDType(x.element);
    SetStrides(x, {}, 0, roles, &v);
    v.batch = tables_.emplace_back(entries_, 0).data();
    return v;
  }

  // An array stored in the order `axes`; `roles` names what follows `*#B`: h head, r row, c col, - anything else.
  View Stored(const Shape& x, std::string_view axes, const char* roles) {
    View v;
    v.dtype = ToDType(x.element);
    SetStrides(x, axes, batch_.size(), roles, &v);
    std::vector<int64_t>& offsets = tables_.emplace_back();
    offsets.reserve(entries_);
    offsets.push_back(0);
    // One dim after the other, innermost first: copies of what is there, further on.
    for (size_t i = batch_.size(); i-- > 0;) {
      const int64_t step = Stride(x, axes, i);
      const size_t inner = offsets.size();
      for (int64_t b = 1; b < batch_[i]; ++b)
        for (size_t j = 0; j < inner; ++j) offsets.push_back(offsets[j] + b * step);
    }
    v.batch = offsets.data();
    return v;
  }

 private:
  // Of canonical dim i, 0 where it broadcasts.
  static int64_t Stride(const Shape& x, std::string_view axes, size_t i) {
    const size_t axis = axes.empty() ? i : static_cast<size_t>(axes[i] - 'a');
    if (x.dims[axis] == 1) return 0;
    int64_t elements = 1;
    for (size_t inner = axis + 1; inner < x.rank; ++inner) elements *= x.dims[inner];
    return elements;
  }

  static void SetStrides(const Shape& x, std::string_view axes, size_t lead, const char* roles, View* v) {
    for (size_t i = 0; roles[i] != 0; ++i) {
      if (roles[i] == 'h') v->head = Stride(x, axes, lead + i);
      if (roles[i] == 'r') v->row = Stride(x, axes, lead + i);
      if (roles[i] == 'c') v->col = Stride(x, axes, lead + i);
    }
  }

  const std::vector<int64_t> batch_;
  size_t entries_ = 1;
  std::vector<std::vector<int64_t>> tables_;  // a table's own data stays where it is when this one grows
};

}  // namespace jax_fa
