// Drives the adapter to CANN against the emulator, which JAX_FA_CANN_EMULATOR names:
//
//   cann_test quick      every function, results, both ways to a stream, a fault in every C call
//   cann_test threads    eight threads at once
//   cann_test parsers N  what is read from files and the environment, N times at random; N SEED: another N times
//
// Also what the sanitizers run.
#include <dlfcn.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cann/adapter.h"
#include "cann/library.h"
#include "cann/text.h"
#include "cann/workspace.h"
#include "parsers_test.h"

namespace {

using jax_fa::cann::Array;
using jax_fa::cann::Call;
using jax_fa::cann::Direction;
using jax_fa::cann::Library;
using jax_fa::cann::Status;

int failures = 0;

#define EXPECT(condition, ...)                                             \
  do {                                                                     \
    if (!(condition)) {                                                    \
      ++failures;                                                          \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fprintf(stderr, "\n");                                          \
    }                                                                      \
  } while (false)

// The emulator's controls, and the runtime functions that a framework calls.
struct Emulator {
  int64_t (*live)(const char*);
  int64_t (*calls)(const char*);
  void (*fail)(const char*, int, int, int);
  void (*reset)();
  int (*set_device)(int32_t);
  int (*create_stream)(void**);
  int (*destroy_stream)(void*);
  int (*synchronize)(void*);

  Emulator() {
    void* const handle = dlopen(Library::Get().runtime.c_str(), RTLD_NOW | RTLD_LOCAL);
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(handle, name));
      if (function == nullptr) {
        std::fprintf(stderr, "the emulator has no %s\n", name);
        std::exit(2);
      }
    };
    find(live, "jaxFaEmulatorLive");
    find(calls, "jaxFaEmulatorCalls");
    find(fail, "jaxFaEmulatorFail");
    find(reset, "jaxFaEmulatorReset");
    find(set_device, "aclrtSetDevice");
    find(create_stream, "aclrtCreateStream");
    find(destroy_stream, "aclrtDestroyStream");
    find(synchronize, "aclrtSynchronizeStream");
  }

  // Streams and workspaces may be kept for the next call; nothing else may.
  int64_t leaked() const { return live("tensor") + live("int_array") + live("executor"); }
};

Emulator& TheEmulator() {
  static Emulator emulator;
  return emulator;
}

// Memory at a multiple of 64 bytes.
class Memory {
 public:
  explicit Memory(size_t bytes)
      : bytes_(std::max<size_t>((bytes + 63) / 64 * 64, 64)), data_(std::aligned_alloc(64, bytes_)) {
    std::memset(data_, 0, bytes_);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  Memory(Memory&& other) noexcept : bytes_(other.bytes_), data_(std::exchange(other.data_, nullptr)) {}
  ~Memory() { std::free(data_); }
  void* get() const { return data_; }
  float* floats() const { return static_cast<float*>(data_); }

 private:
  size_t bytes_;
  void* data_;
};

struct Shape {
  std::string layout = "BSND";
  int64_t B = 2, Sq = 5, Skv = 7, N = 4, K = 2, D = 16;
  int64_t sparse_mode = 0;
  int64_t pse_type = -1;  // -1: no pse
  bool drop = false;
  bool sink = false;  // then the call is float16, of zeros: CANN's backward with a sink takes no float32
  int64_t q_start = 0, kv_start = 0;
  std::string softmax_layout;
  std::vector<int64_t> q_ends, kv_ends, prefix;
};

// A call with arrays of its own, forward and backward; float32 but with a sink.
class Example {
 public:
  explicit Example(const Shape& shape)
      : shape_(shape), random_(7) {  // NOLINT(bugprone-random-generator-seed): the same numbers in every run
    const Shape& s = shape;
    const bool packed = s.layout == "TND";
    query_ = New(Dims(s.Sq, s.N), true);
    key_ = New(Dims(s.Skv, s.K), true);
    value_ = New(Dims(s.Skv, s.K), true);
    dy_ = New(Dims(s.Sq, s.N), true);
    for (Array* x : {&out_, &dq_}) *x = New(Dims(s.Sq, s.N), false);
    for (Array* x : {&dk_, &dv_}) *x = New(Dims(s.Skv, s.K), false);
    const std::vector<int64_t> stats =
        packed ? std::vector<int64_t>{s.Sq, s.N, 8} : std::vector<int64_t>{s.B, s.N, s.Sq, 8};
    max_ = New(stats, false);
    sum_ = New(stats, false);
    if (s.pse_type >= 2) pse_ = New({s.N}, true);
    if (s.pse_type == 0 || s.pse_type == 1) pse_ = New({s.B, s.N, s.Sq, s.Skv}, true);
    if (s.sparse_mode > 1) mask_ = CompressedMask(s.sparse_mode == 6);
    if (s.sink) {
      sink_ = Own({s.N}, jax_fa::cann::ACL_FLOAT);
      dsink_ = Own({s.N}, jax_fa::cann::ACL_FLOAT);
      for (Array* x : {&query_, &key_, &value_, &dy_, &out_, &dq_, &dk_, &dv_})
        *x = Own(x->dims, jax_fa::cann::ACL_FLOAT16);
    }
    if (s.drop) {
      drop_ = Bytes({(s.B * s.N * s.Sq * s.Skv + 7) / 8});
      std::memset(drop_.data, 0x6D, drop_.bytes());
    }
  }

