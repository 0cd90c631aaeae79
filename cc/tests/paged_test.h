// Keys and values in pages: the bits of the same call with contiguous keys, whatever lies where nobody may read.
#pragma once

#include <algorithm>

#include "check.h"
#include "cpu/tuning.h"
#include "paged_shapes.h"

namespace jax_fa_test {
namespace {

struct PagedSpec {
  int64_t B = 3, Sq = 1, N = 4, K = 2, D = 40, Dv = 24, size = 16, each = 20;
  DType query = DType::kF32, pages = DType::kF32;
  bool scales = false;   // powers of 2, which change no bits
  bool partial = false;  // values are parts of keys
  int64_t window = 0;    // 0: none
  uint64_t seed = 0;
};

constexpr PagedSpec kPagedSpecs[] = {
    {},
    {3, 1, 8, 8, 64, 64, 1, 300, DType::kF32, DType::kF32, false, false, 0, 1},
    {2, 3, 6, 2, 33, 70, 3, 100, DType::kBF16, DType::kBF16, false, false, 50, 2},
    {2, 1, 8, 2, 128, 128, 16, 40, DType::kBF16, DType::kBF16, false, false, 0, 3},
    {3, 4, 4, 4, 20, 17, 7, 50, DType::kF16, DType::kF16, false, false, 9, 4},
    {2, 1, 4, 2, 64, 40, 128, 3, DType::kF32, DType::kI8, true, false, 0, 5},
    {2, 2, 3, 1, 37, 37, 5, 60, DType::kF32, DType::kI8, true, false, 100, 6},
    {2, 1, 8, 2, 48, 33, 16, 20, DType::kF32, DType::kF8E4M3, true, false, 0, 7},
    {2, 3, 4, 2, 19, 65, 256, 2, DType::kF32, DType::kF8E5M2, false, false, 30, 8},
    {2, 1, 16, 1, 72, 64, 16, 30, DType::kBF16, DType::kBF16, false, true, 0, 9},
    {2, 1, 48, 1, 72, 64, 64, 6, DType::kF32, DType::kI8, true, true, 0, 10},
    {2, 30, 4, 2, 24, 40, 16, 20, DType::kBF16, DType::kBF16, false, false, 0, 11},
    {2, 40, 2, 2, 24, 40, 9, 30, DType::kF32, DType::kF8E4M3, true, false, 60, 12},
    {2, 1, 8, 2, 128, 128, 16, 40, DType::kBF16, DType::kI8, true, false, 0, 13},
    {3, 3, 4, 4, 33, 71, 7, 50, DType::kBF16, DType::kF8E4M3, true, false, 40, 14},
    {2, 1, 12, 4, 64, 200, 128, 3, DType::kBF16, DType::kF8E5M2, false, false, 101, 15},
    {2, 7, 2, 1, 72, 64, 16, 30, DType::kBF16, DType::kI8, true, true, 0, 16},
    {2, 2, 4, 2, 40, 24, 5, 60, DType::kBF16, DType::kBF16, true, false, 33, 17},
    {2, 20, 4, 2, 40, 24, 5, 60, DType::kBF16, DType::kI8, true, false, 0, 18},
    {2, 1, 2, 2, 1, 1, 3, 40, DType::kBF16, DType::kF8E4M3, true, false, 0, 19},
    {3, 1, 2, 2, 40, 24, 1, 1, DType::kF32, DType::kF32, false, false, 0, 20},  // one key
    {3, 1, 2, 2, 40, 24, 1, 1, DType::kBF16, DType::kI8, true, false, 0, 21},
    {3, 1, 2, 1, 64, 64, 2, 1, DType::kF16, DType::kF16, false, false, 0, 22},
};

// Any of them.
PagedSpec RandomPagedSpec(uint64_t seed) {
  constexpr DType kQueries[] = {DType::kF32, DType::kBF16, DType::kBF16, DType::kF16};
  constexpr DType kBytes[] = {DType::kI8, DType::kF8E4M3, DType::kF8E5M2};
  constexpr int64_t kSizes[] = {1, 2, 5, 16, 48, 128}, kRows[] = {1, 1, 1, 2, 5, 17}, kGroups[] = {1, 2, 4, 8};
  Random random(seed * 2 + 1);
  PagedSpec s;
  s.B = 1 + random.Below(3), s.Sq = random.Pick(kRows), s.K = 1 + random.Below(4), s.N = s.K * random.Pick(kGroups);
  if (s.N / s.K * s.Sq > jax_fa::kSplitRows) s.N = s.K;  // else keys in pages are cut, and contiguous ones are not
  s.D = 1 + random.Below(150), s.Dv = 1 + random.Below(150);
  s.size = random.Pick(kSizes), s.each = 1 + random.Below(1 + 600 / s.size);
  s.query = random.Pick(kQueries), s.pages = random.OneIn(3) ? s.query : random.Pick(kBytes);
  s.scales = jax_fa::IsByte(s.pages) && !random.OneIn(4);
  s.partial = s.Dv <= s.D && random.OneIn(3);
  s.window = random.OneIn(2) ? 0 : 1 + random.Below(200);
  s.seed = 1000 + seed;
  return s;
}

// The number that 8 bits stand for, without the kernels' tricks; NaN too.
double Decode8(uint8_t bits, DType t) {
  if (t == DType::kI8) return static_cast<int8_t>(bits);
  const int digits = t == DType::kF8E4M3 ? 3 : 2, bias = t == DType::kF8E4M3 ? 7 : 15;
  const int e = (bits & 0x7f) >> digits, m = bits & ((1 << digits) - 1), most = 0x7f >> digits;
  double x = e == 0 ? std::ldexp(m, 1 - bias - digits) : std::ldexp((1 << digits) + m, e - bias - digits);
  if (t == DType::kF8E5M2 && e == most) x = m == 0 ? kInf : kNaN;
  if (t == DType::kF8E4M3 && (bits & 0x7f) == 0x7f) x = kNaN;
  return (bits & 0x80) != 0 ? -x : x;
}

// The same keys, values and results twice: in pages, and contiguous in a dtype that kernels multiply without scales.
class PagedTest {
 public:
  explicit PagedTest(const PagedSpec& s)
      : s_(s),
        random_(s.seed + 77),
        Skv_(s.size * s.each),
        wide_Skv_(std::max<int64_t>(Skv_, 65)),
        count_(s.B * s.each + 2),
        wide_(Wide(s)),
        zeros_(static_cast<size_t>(s.B), 0) {
    Lengths();
    Add(s.D, true, &key_pages_, &keys_);
    if (!s.partial) Add(s.Dv, false, &value_pages_, &values_);
    MakeRows();
  }

