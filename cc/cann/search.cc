#include "cann/search.h"

#include <sys/utsname.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace jax_fa::cann {
namespace {

namespace fs = std::filesystem;

std::vector<std::string> Split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) {
    const size_t from = part.find_first_not_of(" \t\r"), to = part.find_last_not_of(" \t\r");
    if (from != std::string::npos) parts.push_back(part.substr(from, to - from + 1));
  }
  return parts;
}

// The line load_priority=a,b of vendors/config.ini.
std::vector<std::string> LoadPriority(const fs::path& vendors) {
  std::ifstream file(vendors / "config.ini");
  for (std::string line; std::getline(file, line);) {
    const size_t equals = line.find('=');
    if (equals == std::string::npos) continue;
    const std::vector<std::string> key = Split(line.substr(0, equals), ' ');
    if (key.size() == 1 && key[0] == "load_priority") return Split(line.substr(equals + 1), ',');
  }
  return {};
}

void Add(std::vector<std::string>& directories, const fs::path& directory) {
  std::error_code error;
  fs::path absolute = fs::absolute(directory, error);
  std::string name = (error ? directory : absolute).lexically_normal().string();
  while (name.size() > 1 && name.back() == '/') name.pop_back();
  if (std::find(directories.begin(), directories.end(), name) == directories.end()) directories.push_back(name);
}

// <vendors>/<v>/op_api/lib of those that load_priority names, of the default vendor, and of all others by name.
void AddVendors(std::vector<std::string>& directories, const fs::path& vendors) {
  std::vector<std::string> names = LoadPriority(vendors);
  names.emplace_back("customize");
  std::vector<std::string> others;
  std::error_code error;
  for (fs::directory_iterator it(vendors, error), end; !error && it != end; it.increment(error))
    others.push_back(it->path().filename().string());
  std::sort(others.begin(), others.end());
  names.insert(names.end(), others.begin(), others.end());
  for (const std::string& name : names) {
    const fs::path vendor = vendors / name;
    std::error_code absent;
    if (fs::is_directory(vendor, absent)) Add(directories, vendor / "op_api" / "lib");
  }
}

// A directory that the user names may hold the libraries, or be the root of an installation, a vendor or an opp.
void AddExplicit(std::vector<std::string>& directories, const fs::path& directory) {
  Add(directories, directory);
  Add(directories, directory / "lib64");
  Add(directories, directory / "op_api" / "lib");
  AddVendors(directories, directory / "vendors");
  AddVendors(directories, directory / "opp" / "vendors");
}

std::string Machine() {
  utsname name;
  return uname(&name) == 0 ? name.machine : "";
}

}  // namespace

std::string Environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

SearchPath ReadSearchPath() {
  SearchPath path;
  std::vector<std::string>& directories = path.directories;
  const std::string emulator = Environment("JAX_FA_CANN_EMULATOR");
  if (!emulator.empty()) {
    AddExplicit(directories, emulator);
    path.emulator = true;
    path.loader = false;
    return path;
  }
  for (const std::string& directory : Split(Environment("JAX_FA_CANN_PATH"), ':')) AddExplicit(directories, directory);
  for (const std::string& vendor : Split(Environment("ASCEND_CUSTOM_OPP_PATH"), ':'))
    Add(directories, fs::path(vendor) / "op_api" / "lib");
  if (const std::string opp = Environment("ASCEND_OPP_PATH"); !opp.empty()) {
    AddVendors(directories, fs::path(opp) / "vendors");
    Add(directories, fs::path(opp) / "built-in/op_impl/ai_core/tbe/op_api/lib/linux" / Machine());
  }
  if (const std::string home = Environment("ASCEND_HOME_PATH"); !home.empty())
    Add(directories, fs::path(home) / "lib64");
  return path;
}

std::string SearchPath::Text() const {
  std::string text;
  for (const std::string& directory : directories) text += (text.empty() ? "" : ", ") + directory;
  if (loader) text += std::string(text.empty() ? "" : ", ") + "the loader's own search (LD_LIBRARY_PATH, ld.so.cache)";
  return text;
}

}  // namespace jax_fa::cann