  Call forward() const { return Common(Direction::kForward); }
  Call backward() const {
    Call c = Common(Direction::kBackward);
    c.dy = dy_;
    c.dq = dq_;
    c.dk = dk_;
    c.dv = dv_;
    c.dsink = dsink_;
    return c;
  }

  std::vector<float> results() const {
    std::vector<float> all;
    for (const Array* x : {&max_, &sum_, &out_, &dq_, &dk_, &dv_})
      all.insert(all.end(), static_cast<float*>(x->data), static_cast<float*>(x->data) + x->elements());
    return all;
  }

  // Row 0 of batch entry 0, head 0 by hand, of a BSND example without mask, pse and dropout.
  double Expected() const {
    const auto at = [&](const Array& x, int64_t row, int64_t d) {
      return static_cast<double>(static_cast<float*>(x.data)[row * x.dims[2] * x.dims[3] + d]);
    };
    double sum = 0, first = 0;
    for (int64_t j = 0; j < shape_.Skv; ++j) {
      double s = 0;
      for (int64_t d = 0; d < shape_.D; ++d) s += at(query_, 0, d) * at(key_, j, d);
      sum += std::exp(0.25 * s);
      first += std::exp(0.25 * s) * at(value_, j, 0);
    }
    return first / sum;
  }
  double FirstOut() const { return static_cast<float*>(out_.data)[0]; }

 private:
  std::vector<int64_t> Dims(int64_t S, int64_t heads) const {
    const Shape& s = shape_;
    if (s.layout == "TND") return {S, heads, s.D};
    if (s.layout == "BSH") return {s.B, S, heads * s.D};
    if (s.layout == "SBH") return {S, s.B, heads * s.D};
    if (s.layout == "BNSD") return {s.B, heads, S, s.D};
    return {s.B, S, heads, s.D};
  }

  Array Own(std::vector<int64_t> dims, jax_fa::cann::aclDataType dtype) {
    Array x;
    x.dims = std::move(dims);
    x.dtype = dtype;
    memory_.emplace_back(x.bytes());
    x.data = memory_.back().get();
    return x;
  }

  Array New(std::vector<int64_t> dims, bool random) {
    Array x = Own(std::move(dims), jax_fa::cann::ACL_FLOAT);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; random && i < x.elements(); ++i) static_cast<float*>(x.data)[i] = normal(random_);
    return x;
  }

  Array Bytes(std::vector<int64_t> dims) { return Own(std::move(dims), jax_fa::cann::ACL_UINT8); }

  Array CompressedMask(bool prefix) {
    Array x = Bytes({prefix ? 3072 : 2048, 2048});
    for (int64_t i = 0; i < x.dims[0]; ++i)
      for (int64_t j = 0; j < 2048; ++j) static_cast<char*>(x.data)[i * 2048 + j] = i < 2048 ? j > i : j >= 1024;
    return x;
  }

