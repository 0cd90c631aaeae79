// What the Python module offers of CANN.
#pragma once

namespace pybind11 {
class module_;
}

namespace jax_fa {

// Adds has_cann, ascend_registrations, cann_library and cann_release to the module. Where the adapter is not built they
// say so: False, no handlers, an error text, nothing to free.
void DefineCann(pybind11::module_& module);

}  // namespace jax_fa