  void Check() {
    for (const Kernels* kernels : Supported()) {
      ++g_cases;
      Doing(kernels->name, "paged", std::to_string(s_.seed));
      const std::string expected = Run(*kernels, Contiguous(), false);
      if (Run(*kernels, Paged(), false) != expected) Fail("pages change the result");
      if (Run(*kernels, Paged(), true) != expected) Fail("the order of tasks changes the result");
    }
  }

 private:
  using Memory = std::unique_ptr<Pages>;
  struct Pool {
    Memory memory, scales;
    int64_t width = 0;
  };

  // Few bfloat16 rows multiply bytes as bfloat16, where the instruction set has such products.
  static DType Wide(const PagedSpec& s) {
    if (!jax_fa::IsByte(s.pages)) return s.pages;
    return s.query == DType::kBF16 && s.N / s.K * s.Sq <= jax_fa::kDirectRows ? DType::kBF16 : DType::kF32;
  }

  static Memory New(int64_t bytes) {
    auto memory = std::make_unique<Pages>(static_cast<size_t>(bytes), true);
    memory->Fill();
    return memory;
  }

  // Pages in any order, and entries of the table that nobody may read.
  void Lengths() {
    std::vector<int32_t> order(static_cast<size_t>(count_));
    for (size_t i = 0; i < order.size(); ++i) {
      order[i] = static_cast<int32_t>(i);
      std::swap(order[i], order[static_cast<size_t>(random_.Below(static_cast<int64_t>(i) + 1))]);
    }
    size_t next = 0;
    for (int64_t b = 0; b < s_.B; ++b) {
      const int64_t n = b == 0 ? Skv_ : random_.OneIn(4) ? 0 : random_.Below(Skv_ + 1);
      lengths_.push_back(static_cast<int32_t>(n));
      for (int64_t i = 0; i < s_.each; ++i)
        table_.push_back(i * s_.size < n ? order[next++] : random_.OneIn(2) ? -1 : 0x7fffffff);
      for (int64_t i = 0; i < s_.Sq; ++i) {
        const int64_t end = n - s_.Sq + 1 + i;
        upper_.push_back(static_cast<int32_t>(end));
        lower_.push_back(static_cast<int32_t>(s_.window > 0 && end > s_.window ? end - s_.window : 0));
      }
    }
  }

