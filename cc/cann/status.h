// What a call of the adapter ends with, and what CANN's return codes mean.
#pragma once

#include <exception>
#include <string>

namespace jax_fa::cann {

enum class Outcome { kOk, kInvalidArgument, kUnimplemented, kUnavailable, kOutOfMemory, kInternal };

struct Status {
  Outcome outcome = Outcome::kOk;
  std::string message;

  bool ok() const { return outcome == Outcome::kOk; }
};

// How an error travels inside the adapter; its functions for the outside return the Status.
struct Failure : std::exception {
  Failure(Outcome outcome, std::string message) : status{outcome, std::move(message)} {}
  const char* what() const noexcept override { return status.message.c_str(); }
  Status status;
};

// The codes that the adapter acts on.
inline constexpr int kSuccess = 0;
inline constexpr int kRepeatInitialize = 100002;
inline constexpr int kContextNull = 107002;
inline constexpr int kMemoryAllocation = 207001;

struct CodeInfo {
  int code;
  const char* name;  // "" where the code is unknown
  const char* meaning;
  const char* advice;  // "" where there is none
};

CodeInfo Describe(int code);

// The failure of a C call: its name, the code, what that means and what to do, and CANN's own words, which may be empty.
Failure CodeFailure(const std::string& call, int code, const std::string& cann_text);

}  // namespace jax_fa::cann
