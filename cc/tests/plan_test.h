// What a call costs beyond its tasks, and where arrays are large.
#pragma once

#include <ctime>

#include "check.h"
#include "cpu/tuning.h"
#include "tasks_test.h"

namespace jax_fa_test {
namespace {

// Many small batch entries, in one block of memory: entry b of each array begins at b times its stride.
struct ManyEntries {
  int64_t B;
  std::vector<float> memory;
  std::vector<std::vector<int64_t>> offsets;
  Call call;

  // `bias_of(b)`: which bias an entry has.
  template <typename BiasOf>
  ManyEntries(int64_t B, const BiasOf& bias_of) : B(B), memory(static_cast<size_t>(B * 16 + 128), 0.5f) {
    call.B = B, call.Sq = 2, call.Skv = jax_fa::KeysOf(jax_fa::kSmallRows, 1) + 1;  // else several heads are a task
    call.N = call.K = call.D = call.Dv = 1;
    offsets.reserve(3);
    const auto table = [&](const auto& of) {
      offsets.emplace_back(static_cast<size_t>(B));
      for (int64_t b = 0; b < B; ++b) offsets.back()[static_cast<size_t>(b)] = of(b);
      return offsets.back().data();
    };
    const auto view = [&](const int64_t* batch, int64_t row, int64_t col) {
      View v;
      v.data = reinterpret_cast<char*>(memory.data());
      v.batch = batch, v.row = row, v.col = col;
      return v;
    };
    const int64_t* own = table([](int64_t b) { return 8 * b; });
    const int64_t* bias = table([&](int64_t b) { return 4 * bias_of(b); });
    for (View* v : {&call.query, &call.key, &call.value, &call.out, &call.m, &call.l, &call.dout}) *v = view(own, 1, 0);
    for (View* v : {&call.query, &call.key, &call.value, &call.out, &call.dout}) v->col = 1;
    call.bias = view(bias, 2, 1);
    call.key_tangent = call.key, call.bias_tangent = call.bias;
    float* const results = memory.data() + 8 * B;
    call.out_tangent = call.out, call.logsumexp_tangent = call.m;
    for (View* v : {&call.out_tangent, &call.logsumexp_tangent}) v->data = reinterpret_cast<char*>(results);
    for (View* v : {&call.dquery, &call.dkey, &call.dvalue, &call.dbias}) *v = view(own, 1, 1);
    for (View* v : {&call.dquery, &call.dkey, &call.dvalue}) v->data = reinterpret_cast<char*>(results);
    call.dbias = view(bias, 2, 1), call.dbias.data = reinterpret_cast<char*>(results);
  }
};

// Runs of all tasks only so many.
struct Few : Runner {
  explicit Few(int64_t most) : Runner{&Few::RunAll}, most(most) {}
  static void RunAll(const Runner* self, int64_t count, Task fn, void* context) {
    const int64_t most = static_cast<const Few*>(self)->most;
    for (int64_t i = 0; i < count && i < most; ++i) fn(context, i);
  }
  int64_t most;
};

// The least processor time of a few runs, in seconds.
template <typename Fn>
double LeastTime(const Fn& fn) {
  double least = HUGE_VAL;
  for (int i = 0; i < 5; ++i) {
    const auto now = [] {
      timespec t;
      clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
      return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
    };
    const double start = now();
    fn();
    least = std::min(least, now() - start);
  }
  return least;
}

// A call of 64 times the entries is planned in 64 times the time, not 4096, and begins a task as soon.
void CheckPlanning() {
  g_real_memory = true;
  constexpr int64_t kSmall = 2048, kTimes = 64, kLarge = kSmall * kTimes;
  const auto own = [](int64_t b) { return b; };
  const auto pairs = [](int64_t b) { return b / 2; };
  const auto one = [](int64_t) { return int64_t{0}; };
  const auto check = [](const Kernels& kernels, const char* name, const auto& bias_of) {
    ManyEntries small(kSmall, bias_of), large(kLarge, bias_of);
    for (const auto& [pass, kernel] : {std::pair("forward", kernels.forward), std::pair("backward", kernels.backward),
                                       std::pair("tangent", kernels.tangent)}) {
      const auto time = [&, kernel = kernel](ManyEntries& entries, int64_t tasks) {
        return LeastTime([&] { kernel(entries.call, Few(tasks)); });
      };
      Doing(kernels.name, pass, name);
      const double few = time(small, 0), many = time(large, 0);
      if (many > 8 * kTimes * few + 1e-3)
        Fail("a plan takes %.3g ms for %lld entries and %.3g ms for %lld", 1e3 * few, static_cast<long long>(kSmall),
             1e3 * many, static_cast<long long>(kLarge));
      if (bias_of(1) == 0) continue;  // one task or few
      constexpr int64_t kTasks = 500;
      const double small_tasks = time(small, kTasks) - few, large_tasks = time(large, kTasks) - many;
      if (large_tasks > 8 * small_tasks + many + 1e-3)
        Fail("%lld tasks take %.3g ms of a small call and %.3g ms of a large one", static_cast<long long>(kTasks),
             1e3 * small_tasks, 1e3 * large_tasks);
    }
  };
  for (const Kernels* kernels : Supported()) {
    check(*kernels, "a bias for each entry", own);
    check(*kernels, "a bias for each two entries", pairs);
    check(*kernels, "one bias", one);
  }
  g_real_memory = false;
}

// There are several tasks too where all heads add to one bias gradient, and of one head with few keys.
void CheckTaskCounts() {
  constexpr int64_t kEntries = int64_t{1} << 17;
  struct Counting : Runner {
    Counting() : Runner{&Counting::Count} {}
    static void Count(const Runner* self, int64_t count, Task, void*) {
      int64_t& most = static_cast<const Counting*>(self)->most;
      most = std::max(most, count);
    }
    mutable int64_t most = 0;
  };
  for (const Kernels* kernels : Supported()) {
    ManyEntries entries(kEntries, [](int64_t) { return int64_t{0}; });
    for (int64_t keys : {entries.call.Skv, int64_t{2}}) {
      entries.call.Skv = keys;
      Doing(kernels->name, "backward", keys == 2 ? "one bias of small heads" : "one bias");
      const Counting runner;
      kernels->backward(entries.call, runner);
      if (runner.most < 16)
        Fail("%lld tasks for %lld heads", static_cast<long long>(runner.most), static_cast<long long>(kEntries));
    }
    Doing(kernels->name, "backward", "one head with few keys");
    ManyEntries one(1, [](int64_t) { return int64_t{0}; });
    one.call.Sq = 10000, one.call.bias = one.call.dbias = {};
    const Counting runner;
    kernels->backward(one.call, runner);
    if (runner.most < 8) Fail("%lld tasks", static_cast<long long>(runner.most));
  }
}

// ---- indices beyond 2^31 ----

// Address space for so many bytes, of which hardly any are touched.
class Sparse {
 public:
  explicit Sparse(size_t bytes) : bytes_(bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<char*>(p);
  }
  ~Sparse() { munmap(data_, bytes_); }
  Sparse(const Sparse&) = delete;
  Sparse& operator=(const Sparse&) = delete;
  char* data() const { return data_; }

