#include "cann/library.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/stat.h>

#include <atomic>
#include <filesystem>
#include <initializer_list>

#include "cann/search.h"
#include "cann/witness.h"

namespace jax_fa::cann {
namespace {

bool SameFile(const struct stat& a, const struct stat& b) { return a.st_dev == b.st_dev && a.st_ino == b.st_ino; }

std::string FileOf(const void* symbol) {
  Dl_info info;
  if (dladdr(symbol, &info) == 0 || info.dli_fname == nullptr) return "";
  return std::filesystem::path(info.dli_fname).lexically_normal().string();
}

// A loaded file.
struct File {
  void* handle = nullptr;
  std::string path;
  struct stat id{};

  explicit operator bool() const { return handle != nullptr; }

  // The symbol from here or from a dependency.
  void* Any(const std::string& symbol) const { return handle == nullptr ? nullptr : dlsym(handle, symbol.c_str()); }

  // The symbol if this very file defines it. dlsym looks into dependencies too, and a short op library may depend on
  // libopapi.so, whose function of the same name takes other arguments.
  void* Own(const std::string& symbol) const {
    void* found = Any(symbol);
    struct stat there;
    return found != nullptr && stat(FileOf(found).c_str(), &there) == 0 && SameFile(id, there) ? found : nullptr;
  }

  Resolved OwnOp(const std::string& phase2) const {
    void* const first = Own(phase2 + "GetWorkspaceSize");
    void* const second = Own(phase2);
    if (first == nullptr || second == nullptr) return {};
    return {first, reinterpret_cast<Phase2>(second), path};
  }
};

constexpr const char* kWhatToDo =
    "Source set_env.sh of the CANN installation before the process starts, or set JAX_FA_CANN_PATH to the directory of "
    "the libraries.";

std::atomic<bool> loaded{false};

class Loader {
 public:
  Library Load() {
    path_ = ReadSearchPath();
    lib_.searched = path_.Text();
    const std::string abi = Environment("JAX_FA_CANN_ABI");
    if (!abi.empty() && abi != "long" && abi != "short") {
      lib_.error = "JAX_FA_CANN_ABI must be long or short; got " + abi + ".";
      return std::move(lib_);
    }
    lib_.prefer_short = abi == "short";
    told_ = abi;
    // The runtime pair first, by its full path: op libraries then find it loaded, whatever LD_LIBRARY_PATH says.
    const File runtime = First({"libascendcl.so", "libacl_rt.so"});
    const File nnopbase = First({"libnnopbase.so"});
    for (const File& file : All({"libcust_opapi.so"})) AddCustom(file);
    for (const File& file : All({"libopapi_transformer.so", "libopapi.so"})) AddLong(file);
    ResolveRuntime(runtime, nnopbase);
    return std::move(lib_);
  }

 private:
  File Open(const std::string& name, bool bare) {
    File file;
    file.handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (file.handle == nullptr) {
      const char* const reason = dlerror();
      const std::string why = reason == nullptr ? "unknown reason" : reason;
      // That the loader's own search finds nothing is expected of most names; that it lacks a dependency is not.
      const bool absent = bare && why.rfind(name + ": cannot open", 0) == 0;
      if (!absent) lib_.notes.push_back(name + " does not load: " + why);
      return {};
    }
    file.path = name;
    if (bare) {
      link_map* map = nullptr;
      if (dlinfo(file.handle, RTLD_DI_LINKMAP, static_cast<void*>(&map)) == 0 && map != nullptr)
        file.path = map->l_name;
    }
    if (stat(file.path.c_str(), &file.id) != 0) {
      lib_.notes.push_back(file.path + " was loaded, but cannot be identified, and is not used");
      return {};
    }
    return file;
  }

  // The files of these names, in the order of the search, each once.
  std::vector<File> All(std::initializer_list<const char*> names, bool first_only = false) {
    std::vector<File> files;
    const auto add = [&](const std::string& name, bool bare) {
      File file = Open(name, bare);
      if (!file) return;
      for (const File& other : files)
        if (SameFile(other.id, file.id)) return;
      files.push_back(std::move(file));
    };
    for (const std::string& directory : path_.directories)
      for (const char* name : names) {
        if (first_only && !files.empty()) return files;
        const std::string candidate = directory + "/" + name;
        struct stat there;
        if (stat(candidate.c_str(), &there) == 0) add(candidate, false);
      }
    for (const char* name : names) {
      if (!path_.loader || (first_only && !files.empty())) break;
      add(name, true);
    }
    return files;
  }

  File First(std::initializer_list<const char*> names) {
    const std::vector<File> files = All(names, true);
    return files.empty() ? File() : files.front();
  }

  void AddLong(const File& file) {
    bool any = false;
    for (int f = 0; f < kLongFunctions; ++f) {
      const Resolved op = file.OwnOp(kFunctionTable[f].phase2);
      any = any || op;
      if (op && !lib_.functions[f]) lib_.functions[f] = op;
    }
    if (any && lib_.long_ops.empty()) lib_.long_ops = file.path;
    op_files_.push_back(file);
  }

  void AddShort(const File& file, const Resolved& op) {
    if (!lib_.functions[kShortScore]) lib_.functions[kShortScore] = op;
    if (lib_.short_ops.empty()) lib_.short_ops = file.path;
    op_files_.push_back(file);
  }

