// The caches of this machine, the tiles that they call for, and how it multiplies. Compiled with baseline flags only.

#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>

#include "cpu/kernel.h"

#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#if defined(JAX_FA_X86)
#include <cpuid.h>
#endif

namespace jax_fa {
namespace {

constexpr int64_t kKiB = 1024;
// Where the system does not say: what every processor of the last ten years has, but for small ones.
constexpr Caches kUsual{32 * kKiB, 512 * kKiB, 4096 * kKiB};

#if defined(__linux__)
// The data or unified cache of a level as the kernel describes it, or 0.
int64_t CacheOfLinux(int level) {
  for (int index = 0; index < 8; ++index) {
    const auto read = [&](const char* what, const char* format, auto* value) {
      char path[96];
      std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/%s", index, what);
      std::FILE* file = std::fopen(path, "r");
      if (file == nullptr) return false;
      const bool found = std::fscanf(file, format, value) == 1;  // NOLINT(cert-err34-c): numbers of the system
      std::fclose(file);
      return found;
    };
    int at = 0;
    long size = 0;  // NOLINT(google-runtime-int): as %ld reads it
    char type[16] = {};
    if (!read("level", "%d", &at)) return 0;
    if (at == level && read("type", "%15s", type) && type[0] != 'I' && read("size", "%ldK", &size)) return size * kKiB;
  }
  return 0;
}
#endif

int64_t CacheOf([[maybe_unused]] int level) {
#if defined(__APPLE__)
  // Those of the fast cores. The second one is shared by a cluster of about four.
  const char* const names[] = {"hw.perflevel0.l1dcachesize", "hw.perflevel0.l2cachesize", "hw.l3cachesize"};
  int64_t bytes = 0;
  size_t size = sizeof bytes;
  if (sysctlbyname(names[level - 1], &bytes, &size, nullptr, 0) != 0) return 0;
  return level == 2 ? bytes / 4 : bytes;
#elif defined(__linux__)
  if (const int64_t bytes = CacheOfLinux(level); bytes > 0) return bytes;
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  constexpr int kNames[] = {_SC_LEVEL1_DCACHE_SIZE, _SC_LEVEL2_CACHE_SIZE, _SC_LEVEL3_CACHE_SIZE};
  return sysconf(kNames[level - 1]);
#else
  return 0;
#endif
#else
  return 0;
#endif
}

Caches Found() {
  Caches caches = kUsual;
  if (const int64_t bytes = CacheOf(1); bytes > 0) caches.first = bytes;
  if (const int64_t bytes = CacheOf(2); bytes > 0) caches.second = bytes;
  if (const int64_t bytes = CacheOf(3); bytes > 0) caches.third = bytes;
  return caches;
}

// Three numbers of bytes, separated by commas.
bool Parse(const char* text, Caches* caches) {
  int64_t* const parts[] = {&caches->first, &caches->second, &caches->third};
  for (int64_t* part : parts) {
    char* end = nullptr;
    errno = 0;
    *part = std::strtoll(text, &end, 10);
    const char separator = part == &caches->third ? '\0' : ',';
    if (end == text || errno != 0 || *part <= 0 || *end != separator) return false;
    text = end + 1;
  }
  return true;
}

// AMD's family 19h is Zen 3, without AVX-512, and Zen 4, with vectors of 256 bits inside.
bool MultipliesHalves() {
#if defined(JAX_FA_X86)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__builtin_cpu_is("amd") || __get_cpuid(1, &a, &b, &c, &d) == 0) return false;
  const unsigned family = (a >> 8 & 0xf) + (a >> 20 & 0xff);
  return family == 0x19;
#else
  return false;
#endif
}

Tuning For(const Caches& caches, bool halves) { return {caches, TilesFor(caches), ChunkFloats(caches), halves}; }

struct Choice {
  Tuning tuning;
  bool valid = true;

  Choice() {
    Caches caches{};
    const char* given = std::getenv("JAX_FA_CPU_CACHES");
    if (given == nullptr || *given == '\0') {
      caches = Found();
    } else if (!Parse(given, &caches)) {
      caches = kUsual;
      valid = false;
    }
    tuning = For(caches, MultipliesHalves());
  }
};

Choice& Chosen() {
  static Choice choice;
  return choice;
}

}  // namespace

const Tuning& TuningInUse() { return Chosen().tuning; }

bool CachesAreValid() { return Chosen().valid; }

void UseMachine(const Caches& caches, bool halves) { Chosen().tuning = For(caches, halves); }

std::string DescribeTiles(const Kernels& kernels) {
  const Tuning& t = TuningInUse();
  const auto kib = [](int64_t bytes) { return std::to_string(bytes / kKiB) + " KiB"; };
  const auto tile = [](int64_t rows, int64_t keys) { return std::to_string(rows) + "x" + std::to_string(keys); };
  std::string text = std::string(kernels.name) + ": caches " + kib(t.caches.first) + ", " + kib(t.caches.second) +
                     ", " + kib(t.caches.third) + "; rows x keys at head_dim";
  for (const int64_t head_dim : {64, 128})
    text += " " + std::to_string(head_dim) + ": forward " +
            tile(t.tiles.group_rows, KeysOf(t.tiles.forward_keys, head_dim)) + ", backward " +
            tile(t.tiles.backward_rows, KeysOf(t.tiles.backward_keys, head_dim)) + ", second " +
            tile(t.tiles.second_rows, KeysOf(t.tiles.second_keys, head_dim)) + (head_dim == 64 ? ";" : "");
  return text;
}

}  // namespace jax_fa