 private:
  size_t bytes_;
  char* data_;
};

// The same call with its arrays side by side, and with more than 2^31 elements between their entries or heads, or from
// the first row to the last: the same bits.
void CheckFarApart() {
  constexpr int64_t kFar = (int64_t{1} << 31) + 64, kB = 2, kSq = 18, kN = 2;
  constexpr int64_t kBits = 64;  // of drop_bits, for a row
  const auto run = [&](const Kernels& kernels, int64_t keys, int64_t width, int apart, Values& values) {
    const int64_t batch = apart == 0 ? kFar : 16384, head = apart == 1 ? kFar : 4096, row = apart == 2 ? kFar / 16 : 64;
    const int64_t extent = (kB - 1) * batch + (kN - 1) * head + keys * row + 64;
    std::vector<std::unique_ptr<Sparse>> arrays;
    std::vector<std::vector<int64_t>> offsets;
    offsets.reserve(48);
    const auto view = [&](DType dtype, bool by_head, bool by_row, bool by_col) {
      arrays.push_back(std::make_unique<Sparse>(static_cast<size_t>(extent * jax_fa::ItemSize(dtype))));
      offsets.push_back({0, batch});
      View v;
      v.data = arrays.back()->data(), v.dtype = dtype, v.batch = offsets.back().data();
      v.head = by_head ? head : 0, v.row = by_row ? row : 0, v.col = by_col ? 1 : 0;
      return v;
    };
    Random random(11);
    const auto draw = [&](const View& v, int64_t rows, int64_t cols, const auto& next) {
      for (int64_t b = 0; b < kB; ++b)
        for (int64_t h = 0; h < kN; ++h)
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < cols; ++c) {
              if (v.dtype == DType::kF32) {
                *v.At<float>(b, h, r, c) = static_cast<float>(next());
              } else if (v.dtype == DType::kU8) {
                *v.At<uint8_t>(b, h, r, c) = static_cast<uint8_t>(next());
              } else {
                *v.At<int32_t>(b, h, r, c) = static_cast<int32_t>(next());
              }
            }
    };
    const auto normal = [&] { return random.Normal(); };
    Call c;
    c.B = kB, c.Sq = kSq, c.Skv = keys, c.N = c.K = kN, c.D = c.Dv = width, c.scale = 0.5f, c.keep_prob = 0.75f;
    for (View* v : {&c.query, &c.key, &c.value, &c.out, &c.dout, &c.dquery, &c.dkey, &c.dvalue})
      *v = view(DType::kF32, true, true, true);
    draw(c.query, kSq, width, normal), draw(c.key, keys, width, normal), draw(c.value, keys, width, normal);
    draw(c.dout, kSq, width, normal);
    c.bias = view(DType::kF32, true, true, true), c.dbias = view(DType::kF32, true, true, true);
    draw(c.bias, kSq, keys, normal);
    c.mask = view(DType::kU8, true, true, true);
    draw(c.mask, kSq, keys, [&] { return random.OneIn(3) ? 0.0 : 1.0; });
    for (View* v : {&c.m, &c.l, &c.upper, &c.segment_row, &c.position}) *v = view(DType::kF32, true, true, false);
    for (View* v : {&c.upper, &c.segment_row, &c.position}) v->dtype = DType::kI32;
    draw(c.upper, kSq, 1, [&] { return static_cast<double>(random.Below(keys + 1)); });
    draw(c.segment_row, kSq, 1, [&] { return static_cast<double>(random.Below(3) - 1); });
    draw(c.position, kSq, 1, [&] { return static_cast<double>(random.Below(50) - 10); });
    c.segment_key = view(DType::kI32, true, false, true);
    draw(c.segment_key, 1, keys, [&] { return static_cast<double>(random.Below(2)); });
    c.alibi = Alibi::kLinear;
    for (View* v : {&c.slopes, &c.dslopes, &c.scale_of_head, &c.dscale, &c.soft_cap_of_head, &c.dsoft_cap})
      *v = view(DType::kF32, true, false, false);
    draw(c.slopes, 1, 1, [&] { return random.Uniform(); });
    draw(c.scale_of_head, 1, 1, [&] { return random.Uniform(); });
    draw(c.soft_cap_of_head, 1, 1, [&] { return 1.0 + random.Uniform(); });
    // Bits of the last row begin more than 2^34 bits after those of the first where entries are apart.
    c.drop_offset = view(DType::kI32, true, true, false);
    const int64_t far_row = apart == 0 ? (int64_t{1} << 31) - kBits / 8 - 8 : kBits;
    draw(c.drop_offset, kSq, 2, [] { return 0.0; });
    for (int64_t b = 0; b < kB; ++b)
      for (int64_t h = 0; h < kN; ++h) *c.drop_offset.At<int32_t>(b, h, kSq - 1) = static_cast<int32_t>(far_row);
    c.drop_bits = view(DType::kU8, false, false, true);
    c.drop_bytes = far_row + kBits / 8;
    for (int64_t b = 0; b < kB; ++b)
      for (int64_t at : {int64_t{0}, far_row})
        for (int64_t i = 0; i < kBits / 8; ++i)
          *c.drop_bits.At<uint8_t>(b, 0, 0, at + i) = static_cast<uint8_t>(random.Bits());
    for (View* v : {&c.query_tangent, &c.key_tangent, &c.value_tangent, &c.out_tangent})
      *v = view(DType::kF32, true, true, true);
    draw(c.query_tangent, kSq, width, normal), draw(c.key_tangent, keys, width, normal);
    draw(c.value_tangent, keys, width, normal);
    c.bias_tangent = view(DType::kF32, true, true, true), c.logsumexp_tangent = view(DType::kF32, true, true, false);
    draw(c.bias_tangent, kSq, keys, normal);
    for (View* v : {&c.slopes_tangent, &c.scale_tangent, &c.soft_cap_tangent}) {
      *v = view(DType::kF32, true, false, false);
      draw(*v, 1, 1, normal);
    }
    kernels.forward(c, Serial(false));
    kernels.backward(c, Serial(false));
    kernels.tangent(c, Serial(false));
    const auto take = [&](const View& v, int64_t rows, int64_t cols) {
      values.emplace_back();
      for (int64_t b = 0; b < kB; ++b)
        for (int64_t h = 0; h < kN; ++h)
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t col = 0; col < cols; ++col) values.back().push_back(*v.At<float>(b, h, r, col));
    };
    take(c.out, kSq, width), take(c.m, kSq, 1), take(c.l, kSq, 1);
    take(c.dquery, kSq, width), take(c.dkey, keys, width), take(c.dvalue, keys, width), take(c.dbias, kSq, keys);
    take(c.out_tangent, kSq, width), take(c.logsumexp_tangent, kSq, 1);
    take(c.dslopes, 1, 1), take(c.dscale, 1, 1), take(c.dsoft_cap, 1, 1);
  };
  struct Head {
    int64_t keys, width;
  };
  for (const Kernels* kernels : Supported()) {
    for (const Head& x : {Head{20, 4}, Head{36, 40}}) {  // a small one, and one that is packed
      Doing(kernels->name, "indices beyond 2^31", std::to_string(x.keys) + " keys");
      Values near;
      run(*kernels, x.keys, x.width, -1, near);
      for (int apart : {0, 1, 2}) {
        Values far;
        run(*kernels, x.keys, x.width, apart, far);
        for (size_t r = 0; r < near.size(); ++r)
          for (size_t i = 0; i < near[r].size(); ++i)
            if (!Same(near[r][i], far[r][i]))
              return Fail("result %zu, element %zu is %.9g, and far apart (%d) %.9g", r, i, near[r][i], apart,
                          far[r][i]);
      }
    }
  }
}

