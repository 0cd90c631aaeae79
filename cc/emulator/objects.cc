#include "emulator/objects.h"

#include <cstring>
#include <utility>

namespace cann_emulator {
namespace {

constexpr uint32_t kTensor = 0xAC17E450, kInts = 0xAC11A44A, kExecutor = 0xACE8EC07, kDead = 0xDEADDEAD;

std::vector<int64_t> Contiguous(const std::vector<int64_t>& dims) {
  std::vector<int64_t> strides(dims.size(), 1);
  for (size_t i = dims.size(); i-- > 1;) strides[i - 1] = strides[i] * dims[i];
  return strides;
}

template <typename T>
void CheckMagic(const T* object, uint32_t magic, const std::string& what) {
  if (object->magic == kDead) Abort(what + " was destroyed before");
  if (object->magic != magic) Abort(what + " is not one");
}

// Dead objects stay readable for a while, or their magic number could not be told from reused memory.
template <typename T>
void Bury(T* object) {
  object->magic = kDead;
  static std::atomic<T*> graves[256];
  static std::atomic<unsigned> next{0};
  delete graves[next++ % 256].exchange(object);
}

void Drop(aclOpExecutor* executor) {
  for (const aclTensor* t : executor->tensors) --const_cast<aclTensor*>(t)->held;
  for (const aclIntArray* a : executor->ints) --const_cast<aclIntArray*>(a)->held;
  executor->work = nullptr;
  Count(Kind::kExecutor, -1);
  Bury(executor);
}

}  // namespace

int64_t Array::size() const {
  int64_t n = 1;
  for (int64_t d : dims) n *= d;
  return n;
}

int64_t ItemSize(int dtype) {
  switch (dtype) {
    case kFloat:
    case 3:
    case 8: return 4;
    case kFloat16:
    case kBF16:
    case 6:
    case 7: return 2;
    case 9:
    case 10:
    case 11: return 8;
    default: return 1;
  }
}

std::string Name(int dtype) {
  switch (dtype) {
    case kFloat: return "FLOAT";
    case kFloat16: return "FLOAT16";
    case kBF16: return "BF16";
    case kUint8: return "UINT8";
    case kBool: return "BOOL";
    default: return "dtype " + std::to_string(dtype);
  }
}

const Array& Read(const aclTensor* tensor, const char* name) {
  CheckMagic(tensor, kTensor, std::string("tensor ") + name);
  const Array& x = tensor->array;
  if (x.size() > 0 && reinterpret_cast<uintptr_t>(x.data) % 32 != 0)
    Abort(std::string("tensor ") + name + " does not start at a multiple of 32 bytes");
  return x;
}

const std::vector<int64_t>& Read(const aclIntArray* array, const char* name) {
  CheckMagic(array, kInts, std::string("int array ") + name);
  return array->values;
}

aclOpExecutor* NewExecutor(const char* op, uint64_t workspace, Work work, std::vector<const aclTensor*> tensors,
                           std::vector<const aclIntArray*> ints) {
  for (const aclTensor* t : tensors) ++const_cast<aclTensor*>(t)->held;
  for (const aclIntArray* a : ints) ++const_cast<aclIntArray*>(a)->held;
  Count(Kind::kExecutor, 1);
  return new aclOpExecutor{kExecutor, op, workspace, std::move(work), 0, "", std::move(tensors), std::move(ints)};
}

void FailInPhase2(aclOpExecutor* executor, int code, const std::string& text) {
  executor->failure = code;
  executor->failure_text = text;
}

int Run(const char* op, void* workspace, uint64_t bytes, aclOpExecutor* executor, void* stream, bool checks_bytes) {
  const int fault = EnterOnDevice(op);
  if (executor == nullptr) return fault ? fault : Fail(161001, std::string(op) + ": executor is null.");
  CheckMagic(executor, kExecutor, std::string("the executor given to ") + op);
  if (executor->op != op) Abort(std::string(op) + " was given the executor of " + executor->op);
  const uint64_t wanted = executor->workspace;
  const int failure = executor->failure;
  const std::string text = executor->failure_text;
  Work work = std::move(executor->work);
  Drop(executor);  // whatever comes: phase 2 owns it
  if (fault) return fault;
  if (wanted > 0 && workspace == nullptr)
    return Fail(161001, std::string(op) + ": workspace is null, its size is not 0.");
  if (bytes < wanted) {
    if (checks_bytes) return Fail(161002, std::string(op) + ": workspaceSize is less than required.");
    Abort(std::string(op) + " was given a workspace smaller than phase 1 asked for");
  }
  if (failure) return Fail(failure, text);
  if (!work) return 0;
  return Enqueue(stream, [work = std::move(work), workspace, wanted] {
    if (wanted > 0) std::memset(workspace, 0xFF, wanted);  // NaN to whoever reads it without writing
    return work();
  });
}

}  // namespace cann_emulator