  // A vendor's library may hold the whole family with the long ABI, or the short op under one name or both.
  void AddCustom(const File& file) {
    const Resolved plain = file.OwnOp(kFunctionTable[kScore].phase2);
    const Resolved preferred = file.OwnOp(kFunctionTable[kShortScore].phase2);
    const bool family = file.Own("aclnnFlashAttentionScoreV2GetWorkspaceSize") != nullptr ||
                        file.Own("aclnnFlashAttentionVarLenScoreGetWorkspaceSize") != nullptr;
    Abi abi = family ? Abi::kLong : Abi::kShort;
    if (plain && !AgreeWithWitnesses(file, abi)) return;
    if (abi == Abi::kLong && (family || plain)) AddLong(file);
    if (preferred) {
      AddShort(file, preferred);
    } else if (abi == Abi::kShort && plain) {
      AddShort(file, plain);
    }
  }

  // Whether the ABI of the plain name is known; where the evidence contradicts itself, JAX_FA_CANN_ABI decides it.
  bool AgreeWithWitnesses(const File& file, Abi& abi) {
    for (const Testimony& witness : Witnesses(file.path)) {
      if (witness.abi == abi) continue;
      if (!told_.empty()) {
        abi = told_ == "long" ? Abi::kLong : Abi::kShort;
        return true;
      }
      lib_.notes.push_back(file.path + " is ambiguous and not used: its symbols are those of the " +
                           (abi == Abi::kLong ? "long" : "short") + " ABI of aclnnFlashAttentionScore, but " +
                           witness.text + "; set JAX_FA_CANN_ABI=long or short to say which it is");
      return false;
    }
    return true;
  }

  // A symbol of the runtime pair, from `file` or from whatever brought it in as a dependency.
  void* Find(const File& file, const char* symbol, std::string& from) {
    void* found = file.Any(symbol);
    for (const File& other : op_files_)
      if (found == nullptr) found = other.Any(symbol);
    if (found != nullptr && from.empty()) from = file ? file.path : FileOf(found);
    return found;
  }

  void ResolveRuntime(const File& runtime, const File& nnopbase) {
    // nnopbase itself depends on the runtime.
    if (nnopbase) op_files_.insert(op_files_.begin(), nnopbase);
    std::string absent;
    const auto find = [&](auto& function, const char* name, const File& file, std::string& from, bool required) {
      void* const symbol = Find(file, name, from);
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(symbol);
      if (symbol == nullptr && required) absent += (absent.empty() ? "" : ", ") + std::string(name);
    };
#define JAX_FA_CANN_FIND_RUNTIME(result, name, parameters) find(lib_.api.name, #name, runtime, lib_.runtime, true);
#define JAX_FA_CANN_FIND_NNOPBASE(result, name, parameters) find(lib_.api.name, #name, nnopbase, lib_.nnopbase, true);
#define JAX_FA_CANN_FIND_OPTIONAL(result, name, parameters) find(lib_.api.name, #name, nnopbase, lib_.nnopbase, false);
    JAX_FA_CANN_RUNTIME(JAX_FA_CANN_FIND_RUNTIME)
    JAX_FA_CANN_NNOPBASE(JAX_FA_CANN_FIND_NNOPBASE)
    JAX_FA_CANN_NNOPBASE_OPTIONAL(JAX_FA_CANN_FIND_OPTIONAL)
#undef JAX_FA_CANN_FIND_RUNTIME
#undef JAX_FA_CANN_FIND_NNOPBASE
#undef JAX_FA_CANN_FIND_OPTIONAL
    lib_.emulator = path_.emulator;
    if (lib_.runtime.empty()) {
      Fail("no CANN runtime (libascendcl.so or libacl_rt.so) was found");
    } else if (lib_.nnopbase.empty()) {
      Fail("libnnopbase.so was not found");
    } else if (!absent.empty()) {
      Fail("the CANN runtime lacks " + absent + " (" + lib_.runtime + ", " + lib_.nnopbase + ")");
    } else if (lib_.long_ops.empty() && lib_.short_ops.empty()) {
      Fail(
          "no library with aclnnFlashAttentionScore (libopapi_transformer.so, libopapi.so or libcust_opapi.so) was found");
    }
  }

  void Fail(const std::string& what) {
    lib_.error = what + ". Searched, in order: " + lib_.searched + ".";
    for (const std::string& note : lib_.notes) lib_.error += " " + note + ".";
    lib_.error += std::string(" ") + kWhatToDo;
  }

  SearchPath path_;
  std::string told_;            // JAX_FA_CANN_ABI
  std::vector<File> op_files_;  // whose dependencies may hold the runtime pair
  Library lib_;
};

}  // namespace

std::string Library::Missing(const std::string& names) const {
  std::string text = names + " is not in " + (long_ops.empty() ? "any library with CANN's own functions" : long_ops) +
                     (short_ops.empty() ? "" : " (custom library: " + short_ops + ")") +
                     ". Install a CANN release that has it, or name the directory of a library that has it in "
                     "JAX_FA_CANN_PATH. Searched, in order: " +
                     searched + ".";
  for (const std::string& note : notes) text += " " + note + ".";
  return text;
}

const Library& Library::Get() {
  static const Library library = Loader().Load();  // once, and safe from any thread
  loaded.store(true, std::memory_order_release);
  return library;
}

bool Library::Loaded() { return loaded.load(std::memory_order_acquire); }

}  // namespace jax_fa::cann