  Call Common(Direction direction) const {
    Call c;
    c.direction = direction;
    c.input_layout = shape_.layout;
    c.softmax_layout = shape_.softmax_layout;
    c.head_num = shape_.N;
    c.scale_value = 0.25;
    c.keep_prob = shape_.drop ? 0.5 : 1.0;
    c.pre_tokens = c.next_tokens = 2147483647;
    if (shape_.sparse_mode == 4) c.pre_tokens = 3, c.next_tokens = 1;
    c.sparse_mode = shape_.sparse_mode;
    c.pse_type = std::max<int64_t>(shape_.pse_type, shape_.pse_type < 0 ? 1 : 0);
    c.prefix = shape_.prefix;
    c.actual_seq_qlen = shape_.q_ends;
    c.actual_seq_kvlen = shape_.kv_ends;
    c.query = query_;
    c.key = key_;
    c.value = value_;
    c.pse = pse_;
    c.drop_mask = drop_;
    c.atten_mask = mask_;
    c.sink = sink_;
    c.q_start = shape_.q_start;
    c.kv_start = shape_.kv_start;
    c.softmax_max = max_;
    c.softmax_sum = sum_;
    c.attention = out_;
    return c;
  }

  Shape shape_;
  std::mt19937 random_;
  std::vector<Memory> memory_;
  Array query_, key_, value_, dy_, out_, max_, sum_, dq_, dk_, dv_, pse_, mask_, drop_, sink_, dsink_;
};

Shape Packed(int64_t sparse_mode, std::string softmax_layout) {
  Shape s;
  s.layout = "TND";
  s.q_ends = {3, 3, 8};
  s.kv_ends = {4, 6, 13};
  s.Sq = 8;
  s.Skv = 13;
  s.sparse_mode = sparse_mode;
  s.softmax_layout = std::move(softmax_layout);
  return s;
}

// One example of every function.
std::vector<Shape> Shapes() {
  std::vector<Shape> all;
  for (const char* layout : {"BSH", "SBH", "BSND", "BNSD"}) {
    Shape s;
    s.layout = layout;
    for (int64_t mode : {0, 2, 3, 4, 6}) {
      s.sparse_mode = mode;
      s.prefix = mode == 6 ? std::vector<int64_t>{2, 6} : std::vector<int64_t>{};
      all.push_back(s);
    }
  }
  for (int64_t type : {0, 1, 2, 3}) {
    Shape s;
    s.pse_type = type;
    s.Skv = type < 2 ? 7 : s.Sq;
    s.drop = type % 2;
    s.q_start = type;
    all.push_back(s);
  }
  for (int64_t mode : {0, 2, 3}) {
    all.push_back(Packed(mode, ""));
    all.push_back(Packed(mode, "same_as_input"));
  }
  for (Shape s : {Shape{}, Packed(3, ""), Packed(3, "same_as_input")}) {
    s.sink = true;
    all.push_back(s);
  }
  return all;
}

void ExpectOk(const Status& status) { EXPECT(status.ok(), "%s", status.message.c_str()); }

void TestResults() {
  for (const Shape& shape : Shapes()) {
    const Example example(shape);
    ExpectOk(RunAndWait(example.forward()));
    ExpectOk(RunAndWait(example.backward()));
    if (shape.sink) continue;  // the results are no float32
    for (float x : example.results()) EXPECT(std::isfinite(x), "%s", shape.layout.c_str());
  }
  const Example plain{Shape{}};
  ExpectOk(RunAndWait(plain.forward()));
  EXPECT(std::fabs(plain.FirstOut() - plain.Expected()) < 1e-5, "%g, not %g", plain.FirstOut(), plain.Expected());
  EXPECT(TheEmulator().leaked() == 0, "objects are alive");
}

// As a framework calls it: on a stream of its own, waiting later, with and without memory for the workspace.
void TestEnqueue() {
  Emulator& emulator = TheEmulator();
  emulator.set_device(0);
  void* stream = nullptr;
  emulator.create_stream(&stream);
  for (const bool with_scratch : {true, false}) {
    std::vector<Memory> scratch;
    const jax_fa::cann::Scratch give = [&](size_t bytes, size_t alignment) -> void* {
      if (!with_scratch) return nullptr;
      scratch.emplace_back(bytes + alignment);
      const size_t past = reinterpret_cast<uintptr_t>(scratch.back().get()) % alignment;
      return static_cast<char*>(scratch.back().get()) + (past == 0 ? 0 : alignment - past);
    };
    const Example queued{Shape{}}, waited{Shape{}};
    emulator.reset();
    ExpectOk(Enqueue(queued.forward(), stream, 0, give));
    ExpectOk(Enqueue(queued.backward(), stream, 0, give));
    EXPECT(emulator.calls("aclrtSynchronizeStream") == 0, "the device path waits");
    EXPECT(emulator.leaked() == 0, "descriptors outlive the call");
    EXPECT(emulator.calls("aclrtMalloc") == (with_scratch ? 0 : 1), "%d mallocs", int(emulator.calls("aclrtMalloc")));
    EXPECT(emulator.synchronize(stream) == 0, "the work fails");
    ExpectOk(RunAndWait(waited.forward()));
    ExpectOk(RunAndWait(waited.backward()));
    EXPECT(queued.results() == waited.results(), "other results");
  }
  ExpectOk(jax_fa::cann::ReleaseAll());
  emulator.destroy_stream(stream);
}

