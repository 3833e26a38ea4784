#include "devices/cpu/amx.h"

namespace flowprefill {

#if defined(__x86_64__)
namespace {

thread_local const AmxShapes* shaped = nullptr;  // of this thread's tiles; null: they are not ours

// Assembler instead of the compiler's functions: these want the tiles' numbers in their source.
struct AmxTiles {
  static void shape(const AmxShapes& shapes) {
    if (shaped == &shapes)
      return;
    asm volatile("ldtilecfg %0" ::"m"(shapes));
    shaped = &shapes;
  }
  template <int kTile>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kTile>
  static void load(const void* from, int64_t row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(kTile)
                 : "memory");
  }
  template <int kTile>
  static void store(void* to, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(kTile) : "memory");
  }
  template <int kSum, int kA, int kB>
  static void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
  }
};

}  // namespace

void multiply_by_amx(const Product<Bf16>& product, AmxTerms terms) {
  multiply_amx<AmxTiles>(product, terms);
}

void release_amx() {
  if (shaped == nullptr)
    return;
  asm volatile("tilerelease");
  shaped = nullptr;
}
#else
void multiply_by_amx(const Product<Bf16>&, AmxTerms) {}
void release_amx() {}
#endif

}  // namespace flowprefill