using namespace cann_emulator;

CANN_EMULATOR_C aclTensor* aclCreateTensor(const int64_t* dims, uint64_t rank, int dtype, const int64_t* strides,
                                           int64_t offset, int format, const int64_t* storage_dims,
                                           uint64_t storage_rank, void* data) {
  if (Enter("aclCreateTensor")) return nullptr;
  if ((dims == nullptr && rank > 0) || (storage_dims == nullptr && storage_rank > 0)) {
    Fail(161001, "aclCreateTensor: dims are null.");
    return nullptr;
  }
  Array x;
  x.data = static_cast<char*>(data);
  x.dims.assign(dims, dims + rank);
  x.strides = strides == nullptr ? Contiguous(x.dims) : std::vector<int64_t>(strides, strides + rank);
  x.offset = offset;
  x.dtype = dtype;
  int64_t last = offset, storage = 1;
  for (size_t i = 0; i < x.dims.size(); ++i) last += (x.dims[i] - 1) * x.strides[i];
  for (uint64_t i = 0; i < storage_rank; ++i) storage *= storage_dims[i];
  if (x.size() > 0 && last >= storage) Abort("aclCreateTensor: the view reaches beyond its storage");
  Count(Kind::kTensor, 1);
  return new aclTensor{kTensor, {0}, format, std::move(x)};
}

CANN_EMULATOR_C int aclDestroyTensor(const aclTensor* tensor) {
  const int code = Enter("aclDestroyTensor");
  if (tensor == nullptr) return code;
  CheckMagic(tensor, kTensor, "the tensor given to aclDestroyTensor");
  if (tensor->held > 0) Abort("a tensor was destroyed between phase 1 and phase 2");
  Count(Kind::kTensor, -1);  // also where a fault was injected: nobody could destroy it again
  Bury(const_cast<aclTensor*>(tensor));
  return code;
}

CANN_EMULATOR_C aclIntArray* aclCreateIntArray(const int64_t* values, uint64_t size) {
  if (Enter("aclCreateIntArray")) return nullptr;
  if (values == nullptr && size > 0) return nullptr;
  Count(Kind::kIntArray, 1);
  return new aclIntArray{kInts, {0}, std::vector<int64_t>(values, values + size)};
}

CANN_EMULATOR_C int aclDestroyIntArray(const aclIntArray* array) {
  const int code = Enter("aclDestroyIntArray");
  if (array == nullptr) return code;
  CheckMagic(array, kInts, "the int array given to aclDestroyIntArray");
  if (array->held > 0) Abort("an int array was destroyed between phase 1 and phase 2");
  Count(Kind::kIntArray, -1);
  Bury(const_cast<aclIntArray*>(array));
  return code;
}

CANN_EMULATOR_C int aclDestroyAclOpExecutor(aclOpExecutor* executor) {
  const int code = Enter("aclDestroyAclOpExecutor");
  if (executor == nullptr) return Fail(561103, "aclDestroyAclOpExecutor: executor is null.");
  CheckMagic(executor, kExecutor, "the executor given to aclDestroyAclOpExecutor");
  Drop(executor);
  return code;
}

CANN_EMULATOR_C int aclSetAclOpExecutorRepeatable(aclOpExecutor*) {
  Enter("aclSetAclOpExecutorRepeatable");
  return Fail(561000, "the emulator's executors are not repeatable.");
}

CANN_EMULATOR_C int aclGetViewShape(const aclTensor* tensor, int64_t** dims, uint64_t* rank) {
  if (const int code = Enter("aclGetViewShape")) return code;
  const Array& x = Read(tensor, "of aclGetViewShape");
  *rank = x.dims.size();
  *dims = new int64_t[x.dims.size()];
  std::memcpy(*dims, x.dims.data(), x.dims.size() * sizeof(int64_t));
  return 0;
}

CANN_EMULATOR_C int aclGetRawTensorAddr(const aclTensor* tensor, void** address) {
  if (const int code = Enter("aclGetRawTensorAddr")) return code;
  *address = Read(tensor, "of aclGetRawTensorAddr").data;
  return 0;
}

CANN_EMULATOR_C int aclSetRawTensorAddr(aclTensor* tensor, void* address) {
  if (const int code = Enter("aclSetRawTensorAddr")) return code;
  Read(tensor, "of aclSetRawTensorAddr");
  tensor->array.data = static_cast<char*>(address);
  return 0;
}
