#define JAX_FA_ISA avx512
#define JAX_FA_SIMD "cpu/simd_avx512-inl.h"
#include "cpu/kernel-inl.h"
