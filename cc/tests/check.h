// Runs kernels on problems and compares what comes out.
#pragma once

#include <chrono>
#include <csignal>
#include <cstdarg>

#include "cpu/kernel.h"
#include "second_reference.h"
#include "spec.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#include <sanitizer/common_interface_defs.h>
#define JAX_FA_SANITIZED
#endif

// The library's allocator under other names: the kernels get either it or memory that faults where it ends.
#define ThreadScratch RealThreadScratch
#define AllocateFloats RealAllocateFloats
#define FreeFloats RealFreeFloats
#include "cpu/memory.cc"  // NOLINT(bugprone-suspicious-include)
#undef ThreadScratch
#undef AllocateFloats
#undef FreeFloats

namespace {
bool g_real_memory = false;
}

namespace jax_fa {
float* ThreadScratch(int64_t n) { return g_real_memory ? RealThreadScratch(n) : jax_fa_test::KernelMemory::Scratch(n); }
float* AllocateFloats(int64_t n) {
  return g_real_memory ? RealAllocateFloats(n) : jax_fa_test::KernelMemory::Allocate(n);
}
void FreeFloats(float* p) { g_real_memory ? RealFreeFloats(p) : jax_fa_test::KernelMemory::Free(p); }
}  // namespace jax_fa

namespace jax_fa_test {
namespace {

using jax_fa::Alibi;
using jax_fa::Call;
using jax_fa::Kernels;
using jax_fa::Runner;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

int g_failures = 0, g_cases = 0;
char g_what[1024] = "starting";         // what runs now, for those who die of it
std::map<std::string, double> g_worst;  // the largest error of each result, in units of its bound

// NOLINTNEXTLINE(modernize-avoid-variadic-functions): as printf
__attribute__((format(printf, 1, 2))) void Fail(const char* format, ...) {
  std::printf("FAIL: ");
  va_list args;
  va_start(args, format);
  std::vprintf(format, args);
  va_end(args);
  std::printf(" [%s]\n", g_what);
  std::fflush(stdout);
  if (++g_failures < 20) return;
  std::printf("too many failures\n");
  std::exit(1);
}

void Doing(const char* who, const char* pass, const std::string& text) {
  std::snprintf(g_what, sizeof g_what, "%s %s: %s", who, pass, text.c_str());
}

void Say(const char* how) {
  for (const char* s : {"FAIL: ", how, " [", static_cast<const char*>(g_what), "]\n"})
    if (write(1, s, std::strlen(s)) < 0) return;
}

// Lines like those of Fail for a fault (memory outside an array, a write to an input, a division by zero) and
// for a run that does not end.
void WatchSignals() {
#if defined(JAX_FA_SANITIZED)
  __sanitizer_set_death_callback([] { Say("died"); });
#else
  const auto die = [](int) {
    Say("died");
    _exit(1);
  };
  for (int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) std::signal(signal, die);
#endif
  std::signal(SIGALRM, [](int) {
    Say("does not end");
    _exit(1);
  });
}

std::vector<const Kernels*> Supported() {
  int count = 0;
  const Kernels* all = jax_fa::AllKernels(&count);
  std::vector<const Kernels*> list;
  for (int i = 0; i < count; ++i)
    if (all[i].supported()) list.push_back(&all[i]);
  return list;
}

// Whether it multiplies pairs of bfloat16, which also takes numbers below the normal ones for zero.
bool HasPairs(const Kernels& kernels) { return std::strstr(kernels.name, "_bf16") != nullptr; }

// One task after the other, from the first or from the last.
struct Serial : Runner {
  explicit Serial(bool backwards) : Runner{&Serial::RunAll}, backwards(backwards) {}
  static void RunAll(const Runner* self, int64_t count, Task fn, void* context) {
    for (int64_t i = 0; i < count; ++i) fn(context, static_cast<const Serial*>(self)->backwards ? count - 1 - i : i);
  }
  bool backwards;
};

Call CallOf(const Problem& p) {
  Call c;
  c.B = p.B(), c.Sq = p.Sq, c.Skv = p.Skv, c.N = p.N, c.K = p.K, c.D = p.D, c.Dv = p.Dv;
  c.scale = static_cast<float>(p.scale);
  c.keep_prob = static_cast<float>(p.keep_prob);
  c.soft_cap = static_cast<float>(p.cap);
  c.alibi = p.alibi;
  c.threshold = p.threshold;
  c.query = p.query.view(), c.key = p.key.view(), c.value = p.value.view(), c.out = p.out.view();
  c.bias = p.bias.view(), c.mask = p.mask.view(), c.lower = p.lower.view(), c.upper = p.upper.view();
  c.slopes = p.slopes.view(), c.seed = p.seed.view(), c.stream = p.stream.view();
  c.drop_bits = p.drop_bits.view(), c.drop_offset = p.drop_offset.view();
  c.drop_bytes = p.drop_bits ? p.drop_bits.dims[kCol] : 0;
  c.bias_offset = p.bias_offset.view(), c.bias_apart = p.bias_apart;
  c.bias_elements = p.bias_offset ? p.bias.dims[kCol] : 0;
  c.position = p.position.view();
  c.segment_row = p.segment_row.view(), c.segment_key = p.segment_key.view();
  c.blocks = p.blocks.view(), c.block_pairs = p.block_pairs.view();
  c.block_rows = p.block_rows, c.block_keys = p.block_keys;
  c.block_count = p.block_pairs ? p.block_pairs.dims[kRow] : 0;
  c.scale_of_head = p.scale_of_head.view(), c.soft_cap_of_head = p.cap_of_head.view();
  c.threshold_of_head = p.threshold_of_head.view(), c.dropout_start = p.dropout_start.view();
  c.rounding = p.rounding.view();
  c.sinks = p.sinks.view();
  c.m = p.m.view(), c.l = p.l.view();
  return c;
}

Call BackwardCallOf(const Problem& p) {
  Call c = CallOf(p);
  c.dout = p.dout.view(), c.dlogsumexp = p.dlogsumexp.view();
  c.dquery = p.dquery.view(), c.dkey = p.dkey.view(), c.dvalue = p.dvalue.view();
  c.dbias = p.dbias.view(), c.dslopes = p.dslopes.view();
  c.dscale = p.dscale.view(), c.dsoft_cap = p.dcap.view();
  if (p.partial) c.partial = true, c.sinks = {};
  return c;
}

// `fused`: together with the forward, whose results are written then.
Call TangentCallOf(const Problem& p, bool fused) {
  Call c = CallOf(p);
  c.query_tangent = p.query_tangent.view(), c.key_tangent = p.key_tangent.view();
  c.value_tangent = p.value_tangent.view(), c.bias_tangent = p.bias_tangent.view();
  c.slopes_tangent = p.slopes_tangent.view(), c.scale_tangent = p.scale_tangent.view();
  c.soft_cap_tangent = p.cap_tangent.view();
  c.out_tangent = p.out_tangent.view(), c.logsumexp_tangent = p.logsumexp_tangent.view();
  c.with_forward = fused;
  return c;
}

Call SecondCallOf(const Problem& p) {
  Call c = TangentCallOf(p, false);
  const Call backward = BackwardCallOf(p);
  c.dout = backward.dout, c.dlogsumexp = backward.dlogsumexp;
  c.dout_tangent = p.dout_tangent.view(), c.dlogsumexp_tangent = p.dlogsumexp_tangent.view();
  c.dquery = backward.dquery, c.dkey = backward.dkey, c.dvalue = backward.dvalue;
  c.dbias = backward.dbias, c.dslopes = backward.dslopes;
  c.dscale = backward.dscale, c.dsoft_cap = backward.dsoft_cap;
  return c;
}

struct Result {
  const char* name;
  Array* array;
  const Quantity* expected;
};
using Values = std::vector<std::vector<double>>;  // of each result

std::vector<Result> ForwardResults(Problem& p, const Reference* r = nullptr) {
  return {{"out", &p.out, r ? &r->out : nullptr},
          {"m", &p.m, r ? &r->m : nullptr},
          {"l", &p.l, r ? &r->l : nullptr},
          {"rounding", &p.rounding, nullptr}};  // see CheckExact
}

std::vector<Result> BackwardResults(Problem& p, const Reference* r = nullptr) {
  return {{"dquery", &p.dquery, r ? &r->dquery : nullptr},    {"dkey", &p.dkey, r ? &r->dkey : nullptr},
          {"dvalue", &p.dvalue, r ? &r->dvalue : nullptr},    {"dbias", &p.dbias, r ? &r->dbias : nullptr},
          {"dslopes", &p.dslopes, r ? &r->dslopes : nullptr}, {"dscale", &p.dscale, r ? &r->dscale : nullptr},
          {"dcap", &p.dcap, r ? &r->dcap : nullptr}};
}

std::vector<Result> TangentResults(Problem& p, bool fused, const Reference* r = nullptr) {
  std::vector<Result> results = fused ? ForwardResults(p, r) : std::vector<Result>();
  results.push_back({"out_tangent", &p.out_tangent, r ? &r->out_tangent : nullptr});
  results.push_back({"logsumexp_tangent", &p.logsumexp_tangent, r ? &r->logsumexp_tangent : nullptr});
  return results;
}

std::vector<Result> SecondResults(Problem& p, const Reference* r = nullptr) {
  std::vector<Result> results = BackwardResults(p, r);
  for (const Result& x : TangentResults(p, false, r)) results.push_back(x);
  return results;
}

bool Same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// Where two runs differ, as text; "" if nowhere.
std::string Difference(const std::vector<Result>& results, const Values& a, const Values& b) {
  for (size_t r = 0; r < a.size() && r < b.size(); ++r)
    for (size_t i = 0; i < a[r].size(); ++i)
      if (!Same(a[r][i], b[r][i]))
        return std::string(results[r].name) + "[" + std::to_string(i) + "] is " + std::to_string(a[r][i]) + " and " +
               std::to_string(b[r][i]);
  return "";
}

// Runs a kernel on cleared results and takes them out.
Values Run(void (*kernel)(const Call&, const Runner&), const Call& c, const Runner& runner,
           const std::vector<Result>& results) {
  for (const Result& r : results)
    if (*r.array) r.array->Clear(c.dbias && std::strcmp(r.name, "dbias") == 0 && !WritesAllBias(c));
  kernel(c, runner);
  Values values;
  for (const Result& r : results) {
    if (*r.array && !r.array->Read()) Fail("%s: bytes between its elements were written", r.name);
    values.push_back(r.array->value);
  }
  if (!g_real_memory && KernelMemory::live() != 0) Fail("memory was not freed");
  return values;
}

std::string Place(const Array& x, size_t at) {
  std::string text;
  for (int axis = 4; axis >= 0; --axis) {
    const auto size = static_cast<size_t>(x.dims[static_cast<size_t>(axis)]);
    text.insert(0, std::to_string(at % size) + (axis < 4 ? "," : ""));
    at /= size;
  }
  return "[" + text + "]";
}

// `compares`: with the reference. Else it is only seen to that nothing but the arrays is touched, that all memory is
// freed, and that the order of tasks changes no bit, which takes a small part of the time.
class CaseTest {
 public:
  CaseTest(const Spec& spec, bool compares)
      : spec_(spec), reference_(problem_), known_(compares ? &reference_ : nullptr) {
    Maker(spec_, problem_).Make();
  }