  void Add(int64_t width, bool keys, Pool* pool, Pool* contiguous) {
    const int64_t heads = s_.K, item = jax_fa::ItemSize(s_.pages);
    pool->width = contiguous->width = width;
    pool->memory = New(count_ * s_.size * heads * width * item);
    pool->scales = New(count_ * s_.size * heads * 4);
    contiguous->memory = New(s_.B * wide_Skv_ * heads * width * jax_fa::ItemSize(wide_));
    for (int64_t b = 0; b < s_.B; ++b)
      for (int64_t j = 0; j < lengths_[static_cast<size_t>(b)]; ++j)
        for (int64_t k = 0; k < heads; ++k) {
          const int64_t page = table_[static_cast<size_t>(b * s_.each + j / s_.size)];
          const int64_t row = (page * s_.size + j % s_.size) * heads + k;
          const auto scale = static_cast<float>(std::ldexp(1.0, static_cast<int>(random_.Below(3)) - (keys ? 7 : 5)));
          std::memcpy(pool->scales->data() + row * 4, &scale, 4);
          for (int64_t d = 0; d < width; ++d)
            Put(pool->memory->data() + (row * width + d) * item,
                contiguous->memory->data() + (((b * wide_Skv_ + j) * heads + k) * width + d) * jax_fa::ItemSize(wide_),
                s_.scales ? scale : 1.0f);
        }
    for (Memory* m : {&pool->memory, &pool->scales, &contiguous->memory}) (*m)->Protect(PROT_READ);
  }

  void Put(char* paged, char* contiguous, float scale) {
    if (jax_fa::ItemSize(s_.pages) == 1) {
      uint8_t bits = 0;
      do bits = static_cast<uint8_t>(random_.Bits());
      while (!std::isfinite(Decode8(bits, s_.pages)) || std::fabs(Decode8(bits, s_.pages)) > 300.0);
      std::memcpy(paged, &bits, 1);
      PutFloat(contiguous, Decode8(bits, s_.pages) * scale, wide_);
    } else {
      const double x = Rounded(random_.Normal(), s_.pages);
      PutFloat(paged, x, s_.pages);
      PutFloat(contiguous, x * scale, wide_);
    }
  }

  static void PutFloat(char* to, double x, DType t) {
    if (t == DType::kF32) {
      const auto f = static_cast<float>(x);
      std::memcpy(to, &f, 4);
    } else {
      const uint16_t bits = Encode16(Rounded(x, t), t);
      std::memcpy(to, &bits, 2);
    }
  }

  void MakeRows() {
    const int64_t item = jax_fa::ItemSize(s_.query), rows = s_.B * s_.Sq * s_.N;
    query_ = New(rows * s_.D * item);
    for (int64_t i = 0; i < rows * s_.D; ++i) PutFloat(query_->data() + i * item, 0.3 * random_.Normal(), s_.query);
    out_ = New(rows * s_.Dv * item), m_ = New(rows * 4), l_ = New(rows * 4);
    const auto offsets = [&](int64_t entry) {
      offsets_.emplace_back();
      for (int64_t b = 0; b < s_.B; ++b) offsets_.back().push_back(b * entry);
      return offsets_.back().data();
    };
    offsets_.reserve(8);
    query_at_ = offsets(s_.Sq * s_.N * s_.D), out_at_ = offsets(s_.Sq * s_.N * s_.Dv);
    row_at_ = offsets(s_.N * s_.Sq), bound_at_ = offsets(s_.Sq);
    key_at_ = offsets(wide_Skv_ * s_.K * s_.D), value_at_ = offsets(wide_Skv_ * s_.K * (s_.partial ? s_.D : s_.Dv));
  }

  static View Of(const Memory& memory, DType t, const int64_t* batch, int64_t head, int64_t row, int64_t col) {
    View v;
    v.data = memory->data(), v.dtype = t, v.batch = batch;
    v.head = head, v.row = row, v.col = col;
    return v;
  }

