#include "cann/witness.h"

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace jax_fa::cann {
namespace {

namespace fs = std::filesystem;

std::string Read(const fs::path& file) {
  std::ostringstream text;
  text << std::ifstream(file, std::ios::binary).rdbuf();
  return text.str();
}

std::vector<fs::path> Entries(const fs::path& directory) {
  std::vector<fs::path> entries;
  std::error_code error;
  for (fs::directory_iterator it(directory, error), end; !error && it != end; it.increment(error))
    entries.push_back(it->path());
  std::sort(entries.begin(), entries.end());
  return entries;
}

size_t SkipSpace(const std::string& text, size_t at) {
  while (at < text.size() && std::isspace(static_cast<unsigned char>(text[at]))) ++at;
  return at;
}

// The end of the string that opens at `at`, one past its closing quote.
size_t SkipString(const std::string& json, size_t at) {
  for (++at; at < json.size() && json[at] != '"'; ++at)
    if (json[at] == '\\') ++at;
  return std::min(at + 1, json.size());
}

bool IsInput(const std::string& key) {  // input0, input1, ...
  return key.size() > 5 && key.compare(0, 5, "input") == 0 &&
         std::all_of(key.begin() + 5, key.end(), [](unsigned char c) { return std::isdigit(c); });
}

// How many inputs the entry "FlashAttentionScore": {"input0": {...}, ...} of an ops-info file lists; 0 without one.
int CountJsonInputs(const std::string& json) {
  int depth = 0, entry_depth = 0, inputs = 0;  // entry_depth: that of the entry's own keys, 0 outside of it
  for (size_t at = 0; at < json.size();) {
    const char c = json[at];
    if (c == '"') {
      const size_t end = SkipString(json, at);
      const std::string key = json.substr(at + 1, end > at + 2 ? end - at - 2 : 0);
      at = SkipSpace(json, end);
      if (at >= json.size() || json[at] != ':') continue;  // a value
      if (entry_depth != 0 && depth == entry_depth && IsInput(key)) ++inputs;
      if (entry_depth == 0 && key == "FlashAttentionScore") entry_depth = depth + 1;
      continue;
    }
    if (c == '{') ++depth;
    if (c == '}' && depth-- == entry_depth && entry_depth != 0) return inputs;
    ++at;
  }
  return inputs;
}

std::string WithoutComments(const std::string& text) {
  std::string code;
  for (size_t at = 0; at < text.size();) {
    const bool block = text.compare(at, 2, "/*") == 0;
    if (block || text.compare(at, 2, "//") == 0) {
      const size_t end = text.find(block ? "*/" : "\n", at + 2);
      at = end == std::string::npos ? text.size() : end + (block ? 2 : 0);
    } else {
      code += text[at++];
    }
  }
  return code;
}

// How many parameters a header declares for the op's phase 1; 0 without a declaration.
int CountHeaderParameters(const std::string& header) {
  static const std::string kName = "aclnnFlashAttentionScoreGetWorkspaceSize";
  const std::string code = WithoutComments(header);
  for (size_t at = code.find(kName); at != std::string::npos; at = code.find(kName, at + 1)) {
    const size_t open = SkipSpace(code, at + kName.size());
    if (open >= code.size() || code[open] != '(') continue;
    const auto end = std::find(code.begin() + static_cast<std::ptrdiff_t>(open), code.end(), ')');
    return 1 + static_cast<int>(std::count(code.begin() + static_cast<std::ptrdiff_t>(open), end, ','));
  }
  return 0;
}

void Add(std::vector<Testimony>& found, const fs::path& file, int count, int of_short, const char* what) {
  if (count == 0) return;
  found.push_back({count <= of_short ? Abi::kShort : Abi::kLong,
                   file.string() + " lists " + std::to_string(count) + " " + what + " for FlashAttentionScore"});
}

bool IsOpsInfo(const std::string& name) {
  static const std::string kStart = "aic-", kEnd = "-ops-info.json";
  return name.size() > kStart.size() + kEnd.size() && name.compare(0, kStart.size(), kStart) == 0 &&
         name.compare(name.size() - kEnd.size(), kEnd.size(), kEnd) == 0;
}

}  // namespace

std::vector<Testimony> Witnesses(const std::string& library) {
  const fs::path lib = fs::path(library).parent_path();
  if (lib.filename() != "lib" || lib.parent_path().filename() != "op_api") return {};
  const fs::path vendor = lib.parent_path().parent_path();
  std::vector<Testimony> found;
  for (const fs::path& soc : Entries(vendor / "op_impl/ai_core/tbe/config"))
    for (const fs::path& file : Entries(soc))
      if (IsOpsInfo(file.filename().string())) Add(found, file, CountJsonInputs(Read(file)), 3, "inputs");
  const fs::path header = vendor / "op_api/include/aclnn_flash_attention_score.h";
  Add(found, header, CountHeaderParameters(Read(header)), 10, "parameters");
  return found;
}

}  // namespace jax_fa::cann
