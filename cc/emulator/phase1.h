// What every phase 1 does with its arguments once they are named.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "emulator/op.h"

namespace cann_emulator {

class Phase1 {
 public:
  explicit Phase1(const char* name)
      : name_(name), fault_(EnterOnDevice((std::string(name) + "GetWorkspaceSize").c_str())) {
    op_.name = name;
  }

  Op& op() { return op_; }

  // A null tensor, or one of rank 0, is absent.
  Phase1& Tensor(Array Op::* slot, const aclTensor* tensor, const char* name, bool required = false) {
    if (fault_) return *this;
    if (tensor == nullptr) {
      if (required) missing_ += std::string(missing_.empty() ? "" : ", ") + name;
      return *this;
    }
    const Array& x = Read(tensor, name);
    tensors_.push_back(tensor);
    if (x.dims.empty() || (!required && x.dims == std::vector<int64_t>{0})) return *this;
    op_.*slot = x;
    named_.emplace_back(name, &(op_.*slot));
    return *this;
  }

  Phase1& Ints(std::vector<int64_t> Op::* slot, const aclIntArray* array, const char* name) {
    if (fault_) return *this;
    if (array != nullptr) {
      op_.*slot = Read(array, name);
      ints_.push_back(array);
    }
    lists_.emplace_back(name, array == nullptr ? nullptr : &(op_.*slot));
    return *this;
  }

  void Layout(const char* layout, const char* softmax_layout, bool has_softmax_layout) {
    if (fault_) return;
    if (layout == nullptr) {
      if (op_.backward) Abort(std::string(name_) + " was given a null inputLayout, which it reads");
      missing_ += std::string(missing_.empty() ? "" : ", ") + "inputLayout";
    } else {
      op_.layout = layout;
    }
    if (has_softmax_layout && softmax_layout == nullptr)
      Abort(std::string(name_) + " was given a null softmax layout, which it reads");
    softmax_text_ = has_softmax_layout ? softmax_layout : "";
    has_softmax_ = has_softmax_layout;
  }

  // Checks, and gives the executor of the work.
  int Finish(uint64_t* workspace, aclOpExecutor** executor);

 private:
  std::string Json(uint64_t workspace) const;

  const char* name_;
  int fault_;
  Op op_;
  std::string missing_, softmax_text_;
  bool has_softmax_ = false;
  std::vector<std::pair<const char*, const Array*>> named_;
  std::vector<std::pair<const char*, const std::vector<int64_t>*>> lists_;
  std::vector<const aclTensor*> tensors_;
  std::vector<const aclIntArray*> ints_;
};

}  // namespace cann_emulator
