// What the adapter to CANN reads from files and the environment, cut up, joined and spoilt at random: whatever it is, it
// is read within its bounds, and in time. Run it in a build with sanitizers.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "cann/search.h"
#include "cann/witness.h"

namespace jax_fa_test {

namespace fs = std::filesystem;

class ParsersTest {
 public:
  explicit ParsersTest(uint64_t seed) : random_(seed) {
    std::string name = (fs::temp_directory_path() / "jax_fa_parsers_XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) std::exit(2);
    root_ = name;
    for (const char* directory : {"vendors/one/op_api/lib", "vendors/one/op_api/include",
                                  "vendors/customize/op_api/lib", "vendors/one/op_impl/ai_core/tbe/config/soc"})
      fs::create_directories(root_ / directory);
  }
  ~ParsersTest() {
    std::error_code ignored;
    fs::remove_all(root_, ignored);
  }
  ParsersTest(const ParsersTest&) = delete;
  ParsersTest& operator=(const ParsersTest&) = delete;

  // How many files and variables said something, so that a run that reads nothing shows.
  int Run(int64_t count) {
    const fs::path vendor = root_ / "vendors/one";
    const fs::path lib = vendor / "op_api/lib/libcust_opapi.so";
    int understood = 0;
    for (int64_t i = 0; i < count; ++i) {
      Write(vendor / "op_impl/ai_core/tbe/config/soc/aic-soc-ops-info.json", Text(kJson));
      Write(vendor / "op_api/include/aclnn_flash_attention_score.h", Text(kHeader));
      Write(root_ / "vendors/config.ini", Text(kIni));
      understood += static_cast<int>(jax_fa::cann::Witnesses(lib.string()).size());
      jax_fa::cann::Witnesses(Text({lib.string()}));
      for (const char* name : {"JAX_FA_CANN_PATH", "ASCEND_CUSTOM_OPP_PATH", "ASCEND_OPP_PATH", "ASCEND_HOME_PATH",
                               "JAX_FA_CANN_EMULATOR"}) {
        const bool emulator = std::string(name) == "JAX_FA_CANN_EMULATOR";
        if (emulator ? OneIn(8) : !OneIn(3))
          setenv(name, Variable().c_str(), 1);
        else
          unsetenv(name);
      }
      const jax_fa::cann::SearchPath path = jax_fa::cann::ReadSearchPath();
      if (!path.Text().empty() && path.directories.size() > 2) ++understood;
    }
    return understood;
  }

 private:
  using Texts = std::vector<std::string>;

  bool OneIn(uint64_t n) { return Below(n) == 0; }
  uint64_t Below(uint64_t n) { return random_() % n; }

  static void Write(const fs::path& file, const std::string& text) { std::ofstream(file, std::ios::binary) << text; }

  // One of the texts, or a part of it; changed in a few places.
  std::string Text(const Texts& texts) {
    std::string text = texts[Below(texts.size())];
    for (uint64_t change = OneIn(4) ? 0 : Below(6); change > 0 && !text.empty(); --change) {
      const size_t at = Below(text.size() + 1), length = Below(12);
      switch (Below(6)) {
        case 0: text.erase(at, length); break;
        case 1: text.insert(at, text.substr(Below(text.size() + 1), length)); break;
        case 2: text.insert(at, 1, kSpecial[Below(kSpecial.size())]); break;
        case 3: text.resize(at); break;
        case 4: text.insert(at, std::string(Below(3000), kSpecial[Below(kSpecial.size())])); break;
        default:
          if (at < text.size()) text[at] = static_cast<char>(Below(256));
      }
    }
    return text;
  }
  // Without zeros, which end it.
  std::string Variable() {
    std::string text =
        Text({root_.string(), root_.string() + ":" + (root_ / "vendors/one").string(), "", ":::", "/", "."});
    for (char& c : text) c = c == 0 ? ' ' : c;
    return text;
  }

  const std::string kSpecial = std::string("{}[]\"\\:,/*=()\n\r\t \0", 18) + "\xff" + "0";
  const Texts kJson = {
      R"({"FlashAttentionScore": {"input0": {"name": "query"}, "input1": {"name": "k"}, "output0": {}}})",
      R"({"Other": {"input0": {"a": {"b": "}"}}}, "FlashAttentionScore":{"input0":{},"input1":{},"input2":{}, "input10":{}}})",
      R"({"a": "FlashAttentionScore", "FlashAttentionScore" : { "attr": "\"input0\":", "input0": [{"input1": 1}]}})",
      ""};
  const Texts kHeader = {
      "aclnnStatus aclnnFlashAttentionScoreGetWorkspaceSize(const aclTensor* query, int64_t n /* , */, // ,\n int a);",
      "/* aclnnFlashAttentionScoreGetWorkspaceSize(a, b) */ aclnnFlashAttentionScoreGetWorkspaceSize (a, b, c);",
      "aclnnFlashAttentionScoreGetWorkspaceSize", ""};
  const Texts kIni = {"load_priority=one,customize\n", " load_priority = one , ,two\r\nother=1\n",
                      "#x\n=\n==\nload_priority", ""};

  std::mt19937_64 random_;
  fs::path root_;
};

}  // namespace jax_fa_test
