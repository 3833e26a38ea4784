#include "devices/cpu/buffer.h"

#include <sys/mman.h>

#include <bit>
#include <new>

namespace flowprefill {

Buffer::Buffer(size_t bytes) : bytes_(bytes) {
  if (bytes == 0)
    return;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED)
    throw std::bad_alloc();
  madvise(memory, bytes,
          MADV_HUGEPAGE);  // a hint: without it the buffer works as well, only slower
  memory_ = memory;
}

Buffer::~Buffer() {
  if (memory_ != nullptr)
    munmap(memory_, bytes_);
}

namespace {

// Sizes come in steps of a quarter of a power of two, so that prompts of similar length share
// buffers.
size_t size_class(size_t bytes) {
  const size_t step = std::bit_floor(bytes < 4096 ? size_t{4096} : bytes) / 4;
  return (bytes + step - 1) / step * step;
}

}  // namespace

Buffer BufferPool::take(size_t bytes) {
  const size_t size = size_class(bytes);
  {
    const MutexLock lock(mutex_);
    const auto found = kept_.find(size);
    if (found != kept_.end() && !found->second.empty()) {
      Buffer buffer = std::move(found->second.back());
      found->second.pop_back();
      kept_bytes_ -= size;
      return buffer;
    }
  }
  return Buffer(size);
}

void BufferPool::give(Buffer buffer) {
  if (buffer.bytes() == 0)
    return;
  const MutexLock lock(mutex_);
  if (kept_bytes_ + buffer.bytes() > limit_)
    return;  // unmapped by the destructor
  kept_bytes_ += buffer.bytes();
  kept_[buffer.bytes()].push_back(std::move(buffer));
}

}  // namespace flowprefill