  Call Common() const {
    Call c;
    c.B = s_.B, c.Sq = s_.Sq, c.Skv = Skv_, c.N = s_.N, c.K = s_.K, c.D = s_.D, c.Dv = s_.Dv;
    c.scale = 0.5f;
    c.query = Of(query_, s_.query, query_at_, s_.D, s_.N * s_.D, 1);
    c.out = Of(out_, s_.query, out_at_, s_.Dv, s_.N * s_.Dv, 1);
    c.m = Of(m_, DType::kF32, row_at_, s_.Sq, 1, 0), c.l = Of(l_, DType::kF32, row_at_, s_.Sq, 1, 0);
    const auto bound = [&](const std::vector<int32_t>& x) {
      View v;
      v.data =
          reinterpret_cast<char*>(const_cast<int32_t*>(x.data()));  // NOLINT(cppcoreguidelines-pro-type-const-cast)
      v.dtype = DType::kI32, v.batch = bound_at_, v.row = 1;
      return v;
    };
    c.lower = bound(lower_), c.upper = bound(upper_);
    return c;
  }

  Call Contiguous() const {
    Call c = Common();
    c.Skv = wide_Skv_;
    c.key = Of(keys_.memory, wide_, key_at_, s_.D, s_.K * s_.D, 1);
    const Pool& values = s_.partial ? keys_ : values_;
    c.value = Of(values.memory, wide_, value_at_, values.width, s_.K * values.width, 1);
    return c;
  }

  Call Paged() const {
    Call c = Common();
    c.pages.table = table_.data(), c.pages.lengths = lengths_.data();
    c.pages.count = count_, c.pages.size = s_.size, c.pages.each = s_.each;
    const Pool& values = s_.partial ? key_pages_ : value_pages_;
    c.key = Of(key_pages_.memory, s_.pages, zeros_.data(), s_.D, s_.K * s_.D, 1);
    c.value = Of(values.memory, s_.pages, zeros_.data(), values.width, s_.K * values.width, 1);
    if (s_.scales) {
      c.key_scale = Of(key_pages_.scales, DType::kF32, zeros_.data(), 1, s_.size * s_.K, s_.K);
      c.value_scale = Of(values.scales, DType::kF32, zeros_.data(), 1, s_.size * s_.K, s_.K);
    }
    return c;
  }

  // The bytes of the results.
  std::string Run(const Kernels& kernels, const Call& c, bool backwards) const {
    std::string bytes;
    for (const Memory* x : {&out_, &m_, &l_}) (*x)->Fill();
    kernels.forward(c, Serial(backwards));
    for (const Memory* x : {&out_, &m_, &l_}) bytes.append((*x)->data(), (*x)->bytes());
    if (!g_real_memory && KernelMemory::live() != 0) Fail("memory was not freed");
    return bytes;
  }

