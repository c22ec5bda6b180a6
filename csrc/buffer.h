// Aligned scratch memory.  Freed buffers stay with their thread, so that a kernel called again finds
// its scratch warm instead of asking the system for fresh zeroed pages.
#pragma once

#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace llmkern {

class Buffer {
 public:
  explicit Buffer(size_t bytes) {
    std::vector<Block>& pool = spare();
    size_t best = pool.size();
    for (size_t i = 0; i < pool.size(); ++i)
      if (pool[i].bytes >= bytes && (best == pool.size() || pool[i].bytes < pool[best].bytes)) best = i;
    if (best < pool.size()) {
      block_ = pool[best];
      pool.erase(pool.begin() + best);
    } else {
      block_ = allocate(bytes);
    }
  }
  Buffer(Buffer&& other) noexcept : block_(std::exchange(other.block_, {})) {}
  Buffer& operator=(Buffer&&) = delete;
  ~Buffer() {
    std::vector<Block>& pool = spare();
    size_t kept = block_.bytes;
    for (const Block& b : pool) kept += b.bytes;
    for (; kept > kMostSpare && !pool.empty(); pool.erase(pool.begin())) {  // oldest first
      kept -= pool.front().bytes;
      std::free(pool.front().data);
    }
    if (kept > kMostSpare)
      std::free(block_.data);
    else if (block_.data)
      pool.push_back(block_);
  }

  template <class T>
  T* as() const {
    return static_cast<T*>(block_.data);
  }

 private:
  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
  };
  struct Pool : std::vector<Block> {
    Pool() { reserve(32); }  // so that returning a buffer never allocates
    ~Pool() {
      for (const Block& b : *this) std::free(b.data);
    }
  };

  static constexpr size_t kMostSpare = size_t{128} << 20;  // bytes a thread
  static constexpr size_t kPage = size_t{2} << 20;         // a large page: one TLB entry covers it

  static std::vector<Block>& spare() {
    static thread_local Pool pool;
    return pool;
  }
  static Block allocate(size_t bytes) {
    const size_t unit = bytes >= kPage ? kPage : 4096;
    bytes = (bytes + unit) / unit * unit;  // at least one byte
    void* data = std::aligned_alloc(unit, bytes);
    if (!data) throw std::bad_alloc();
#ifdef __linux__
    if (unit == kPage) madvise(data, bytes, MADV_HUGEPAGE);
#endif
    return {data, bytes};
  }

  Block block_;
};

}  // namespace llmkern
