// The sweep over blocks of outputs and tiles of rows, for an isa_*.cpp to include after defining
//   template <int B, int M, bool G> void tile(const Product&, int64_t block, int64_t m0)
// which computes rows m0..m0+M of one block of 16 outputs (B bits; G: scales per group), for M in
// 1..SMALL_TILE and LARGE_TILE.
// The lines of a block stay in cache between its tiles. Internal linkage, see CMakeLists.txt.
#include <cstring>

namespace gemsmith {
namespace {

template <int B, bool G, int M>
inline void remaining_rows(const Product& p, int64_t block, int64_t m0, int64_t left) {
  if constexpr (M > 0) {
    if (left == M)
      tile<B, M, G>(p, block, m0);
    else
      remaining_rows<B, G, M - 1>(p, block, m0, left);
  }
}

template <int B, bool G>
void sweep(const Product& p, int64_t b0, int64_t b1, int64_t m0, int64_t m1) {
  for (int64_t block = b0; block < b1; block++) {
    int64_t m = m0;
    for (; m1 - m >= LARGE_TILE; m += LARGE_TILE) tile<B, LARGE_TILE, G>(p, block, m);
    for (; m1 - m >= SMALL_TILE; m += SMALL_TILE) tile<B, SMALL_TILE, G>(p, block, m);
    remaining_rows<B, G, SMALL_TILE - 1>(p, block, m, m1 - m);
  }
}

void product(const Product& p, int64_t b0, int64_t b1, int64_t m0, int64_t m1) {
  const bool grouped = p.groups > 1;
  switch (p.bits) {
    case 2: return grouped ? sweep<2, true>(p, b0, b1, m0, m1) : sweep<2, false>(p, b0, b1, m0, m1);
    case 4: return grouped ? sweep<4, true>(p, b0, b1, m0, m1) : sweep<4, false>(p, b0, b1, m0, m1);
    case 8: return grouped ? sweep<8, true>(p, b0, b1, m0, m1) : sweep<8, false>(p, b0, b1, m0, m1);
  }
}

}  // namespace
}  // namespace gemsmith