  void Check() {
    ++g_cases;
    const Problem& p = problem_;
    const std::vector<Result> forward = ForwardResults(problem_, known_);
    Expect("forward", [&] { reference_.Forward(); });
    const Values saved = CheckPass("forward", forward, CallOf(p), [](const Kernels& k) { return k.forward; });
    if (!p.sinks) CheckTangent(true);  // (Together with the forward, tangents are without sinks.)
    for (size_t r = 0; r < forward.size(); ++r) {
      if (!*forward[r].array) continue;
      forward[r].array->value = saved[r];
      forward[r].array->Write();
    }
    CheckTangent(false);
    if (p.partial) AddElsewhere();
    Expect("backward", [&] { reference_.Backward(); });
    const std::vector<Result> backward = BackwardResults(problem_, known_);
    CheckPass("backward", backward, BackwardCallOf(p), [](const Kernels& k) { return k.backward; });
    if (p.sinks) return;  // Python takes second derivatives of what has none.
    Expect("second", [&] { reference_.Second(); });
    CheckPass("second", SecondResults(problem_, known_), SecondCallOf(p), [](const Kernels& k) { return k.second; });
  }

 private:
  template <typename Fn>
  void Expect(const char* pass, const Fn& fn) const {
    if (known_ == nullptr) return;
    Doing("reference", pass, spec_.Text());
    fn();
  }

