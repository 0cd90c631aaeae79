// The Python module jax_fa._native: FFI handlers, and what the processor offers.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "ascend_ffi.h"
#include "cann/adapter.h"
#include "cann/library.h"
#include "cpu/kernel.h"
#include "cpu_ffi.h"

namespace py = pybind11;

namespace {

py::object PathOrNone(const std::string& path) { return path.empty() ? py::object(py::none()) : py::object(py::str(path)); }

py::dict CannLibrary() {
  const jax_fa::cann::Library* library;
  {
    const py::gil_scoped_release release;
    library = &jax_fa::cann::Library::Get();
  }
  py::list functions;
  for (int f = 0; f < jax_fa::cann::kFunctions; ++f)
    if (library->functions[f]) functions.append(jax_fa::cann::kFunctionTable[f].phase2);
  py::dict found;
  found["error"] = PathOrNone(library->error);
  found["long"] = PathOrNone(library->long_ops);
  found["short"] = PathOrNone(library->short_ops);
  found["runtime"] = PathOrNone(library->runtime);
  found["nnopbase"] = PathOrNone(library->nnopbase);
  found["emulator"] = library->emulator;
  found["functions"] = functions;
  found["notes"] = py::cast(library->notes);
  return found;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.def("registrations", [] {
    py::dict handlers;
    handlers["jax_fa_cpu_forward"] = py::capsule(reinterpret_cast<void*>(jax_fa::CpuForward));
    handlers["jax_fa_cpu_backward"] = py::capsule(reinterpret_cast<void*>(jax_fa::CpuBackward));
    return handlers;
  });
  // For arrays on a device, or for arrays on the host, which only the emulator takes. The same targets.
  module.def("ascend_registrations", [](bool host) {
    py::dict handlers;
    handlers["jax_fa_ascend_forward"] =
        py::capsule(reinterpret_cast<void*>(host ? jax_fa::AscendHostForward : jax_fa::AscendForward));
    handlers["jax_fa_ascend_backward"] =
        py::capsule(reinterpret_cast<void*>(host ? jax_fa::AscendHostBackward : jax_fa::AscendBackward));
    return handlers;
  }, py::arg("host"));
  // What of CANN was found; loads it. Where nothing can be used, "error" says what was searched.
  module.def("cann_library", CannLibrary);
  // Frees our own streams and all workspaces that are kept for later calls; nothing may be running.
  module.def("cann_release", [] {
    jax_fa::cann::Status status;
    {
      const py::gil_scoped_release release;
      status = jax_fa::cann::ReleaseAll();
    }
    if (!status.ok()) throw std::runtime_error(status.message);
  });
  // Instruction sets compiled in, best first, and whether this machine has each.
  module.def("instruction_sets", [] {
    int count = 0;
    const jax_fa::Kernels* kernels = jax_fa::AllKernels(&count);
    py::dict sets;
    for (int i = 0; i < count; ++i) sets[kernels[i].name] = kernels[i].supported();
    return sets;
  });
  // The set that runs, or None where JAX_FA_CPU_ISA names one that this machine lacks.
  module.def("chosen_instruction_set", []() -> py::object {
    const jax_fa::Kernels* chosen = jax_fa::ChosenKernels();
    return chosen == nullptr ? py::object(py::none()) : py::object(py::str(chosen->name));
  });
  // For benchmarks: runs the multiply-adds that one instruction set uses for a dtype, alone, on this thread; returns
  // how many operations.
  module.def("fma_operations", [](const std::string& isa, int64_t iterations, bool bf16) {
    int count = 0;
    const jax_fa::Kernels* kernels = jax_fa::AllKernels(&count);
    for (int i = 0; i < count; ++i) {
      if (isa != kernels[i].name || !kernels[i].supported()) continue;
      float sink[3] = {0.999f, 0.001f, 0.0f};
      const py::gil_scoped_release release;
      return kernels[i].fma(iterations, bf16, sink);
    }
    throw py::value_error("isa must be an instruction set that this machine has; got " + isa);
  });
}
