// The task runner, alone and with kernels, on pools of all manners.
#pragma once

#include <stdexcept>

#include "check.h"
#include "cpu/turns-inl.h"
#include "large_results.h"
#include "pool.h"
#include "tasks.h"

namespace jax_fa_test {
namespace {

using jax_fa::PoolRunner;

// Every pass; leaves the forward's results in place.
Values RunEvery(const Kernels& kernels, Problem& p, const Runner& runner) {
  Values values = Run(kernels.tangent, TangentCallOf(p, true), runner, TangentResults(p, true));
  const auto add = [&](const Values& more) { values.insert(values.end(), more.begin(), more.end()); };
  add(Run(kernels.forward, CallOf(p), runner, ForwardResults(p)));
  for (Array* x : {&p.out, &p.m, &p.l, &p.rounding})
    if (*x) x->Write();
  add(Run(kernels.tangent, TangentCallOf(p, false), runner, TangentResults(p, false)));
  add(Run(kernels.backward, BackwardCallOf(p), runner, BackwardResults(p)));
  return values;
}

std::vector<Result> EveryResult(Problem& p) {
  std::vector<Result> results = TangentResults(p, true);
  for (const std::vector<Result>& more : {ForwardResults(p), TangentResults(p, false), BackwardResults(p)})
    results.insert(results.end(), more.begin(), more.end());
  return results;
}

std::vector<Spec> ThreadedSpecs() {
  std::vector<Spec> specs(5);
  for (Spec& s : specs) s.B1 = 3, s.B2 = 2, s.Sq = 40, s.Skv = 600, s.N = s.K = 2;
  Spec& causal = specs[0];
  causal.B1 = causal.B2 = 1, causal.Sq = 500, causal.N = 4, causal.bounds = Bounds::kCausalEnd;
  causal.dtype = DType::kBF16, causal.philox = true, causal.keep = 0.9;
  Spec& decode = specs[1];
  decode.B1 = decode.B2 = 1, decode.Sq = 1, decode.Skv = 5000, decode.N = 4, decode.alibi = Alibi::kLinear;
  specs[2].bias = 6;  // shared by the entries of one batch axis
  specs[3].bias = 30, specs[3].mask = 8, specs[3].dlogsumexp = true;
  Spec& some = specs[4];
  some.B1 = some.B2 = 1, some.Sq = 20, some.Skv = 2500, some.bounds = Bounds::kLengths;
  return specs;
}

std::string Text(int64_t threads, Manner manner) {
  return std::to_string(threads) + " threads, manner " + std::to_string(static_cast<int>(manner));
}

// The same bits for any number of threads and any manner of the pool.
void CheckPools() {
  for (const Spec& spec : ThreadedSpecs()) {
    Problem p;
    Maker(spec, p).Make();
    const std::vector<Result> results = EveryResult(p);
    for (const Kernels* kernels : Supported()) {
      Doing(kernels->name, "serial", spec.Text());
      const Values expected = RunEvery(*kernels, p, Serial(false));
      const auto check = [&](int64_t threads, Manner manner, bool alone) {
        Doing(kernels->name, Text(threads, manner).c_str(), spec.Text());
        FakePool pool(threads, manner);
        const PoolRunner<FakePool> runner(pool, alone);
        const std::string difference = Difference(results, expected, RunEvery(*kernels, p, runner));
        if (!difference.empty()) Fail("threads change %s", difference.c_str());
      };
      for (int64_t threads : {1, 2, 3, 8}) check(threads, Manner::kPrompt, false);
      for (Manner manner : {Manner::kLate, Manner::kNever, Manner::kInline, Manner::kThrows}) check(3, manner, false);
      check(3, Manner::kPrompt, true);
    }
  }
}

// Counts what runs.
struct Tally {
  explicit Tally(size_t n) : times(n) {}
  std::vector<std::atomic<int>> times;
  std::atomic<int> running{0};
  int64_t bad = -1;  // the task that throws; -2: every one
  static void Task(void* self, int64_t i) {
    Tally& t = *static_cast<Tally*>(self);
    ++t.running;
    ++t.times[static_cast<size_t>(i)];
    if (i % 5 == 0) std::this_thread::yield();
    --t.running;
    if (i == t.bad || t.bad == -2) throw std::runtime_error("task " + std::to_string(i));
  }
  void Check(int expected) const {
    if (running != 0) Fail("tasks are running after the end");
    for (const auto& n : times)
      if (n != expected) return Fail("a task ran %d times", n.load());
  }
};

void RunTally(const Runner& runner, Tally& tally) {
  runner.run(&runner, static_cast<int64_t>(tally.times.size()), &Tally::Task, &tally);
}

// Every thread of the pool is itself a caller that waits for its tasks.
void CheckCallsFromThePool() {
  for (int64_t threads : {1, 2}) {
    const std::string text = std::to_string(threads) + " threads";
    Doing("tasks.h", "calls from the pool itself", text);
    constexpr int kCalls = 200;
    std::vector<std::unique_ptr<Tally>> tallies;
    tallies.reserve(kCalls);
    for (int i = 0; i < kCalls; ++i) tallies.push_back(std::make_unique<Tally>(static_cast<size_t>(i % 17)));
    std::atomic<int> ended{0};
    {
      FakePool pool(threads);
      for (int i = 0; i < kCalls; ++i)
        pool.Schedule([&, i] {
          const PoolRunner<FakePool> runner(pool);
          RunTally(runner, *tallies[static_cast<size_t>(i)]);
          ++ended;
        });
      while (ended < kCalls) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    for (const auto& tally : tallies) tally->Check(1);

    const Spec spec = ThreadedSpecs()[3];
    constexpr size_t kProblems = 4;
    std::vector<Problem> problems(kProblems);
    for (Problem& p : problems) Maker(spec, p).Make();
    for (const Kernels* kernels : Supported()) {
      Doing(kernels->name, "calls from the pool itself", text);
      const Values expected = RunEvery(*kernels, problems[0], Serial(false));
      std::vector<Values> got(kProblems);
      ended = 0;
      FakePool pool(threads);
      for (size_t i = 0; i < kProblems; ++i)
        pool.Schedule([&, i] {
          const PoolRunner<FakePool> runner(pool);
          got[i] = RunEvery(*kernels, problems[i], runner);
          ++ended;
        });
      while (ended < static_cast<int>(kProblems)) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      std::vector<Result> results = ForwardResults(problems[0]);
      for (const Result& r : BackwardResults(problems[0])) results.push_back(r);
      for (const Values& values : got) {
        const std::string difference = Difference(results, expected, values);
        if (!difference.empty()) Fail("concurrent calls change %s", difference.c_str());
      }
    }
  }
}

// A task that throws: the caller hears of it, and only after all others have ended.
void CheckThrowing() {
  for (Manner manner : {Manner::kPrompt, Manner::kLate, Manner::kNever, Manner::kInline, Manner::kThrows}) {
    for (int64_t bad : {int64_t{-1}, int64_t{-2}, int64_t{0}, int64_t{7}, int64_t{39}}) {
      for (size_t count : {size_t{1}, size_t{40}}) {
        Doing("tasks.h", "throwing", Text(3, manner) + ", task " + std::to_string(bad));
        FakePool pool(3, manner);
        const PoolRunner<FakePool> runner(pool);
        auto tally = std::make_unique<Tally>(count);
        tally->bad = bad;
        std::string caught;
        try {
          RunTally(runner, *tally);
        } catch (const std::runtime_error& e) {
          caught = e.what();
        } catch (const std::bad_alloc&) {
          caught = "refused";
        }
        const bool throws = bad == -2 || (bad >= 0 && bad < static_cast<int64_t>(count));
        if (throws != (caught.rfind("task ", 0) == 0)) Fail("the caller caught '%s'", caught.c_str());
        if (bad >= 0 && throws && caught != "task " + std::to_string(bad)) Fail("caught '%s'", caught.c_str());
        tally->Check(1);
        tally.reset();  // a helper that comes now must not look for it
        pool.Finish();
      }
    }
  }
  // No memory, at every request of a call in turn.
  const bool real = g_real_memory;
  g_real_memory = false;
  const Spec spec = ThreadedSpecs()[1];
  Problem p;
  Maker(spec, p).Make();
  for (const Kernels* kernels : Supported()) {
    Doing(kernels->name, "out of memory", spec.Text());
    RunEvery(*kernels, p, Serial(false));
    for (Array* x : {&p.dquery, &p.dkey, &p.dvalue, &p.dslopes}) x->Clear(false);
    FakePool pool(2);
    const PoolRunner<FakePool> runner(pool);
    int64_t failures = 0;
    for (int64_t at = 1; at < 100; ++at) {
      KernelMemory::FailAt(at);
      try {
        kernels->backward(BackwardCallOf(p), runner);
      } catch (const std::bad_alloc&) {
        ++failures;
      }
      if (KernelMemory::live() != 0) Fail("memory was not freed");
      if (failures < at) break;
    }
    KernelMemory::FailAt(0);
    if (failures < 3) Fail("only %lld failures of memory came out", static_cast<long long>(failures));
  }
  g_real_memory = real;
}

// Memory of all sizes is cleared, and what is beside it stays.
void CheckClear() {
  Doing("portable", "clear", "");
  FakePool pool(3);
  const PoolRunner<FakePool> runner(pool);
  for (size_t bytes : {size_t{0}, size_t{4}, size_t{1} << 20, (size_t{1} << 20) + 4, size_t{40} << 20}) {
    std::vector<char> memory(bytes + 8, 1);
    jax_fa::TakeHugePages(memory.data() + 4, bytes);
    jax_fa::Clear(runner, memory.data() + 4, bytes);
    for (size_t i = 0; i < memory.size(); ++i)
      if (memory[i] != (i < 4 || i >= bytes + 4))
        return Fail("byte %zu of %zu is %d", i, memory.size(), static_cast<int>(memory[i]));
  }
}

// Every turn of every unit is taken once, and each thread stays with a unit while there are as many units as threads.
void CheckTurns() {
  Doing("turns", "", "");
  for (int64_t units = 1; units <= 7; ++units)
    for (int64_t turns = 1; turns <= 4; ++turns)
      for (int64_t threads = 1; threads <= 5; ++threads) {
        std::vector<int> taken(static_cast<size_t>(units * turns));
        for (int64_t task = 0; task < units * turns; ++task) {
          const auto at = jax_fa::portable::TurnAt(task, units, turns, threads);
          const bool inside = at.unit >= 0 && at.unit < units && at.turn >= 0 && at.turn < turns;
          if (!inside || taken[static_cast<size_t>(at.unit * turns + at.turn)]++) Fail("a turn is not taken once");
          if (task < units / threads * threads * turns && at.unit % threads != task % threads)
            Fail("a thread goes from a unit to another before its last turn");
        }
      }
}

void CheckTasks() {
  g_real_memory = true;
  CheckTurns();
  CheckClear();
  CheckCallsFromThePool();
  CheckThrowing();
  CheckPools();
  g_real_memory = false;
}

}  // namespace
}  // namespace jax_fa_test