  // What keys that are elsewhere, with the weight of the sink, add to `out`.
  void AddElsewhere() {
    Array& out = problem_.out;
    Random random(spec_.seed + 4000037);
    for (int64_t b = 0; b < problem_.B(); ++b)
      for (int64_t n = 0; n < problem_.N; ++n)
        for (int64_t i = 0; i < problem_.Sq; ++i) {
          const double l = problem_.l.at(b, n, i);
          const double weight = l > 0.0 ? std::exp(problem_.sinks.at(b, n) - problem_.m.at(b, n, i)) / l : 0.0;
          for (int64_t d = 0; d < problem_.Dv; ++d) out.value[out.Index(b, n, i, d)] += weight * random.Normal();
        }
    out.Write();
  }

  void CheckTangent(bool fused) {
    const char* const pass = fused ? "jvp" : "tangent";
    Expect(pass, [&] { reference_.Tangent(fused); });
    CheckPass(pass, TangentResults(problem_, fused, known_), TangentCallOf(problem_, fused),
              [](const Kernels& k) { return k.tangent; });
  }

  template <typename Which>
  Values CheckPass(const char* pass, const std::vector<Result>& results, const Call& c, const Which& which) {
    Values first;
    const Kernels* first_kernels = nullptr;
    for (const Kernels* kernels : Supported()) {
      Doing(kernels->name, pass, spec_.Text());
      const Values values = Run(which(*kernels), c, Serial(false), results);
      for (size_t r = 0; r < results.size(); ++r)
        if (results[r].expected != nullptr) Compare(results[r], values[r], InPairs(*kernels, c));
      if (known_ != nullptr && results[0].array == &problem_.out && problem_.rounding)
        CheckExact(results[0], values[0], values[3], InPairs(*kernels, c));
      const std::string difference = Difference(results, values, Run(which(*kernels), c, Serial(true), results));
      if (!difference.empty()) Fail("the order of tasks changes %s", difference.c_str());
      if (first_kernels == nullptr) {
        first = values;
        first_kernels = kernels;
      } else {
        CompareSets(results, first, values, c, *first_kernels, *kernels);
      }
    }
    return first;
  }

