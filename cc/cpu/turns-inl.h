// The order of tasks: a unit's tasks take turns where the rows of one are neighbours in memory of those of the next, as those of
// the heads of a batch entry are. What a thread fetches for one then has the translations of addresses, and often the lines, of
// the next one. Each thread goes through units of its own, since lines beside those that it reads or writes are fetched too.
#pragma once

#include "cpu/target-inl.h"

namespace jax_fa::JAX_FA_ISA {
namespace {

struct Turn {
  int64_t unit, turn;
};

// Task `at` of `units` times `turns`, which `threads` threads begin in the order of their numbers.
inline Turn TurnAt(int64_t at, int64_t units, int64_t turns, int64_t threads) {
  const int64_t first = at / (turns * threads) * threads, rest = units - first;
  const int64_t side = rest < threads ? rest : threads, within = at - first * turns;  // units side by side
  return {first + within % side, within / side};
}

}  // namespace
}  // namespace jax_fa::JAX_FA_ISA
