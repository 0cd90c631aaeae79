// libnnopbase.so: descriptors and executors, as the op libraries see them.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "emulator/control.h"

namespace cann_emulator {

enum DType { kFloat = 0, kFloat16 = 1, kUint8 = 4, kBool = 12, kBF16 = 27 };

// What outlives a descriptor.
struct Array {
  char* data = nullptr;
  std::vector<int64_t> dims, strides;  // strides and offset in elements
  int64_t offset = 0;
  int dtype = -1;

  CANN_EMULATOR_API int64_t size() const;
  bool present() const { return dtype >= 0; }
};

CANN_EMULATOR_API int64_t ItemSize(int dtype);
CANN_EMULATOR_API std::string Name(int dtype);

}  // namespace cann_emulator

struct aclTensor {
  uint32_t magic;
  std::atomic<int> held;  // by executors between the phases
  int format;
  cann_emulator::Array array;
};

struct aclIntArray {
  uint32_t magic;
  std::atomic<int> held;
  std::vector<int64_t> values;
};

struct aclOpExecutor {
  uint32_t magic;
  std::string op;
  uint64_t workspace;
  cann_emulator::Work work;
  int failure = 0;  // what phase 2 will say
  std::string failure_text;
  std::vector<const aclTensor*> tensors;
  std::vector<const aclIntArray*> ints;
};

namespace cann_emulator {

// These abort on objects that were destroyed, or are none.
CANN_EMULATOR_API const Array& Read(const aclTensor* tensor, const char* name);
CANN_EMULATOR_API const std::vector<int64_t>& Read(const aclIntArray* array, const char* name);

// A new executor that holds the objects until phase 2, or until it is destroyed.
CANN_EMULATOR_API aclOpExecutor* NewExecutor(const char* op, uint64_t workspace, Work work,
                                             std::vector<const aclTensor*> tensors,
                                             std::vector<const aclIntArray*> ints);
CANN_EMULATOR_API void FailInPhase2(aclOpExecutor* executor, int code, const std::string& text);

// Phase 2 of every op.
CANN_EMULATOR_API int Run(const char* op, void* workspace, uint64_t bytes, aclOpExecutor* executor, void* stream,
                          bool checks_bytes);

}  // namespace cann_emulator