  // Products of bfloat16 pairs round the weights to bfloat16 before they are summed up. Tangents have none.
  static bool InPairs(const Kernels& kernels, const Call& c) { return HasPairs(kernels) && !c.out_tangent; }

  double Bound(const Result& result, size_t i, bool pairs) const {
    const DType t = result.array->dtype;
    const double rounded =
        pairs && t == DType::kBF16 ? 0x1.02p-8 * result.expected->terms[i] + result.expected->moved[i] : 0.0;
    const double u = HalfUlp(t), smallest = t == DType::kF16 ? 0x1p-25 : 1e-30;
    return result.expected->error[i] + (1.0 + 2.0 * u) * rounded + u * std::fabs(result.expected->value[i]) + smallest;
  }

  void Compare(const Result& result, const std::vector<double>& got, bool pairs) const {
    const Quantity& expected = *result.expected;
    double& worst = g_worst[result.name];
    for (size_t i = 0; i < got.size(); ++i) {
      const double x = got[i], r = expected.value[i];
      if (expected.tainted[i]) {
        const bool certain = (expected.tainted[i] & Quantity::kCertain) != 0 || std::isnan(r);
        if (certain && MustBeNaN(result, r) && !std::isnan(x)) return Wrong(result, i, x, kNaN, 0.0);
        continue;
      }
      const double bound = Bound(result, i, pairs);
      const bool overflows = std::fabs(r) + bound >= FormatOf(result.array->dtype).overflow;
      if (overflows && std::isinf(x) && (x > 0) == (r > 0)) continue;
      if (!(std::fabs(x - r) <= bound)) return Wrong(result, i, x, r, bound);
      if (result.array->dtype == DType::kF32) worst = std::max(worst, std::fabs(x - r) / bound);
    }
  }

