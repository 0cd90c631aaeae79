#define JAX_FA_ISA avx512
#include "cpu/kernel.inl"
