// Memory that many long-lived arrays share, in large pages: weights of a few hundred KiB each would be in pages
// of 4 KiB, and reading all of them would wait for thousands of page walks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "buffer.h"

namespace llmkern {

class Arena {
 public:
  // `bytes` bytes from a multiple of 64 on, which live as long as the arena.
  uint8_t* take(size_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    if (bytes > left_) {
      left_ = std::max(bytes, kPart);
      parts_.emplace_back(left_);
      next_ = parts_.back().as<uint8_t>();
    }
    uint8_t* const taken = next_;
    next_ += bytes, left_ -= bytes;
    return taken;
  }

 private:
  static constexpr size_t kPart = size_t{16} << 20;
  std::vector<Buffer> parts_;
  uint8_t* next_ = nullptr;
  size_t left_ = 0;
};

}  // namespace llmkern
