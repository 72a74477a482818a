// The sweep over blocks of outputs and tiles of rows, for an isa_*.cpp to include after defining
//   template <int B, int M, int S> void tile(const Product&, int64_t block, int64_t m0)
// which computes rows m0..m0+M of one block of 16 outputs, for M in 1..SMALL_TILE and LARGE_TILE.
// B: bits of a weight. S: 0 for one scale per output, else the bits of a group's scale, 16 or 32.
// The lines of a block stay in cache between its tiles. Internal linkage, see CMakeLists.txt.
#include <cstring>

namespace gemsmith {
namespace {

template <int B, int S, int M>
inline void remaining_rows(const Product& p, int64_t block, int64_t m0, int64_t left) {
  if constexpr (M > 0) {
    if (left == M)
      tile<B, M, S>(p, block, m0);
    else
      remaining_rows<B, S, M - 1>(p, block, m0, left);
  }
}

template <int B, int S>
void sweep(const Product& p, int64_t b0, int64_t b1, int64_t m0, int64_t m1) {
  for (int64_t block = b0; block < b1; block++) {
    int64_t m = m0;
    for (; m1 - m >= LARGE_TILE; m += LARGE_TILE) tile<B, LARGE_TILE, S>(p, block, m);
    for (; m1 - m >= SMALL_TILE; m += SMALL_TILE) tile<B, SMALL_TILE, S>(p, block, m);
    remaining_rows<B, S, SMALL_TILE - 1>(p, block, m, m1 - m);
  }
}

template <int B>
void sweep_any(const Product& p, int64_t b0, int64_t b1, int64_t m0, int64_t m1) {
  if (p.scale_bits == 16) return sweep<B, 16>(p, b0, b1, m0, m1);
  if (p.groups > 1) return sweep<B, 32>(p, b0, b1, m0, m1);
  return sweep<B, 0>(p, b0, b1, m0, m1);
}

void product(const Product& p, int64_t b0, int64_t b1, int64_t m0, int64_t m1) {
  switch (p.bits) {
    case 2: return sweep_any<2>(p, b0, b1, m0, m1);
    case 4: return sweep_any<4>(p, b0, b1, m0, m1);
    case 8: return sweep_any<8>(p, b0, b1, m0, m1);
  }
}

}  // namespace
}  // namespace gemsmith
