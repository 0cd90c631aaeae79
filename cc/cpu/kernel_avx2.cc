#define JAX_FA_ISA avx2
#include "cpu/kernel.inl"
