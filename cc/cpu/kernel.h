// The kernels of every instruction set that was compiled, and the choice among them.
#pragma once

#include <string>

#include "call.h"
#include "cpu/tuning.h"

namespace jax_fa {

struct Kernels {
  const char* name;
  bool (*supported)();  // by this processor and operating system
  bool (*preferred)();  // to those after it, where supported
  void (*forward)(const Call&, const Runner&);
  void (*backward)(const Call&, const Runner&);
  void (*tangent)(const Call&, const Runner&);  // with_forward: of the forward too
  void (*second)(const Call&, const Runner&);
  // For benchmarks: runs the multiply-adds of products alone, of floats or as for bfloat16 arrays, and returns the
  // number of operations; sink holds three floats.
  double (*fma)(int64_t iterations, bool bf16, float* sink);
};

// Best first; the last one runs everywhere.
const Kernels* AllKernels(int* count);

// The best one supported, or the one that JAX_FA_CPU_ISA names. nullptr if that is not to be had.
const Kernels* ChosenKernels();

// Whether JAX_FA_CPU_CACHES, if it is set, holds three numbers of bytes above 0, separated by commas.
bool CachesAreValid();

// For tests: from here on as if the machine had these caches, and multiplied in halves or not. No kernel may be running.
void UseMachine(const Caches& caches, bool halves);

// The instruction set, the caches and the sizes of blocks that calls run with, in a line.
std::string DescribeTiles(const Kernels& kernels);

}  // namespace jax_fa
