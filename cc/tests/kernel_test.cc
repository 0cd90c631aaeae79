// Tests of the CPU kernels, every instruction set that this machine has, and of the task runner.
//
//   kernel_test quick       in seconds: a few of everything
//   kernel_test emulated    the same for an emulated processor, which has not the memory for arrays of 2^31 elements
//   kernel_test sample      a part of it, in less than a minute there
//   kernel_test full        every length, head_dim and broadcast pattern, and many random cases
//   kernel_test sanitized   what lies between, for builds with sanitizers
//   kernel_test threads     task runner, and kernels on thread pools
//   kernel_test random A B  the random cases of the seeds from A to below B
//   kernel_test guards A B  small ones of these, without the reference: arrays between guard pages, and memory freed
//
// Prints a line per failure and exits with 1 if there is any.

#include "accuracy_test.h"
#include "check.h"
#include "formats_test.h"
#include "paged_test.h"
#include "plan_test.h"
#include "shapes_test.h"
#include "tasks_test.h"

namespace jax_fa_test {
namespace {

constexpr int64_t kLengths[] = {1,  2,  5,  6,   7,   15,  16,  17,  63,  64,  65,
                                95, 96, 97, 127, 129, 383, 385, 511, 512, 513, 700};
constexpr int64_t kSizes[] = {1, 3, 8, 16, 17, 40, 64, 80, 100, 128, 130, 256};
constexpr DType kDTypes[] = {DType::kF32, DType::kBF16, DType::kF16};
constexpr Bounds kAllBounds[] = {Bounds::kNone,     Bounds::kCausal,  Bounds::kCausalEnd, Bounds::kWindow,
                                 Bounds::kAnything, Bounds::kLengths, Bounds::kFrom};

constexpr uint64_t kSmallSeeds = 1000;  // smaller seeds give smaller cases

// Few rows, or some, of many keys, half of them with no more than bounds and sinks: all of which is read in place. With numbers
// of its own: the rest of a case does not depend on them.
void TakeManyKeys(double most_work, Spec& s) {
  Random random(s.seed + 5000011);
  do {
    s.B1 = 1 + random.Below(2), s.B2 = 1, s.K = 1 + random.Below(2), s.N = s.K * (1 + random.Below(3));
    s.Sq = 1 + random.Below(66 * s.K / s.N);
    s.Skv = random.OneIn(3) ? 200 + random.Below(1800) : 2040 + random.Below(500);
    s.D = 1 + random.Below(80), s.Dv = random.OneIn(2) ? s.D : 1 + random.Below(80);
  } while (static_cast<double>(s.B1 * s.N * s.Sq * s.Skv * (s.D + s.Dv)) > most_work);
  if (random.OneIn(2)) return;
  s.mask = s.bias = s.indexed = s.segments = s.scales = s.caps = s.blocks = kNoAxes;
  s.cap = 0.0, s.alibi = Alibi::kNone, s.philox = s.bits = false, s.keep = 1.0;
  if (random.OneIn(2)) s.bounds = Bounds::kNone;
}

Spec RandomSpec(uint64_t seed, double most_work) {
  Random random(seed * 7919 + 1);
  const auto axes = [&](int64_t absent, int all) {
    return random.OneIn(absent) ? static_cast<int>(random.Below(all + 1)) : kNoAxes;
  };
  Spec s;
  s.seed = seed;
  do {
    s.B1 = 1 + random.Below(3), s.B2 = random.OneIn(2) ? 1 : 2;
    s.K = 1 + random.Below(3), s.N = s.K * (random.OneIn(2) ? 1 : 1 + random.Below(4));
    s.Sq = random.OneIn(30) ? 0 : random.Pick(kLengths);
    s.Skv = random.OneIn(30) ? 0 : random.Pick(kLengths);
    s.D = random.Pick(kSizes);
    s.Dv = random.OneIn(2) ? s.D : random.Pick(kSizes);
  } while (static_cast<double>(s.B1 * s.B2 * s.N * s.Sq * s.Skv * (s.D + s.Dv)) > most_work);
  s.dtype = random.Pick(kDTypes);
  s.bounds = random.Pick(kAllBounds);
  s.bound_axes = random.OneIn(2) ? 8 : static_cast<int>(random.Below(16));
  s.mask = axes(3, 31);
  s.bias = axes(3, 31);
  s.infinite_bias = random.OneIn(4);
  s.scale = (random.OneIn(5) ? -1.0 : 1.0) / std::sqrt(static_cast<double>(s.D));
  if (random.OneIn(4)) s.cap = 0.5 + 5.0 * random.Uniform();
  if (random.OneIn(4)) s.alibi = random.OneIn(2) ? Alibi::kLinear : Alibi::kSqrt;
  s.slope_axes = static_cast<int>(random.Below(16));
  if (random.OneIn(4)) s.philox = true;
  if (random.OneIn(6)) s.bits = true;
  if (s.philox || s.bits) s.keep = 0.5 + 0.45 * random.Uniform();
  if (s.philox && random.OneIn(8)) s.keep = 1.0;
  s.dlogsumexp = random.OneIn(3);
  s.rounding = !random.OneIn(3);
  s.layout = random.OneIn(2) ? 1 : 0;
  if (random.OneIn(3)) s.garbage = random.OneIn(3) ? kInf : kNaN;
  s.seen_garbage = random.OneIn(2);
  s.position = axes(2, 15);
  if (s.bias != kNoAxes) s.indexed = axes(3, 15), s.apart = random.OneIn(3);
  s.segments = axes(5, 15);
  s.scales = axes(5, 7), s.caps = axes(6, 7), s.rates = axes(2, 7);
  if (random.OneIn(4)) {
    constexpr int64_t kBlocks[] = {1, 3, 8, 16, 40, 64, 100, 128, 300};
    s.blocks = static_cast<int>(random.Below(8));
    s.block_rows = random.Pick(kBlocks), s.block_keys = random.Pick(kBlocks);
    if (random.OneIn(2)) s.mask = s.segments = kNoAxes;  // which otherwise are masks beside it
    if (random.OneIn(2)) s.bounds = Bounds::kNone;
  }
  if (seed % 8 == 5) TakeManyKeys(most_work, s);
  if (random.OneIn(2)) s.tangents = static_cast<int>(random.Below(128));
  const int have = 7 | (s.bias != kNoAxes ? 8 : 0) | (s.alibi != Alibi::kNone ? 16 : 0) |
                   (s.scales != kNoAxes ? 32 : 0) | (s.caps != kNoAxes ? 64 : 0);
  if ((s.tangents & have) == 0) s.tangents |= 1;  // there is no call without any
  if (random.OneIn(2)) s.cotangents = static_cast<int>(random.Below(4));
  s.sinks = axes(4, 7), s.partial = random.OneIn(3);
  return s;
}

// Of a case, in multiply-adds of a product. Without the reference arrays count as much as these, and most are smaller.
double MostWork(uint64_t seed, bool compares) {
  if (compares) return seed < kSmallSeeds ? 4e6 : 4e7;
  return seed % 32 == 0 ? 4e6 : 2e5;
}

// With the tiles of every size of caches in turn.
void CheckRandom(uint64_t from, uint64_t to, bool compares = true) {
  const jax_fa::Tuning own = jax_fa::TuningInUse();
  for (uint64_t seed = from; seed < to; ++seed) {
    const jax_fa::Tiles& tiles = jax_fa::kTiles[seed % (sizeof jax_fa::kTiles / sizeof *jax_fa::kTiles)];
    const int64_t third = seed % 5 < 2 ? 1 : own.caches.third;  // with next to none, small calls ask ahead too
    jax_fa::UseMachine({seed % 2 == 0 ? 32768 : 49152, tiles.second_cache, third}, seed % 16 < 8);
    Check(RandomSpec(seed, MostWork(seed, compares)), compares);
  }
  jax_fa::UseMachine(own.caches, own.halves);
}

// Every pair of lengths (every `stride`-th of them), with causal and other bounds in turn.
void CheckLengths(int stride) {
  int at = 0;
  for (int64_t Sq : kLengths)
    for (int64_t Skv : kLengths) {
      if (++at % stride != 0) continue;
      Spec s;
      s.Sq = Sq, s.Skv = Skv, s.D = 8, s.Dv = 3;
      s.bounds = kAllBounds[at % 7];
      s.dtype = kDTypes[at % 3];
      s.seed = static_cast<uint64_t>(at);
      Check(s);
    }
}

void CheckSizes(int stride) {
  int at = 0;
  for (int64_t D : kSizes)
    for (int64_t Dv : kSizes) {
      if (++at % stride != 0) continue;
      Spec s;
      s.Sq = 33, s.Skv = 70, s.N = 2, s.D = D, s.Dv = Dv;
      s.bounds = at % 2 ? Bounds::kCausalEnd : Bounds::kNone;
      s.dtype = kDTypes[at % 3];
      s.scale = 1.0 / std::sqrt(static_cast<double>(D));
      s.layout = at % 4 == 3;
      s.seed = static_cast<uint64_t>(at);
      Check(s);
    }
}

// Bias with its gradient and mask in every broadcast pattern.
void CheckBroadcasts(int stride) {
  for (int axes = 0; axes < 32; axes += stride) {
    Spec s;
    s.B1 = 2, s.B2 = 3, s.N = 4, s.K = 2, s.Sq = 21, s.Skv = 300, s.D = 5, s.Dv = 4;
    s.seed = static_cast<uint64_t>(axes);
    s.mask = kNoAxes, s.bias = axes;
    Check(s);
    s.mask = axes, s.bias = 31 - axes, s.dtype = DType::kBF16;
    Check(s);
    s.bias = kNoAxes, s.garbage = kNaN, s.layout = 1, s.Skv = 37;
    Check(s);
    s.bounds = Bounds::kAnything, s.bound_axes = axes & 15, s.mask = kNoAxes, s.alibi = Alibi::kLinear;
    s.slope_axes = axes & 7, s.dlogsumexp = true;
    Check(s);
  }
}

// One property each, of every `stride`-th case.
void CheckTable(bool all, size_t stride) {
  Spec base;
  base.Sq = 45, base.Skv = 70, base.N = 4, base.K = 2;
  std::vector<Spec> specs;
  const auto add = [&](const auto& change, bool quick = true) {
    Spec s = base;
    s.seed = 1000 + specs.size();
    change(s);
    if (quick || all) specs.push_back(s);
  };
  for (DType t : kDTypes) {
    add([&](Spec& s) { s.dtype = t; });
    add([&](Spec& s) { s.dtype = t, s.bounds = Bounds::kCausal, s.philox = true, s.keep = 0.7, s.N = s.K = 1; });
    add([&](Spec& s) { s.dtype = t, s.layout = 1, s.cap = 2.0, s.bias = 28; });
  }
  add([](Spec& s) { s.bits = true, s.keep = 0.75, s.Skv = 301; });
  add([](Spec& s) { s.bits = s.philox = true, s.keep = 0.6, s.bounds = Bounds::kWindow; });
  add([](Spec& s) { s.philox = true, s.keep = 1.0; });
  add([](Spec& s) { s.philox = true, s.keep = 0x1p-16, s.Sq = 300, s.Skv = 400, s.D = s.Dv = 4; });
  add([](Spec& s) { s.dlogsumexp = true; });
  add([](Spec& s) { s.scale = -0.5; });
  add([](Spec& s) { s.amplitude = 100.0; });  // logits of +-1e4
  add([](Spec& s) { s.amplitude = 100.0, s.scale = -0.25, s.bounds = Bounds::kCausal; });
  add([](Spec& s) { s.amplitude = 20.0, s.cap = 30.0; });
  add([](Spec& s) { s.bias = 24, s.infinite_bias = true; });
  add([](Spec& s) { s.bias = 8, s.infinite_bias = true; });  // whole rows of it
  add([](Spec& s) { s.bias = 24, s.infinite_bias = true, s.cap = 3.0; });
  add([](Spec& s) { s.alibi = Alibi::kSqrt, s.bounds = Bounds::kCausalEnd; });
  add([](Spec& s) { s.alibi = Alibi::kLinear, s.cap = 4.0, s.slope_axes = 4; });
  add([](Spec& s) { s.mask = 0; });
  add([](Spec& s) { s.blocks = 7, s.B1 = 2, s.garbage = kNaN; });
  add([](Spec& s) { s.blocks = 4, s.Sq = 300, s.Skv = 400, s.garbage = kInf, s.seen_garbage = true, s.bias = 28; });
  add([](Spec& s) { s.blocks = 0, s.Sq = 5, s.Skv = 700, s.garbage = kNaN, s.mask = 24, s.dtype = DType::kBF16; });
  add([](Spec& s) { s.blocks = 4, s.block_rows = 7, s.block_keys = 5, s.Skv = 300, s.philox = true, s.keep = 0.8; });
  add([](Spec& s) { s.blocks = 4, s.Sq = 12, s.Skv = 40, s.block_keys = 16, s.cap = 3.0, s.alibi = Alibi::kLinear; });
  add([](Spec& s) { s.Dv = 0, s.bias = 24, s.bounds = Bounds::kCausal; });
  add([](Spec& s) { s.Dv = 0, s.Sq = 1, s.D = 64, s.dtype = DType::kBF16; });
  add([](Spec& s) { s.bounds = Bounds::kLengths, s.bound_axes = 0, s.garbage = kNaN; });
  for (double garbage : {kNaN, kInf}) {
    add([&](Spec& s) { s.garbage = garbage, s.mask = 31, s.bounds = Bounds::kWindow, s.bias = 28; });
    add([&](Spec& s) { s.garbage = garbage, s.seen_garbage = true, s.bounds = Bounds::kAnything, s.bound_axes = 15; });
    add([&](Spec& s) { s.garbage = garbage, s.seen_garbage = true, s.mask = 24, s.philox = true, s.keep = 0.8; });
    add([&](Spec& s) { s.garbage = garbage, s.seen_garbage = true, s.dlogsumexp = true, s.cap = 5.0; });
  }
  for (int64_t Sq : {0, 1, 7}) {
    add([&](Spec& s) { s.Sq = Sq, s.Skv = 0, s.bias = 24, s.alibi = Alibi::kLinear; });
    add([&](Spec& s) { s.Sq = 0, s.Skv = Sq, s.bias = 16, s.alibi = Alibi::kLinear; });
  }
  // Few rows and many keys: the keys are split.
  const auto size = [](Spec& s, int64_t Sq, int64_t Skv, int64_t N, int64_t K, int64_t D, int64_t Dv) {
    s.Sq = Sq, s.Skv = Skv, s.N = N, s.K = K, s.D = D, s.Dv = Dv;
  };
  add([&](Spec& s) { size(s, 1, 5000, 1, 1, 64, 64); });
  add([&](Spec& s) { size(s, 1, 5000, 8, 1, 16, 16), s.bounds = Bounds::kLengths, s.bound_axes = 0; });
  // ... and read where they lie.
  for (DType t : kDTypes) {
    add([&](Spec& s) { size(s, 1, 1300, 8, 2, 64, 128), s.dtype = t, s.bias = 16; });
    add([&](Spec& s) { size(s, 3, 601, 3, 1, 128, 64), s.dtype = t, s.bounds = Bounds::kLengths, s.garbage = kNaN; });
    add([&](Spec& s) { size(s, 7, 333, 2, 2, 32, 64), s.dtype = t, s.bounds = Bounds::kWindow, s.mask = 24; });
    add([&](Spec& s) {
      size(s, 5, 400, 3, 1, 64, 64), s.dtype = t, s.mask = 31, s.garbage = kNaN, s.seen_garbage = true;
    });
    add([&](Spec& s) { size(s, 2, 900, 2, 1, 64, 64), s.dtype = t, s.philox = true, s.keep = 0.8, s.B1 = 3; });
    // ... with head_dims that fill no vector, in arrays that end where a page does.
    const int64_t odd[][2] = {{1, 1}, {3, 5}, {17, 36}, {36, 7}, {72, 100}, {100, 72}, {120, 120}, {127, 129}};
    for (const auto [D, Dv] : odd) {
      add([&, D = D, Dv = Dv](Spec& s) { size(s, 2, 150, 6, 3, D, Dv), s.dtype = t, s.bounds = Bounds::kLengths; });
      add([&, D = D, Dv = Dv](Spec& s) { size(s, 16, 40, 1, 1, D, Dv), s.dtype = t, s.layout = 1, s.mask = 24; });
      add([&, D = D, Dv = Dv](Spec& s) {
        size(s, 1, 300, 5, 1, D, Dv), s.dtype = t, s.bounds = Bounds::kAnything, s.garbage = kNaN,
                                      s.layout = static_cast<int>(D % 2);
      });
    }
  }
  // More rows and plain weights, which are read there too.
  for (DType t : kDTypes) {
    add([&](Spec& s) { size(s, 9, 2100, 4, 2, 64, 64), s.dtype = t, s.bounds = Bounds::kLengths, s.garbage = kNaN; });
    add([&](Spec& s) {
      size(s, 20, 2080, 1, 1, 72, 100), s.dtype = t, s.bounds = Bounds::kAnything, s.garbage = kInf,
                                        s.seen_garbage = true;
    });
  }
  add([&](Spec& s) { size(s, 1, 5000, 33, 1, 17, 36), s.amplitude = 30.0; });
  add([&](Spec& s) { size(s, 21, 2050, 2, 2, 40, 33), s.scale = -0.4; });
  add([&](Spec& s) { size(s, 19, 2051, 2, 2, 33, 40); });
  add([&](Spec& s) {
    size(s, 64, 2060, 2, 2, 16, 40), s.B1 = 2, s.bounds = Bounds::kCausalEnd, s.dtype = DType::kF16;
  });
  // One bias, or few, of many heads, whose gradients are added up in parts.
  for (DType t : kDTypes) {
    const auto many = [&](Spec& s) { s.B1 = 5, s.B2 = 3, s.dtype = t, s.garbage = kNaN; };
    add([&](Spec& s) { size(s, 5, 7, 4, 2, 8, 8), many(s), s.bias = 24; });
    add([&](Spec& s) {
      size(s, 4, 6, 2, 2, 9, 3), many(s), s.bias = 28, s.bounds = Bounds::kAnything, s.bound_axes = 11;
    });
    add([&](Spec& s) { size(s, 70, 90, 2, 1, 20, 20), many(s), s.bias = 24, s.mask = 31; });
    add([&](Spec& s) { size(s, 40, 80, 2, 2, 7, 7), many(s), s.bias = 4, s.indexed = 12; });
    add([&](Spec& s) { size(s, 34, 66, 1, 1, 16, 16), many(s), s.bias = 17, s.infinite_bias = true; });
  }
  // Few heads and keys: the rows are split.
  for (DType t : kDTypes) {
    add([&](Spec& s) { size(s, 700, 100, 1, 1, 20, 9), s.dtype = t, s.dlogsumexp = true, s.sinks = 0; });
    add([&](Spec& s) { size(s, 300, 70, 6, 2, 9, 20), s.dtype = t, s.bounds = Bounds::kAnything, s.garbage = kNaN; });
    add([&](Spec& s) { size(s, 410, 600, 3, 1, 8, 8), s.dtype = t, s.bounds = Bounds::kCausalEnd, s.partial = true; });
    add([&](Spec& s) {
      size(s, 500, 90, 2, 1, 16, 16), s.dtype = t, s.alibi = Alibi::kLinear, s.cap = 3.0, s.sinks = 4;
    });
    add([&](Spec& s) { size(s, 600, 80, 1, 1, 33, 33), s.dtype = t, s.philox = true, s.keep = 0.8, s.scales = 4; });
  }
  const bool full = false;  // not in the quick table
  add([&](Spec& s) { size(s, 3, 3001, 8, 2, 16, 16), s.mask = 31, s.garbage = kNaN, s.seen_garbage = true; }, full);
  add([&](Spec& s) { size(s, 1, 5000, 4, 2, 256, 130), s.philox = true, s.keep = 0.9, s.bias = 16; }, full);
  add([&](Spec& s) { size(s, 5, 2049, 4, 2, 16, 16), s.B1 = 3, s.bounds = Bounds::kAnything, s.bound_axes = 9; }, full);
  add([&](Spec& s) { size(s, 2, 5000, 4, 2, 16, 16), s.amplitude = 100.0, s.bounds = Bounds::kFrom; }, full);
  // More than one task of rows, block of keys and group of rows; large head_dims take smaller blocks.
  add([&](Spec& s) { size(s, 103, 1100, 1, 1, 4, 4), s.philox = true, s.keep = 0.9; });
  add([&](Spec& s) { size(s, 401, 1100, 4, 1, 16, 16), s.bounds = Bounds::kCausalEnd; }, full);
  add([&](Spec& s) { size(s, 800, 800, 1, 1, 64, 64), s.bounds = Bounds::kCausal; }, full);
  add([&](Spec& s) { size(s, 1030, 1030, 1, 1, 16, 16), s.bounds = Bounds::kWindow, s.mask = s.bias = 24; }, full);
  add([&](Spec& s) { size(s, 210, 1300, 2, 1, 130, 100), s.philox = true, s.keep = 0.5; }, full);
  add([&](Spec& s) { size(s, 97, 700, 2, 2, 300, 17), s.alibi = Alibi::kLinear; }, full);
  add([&](Spec& s) { size(s, 97, 700, 1, 1, 17, 300), s.bias = 8; }, full);
  add([&](Spec& s) { size(s, 7, 1500, 12, 3, 16, 16), s.B1 = 5, s.bounds = Bounds::kAnything; }, full);
  add([&](Spec& s) { size(s, 9, 20, 2, 2, 16, 16), s.B1 = 9, s.B2 = 7, s.bias = 2; }, full);
  // More packed keys and values than tangents share at once: the heads take turns.
  add([&](Spec& s) { size(s, 97, 250, 49, 49, 256, 256), s.bounds = Bounds::kCausalEnd; }, full);
  for (size_t i = 0; i < specs.size(); i += stride) Check(specs[i]);
}

// "A row's result does not depend on how rows are grouped": a few rows alone give the same bits.
void CheckRowsAlone(DType dtype) {
  Spec s;
  s.Sq = 400, s.Skv = 1100, s.N = s.K = 1, s.D = dtype == DType::kBF16 ? 40 : 20, s.Dv = 9, s.bounds = Bounds::kWindow;
  s.dtype = dtype;
  constexpr int64_t kFew = 260;  // fewer than a task's, more than those for which keys are split
  Problem all;
  Maker(s, all).Make();
  const auto run = [](const Kernels& kernels, Problem& p, bool tangents) {
    return tangents ? Run(kernels.tangent, TangentCallOf(p, true), Serial(false), TangentResults(p, true))
                    : Run(kernels.forward, CallOf(p), Serial(false), ForwardResults(p));
  };
  for (const Kernels* kernels : Supported()) {
    for (bool tangents : {false, true}) {
      Doing(kernels->name, tangents ? "jvp" : "forward", "some rows alone");
      const Values expected = run(*kernels, all, tangents);
      for (int64_t first = 0; first + kFew <= s.Sq; first += 37) {
        Spec few = s;
        few.Sq = kFew;
        Problem p;
        Maker(few, p).Make();
        for (auto [from, to, rows] :
             {std::tuple(&all.query, &p.query, true), std::tuple(&all.key, &p.key, false),
              std::tuple(&all.value, &p.value, false), std::tuple(&all.lower, &p.lower, true),
              std::tuple(&all.upper, &p.upper, true), std::tuple(&all.query_tangent, &p.query_tangent, true),
              std::tuple(&all.key_tangent, &p.key_tangent, false),
              std::tuple(&all.value_tangent, &p.value_tangent, false)}) {
          for (int64_t r = 0; r < to->dims[kRow]; ++r)
            for (int64_t c = 0; c < to->dims[kCol]; ++c)
              to->value[to->Index(0, 0, r, c)] = from->at(0, 0, rows ? first + r : r, c);
          to->Write();
        }
        const Values got = run(*kernels, p, tangents);
        Values cut = got;
        for (size_t r = 0; r < got.size(); ++r) {
          const size_t width = got[r].size() / kFew;
          for (size_t i = 0; i < got[r].size(); ++i) cut[r][i] = expected[r][static_cast<size_t>(first) * width + i];
        }
        const std::string difference = Difference(TangentResults(p, true), got, cut);
        if (!difference.empty())
          return Fail("rows from %lld on: %s", static_cast<long long>(first), difference.c_str());
      }
    }
  }
}

// Together with tangents the forward's results have the bits that it gives alone, where it neither splits the keys nor
// reads them in place nor multiplies pairs.
void CheckBitsOfForward() {
  for (uint64_t seed = 1; seed <= 12; ++seed) {
    Spec s;
    s.seed = seed, s.N = 2, s.Sq = seed % 2 ? 200 : 131, s.Skv = seed % 3 ? 1100 : 300, s.D = 20, s.Dv = 70;
    s.dtype = seed % 4 == 3 ? DType::kF16 : DType::kF32;
    s.bounds = kAllBounds[seed % 7];
    if (seed % 3 == 0) s.philox = true, s.keep = 0.8;
    if (seed % 4 == 0) s.bias = 24, s.infinite_bias = true;
    if (seed % 5 == 0) s.cap = 3.0, s.alibi = Alibi::kLinear;
    if (seed % 6 == 1) s.mask = 31, s.garbage = kNaN, s.seen_garbage = true;
    s.tangents = seed % 5 == 1 ? 4 : 127;
    Problem p;
    Maker(s, p).Make();
    for (const Kernels* kernels : Supported()) {
      Doing(kernels->name, "jvp", s.Text());
      const Values got = Run(kernels->tangent, TangentCallOf(p, true), Serial(false), TangentResults(p, true));
      const Values expected = Run(kernels->forward, CallOf(p), Serial(false), ForwardResults(p));
      const std::string difference = Difference(ForwardResults(p), got, expected);
      if (!difference.empty()) Fail("with tangents and alone %s", difference.c_str());
    }
  }
}

// Tangents that grow with the distance, of weights that fall with it by some e^35 or less a block: those of the last keys are
// far from the first ones', which had all weight until then.
void CheckFarTangents() {
  for (DType dtype : {DType::kF32, DType::kBF16})
    for (int moving : {16, 24, 127}) {
      Spec s;
      s.seed = static_cast<uint64_t>(moving), s.dtype = dtype, s.tangents = moving;
      s.Sq = 7, s.Skv = 3000, s.N = 4, s.K = 2, s.D = 16, s.Dv = 24, s.bounds = Bounds::kCausalEnd;
      s.alibi = Alibi::kLinear, s.bias = moving == 16 ? kNoAxes : 8;
      Check(s);
    }
}

// More rows than the backward keeps in packed form: some blocks of them share a place, and those that see one block of keys are
// more than there are places, all of them or, in a window, not.
void CheckKeptRows() {
  for (DType dtype : {DType::kF32, DType::kBF16})
    for (Bounds bounds : {Bounds::kNone, Bounds::kCausalEnd, Bounds::kWindow}) {
      Spec s;
      s.seed = 11, s.dtype = dtype, s.bounds = bounds, s.Sq = 1100, s.Skv = 140, s.N = s.K = 1, s.D = 512, s.Dv = 16;
      Check(s);
    }
}

// No batch entries: nothing is read or written.
void CheckNoBatch() {
  Spec s;
  s.B1 = 0, s.Sq = 3, s.Skv = 4, s.N = s.K = 1;
  Check(s);
}

void CheckMemory() {
  Doing("memory.cc", "", "");
  float* before = nullptr;
  for (int64_t n : {1, 15, 16, 1000, 17, 100000}) {
    float* p = jax_fa::RealThreadScratch(n);
    float* q = jax_fa::RealAllocateFloats(n);
    for (float* x : {p, q}) {
      if (reinterpret_cast<uintptr_t>(x) % 64 != 0) Fail("memory is not aligned");
      std::memset(x, 1, static_cast<size_t>(n) * sizeof(float));
    }
    if (n == 17 && p != before) Fail("a smaller request does not get the kept memory");
    before = p;
    jax_fa::RealFreeFloats(q);
  }
  jax_fa::RealFreeFloats(nullptr);
  // What was freed last is kept, whatever a program needed before; memory of the system would hold zeros.
  jax_fa::RealFreeFloats(jax_fa::RealAllocateFloats(jax_fa::kKeptFloats / 16 * 15));
  constexpr int64_t kSmaller = jax_fa::kKeptFloats / 8;
  float* const p = jax_fa::RealAllocateFloats(kSmaller);
  for (int64_t i = 0; i < kSmaller; ++i) p[i] = 1.0f;
  jax_fa::RealFreeFloats(p);
  float* const again = jax_fa::RealAllocateFloats(kSmaller);
  if (again != p || again[0] != 1.0f || again[kSmaller - 1] != 1.0f) Fail("memory that was freed last is not kept");
  jax_fa::RealFreeFloats(again);
}

int Main(const std::vector<std::string>& args) {
  const std::string mode = args.empty() ? "quick" : args[0];
  WatchSignals();
  for (const Kernels* k : Supported()) std::printf("%s ", k->name);
  std::printf("(%s)\n", mode.c_str());
  std::fflush(stdout);
  const auto start = std::chrono::steady_clock::now();
  if ((mode == "random" || mode == "guards") && args.size() == 3) {
    const uint64_t from = std::strtoull(args[1].c_str(), nullptr, 10), to = std::strtoull(args[2].c_str(), nullptr, 10);
    CheckRandom(from, to, mode == "random");
    CheckRandomPaged(from, to);
  } else if (mode == "quick" || mode == "emulated" || mode == "sample" || mode == "sanitized" || mode == "full") {
    const bool sample = mode == "sample", emulated = mode == "emulated" || sample;
    const bool quick = mode == "quick" || emulated, full = mode == "full";
    CheckPhilox();
    CheckMemory();
    CheckShapes();
    if (!sample) CheckStaticAndGiven();
    if (!emulated) CheckFarApart();
    if (mode != "sanitized") CheckPlanning();
    CheckTaskCounts();
    CheckConversions(quick ? 100000 : full ? 20000000 : 1000000);
    CheckEveryNumber();
    CheckFunctions();
    CheckNoBatch();
    if (!sample) CheckFarTangents();
    if (!sample) CheckKeptRows();
    CheckPaged();
    for (DType t : {DType::kF32, DType::kBF16}) CheckRowsAlone(t);
    if (!sample) CheckBitsOfForward();
    if (!sample) CheckAccuracy();
    CheckTable(!quick, sample ? 7 : 1);
    if (!sample) CheckBroadcasts(quick ? 7 : 1);
    CheckSizes(quick ? 23 : full ? 1 : 5);
    CheckLengths(quick ? 71 : full ? 1 : 5);
    CheckRandom(0, sample ? 12 : quick ? 25 : full ? kSmallSeeds + 500 : 120);
    CheckRandomPaged(0, quick ? 12 : 200);
    alarm(quick && !emulated ? 120 : 600);
    if (!sample) CheckTasks();
  } else if (mode == "threads") {
    alarm(600);
    CheckTasks();
    CheckRandom(0, 20);
  } else {
    std::printf(
        "usage: kernel_test [quick | emulated | sample | full | sanitized | threads | random FROM TO | guards FROM TO]\n");
    return 2;
  }
  alarm(0);
  for (const auto& [name, worst] : g_worst)
    std::printf("largest error of %s: %.2f of its bound\n", name.c_str(), worst);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  std::printf("%d cases, %d failures, %.0f s\n", g_cases, g_failures, took.count());
  return g_failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace jax_fa_test

int main(int argc, char** argv) { return jax_fa_test::Main({argv + 1, argv + argc}); }
