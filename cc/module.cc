// The Python module jax_fa._native: FFI handlers, and what the processor offers.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "cann_module.h"
#include "cpu/kernel.h"
#include "cpu_ffi.h"
#include "operands.h"

namespace py = pybind11;

namespace {

py::tuple DifferentiableNames() {
  py::list names;
  for (const jax_fa::Differentiable& x : jax_fa::kDifferentiable) names.append(jax_fa::kForms[x.operand].name);
  return py::tuple(names);
}

py::dict BitsOfSaved() {
  py::dict bits;
  for (const jax_fa::SavedArray& x : jax_fa::kSavedArrays)
    if (x.bit != 0) bits[x.name] = x.bit;
  return bits;
}

// The bits of `saved` by name.
py::dict TangentBits() {
  py::dict bits;
  for (size_t i = 0; i < jax_fa::kDifferentiables; ++i)
    bits[jax_fa::kForms[jax_fa::kDifferentiable[i].operand].name] = jax_fa::TangentBit(i);
  return bits;
}

py::dict UnwantedBits() {
  py::dict bits;
  for (size_t i = 0; i < jax_fa::kDifferentiables; ++i)
    bits[jax_fa::kForms[jax_fa::kDifferentiable[i].operand].name] = jax_fa::UnwantedBit(i);
  for (const jax_fa::TangentResult& x : jax_fa::kTangentResults) bits[x.cotangent] = x.unwanted;
  return bits;
}

template <typename Names>
py::tuple NamesOf(const Names& table) {
  py::list names;
  for (const auto& row : table) names.append(row.name);
  return py::tuple(names);
}

// Four streams at a time, which the processor's prefetching follows: with one it reads a sixth less.
uint64_t ReadAll(const uint64_t* x, int64_t size) {
  const int64_t quarter = size / 4;
  uint64_t sum = 0;
  for (int64_t i = 0; i < quarter; ++i) sum += x[i] ^ x[i + quarter] ^ x[i + 2 * quarter] ^ x[i + 3 * quarter];
  for (int64_t i = 4 * quarter; i < size; ++i) sum += x[i];
  return sum;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  // For Python to compare with its own version, and with what it sends: a number that changes with what names do not
  // show (see operands.h), ...
  module.def("version", [] { return JAX_FA_VERSION; });
  module.def("abi", [] { return jax_fa::kAbi; });
  // ... the operands in the order of their arrays: operand i is given where bit i of `present` is set.
  module.def("operand_names", [] { return NamesOf(jax_fa::kForms); });
  // ... those with gradients and tangents, in the order of both.
  module.def("differentiable_operands", DifferentiableNames);
  // ... what the second gives: the gradients of those, then the gradients by the cotangents.
  module.def("second_names", [] {
    py::list names;
    for (const auto& [name, bit] : UnwantedBits()) names.append(name);
    return py::tuple(names);
  });
  // ... the arrays that follow the operands of a derivative, in their order. Then, by name, the bits of `saved`: of each
  // of them that may be absent, of each tangent that is given, and of each gradient that is not wanted.
  module.def("saved_names", [] { return NamesOf(jax_fa::kSavedArrays); });
  module.def("saved_bits", BitsOfSaved);
  module.def("tangent_bits", TangentBits);
  module.def("unwanted_bits", UnwantedBits);
  // What to register with XLA: targets by name, each with its stages, ...
  module.def("registrations", [] {
    py::dict targets;
    for (const jax_fa::FfiTarget* x : {&jax_fa::kCpuForward, &jax_fa::kCpuBackward, &jax_fa::kCpuJvp,
                                       &jax_fa::kCpuTangent, &jax_fa::kCpuSecond, &jax_fa::kCpuPaged}) {
      py::dict stages;
      stages["instantiate"] = py::capsule(reinterpret_cast<void*>(x->instantiate));
      stages["execute"] = py::capsule(reinterpret_cast<void*>(x->execute));
      targets[x->name] = stages;
    }
    return targets;
  });
  // ... and, before those, the types of what they keep.
  module.def("registered_types", [] {
    py::dict compiled_call, types;
    compiled_call["type_id"] = py::capsule(jax_fa::CompiledCallTypeId());
    compiled_call["type_info"] = py::capsule(jax_fa::CompiledCallTypeInfo());
    types["jax_fa_cpu_compiled_call"] = compiled_call;
    return types;
  });
  jax_fa::DefineCann(module);
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
  // What the tiles of the set that runs are made from, and their sizes; None as above.
  module.def("cpu_tuning", []() -> py::object {
    const jax_fa::Kernels* chosen = jax_fa::ChosenKernels();
    return chosen == nullptr ? py::object(py::none()) : py::object(py::str(jax_fa::DescribeTiles(*chosen)));
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
  // ... and reads all of an array, on this thread.
  module.def("read_memory", [](const py::array_t<uint64_t, py::array::c_style>& x) {
    const uint64_t* data = x.data();
    const py::ssize_t size = x.size();
    const py::gil_scoped_release release;
    return ReadAll(data, size);
  });
}
