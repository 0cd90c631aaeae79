#define JAX_FA_ISA avx512_bf16
#define JAX_FA_SIMD "cpu/simd_avx512_bf16-inl.h"
#include "cpu/kernel-inl.h"
