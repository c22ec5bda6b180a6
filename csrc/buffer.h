// Aligned scratch memory.  Freed buffers stay with their thread, so that a kernel called again finds
// its scratch warm instead of asking the system for fresh zeroed pages.
#pragma once

#include <algorithm>
#include <atomic>
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
  // Bytes of all threads' scratch, in use or kept.
  static size_t held() { return held_; }

  explicit Buffer(size_t bytes) {
    std::vector<Block>& pool = spare();
    size_t best = pool.size();
    const size_t most = 2 * bytes + kPage;  // a larger block waits for what needs it
    for (size_t i = 0; i < pool.size(); ++i)
      if (pool[i].bytes >= bytes && pool[i].bytes <= most && (best == pool.size() || pool[i].bytes < pool[best].bytes))
        best = i;
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
      release(pool.front());
    }
    if (kept > kMostSpare)
      release(block_);
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
      for (const Block& b : *this) release(b);
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
    bytes = std::max(unit, (bytes + unit - 1) / unit * unit);
    void* data = std::aligned_alloc(unit, bytes);
    if (!data) throw std::bad_alloc();
#ifdef __linux__
    if (unit == kPage) madvise(data, bytes, MADV_HUGEPAGE);
#endif
    held_ += bytes;
    return {data, bytes};
  }
  static void release(const Block& block) {
    held_ -= block.bytes;
    std::free(block.data);
  }

  inline static std::atomic<size_t> held_{0};
  Block block_;
};

}  // namespace llmkern
