#define JAX_FA_ISA avx2
#define JAX_FA_SIMD "cpu/simd_avx2-inl.h"
#include "cpu/kernel-inl.h"