// Every C call that the adapter makes fails once, each time it makes it.
void TestFaults() {
  Emulator& emulator = TheEmulator();
  Shape sink = Packed(3, "same_as_input");
  sink.sink = true;
  for (const Shape& shape : {Shape{}, Packed(3, ""), Packed(3, "same_as_input"), sink}) {
    for (const bool backward : {false, true}) {
      const Example example(shape);
      ExpectOk(RunAndWait(example.forward()));
      const Call call = backward ? example.backward() : example.forward();
      const bool varlen = shape.layout == "TND", in_rows = !shape.softmax_layout.empty();
      std::string op = "aclnnFlashAttention";
      if (!varlen) op += backward ? "ScoreGradV2" : "ScoreV2";
      if (varlen)
        op += std::string(backward ? "UnpaddingScoreGrad" : "VarLenScore") + (shape.sink ? "V5"
                                                                              : in_rows  ? "V4"
                                                                                         : "V2");
      const std::string phase1 = op + "GetWorkspaceSize";
      for (const std::string& function :
           {std::string("aclrtCreateStream"), std::string("aclCreateTensor"), std::string("aclCreateIntArray"), phase1,
            std::string("aclrtMalloc"), op, std::string("kernel"), std::string("aclrtSynchronizeStream"),
            std::string("aclDestroyTensor"), std::string("aclDestroyIntArray")}) {
        for (int skip = 0;; ++skip) {
          ExpectOk(jax_fa::cann::ReleaseAll());  // so that streams and workspaces are made again
          emulator.reset();
          emulator.fail(function.c_str(), 507899, skip, 1);
          const Status status = RunAndWait(call);
          const bool reached = emulator.calls(function.c_str()) > skip;
          emulator.reset();
          EXPECT(emulator.leaked() == 0, "%s, call %d: %d objects alive", function.c_str(), skip,
                 int(emulator.leaked()));
          // What fails while it cleans up after success is no failure of the call.
          const bool cleaning = function.rfind("aclDestroy", 0) == 0;
          EXPECT(status.ok() == (!reached || cleaning), "%s, call %d: %s", function.c_str(), skip,
                 status.message.c_str());
          const bool names = function == "kernel" || status.message.find(function) != std::string::npos;
          EXPECT(status.ok() || names, "%s is not named: %s", function.c_str(), status.message.c_str());
          ExpectOk(RunAndWait(call));
          if (!reached) break;
        }
      }
      // A thread without a device: each call that says so is made again, once.
      for (const std::string& function : {std::string("aclrtCreateStream"), phase1, std::string("aclrtMalloc"), op}) {
        ExpectOk(jax_fa::cann::ReleaseAll());
        emulator.fail(function.c_str(), 107002, 0, 1);
        ExpectOk(RunAndWait(call));
        ExpectOk(jax_fa::cann::ReleaseAll());
        emulator.fail(function.c_str(), 107002, 0, 2);
        EXPECT(!RunAndWait(call).ok(), "%s is tried more than twice", function.c_str());
        emulator.reset();
      }
    }
  }
  ExpectOk(jax_fa::cann::ReleaseAll());
  EXPECT(emulator.live("stream") == 0 && emulator.live("memory") == 0, "streams or workspaces are left");
}

void TestRefusals() {
  const Example example{Shape{}};
  const auto refused = [](const Call& call, const char* why) {
    const Status status = RunAndWait(call);
    EXPECT(!status.ok() && status.message.find(why) != std::string::npos, "wanted '%s', got: %s", why,
           status.message.c_str());
  };
  Call c = example.forward();
  c.input_layout = "BSD";
  refused(c, "input_layout must be");
  c = example.forward();
  c.query.data = static_cast<char*>(c.query.data) + 16;
  refused(c, "query must start at a multiple of 32 bytes");
  c = example.forward();
  c.softmax_max.dims[3] = 1;
  refused(c, "softmax_max must have shape");
  c = example.forward();
  c.key.dtype = jax_fa::cann::ACL_BF16;
  refused(c, "key must be float32");
  Shape with_sink;
  with_sink.sink = true;
  const Example sinks(with_sink);
  c = sinks.forward();
  c.sink.dims = {3};
  refused(c, "sink must have shape [4]");
  c = sinks.backward();
  c.dsink = {};
  refused(c, "sink and dsink go together");
  c = example.forward();
  c.head_num = 3;
  EXPECT(!RunAndWait(c).ok(), "a wrong head_num passes");
}

