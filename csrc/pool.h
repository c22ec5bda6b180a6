// Memory for outputs, kept when a tensor dies and given to the next one.
//
// The C library returns large blocks to the system at once, and those of a whole training step at its
// end, so every output begins with a page fault for each 4 KiB and the zeroing of what is overwritten
// next: several times the work of a norm.  Here blocks wait for their next use, the large ones in large
// pages, as in torch's own allocator for GPUs.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace llmkern {

class Pool {
 public:
  static constexpr size_t kPage = size_t{2} << 20;  // a large page
  static constexpr size_t kUnit = size_t{64} << 10;  // of smaller blocks

  // Never destroyed: tensors may outlive everything else.
  static Pool& shared() {
    static Pool* pool = new Pool;
    return *pool;
  }

  // At least `bytes` bytes; writes to `bytes` how many, which `give` needs.
  void* take(size_t& bytes) {
    const size_t unit = bytes >= kPage ? kPage : kUnit;
    bytes = (bytes + unit - 1) / unit * unit;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto found = spare_.lower_bound(bytes);
      if (found != spare_.end() && found->first <= bytes + bytes / 4) {  // waste a quarter at most
        void* data = found->second;
        kept_ -= bytes = found->first;
        spare_.erase(found);
        return data;
      }
    }
    void* data = std::aligned_alloc(unit, bytes);
    if (!data) {
      release(0);
      data = std::aligned_alloc(unit, bytes);
      if (!data) throw std::bad_alloc();
    }
#ifdef __linux__
    if (unit == kPage) madvise(data, bytes, MADV_HUGEPAGE);
#endif
    return data;
  }

  void give(void* data, size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    spare_.emplace(bytes, data);
    kept_ += bytes;
    if (kept_ > most_) shrink(most_);
  }

  // Returns spare blocks to the system, the largest first, until `most` bytes are left.
  void release(size_t most) {
    std::lock_guard<std::mutex> lock(mutex_);
    shrink(most);
  }
  // How many spare bytes are kept.
  void limit(size_t most) {
    std::lock_guard<std::mutex> lock(mutex_);
    most_ = most;
    shrink(most);
  }
  size_t kept() {
    std::lock_guard<std::mutex> lock(mutex_);
    return kept_;
  }

 private:
  void shrink(size_t most) {
    while (kept_ > most) {
      const auto last = std::prev(spare_.end());
      kept_ -= last->first;
      std::free(last->second);
      spare_.erase(last);
    }
  }

  std::mutex mutex_;
  std::multimap<size_t, void*> spare_;
  size_t kept_ = 0, most_ = size_t{1} << 30;
};

// Scratch from there, where it is too large for a thread to keep.
class PooledBuffer {
 public:
  explicit PooledBuffer(size_t bytes) : bytes_(bytes), data_(bytes ? Pool::shared().take(bytes_) : nullptr) {}
  PooledBuffer(const PooledBuffer&) = delete;
  ~PooledBuffer() {
    if (data_) Pool::shared().give(data_, bytes_);
  }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  size_t bytes_;
  void* data_;
};

}  // namespace llmkern
