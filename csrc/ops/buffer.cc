#include "ops/buffer.h"

#include <sys/mman.h>

#include <new>

namespace flowprefill {

Buffer::Buffer(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  void* memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  madvise(memory, bytes, MADV_HUGEPAGE);  // a hint: without it the buffer works as well, only slower
  memory_ = memory;
}

Buffer::~Buffer() {
  if (memory_ != nullptr) munmap(memory_, bytes_);
}

}  // namespace flowprefill
