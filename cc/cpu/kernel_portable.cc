#define JAX_FA_ISA portable
#define JAX_FA_SIMD "cpu/simd_portable-inl.h"
#include "cpu/kernel-inl.h"
