// Ref<T>: intrusive reference-counted pointer; T needs retain(T*) and release(T*) by ADL.
// Used by the whole runtime for runs, and by csrc/bindings as the holder type.
#pragma once

#include <cstddef>
#include <utility>

namespace flowprefill {

// Copying retains, destruction releases. Constructing from a raw pointer always retains, so a
// second Ref made from get() or from `this` shares the same count.
template <typename T>
class Ref {
 public:
  using element_type = T;

  Ref() = default;
  Ref(std::nullptr_t) {}  // NOLINT(google-explicit-constructor)
  explicit Ref(T* pointer) : pointer_(pointer) {
    if (pointer_ != nullptr)
      retain(pointer_);
  }
  Ref(const Ref& other) : Ref(other.pointer_) {}
  Ref(Ref&& other) noexcept : pointer_(std::exchange(other.pointer_, nullptr)) {}
  Ref& operator=(Ref other) noexcept {
    std::swap(pointer_, other.pointer_);
    return *this;
  }
  ~Ref() {
    if (pointer_ != nullptr)
      release(pointer_);
  }

  // Takes over a reference that detach() gave out.
  static Ref adopt(T* pointer) noexcept {
    Ref ref;
    ref.pointer_ = pointer;
    return ref;
  }
  // Gives the reference out as a raw pointer; the caller must adopt() it.
  T* detach() noexcept { return std::exchange(pointer_, nullptr); }

  T* get() const noexcept { return pointer_; }
  T& operator*() const noexcept { return *pointer_; }
  T* operator->() const noexcept { return pointer_; }
  explicit operator bool() const noexcept { return pointer_ != nullptr; }
  void reset() noexcept { *this = Ref(); }

  friend bool operator==(const Ref& a, const Ref& b) noexcept { return a.pointer_ == b.pointer_; }
  friend bool operator==(const Ref& a, std::nullptr_t) noexcept { return a.pointer_ == nullptr; }

 private:
  T* pointer_ = nullptr;
};

class Run;
void retain(Run* run) noexcept;
void release(Run* run) noexcept;
using RunRef = Ref<Run>;

}  // namespace flowprefill
