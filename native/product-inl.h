// The sweep over blocks of outputs and tiles of rows, for an isa_*.cpp to include after defining
//   template <int B, int M, int S, int NB> void tile(const Product&, int64_t block, int64_t m0)
// which computes rows m0..m0+M of NB blocks of 16 outputs, for M in 1..MOST_ROWS.
// B: bits of a weight. S: 0 for one scale per output, else the bits of a group's scale, 8 (steps), 16
// or 32.
// NB: 1; or 2 where S is 0, for more rows than PAIR_ABOVE.
// The lines of a block stay in cache between its tiles. Internal linkage, see CMakeLists.txt.
#include <cstring>

namespace gemsmith {
namespace {

template <int B, int S, int NB, int M>
inline void remaining_rows(const Product& p, int64_t block, int64_t m0, int64_t left) {
  if constexpr (M > 0) {
    if (left == M)
      tile<B, M, S, NB>(p, block, m0);
    else
      remaining_rows<B, S, NB, M - 1>(p, block, m0, left);
  }
}

template <int B, int S, int NB>
void rows(const Product& p, int64_t block, int64_t m0, int64_t m1) {
  int64_t m = m0;
  for (; m1 - m >= MOST_ROWS; m += MOST_ROWS) tile<B, MOST_ROWS, S, NB>(p, block, m);
  remaining_rows<B, S, NB, MOST_ROWS - 1>(p, block, m, m1 - m);
}

template <int B, int S>
void sweep(const Product& p, int64_t b0, int64_t b1, int64_t m0, int64_t m1) {
  int64_t block = b0;
  if constexpr (S == 0 && PAIR_ABOVE > 0)
    if (m1 - m0 > PAIR_ABOVE)
      for (; block + 2 <= b1; block += 2) rows<B, S, 2>(p, block, m0, m1);
  for (; block < b1; block++) rows<B, S, 1>(p, block, m0, m1);
}

template <int B>
void sweep_any(const Product& p, int64_t b0, int64_t b1, int64_t m0, int64_t m1) {
  if constexpr (B < 8)
    if (p.steps()) return sweep<B, 8>(p, b0, b1, m0, m1);
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
