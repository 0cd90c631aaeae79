# The library jax_fa_kernels, and what every target is compiled with. Included by the extension's project and by that of
# the C++ tests, after CXX is enabled; needs a compiler and nothing else.
set(JAX_FA_SANITIZE "" CACHE STRING "Sanitizers to build with, e.g. address,undefined")
option(JAX_FA_WERROR "Treat warnings as errors" OFF)
option(JAX_FA_RELEASE "Leave out the variants of the emulator that only tests use" OFF)
option(JAX_FA_EMULATE_AMX "Compute what AMX does in plain C++, for tests" OFF)

# CANN is loaded from shared objects of Linux; elsewhere the adapter and its emulator are left out.
if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
  set(JAX_FA_CANN_DEFAULT ON)
else()
  set(JAX_FA_CANN_DEFAULT OFF)
endif()
option(JAX_FA_CANN "Build the adapter to CANN and its emulator" ${JAX_FA_CANN_DEFAULT})

set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()
set(CMAKE_CXX_FLAGS_RELEASE "-O3 -DNDEBUG")

include(CheckCXXCompilerFlag)
find_package(Threads REQUIRED)

# Headers from cc/, warnings, sanitizers.
function(jax_fa_target target)
  target_include_directories(${target} PRIVATE "${CMAKE_CURRENT_FUNCTION_LIST_DIR}")
  target_compile_options(${target} PRIVATE -Wall -Wextra)
  if(JAX_FA_WERROR)
    target_compile_options(${target} PRIVATE -Werror)
  endif()
  if(JAX_FA_SANITIZE)
    target_compile_options(${target} PRIVATE -fsanitize=${JAX_FA_SANITIZE} -g -O1 -fno-omit-frame-pointer)
    target_link_options(${target} PRIVATE -fsanitize=${JAX_FA_SANITIZE})
  endif()
endfunction()

# An instruction set is a file simd_<set>-inl.h, a file and a line here, and a row in cpu/tuning.h and cpu/kernel.cc.
set(CPU "${CMAKE_CURRENT_LIST_DIR}/cpu")
set(KERNELS "${CPU}/kernel_portable.cc")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set(AVX2 -mavx2 -mfma -mf16c)
  set(AVX512 ${AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512)
  list(APPEND KERNELS "${CPU}/kernel_avx2.cc" "${CPU}/kernel_avx512.cc" "${CPU}/kernel_avx512_bf16.cc")
  set_source_files_properties("${CPU}/kernel_avx2.cc" PROPERTIES COMPILE_OPTIONS "${AVX2}")
  set_source_files_properties("${CPU}/kernel_avx512.cc" PROPERTIES COMPILE_OPTIONS "${AVX512}")
  set_source_files_properties("${CPU}/kernel_avx512_bf16.cc" PROPERTIES COMPILE_OPTIONS "${AVX512};-mavx512vbmi;-mavx512bf16")
  add_compile_definitions(JAX_FA_X86)
  if(CMAKE_SYSTEM_NAME STREQUAL "Linux")  # which gives a process the tiles on request
    check_cxx_compiler_flag("-mamx-bf16" JAX_FA_HAS_AMX)
  endif()
  if(JAX_FA_HAS_AMX)
    list(APPEND KERNELS "${CPU}/kernel_amx_bf16.cc")
    set_source_files_properties("${CPU}/kernel_amx_bf16.cc" PROPERTIES
      COMPILE_OPTIONS "${AVX512};-mavx512vbmi;-mavx512bf16;-mamx-tile;-mamx-bf16")
    add_compile_definitions(JAX_FA_AMX $<$<BOOL:${JAX_FA_EMULATE_AMX}>:JAX_FA_EMULATE_AMX>)
  endif()
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64|ARM64")
  list(APPEND KERNELS "${CPU}/kernel_neon.cc")
  add_compile_definitions(JAX_FA_AARCH64)
endif()

add_library(jax_fa_kernels STATIC ${KERNELS} "${CPU}/kernel.cc" "${CPU}/caches.cc" "${CPU}/memory.cc")
# -ffp-contract=fast: a * b + c is one rounding. GCC's own AVX-512 headers trip its uninitialized warnings.
jax_fa_target(jax_fa_kernels)
target_compile_options(jax_fa_kernels PRIVATE -ffp-contract=fast -fno-math-errno
  $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized -Wno-uninitialized>)