  // The output and what rounding took from it are together as good as a float would be, nearly.
  void CheckExact(const Result& out, const std::vector<double>& got, const std::vector<double>& rounding,
                  bool pairs) const {
    const Quantity& expected = *out.expected;
    const DType t = out.array->dtype;
    const double u = HalfUlp(t);
    for (size_t i = 0; i < got.size(); ++i) {
      const double r = expected.value[i], bound = Bound(out, i, pairs) - u * std::fabs(r) + u * u * std::fabs(r);
      if (expected.tainted[i] || std::fabs(r) + Bound(out, i, pairs) >= FormatOf(t).overflow) continue;
      const double x = got[i] + u * rounding[i];
      if (!(std::fabs(x - r) <= bound)) return Wrong({"exact out", out.array, out.expected}, i, x, r, bound);
    }
  }

  // Of results that a NaN reached: those where the definition gives NaN, and whole rows of masked calls. An
  // infinity may also vanish in exp(-inf).
  bool MustBeNaN(const Result& result, double r) const {
    if (!std::isnan(spec_.garbage)) return false;
    if (std::isnan(r)) return true;
    // A soft cap turns even NaN into -inf where the bias is.
    if (spec_.infinite_bias && (spec_.cap != 0.0 || problem_.cap_of_head)) return false;
    const bool dropped = spec_.philox || spec_.bits;
    return problem_.Masked() && !(dropped && result.array == &problem_.dvalue);
  }

  // Instruction sets agree to within what each may be off.
  void CompareSets(const std::vector<Result>& results, const Values& a, const Values& b, const Call& c,
                   const Kernels& a_kernels, const Kernels& b_kernels) const {
    for (size_t r = 0; r < results.size(); ++r)
      for (size_t i = 0; i < a[r].size() && results[r].expected != nullptr; ++i) {
        if (results[r].expected->tainted[i] || Same(a[r][i], b[r][i])) continue;
        const double plain = Bound(results[r], i, false), u = plain - results[r].expected->error[i];
        const double bound = Bound(results[r], i, InPairs(a_kernels, c) || InPairs(b_kernels, c));
        if (!(std::fabs(a[r][i] - b[r][i]) <= bound + u))
          return Fail("%s%s is %.9g, and with %s %.9g", results[r].name, Place(*results[r].array, i).c_str(), b[r][i],
                      a_kernels.name, a[r][i]);
      }
  }

  static void Wrong(const Result& result, size_t i, double got, double expected, double bound) {
    Fail("%s%s is %.9g, expected %.9g within %.3g", result.name, Place(*result.array, i).c_str(), got, expected, bound);
  }

  Spec spec_;
  Problem problem_;
  SecondReference reference_;
  const Reference* known_;  // the reference, or null
};

void Check(const Spec& spec, bool compares = true) { CaseTest(spec, compares).Check(); }

}  // namespace
}  // namespace jax_fa_test