  const PagedSpec s_;
  Random random_;
  // Contiguous keys are so many, of which more are masked: calls of fewer have kernels of their own, which have no pages.
  const int64_t Skv_, wide_Skv_, count_;
  const DType wide_;
  const std::vector<int64_t> zeros_;
  std::vector<int32_t> lengths_, table_, lower_, upper_;
  Pool key_pages_, value_pages_, keys_, values_;
  Memory query_, out_, m_, l_;
  std::vector<std::vector<int64_t>> offsets_;
  const int64_t *query_at_ = nullptr, *out_at_ = nullptr, *row_at_ = nullptr, *bound_at_ = nullptr;
  const int64_t *key_at_ = nullptr, *value_at_ = nullptr;
};

// Attention to one key returns its value: every number of 8 bits passes as it is, in floats and in bfloat16.
void CheckEveryByte(DType t, DType rows) {
  std::vector<uint8_t> bytes(256);
  for (size_t i = 0; i < 256; ++i) bytes[i] = static_cast<uint8_t>(i);
  for (const Kernels* kernels : Supported()) {
    Doing(kernels->name, "forward", "every byte");
    std::vector<float> out(256, -1.0f), one(4, 1.0f);
    const int32_t table = 0, length = 1;
    const int64_t none = 0;
    const auto view = [&](void* data, DType dtype) {
      View v;
      v.data = static_cast<char*>(data), v.dtype = dtype, v.batch = &none, v.col = 1;
      return v;
    };
    Call c;
    c.B = c.Sq = c.Skv = c.N = c.K = c.D = 1, c.Dv = 256;
    c.pages.table = &table, c.pages.lengths = &length, c.pages.count = c.pages.size = c.pages.each = 1;
    c.query = view(one.data(), rows), c.m = view(&one[1], DType::kF32), c.l = view(&one[2], DType::kF32);
    uint8_t key = 0;
    c.key = view(&key, t), c.value = view(bytes.data(), t), c.out = view(out.data(), rows);
    kernels->forward(c, Serial(false));
    for (size_t i = 0; i < 256; ++i) {
      uint16_t half = 0;
      std::memcpy(&half, reinterpret_cast<const char*>(out.data()) + 2 * i, 2);
      const double got = rows == DType::kF32 ? out[i] : Decode16(half, rows);
      if (!Same(got, Decode8(bytes[i], t))) Fail("byte %zu is %.9g, expected %.9g", i, got, Decode8(bytes[i], t));
    }
  }
}

// A call with one array of another shape or dtype is refused by its name.
void CheckPagedShapes() {
  using jax_fa::Element;
  Doing("paged shapes", "", "");
  const std::vector<std::vector<int64_t>> dims = {{2, 3, 4, 8}, {5, 6, 2, 8}, {5, 6, 2, 9}, {2, 7}, {2}, {2, 3},
                                                  {2, 3},       {5, 1, 2},    {5, 6, 2},    {2},    {1}};
  const std::vector<std::vector<int64_t>> results = {{2, 3, 4, 9}, {2, 4, 3}, {2, 4, 3}};
  const auto shapes = [](const auto& all, const auto& forms) {
    std::vector<jax_fa::Shape> list;
    for (size_t i = 0; i < all.size(); ++i) {
      Element element = Element::kF32;
      for (Element e : {Element::kF32, Element::kI32})
        if ((forms[i].elements & jax_fa::Bit(e)) != 0) element = e;
      list.push_back({element, all[i].data(), all[i].size()});
    }
    return list;
  };
  const auto refused = [](const std::vector<jax_fa::Shape>& args, const std::vector<jax_fa::Shape>& rets) {
    try {
      jax_fa::PagedCheck::Of(31, args, rets);
    } catch (const jax_fa::BadCall& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  const std::vector<jax_fa::Shape> args = shapes(dims, jax_fa::kPagedForms),
                                   rets = shapes(results, jax_fa::kPagedResults);
  if (const std::string text = refused(args, rets); !text.empty()) Fail("a good call is refused: %s", text.c_str());
  if (refused({args.begin(), args.end() - 1}, rets).empty()) Fail("a missing array is not noticed");
  const std::vector<int64_t> other(4, 11);
  for (size_t i = 0; i < args.size() + rets.size(); ++i) {
    const bool of_args = i < args.size();
    const char* name = of_args ? jax_fa::kPagedForms[i].name : jax_fa::kPagedResults[i - args.size()].name;
    for (const bool dtype : {false, true}) {
      std::vector<jax_fa::Shape> bad_args = args, bad_rets = rets;
      jax_fa::Shape& x = of_args ? bad_args[i] : bad_rets[i - args.size()];
      if (dtype) {
        x.element = Element::kU32;
      } else {
        x.dims = other.data();
      }
      const std::string text = refused(bad_args, bad_rets);
      // Sizes are those of the first arrays: of these, another size is another array's fault.
      if (text.empty() || (dtype && text.find(name) == std::string::npos))
        Fail("%s of another %s: '%s'", name, dtype ? "dtype" : "shape", text.c_str());
    }
  }
}

void CheckPaged() {
  CheckPagedShapes();
  for (DType t : {DType::kI8, DType::kF8E4M3, DType::kF8E5M2})
    for (DType rows : {DType::kF32, DType::kBF16}) CheckEveryByte(t, rows);
  for (const PagedSpec& spec : kPagedSpecs) PagedTest(spec).Check();
}

void CheckRandomPaged(uint64_t from, uint64_t to) {
  for (uint64_t seed = from; seed < to; ++seed) PagedTest(RandomPagedSpec(seed)).Check();
}

}  // namespace
}  // namespace jax_fa_test
