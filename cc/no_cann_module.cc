// A system without the adapter to CANN.
#include "cann_module.h"

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace jax_fa {

void DefineCann(py::module_& module) {
  module.def("has_cann", [] { return false; });
  module.def("ascend_registrations", [](bool) { return py::dict(); }, py::arg("host"));
  module.def("cann_library", [] {
    py::dict found;
    found["error"] = "this build of jax_fa has no adapter to CANN, which exists for Linux only";
    for (const char* file : {"long", "short", "runtime", "nnopbase"}) found[file] = py::none();
    found["emulator"] = false;
    found["functions"] = py::list();
    found["notes"] = py::list();
    return found;
  });
  module.def("cann_release", [] {});
}

}  // namespace jax_fa
