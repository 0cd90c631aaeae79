// Owners of CANN's host objects. Order matters: tensors and arrays must live until phase 2 has returned, so they are
// declared before the executor, and destroyed after it.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "cann/runtime.h"

namespace jax_fa::cann {

// The descriptors of one call.
class Descriptors {
 public:
  explicit Descriptors(const Library& library) : library_(library) {}
  Descriptors(const Descriptors&) = delete;
  Descriptors& operator=(const Descriptors&) = delete;

  ~Descriptors() {
    for (const aclTensor* tensor : tensors_) Forget(library_, library_.api.aclDestroyTensor(tensor));
    for (const aclIntArray* array : arrays_) Forget(library_, library_.api.aclDestroyIntArray(array));
  }

  // A contiguous tensor. ND, and the storage has the shape of the view: the ops look at no more than that.
  Tensor AddTensor(const std::vector<int64_t>& dims, aclDataType dtype, void* data) {
    std::vector<int64_t> strides(dims.size(), 1);
    for (size_t i = dims.size(); i-- > 1;) strides[i - 1] = strides[i] * dims[i];
    tensors_.reserve(tensors_.size() + 1);  // so that nothing can fail once the tensor exists
    const aclTensor* const tensor = library_.api.aclCreateTensor(dims.data(), dims.size(), dtype, strides.data(), 0,
                                                                 ACL_FORMAT_ND, dims.data(), dims.size(), data);
    return Keep(tensors_, tensor, "aclCreateTensor");
  }

  Ints AddInts(const std::vector<int64_t>& values) {
    arrays_.reserve(arrays_.size() + 1);
    const aclIntArray* const array = library_.api.aclCreateIntArray(values.data(), values.size());
    return Keep(arrays_, array, "aclCreateIntArray");
  }

 private:
  template <typename T>
  const T* Keep(std::vector<const T*>& kept, const T* object, const char* function) {
    if (object == nullptr) {
      const std::string text = TakeErrorText(library_);
      throw Failure(Outcome::kInternal,
                    std::string(function) + " returned null." + (text.empty() ? "" : " CANN says: " + text));
    }
    kept.push_back(object);
    return object;
  }

  const Library& library_;
  std::vector<const aclTensor*> tensors_;
  std::vector<const aclIntArray*> arrays_;
};

// What a successful phase 1 gave, until phase 2 takes it.
class Executor {
 public:
  Executor(const Library& library, aclOpExecutor* executor) : library_(library), executor_(executor) {}
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  ~Executor() {
    if (executor_ == nullptr || library_.api.aclDestroyAclOpExecutor == nullptr) return;
    Forget(library_, library_.api.aclDestroyAclOpExecutor(executor_));
  }

  // For phase 2, which deletes it whatever it returns.
  aclOpExecutor* Release() { return std::exchange(executor_, nullptr); }

 private:
  const Library& library_;
  aclOpExecutor* executor_;
};

}  // namespace jax_fa::cann