// As a size of -1 comes from the tiling of an op.
void TestText() {
  const std::string lost = "\xef\xbf\xbd";
  const struct {
    std::string bytes, text;
  } cases[] = {
      {"", ""},
      {"tiling \xe5\xa4\xb1\xe8\xb4\xa5, \xc3\xa9 \xf0\x9f\x98\x80",
       "tiling \xe5\xa4\xb1\xe8\xb4\xa5, \xc3\xa9 \xf0\x9f\x98\x80"},
      {"cut \xe8\xb4", "cut " + lost + lost},                      // within a character
      {"\xff\x80 a", lost + lost + " a"},                          // no first bytes
      {"\xc0\xaf\xe0\x80\xaf", lost + lost + lost + lost + lost},  // longer than need be
      {"\xed\xa0\x80", lost + lost + lost},                        // half of a surrogate pair
      {"\xf4\x90\x80\x80", lost + lost + lost + lost},             // beyond the last code point
      {std::string("a\0b", 3), std::string("a\0b", 3)},
  };
  for (const auto& one : cases) {
    const std::string text = jax_fa::cann::Readable(one.bytes);
    EXPECT(text == one.text, "%s, not %s", text.c_str(), one.text.c_str());
    EXPECT(jax_fa::cann::Readable(text) == text, "%s", text.c_str());
  }
}

void TestHugeWorkspace() {
  const Library& library = jax_fa::cann::Ready();
  for (size_t bytes : {SIZE_MAX, SIZE_MAX - 64, SIZE_MAX - 500}) {
    try {
      jax_fa::cann::ProcessWorkspaces().Get(library, 0, nullptr, bytes);
      EXPECT(false, "%zu bytes were there", bytes);
    } catch (const jax_fa::cann::Failure& failure) {
      EXPECT(failure.status.outcome == jax_fa::cann::Outcome::kOutOfMemory, "%s", failure.what());
    }
  }
  ExpectOk(jax_fa::cann::ReleaseAll());
}

void TestThreads() {
  std::vector<std::thread> threads;
  threads.reserve(8);
  std::atomic<int> wrong{0};
  for (int t = 0; t < 8; ++t)
    threads.emplace_back([&wrong, t] {
      const std::vector<Shape> shapes = Shapes();
      for (int turn = 0; turn < 12; ++turn) {
        const Shape& shape = shapes[static_cast<size_t>(5 * t + 7 * turn) % shapes.size()];
        const Example one(shape), other(shape);
        for (const Example* e : {&one, &other})
          wrong += !RunAndWait(e->forward()).ok() + !RunAndWait(e->backward()).ok();
        if (!shape.sink) wrong += one.results() != other.results();
        Call bad = one.forward();
        bad.query.dims.pop_back();
        wrong += RunAndWait(bad).ok();
      }
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT(wrong == 0, "%d wrong results", wrong.load());
  EXPECT(TheEmulator().leaked() == 0, "objects are alive");
  ExpectOk(jax_fa::cann::ReleaseAll());
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "quick";
  if (mode == "parsers") {
    const int64_t count = argc > 2 ? std::strtoll(argv[2], nullptr, 10) : 2000;
    const int understood = jax_fa_test::ParsersTest(argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 1).Run(count);
    std::printf("cann_test parsers: %lld rounds, %d times understood\n", static_cast<long long>(count), understood);
    return understood > 0 ? 0 : 1;
  }
  if (!Library::Get().error.empty()) {
    std::fprintf(stderr, "%s\n", Library::Get().error.c_str());
    return 2;
  }
  if (mode == "quick") {
    TestText();
    TestResults();
    TestEnqueue();
    TestRefusals();
    TestHugeWorkspace();
    TestFaults();
  }
  TestThreads();
  std::printf("cann_test %s: %d failures\n", mode.c_str(), failures);
  return failures == 0 ? 0 : 1;
}
