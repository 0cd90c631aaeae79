// How near results come to attention in real numbers where rounding is easily made worse than it has to be.
//
// Bounds are relative errors in L2: twice to three times what a dense computation in the same dtype has.
#pragma once

#include "check.h"

namespace jax_fa_test {
namespace {

constexpr double kAnything = 1e300;  // that is finite

struct Accuracy {
  const char* name;
  Spec spec;
  double out, dquery, dkey, dvalue;  // bounds
};

double RelativeError(const std::vector<double>& got, const std::vector<double>& expected) {
  double off = 0.0, size = 0.0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double difference = got[i] - expected[i];
    off += difference * difference, size += expected[i] * expected[i];
  }
  return std::sqrt(off / size);
}

// The gradients, from what the forward saves.
Values Gradients(const Kernels& kernels, Problem& p, Values* saved) {
  const std::vector<Result> forward = ForwardResults(p);
  *saved = Run(kernels.forward, CallOf(p), Serial(false), forward);
  for (size_t r = 0; r < forward.size(); ++r) {
    if (!*forward[r].array) continue;
    forward[r].array->value = (*saved)[r];
    forward[r].array->Write();
  }
  return Run(kernels.backward, BackwardCallOf(p), Serial(false), BackwardResults(p));
}

void CheckAccuracy(const Accuracy& a) {
  for (const Kernels* kernels : Supported()) {
    Problem p;
    Maker(a.spec, p).Make();
    Reference reference(p);
    Doing(kernels->name, a.name, a.spec.Text());
    ++g_cases;
    Values saved;
    const Values got = Gradients(*kernels, p, &saved);
    reference.Forward();
    p.out.value = reference.out.value;  // from here on in real numbers
    for (double& x : p.rounding.value) x = 0.0;
    reference.Backward();
    const auto check = [&](const char* name, const std::vector<double>& x, const Quantity& expected, double bound) {
      if (!std::all_of(x.begin(), x.end(), [](double y) { return std::isfinite(y); })) Fail("%s is not finite", name);
      if (bound == kAnything) return;
      const double error = RelativeError(x, expected.value);
      if (!(error <= bound)) Fail("the relative error of %s is %.2g, allowed are %.2g", name, error, bound);
    };
    check("out", saved[0], reference.out, a.out);
    check("dquery", got[0], reference.dquery, a.dquery);
    check("dkey", got[1], reference.dkey, a.dkey);
    check("dvalue", got[2], reference.dvalue, a.dvalue);
  }
}

// The tangents of what has much in common along its tangents: `bound` for that of out, relative.
void CheckTangentAccuracy(const Spec& spec, double bound) {
  Problem p;
  Maker(spec, p).Make();
  Reference reference(p);
  reference.Forward();
  reference.Tangent(true);
  for (const Kernels* kernels : Supported()) {
    for (bool fused : {true, false}) {
      Doing(kernels->name, fused ? "jvp" : "tangent", spec.Text());
      ++g_cases;
      const Values got = Run(kernels->tangent, TangentCallOf(p, fused), Serial(false), TangentResults(p, fused));
      const double error = RelativeError(got[fused ? 4 : 0], reference.out_tangent.value);
      if (!(error <= bound)) Fail("the relative error of the tangent of out is %.2g, allowed are %.2g", error, bound);
      for (Array* x : {&p.out, &p.m, &p.l, &p.rounding})
        if (fused && *x) x->Write();
    }
  }
}

// Queries so large that one key takes it all: nothing moves that, and the gradients of queries and keys are 0.
void CheckOneKey(const Spec& spec) {
  for (const Kernels* kernels : Supported()) {
    Problem p;
    Maker(spec, p).Make();
    Doing(kernels->name, "one key", spec.Text());
    ++g_cases;
    Values saved;
    const Values got = Gradients(*kernels, p, &saved);
    const char* const names[] = {"dquery", "dkey"};
    for (size_t i = 0; i < 2; ++i)
      for (double x : got[i])
        if (x != 0.0) return Fail("%s has %.2g, which is to be 0", names[i], x);
  }
}

void CheckAccuracy() {
  Spec base;
  base.Sq = 64, base.Skv = 200, base.N = base.K = 2, base.D = base.Dv = 64, base.scale = 0.125;
  const auto check = [&](const char* name, const auto& change, double out, double dquery, double dkey, double dvalue) {
    Spec s = base;
    change(s);
    CheckAccuracy({name, s, out, dquery, dkey, dvalue});
  };
  // Logits that have much in common: as exact as products of that size are. Up to 16 rows keys are read in place.
  for (int64_t rows : {1, 16, 17}) {
    const auto with = [&](double logit) {
      return [=](Spec& s) { s.Sq = rows, s.N = s.K = 8, s.Skv = 256, s.common_logit = logit; };
    };
    check("few rows", with(0.0), 2e-6, 2e-6, 2e-6, 2e-6);
    for (double sign : {1.0, -1.0}) {
      check("few rows, common logit", with(sign * 120.0), 1e-4, 1.5e-4, 1e-4, 1e-4);
      check("few rows, large common logit", with(sign * 2500.0), 2e-3, 3e-3, 2e-3, 2e-3);
    }
  }
  // Hardly more than one key counts: delta and dout.v differ by less than a 16-bit out shows.
  const auto peaked = [](DType t) {
    return [=](Spec& s) { s.dtype = t, s.Skv = 64, s.scale = 1.0, s.amplitude = 2.0; };
  };
  check("peaked", peaked(DType::kF32), 4e-6, 8e-6, 8e-6, 4e-6);
  check("peaked", peaked(DType::kBF16), 5e-3, 5e-3, 5e-3, 5e-3);
  check("peaked", peaked(DType::kF16), 6e-4, 6e-4, 6e-4, 6e-4);
  // What tangents of logits have in common moves no softmax.
  for (double x : {0.0, 30.0, 3000.0}) {
    for (DType t : {DType::kF32, DType::kBF16, DType::kF16}) {
      Spec s = base;
      s.dtype = t, s.Skv = 1100, s.bias = 24, s.common_tangent = x, s.rounding = false;
      CheckTangentAccuracy(s, (t == DType::kF32 ? 1e-6 : t == DType::kBF16 ? 3e-3 : 3e-4) + 1.5e-7 * x);
    }
  }
  // What keys have in common moves no softmax.
  const auto common = [](DType t, double x) { return [=](Spec& s) { s.dtype = t, s.common_key = x; }; };
  for (double x : {0.0, 3.0, 30.0}) {
    check("common key", common(DType::kBF16, x), 5e-3, 5e-3, 5e-3, 5e-3);
    check("common key", common(DType::kF16, x), 6e-4, 6e-4, 6e-4, 6e-4);
  }
  check("common key", common(DType::kF32, 300.0), 1e-4, 1e-3, 1e-4, 1e-4);
  for (double x : {1e4, 1e6, 1e18}) {
    check("large queries", [=](Spec& s) { s.query_amplitude = x, s.Skv = 50; }, 1e-4, kAnything, kAnything, 1e-4);
    for (DType t : {DType::kF32, DType::kBF16}) {
      Spec s = base;
      s.dtype = t, s.query_amplitude = x, s.Skv = 50;
      if (x == 1e4) continue;  // some rows have two keys
      CheckOneKey(s);
      s.Skv = 300, s.K = 1;
      CheckOneKey(s);
      s.Sq = s.Skv = 8;
      CheckOneKey(s);
      s.Sq = s.Skv = 70, s.bounds = Bounds::kCausal;
      CheckOneKey(s);
      s.keep = 0.75, s.philox = true;
      CheckOneKey(s);
    }
  }
}

}  // namespace
}  // namespace jax_fa_test
