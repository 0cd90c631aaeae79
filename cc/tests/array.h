// An array of a test: its numbers in double, and how they are stored.
#pragma once

#include <array>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "memory.h"
#include "numbers.h"

namespace jax_fa_test {

using jax_fa::View;

// Two batch axes, then head, row, column; a size of 1 may stand for the full size.
using Dims = std::array<int64_t, 5>;
enum Axis { kBatch1, kBatch2, kHead, kRow, kCol };

struct Storage {
  const char* order = "01234";  // axes, outermost first
  int64_t step = 1, gap = 0;    // stride of the innermost axis; elements left out behind each innermost run
  bool at_end = true;           // against the guard page behind, or the one before
};

class Array {
 public:
  Array() = default;
  Array(DType dtype, const Dims& dims, int64_t full2, int64_t full1, const Storage& storage)
      : dtype(dtype), dims(dims), value(static_cast<size_t>(dims[0] * dims[1] * dims[2] * dims[3] * dims[4])) {
    int64_t s = storage.step, n = 1;
    for (int at = 4; at >= 0; --at) {
      const int axis = storage.order[at] - '0';
      stored_[axis] = s;
      s = at == 4 ? s * dims[axis] + storage.gap : s * dims[axis];
      dense_[at] = n;
      n *= dims[at];
    }
    int64_t extent = n == 0 ? 0 : 1;
    for (int axis = 0; axis < 5 && n > 0; ++axis) extent += (dims[axis] - 1) * stored_[axis];
    pages_ = std::make_unique<Pages>(static_cast<size_t>(extent * jax_fa::ItemSize(dtype)), storage.at_end);
    for (int axis = 0; axis < 5; ++axis) {
      if (dims[axis] != 1) continue;
      stored_[axis] = dense_[axis] = 0;
    }
    for (int64_t b = 0; b < full1 * full2; ++b) {
      batch_.push_back(b / full2 * stored_[0] + b % full2 * stored_[1]);
      dense_batch_.push_back(b / full2 * dense_[0] + b % full2 * dense_[1]);
    }
  }

  explicit operator bool() const { return pages_ != nullptr; }

  View view() const {
    View v;
    if (pages_ == nullptr) return v;
    v.data = pages_->data();
    v.dtype = dtype;
    v.batch = batch_.data();
    v.head = stored_[kHead], v.row = stored_[kRow], v.col = stored_[kCol];
    return v;
  }

  // Index into value; broadcast axes take any index.
  size_t Index(int64_t b, int64_t h, int64_t r = 0, int64_t c = 0) const {
    return static_cast<size_t>(dense_batch_[static_cast<size_t>(b)] + h * dense_[kHead] + r * dense_[kRow] +
                               c * dense_[kCol]);
  }
  double at(int64_t b, int64_t h, int64_t r = 0, int64_t c = 0) const { return value[Index(b, h, r, c)]; }
  bool Has(Axis axis) const { return dims[axis] != 1; }

  // Stores the numbers, which become what the dtype makes of them. Nobody writes to them from now on.
  void Write() {
    pages_->Protect(PROT_READ | PROT_WRITE);
    pages_->Fill();
    ForEach([&](size_t i, char* p) { Store(&value[i], p); });
    pages_->Protect(PROT_READ);
  }
  // Before a kernel writes: every byte 0xFF, or every element zero.
  void Clear(bool zero) {
    pages_->Protect(PROT_READ | PROT_WRITE);
    pages_->Fill();
    double none = 0.0;
    if (zero) ForEach([&](size_t, char* p) { Store(&none, p); });
  }
  // Takes the numbers out and says whether nothing but them was written.
  bool Read() {
    ForEach([&](size_t i, char* p) {
      value[i] = Load(p);
      std::memset(p, 0xFF, static_cast<size_t>(jax_fa::ItemSize(dtype)));
    });
    return pages_->IsFilled();
  }

  DType dtype = DType::kF32;
  Dims dims{};
  std::vector<double> value;

 private:
  template <typename Fn>
  void ForEach(const Fn& fn) {
    size_t i = 0;
    for (int64_t a = 0; a < dims[0]; ++a)
      for (int64_t b = 0; b < dims[1]; ++b)
        for (int64_t h = 0; h < dims[2]; ++h)
          for (int64_t r = 0; r < dims[3]; ++r)
            for (int64_t c = 0; c < dims[4]; ++c)
              fn(i++, pages_->data() + jax_fa::ItemSize(dtype) * (a * stored_[0] + b * stored_[1] + h * stored_[2] +
                                                                  r * stored_[3] + c * stored_[4]));
  }

  void Store(double* x, char* p) const {
    switch (dtype) {
      case DType::kF32: return Put<float>(x, p);
      case DType::kI32: return Put<int32_t>(x, p);
      case DType::kU32: return Put<uint32_t>(x, p);
      case DType::kU8: return Put<uint8_t>(x, p);
      default: break;
    }
    *x = Rounded(*x, dtype);
    const uint16_t bits = Encode16(*x, dtype);
    std::memcpy(p, &bits, sizeof bits);
  }
  template <typename T>
  static void Put(double* x, char* p) {
    const T t = static_cast<T>(*x);
    std::memcpy(p, &t, sizeof t);
    *x = static_cast<double>(t);
  }
  double Load(const char* p) const {
    if (dtype == DType::kF32) {
      float f;
      std::memcpy(&f, p, sizeof f);
      return f;
    }
    uint16_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return Decode16(bits, dtype);
  }

  int64_t stored_[5] = {}, dense_[5] = {};
  std::vector<int64_t> batch_, dense_batch_;
  std::unique_ptr<Pages> pages_;
};

}  // namespace jax_fa_test
