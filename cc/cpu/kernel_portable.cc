#define JAX_FA_ISA portable
#include "cpu/kernel.inl"