// ---- a number for the call, and the same number as data ----

void CheckStaticAndGiven() {
  for (uint64_t seed = 1; seed <= 12; ++seed) {
    Spec s;
    s.seed = seed;
    s.B1 = 2, s.Sq = seed % 3 ? 40 : 3, s.Skv = 300, s.N = 4, s.K = 2, s.dtype = seed % 2 ? DType::kBF16 : DType::kF32;
    s.philox = true, s.keep = seed % 4 ? 0.8125 : 1.0;
    if (seed % 3 == 0) s.cap = 3.0;
    if (seed % 5 == 0) s.bias = 24, s.infinite_bias = true;
    if (seed % 4 == 1) s.bounds = Bounds::kCausalEnd;
    if (seed % 6 == 5) s.scale = -0.25;
    if (seed == 7) s.scale = 0.0;
    Problem p;
    Maker(s, p).Make();
    Problem given;
    Maker(s, given).Make();
    const int axes = static_cast<int>(seed % 8);
    const Dims dims{axes & 1 ? s.B1 : 1, 1, axes & 2 ? s.N : 1, 1, 1};
    const auto fill = [&](Array& x, DType dtype, double value) {
      x = Array(dtype, dims, s.B2, s.B1, Storage());
      std::fill(x.value.begin(), x.value.end(), value);
      x.Write();
    };
    fill(given.scale_of_head, DType::kF32, p.scale);
    if (p.cap != 0.0) fill(given.cap_of_head, DType::kF32, p.cap);
    fill(given.threshold_of_head, DType::kU32, p.threshold);
    given.scale = 1.0, given.cap = 0.0, given.keep_prob = 1.0, given.threshold = 65536;
    for (const Kernels* kernels : Supported()) {
      Doing(kernels->name, "scale, cap and rate as data", s.Text());
      const Values expected = RunEvery(*kernels, p, Serial(false)), got = RunEvery(*kernels, given, Serial(false));
      const std::string difference = Difference(EveryResult(p), expected, got);
      if (!difference.empty()) Fail("data change %s", difference.c_str());
    }
  }
}

}  // namespace
}  // namespace jax_fa_test
