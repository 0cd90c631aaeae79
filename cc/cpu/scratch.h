// Cutting memory into aligned parts.

inline int64_t AlignedSize(int64_t n) { return (n + 15) / 16 * 16; }

// Parts of this thread's scratch, in the order of `sizes`.
template <int kCount>
inline void TakeScratch(const int64_t (&sizes)[kCount], float* (&parts)[kCount]) {
  int64_t total = 0;
  for (int64_t size : sizes) total += AlignedSize(size);
  float* p = ThreadScratch(total);
  for (int i = 0; i < kCount; ++i) {
    parts[i] = p;
    p += AlignedSize(sizes[i]);
  }
}

// Memory that lives as long as this object.
class Buffer {
 public:
  explicit Buffer(int64_t floats) : data_(floats > 0 ? AllocateFloats(floats) : nullptr) {}
  ~Buffer() { FreeFloats(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* get() const { return data_; }
  int64_t* ints() const { return reinterpret_cast<int64_t*>(data_); }
  double* doubles() const { return reinterpret_cast<double*>(data_); }

 private:
  float* data_;
};

// Runs a callable for every index.
template <typename Fn>
inline void Run(const Runner& runner, int64_t count, const Fn& fn) {
  runner.run(&runner, count, [](void* context, int64_t i) { (*static_cast<const Fn*>(context))(i); },
             const_cast<Fn*>(&fn));
}
