// The Python module jax_fa._native: FFI handlers, and what the processor offers.

#include <pybind11/pybind11.h>

#include <string>

#include "cpu/kernel.h"
#include "cpu_ffi.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, module) {
  module.def("registrations", [] {
    py::dict handlers;
    handlers["jax_fa_cpu_forward"] = py::capsule(reinterpret_cast<void*>(jax_fa::CpuForward));
    handlers["jax_fa_cpu_backward"] = py::capsule(reinterpret_cast<void*>(jax_fa::CpuBackward));
    return handlers;
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
