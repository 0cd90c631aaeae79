#include "cann_module.h"

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "ascend_ffi.h"
#include "cann/adapter.h"
#include "cann/library.h"
#include "cann/text.h"

namespace py = pybind11;

namespace jax_fa {
namespace {

py::object TextOrNone(const std::string& text) {
  return text.empty() ? py::object(py::none()) : py::object(py::str(cann::Readable(text)));
}

py::dict CannLibrary() {
  const cann::Library* library = nullptr;
  {
    const py::gil_scoped_release release;
    library = &cann::Library::Get();
  }
  py::list functions, notes;
  for (int f = 0; f < cann::kFunctions; ++f)
    if (library->functions[f]) functions.append(cann::kFunctionTable[f].phase2);
  py::dict found;
  found["error"] = TextOrNone(library->error);
  found["long"] = TextOrNone(library->long_ops);
  found["short"] = TextOrNone(library->short_ops);
  found["runtime"] = TextOrNone(library->runtime);
  found["nnopbase"] = TextOrNone(library->nnopbase);
  found["emulator"] = library->emulator;
  found["functions"] = functions;
  for (const std::string& note : library->notes) notes.append(cann::Readable(note));
  found["notes"] = notes;
  return found;
}

py::dict AscendRegistrations(bool host) {
  py::dict handlers;
  handlers["jax_fa_ascend_forward"] = py::capsule(reinterpret_cast<void*>(host ? AscendHostForward : AscendForward));
  handlers["jax_fa_ascend_backward"] = py::capsule(reinterpret_cast<void*>(host ? AscendHostBackward : AscendBackward));
  return handlers;
}

void CannRelease() {
  cann::Status status;
  {
    const py::gil_scoped_release release;
    status = cann::ReleaseAll();
  }
  if (!status.ok()) throw std::runtime_error(status.message);
}

}  // namespace

void DefineCann(py::module_& module) {
  // Whether the adapter to CANN is built in.
  module.def("has_cann", [] { return true; });
  // For arrays on a device, or for arrays on the host, which only the emulator takes. The same targets.
  module.def("ascend_registrations", AscendRegistrations, py::arg("host"));
  // What of CANN was found; loads it. Where nothing can be used, "error" says what was searched.
  module.def("cann_library", CannLibrary);
  // Frees our own streams and all workspaces that are kept for later calls; nothing may be running.
  module.def("cann_release", CannRelease);
}

}  // namespace jax_fa
