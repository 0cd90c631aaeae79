#define JAX_FA_ISA neon
#define JAX_FA_SIMD "cpu/simd_neon-inl.h"
#include "cpu/kernel-inl.h"
