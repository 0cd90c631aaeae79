#define JAX_FA_ISA avx512_bf16
#include "cpu/kernel.inl"
