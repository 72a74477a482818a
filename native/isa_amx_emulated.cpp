// The code of the AMX kernels with a matrix unit of plain loops, for tests on CPUs without one
// (CMakeLists.txt: GEMSMITH_EMULATE_AMX).
#include "kernels.h"

namespace gemsmith {
namespace {

struct Unit {
  struct Tile {
    int rows, row_bytes;
    alignas(64) uint8_t byte[16][64];
  };
  static thread_local Tile tile[8];

  static void configure(int bytes) {
    for (int t = 0; t < 8; t++) {
      tile[t].row_bytes = t == 4 || t == 5 ? bytes : 64;
      tile[t].rows = t >= 6 ? bytes / 4 : 16;
      std::memset(tile[t].byte, 0, sizeof(tile[t].byte));
    }
  }
  static void release() {
    for (Tile& each : tile) each.rows = 0;  // nothing computes before it is configured again
  }
  template <int T>
  static void zero() {
    std::memset(tile[T].byte, 0, sizeof(tile[T].byte));
  }
  template <int T>
  static void load(const int8_t* from, int64_t stride) {
    zero<T>();
    for (int row = 0; row < tile[T].rows; row++)
      std::memcpy(tile[T].byte[row], from + row * stride, static_cast<size_t>(tile[T].row_bytes));
  }
  template <int T>
  static void store(int32_t* to) {
    for (int row = 0; row < tile[T].rows; row++)
      std::memcpy(to + row * 16, tile[T].byte[row], static_cast<size_t>(tile[T].row_bytes));
  }
  template <class Floats>
  static Floats multiply_add(const Floats& a, const Floats& b, const Floats& c) {
    return a * b + c;
  }
  template <class Ints>
  static Ints widened(const int8_t* from) {
    Ints wide;
    for (int i = 0; i < 16; i++) wide[i] = from[i];
    return wide;
  }
  template <int C, int A, int B>
  static void dot() {
    for (int m = 0; m < tile[A].rows; m++) {
      int32_t sums[16];
      std::memcpy(sums, tile[C].byte[m], sizeof(sums));
      for (int j = 0; j < tile[A].row_bytes / 4; j++)
        for (int n = 0; n < 16; n++)
          for (int i = 0; i < 4; i++)
            sums[n] += static_cast<int8_t>(tile[A].byte[m][4 * j + i]) *
                       static_cast<int8_t>(tile[B].byte[j][4 * n + i]);
      std::memcpy(tile[C].byte[m], sums, sizeof(sums));
    }
  }
};
thread_local Unit::Tile Unit::tile[8];

bool runs_here() { return true; }
void product(const Product& p, int64_t b0, int64_t b1, int64_t m0, int64_t m1) {
  GENERIC.product(p, b0, b1, m0, m1);
}

}  // namespace
}  // namespace gemsmith

#include "amx-inl.h"
#include "attention-plain-inl.h"
#include "attention-amx-plain-inl.h"
#include "attention-amx-inl.h"
#include "layer-inl.h"
#include "rows-inl.h"
#include "wide-inl.h"

namespace gemsmith {
const Kernels AMX_EMULATED = {"amx-emulated", runs_here, product, quantize, {norm, add_norm, geglu, rotate},
    BFLOAT16_ROWS, dots, wide,
                 read, sums, UNIT_ATTENTION, &GEMM};
}
