// AMX int8: Intel servers since 2023. Many rows on the matrix unit; all else as with AVX512-VNNI.
//
// Linux lends the unit's registers (8 KiB a thread) to processes that ask for it. Other systems are
// not asked.
#include <immintrin.h>

#include "kernels.h"

#if defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gemsmith {
namespace {

// By their names: GCC's functions want a number, not a template's argument, and GCC 12 believes that
// ldtilecfg reads 8 bytes, so that it drops stores to the other 56.
struct Unit {
  static void configure(int bytes) {
    struct {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } tiles = {};
    static_assert(sizeof(tiles) == 64, "what ldtilecfg reads");
    tiles.palette = 1;
    for (int t = 0; t < 8; t++) {
      tiles.row_bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? bytes : 64);
      tiles.rows[t] = static_cast<uint8_t>(t >= 6 ? bytes / 4 : 16);
    }
    asm volatile("ldtilecfg %0" : : "m"(tiles));
  }
  static void release() { asm volatile("tilerelease"); }
  template <int T>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
  }
  template <int T>
  static void load(const int8_t* from, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(T), "r"(from), "r"(stride) : "memory");
  }
  template <int T>
  static void store(int32_t* to) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)"
                 : : "i"(T), "r"(to), "r"(static_cast<int64_t>(64)) : "memory");
  }
  template <class Floats>
  static Floats multiply_add(const Floats& a, const Floats& b, const Floats& c) {
    return reinterpret_cast<Floats>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b),
                                                    reinterpret_cast<__m512>(c)));
  }
  template <class Ints>
  static Ints widened(const int8_t* from) {
    const auto* bytes = reinterpret_cast<const __m128i*>(from);
    return reinterpret_cast<Ints>(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes)));
  }
  template <int C, int A, int B>
  static void dot() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
};

bool runs_here() {
#if defined(__linux__) && defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned TILE = 1u << 24, INT8 = 1u << 25;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & TILE) || !(d & INT8)) return false;
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, for all threads
  return AVX512VNNI.runs_here() && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
  return false;
#endif
}

void product(const Product& p, int64_t b0, int64_t b1, int64_t m0, int64_t m1) {
  AVX512VNNI.product(p, b0, b1, m0, m1);
}

}  // namespace
}  // namespace gemsmith

#include "amx-inl.h"
#include "attention-avx512-inl.h"
#include "attention-amx-avx512-inl.h"
#include "attention-amx-inl.h"
#include "layer-inl.h"
#include "rows-inl.h"
#include "wide-avx512-inl.h"

namespace gemsmith {
const Kernels AMX = {"amx", runs_here, product, quantize, {norm, add_norm, geglu, rotate},
    BFLOAT16_ROWS, dots, wide,
                 read, sums, UNIT_ATTENTION, &GEMM};
}
