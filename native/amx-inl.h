// The product of many rows on a matrix unit, for an isa_*.cpp to include after defining the unit:
//   struct Unit  with static members
//     void configure(int bytes);              tiles 0-3: 16 x 16 int32; 4, 5: 16 rows x `bytes` int8
//                                             (activations); 6, 7: bytes/4 rows x 64 int8 (weights)
//     void release();
//     template <int T> void zero();
//     template <int T> void load(const int8_t*, int64_t stride);
//     template <int T> void store(int32_t*);  16 rows of 64 bytes
//     template <int C, int A, int B> void dot();
//       C[m][n] += sum over j, i of A[m][4j + i] * B[j][4n + i]
// All else here is plain C++ that compilers turn into vectors, so that it is tested on any CPU, with
// a unit of plain loops.
//
// Sixteen unpacked lines are a tile of weights as it is. Codes are signed here, so sums need no start.
//
// One scale a row: 2 blocks of outputs times 2 panels of 16 rows make four independent sums, and each
// tile loaded serves two. Groups: sums leave the unit at each group's end to be scaled in float32, a
// tile of totals is all that fits into vector registers, and the four sums are of four groups, so that
// the unit works on two of them while the others are scaled.
//
// Groups of 32 inputs fill half a tile. Tiles are then configured to be that small: zeros in the
// other half would cost the same loads and stores, and as much or more time in the unit.
#include <cstring>

#include "unroll.h"

namespace gemsmith {
namespace {

constexpr int PANEL = 16, TILE_BYTES = 64;

// A register, or a few, whatever the CPU: the compiler's vectors, element by element as written.
using Floats = float __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));
using Words = uint64_t __attribute__((vector_size(64)));
using Bytes = uint8_t __attribute__((vector_size(64)));

// q of all fields of a block, int8 [stride/4][64]; scales as float32 [G][16].
template <int B>
void unpack(const Product& p, int64_t block, int8_t* codes, float* scales) {
  constexpr uint64_t MASK = ((1u << B) - 1) * 0x0101010101010101u;
  constexpr uint8_t ZERO = 1u << (B - 1);
  const uint8_t* w = p.lines + block * p.line_count * LINE;
  int8_t* to = codes;
  for (int64_t l = 0; l < p.line_count; l++, w += LINE) {
    Words u;
    std::memcpy(&u, w, LINE);
    UNROLL
    for (int f = 0; f < 8 / B; f++, to += LINE) {
      const Words field = (u >> (B * f)) & MASK;
      const Bytes q = reinterpret_cast<Bytes>(field) - ZERO;
      std::memcpy(to, &q, LINE);
    }
  }
  std::memset(to, 0, static_cast<size_t>(codes + p.stride * BLOCK - to));
  const int64_t first = block * p.groups * BLOCK;
  for (int64_t i = 0; i < p.groups * BLOCK; i++)
    scales[i] = p.scale_bits == 16 ? widened(static_cast<const uint16_t*>(p.scales)[first + i])
                                   : static_cast<const float*>(p.scales)[first + i];
}

struct alignas(64) Sums {
  int32_t of[PANEL][BLOCK];
};

inline void add_scaled(const Sums& sums, const float* scales, Floats* total) {
  Floats scale;
  std::memcpy(&scale, scales, LINE);
  UNROLL
  for (int m = 0; m < PANEL; m++) {
    Ints sum;
    std::memcpy(&sum, sums.of[m], LINE);
    total[m] += __builtin_convertvector(sum, Floats) * scale;
  }
}

// y of a block and the rows m0.. of a panel, up to m1.
inline void store_rows(const Product& p, const Floats* total, int64_t block, int64_t m0, int64_t m1) {
  const int64_t n0 = block * BLOCK, count = p.N - n0 < BLOCK ? p.N - n0 : BLOCK;
  UNROLL
  for (int m = 0; m < PANEL; m++) {
    if (m0 + m >= m1) break;
    const Floats y = total[m] * p.sx[m0 + m];
    float* to = p.y + (m0 + m) * p.N + n0;
    if (count == BLOCK)
      std::memcpy(to, &y, LINE);
    else
      std::memcpy(to, &y, static_cast<size_t>(count) * sizeof(float));
  }
}

// Asks for what `store_rows` will write of so many panels, a line a row: fetched from memory by then,
// not when it is due.
inline void expect_rows(const Product& p, int64_t block, int64_t m0, int64_t m1, int panels) {
  for (int64_t m = m0; m < m1 && m < m0 + panels * PANEL; m++)
    __builtin_prefetch(p.y + m * p.N + block * BLOCK, 1);
}

// What a panel of activations has at input k.
inline const int8_t* at(const int8_t* panel, int64_t k) {
  return panel + k / TILE_BYTES * (PANEL * TILE_BYTES) + k % TILE_BYTES;
}

// Sum C, of inputs k.. up to `end`, of one panel and one block.
template <int C>
inline void dots(const int8_t* x, const int8_t* codes, int64_t k, int64_t end, int step) {
  Unit::zero<C>();
  for (; k < end; k += step) {
    Unit::load<4 + C % 2>(at(x, k), TILE_BYTES);
    Unit::load<6 + C % 2>(codes + k * BLOCK, LINE);
    Unit::dot<C, 4 + C % 2, 6 + C % 2>();
  }
}

// Two groups on end, with sums C and C + 1, from input k on.
template <int C>
inline void pair_dots(const int8_t* x, const int8_t* codes, int64_t k, int64_t size, int step) {
  dots<C>(x, codes, k, k + size, step);
  dots<C + 1>(x, codes, k + size, k + 2 * size, step);
}

template <int C>
inline void pair_store(Sums* sums) {
  Unit::store<C>(sums[C].of[0]);
  Unit::store<C + 1>(sums[C + 1].of[0]);
}

template <int C>
inline void pair_add(const Sums* sums, const float* scales, Floats* total) {
  add_scaled(sums[C], scales, total);
  add_scaled(sums[C + 1], scales + BLOCK, total);
}

// The panel that begins with row m0, its rows up to m1, and one block, of several groups. What the
// unit stores can be read only once it lies in the cache: so while pair i is stored, pair i + 1 is
// computed and pair i - 1 is scaled.
void tile_of_groups(const Product& p, int64_t block, int64_t m0, int64_t m1, const int8_t* codes,
                    const float* scales, int step) {
  const int8_t* x = p.x + m0 * p.stride;
  const int64_t size = p.group_lines * line_inputs(p.bits), pairs = p.groups / 2;
  const int64_t turn = 2 * size, scale_turn = 2 * BLOCK;
  Sums sums[4];
  Floats total[PANEL] = {};
  expect_rows(p, block, m0, m1, 1);
  pair_dots<0>(x, codes, 0, size, step);
  for (int64_t i = 0; i < pairs; i += 2) {
    pair_store<0>(sums);
    if (i + 1 < pairs) pair_dots<2>(x, codes, (i + 1) * turn, size, step);
    if (i > 0) pair_add<2>(sums, scales + (i - 1) * scale_turn, total);
    if (i + 1 < pairs) pair_store<2>(sums);
    if (i + 2 < pairs) pair_dots<0>(x, codes, (i + 2) * turn, size, step);
    pair_add<0>(sums, scales + i * scale_turn, total);
  }
  if (pairs % 2 == 0) pair_add<2>(sums, scales + (pairs - 1) * scale_turn, total);
  if (p.groups % 2) {
    dots<0>(x, codes, pairs * turn, pairs * turn + size, step);
    Unit::store<0>(sums[0].of[0]);
    add_scaled(sums[0], scales + pairs * scale_turn, total);
  }
  store_rows(p, total, block, m0, m1);
}

template <int T>
inline void store_sum(const Product& p, int64_t block, int64_t m0, int64_t m1, const float* scale) {
  Sums sums;
  Unit::store<T>(sums.of[0]);
  Floats total[PANEL] = {};
  add_scaled(sums, scale, total);
  store_rows(p, total, block, m0, m1);
}

// Rows m0.. of NM panels and NB blocks, up to m1, of one group. codes, scales: as unpacked, blocks
// one after the other. Sum 2i + j is of panel i and block j.
template <int NM, int NB>
void tiles(const Product& p, int64_t block, int64_t m0, int64_t m1, const int8_t* codes,
           const float* scales) {
  const int8_t* x = p.x + m0 * p.stride;
  const int64_t block_bytes = p.stride * BLOCK, panel_bytes = p.stride * PANEL;
  for (int j = 0; j < NB; j++) expect_rows(p, block + j, m0, m1, NM);
  Unit::zero<0>();
  if (NB > 1) Unit::zero<1>();
  if (NM > 1) Unit::zero<2>();
  if (NM > 1 && NB > 1) Unit::zero<3>();
  // To the end of the panels, where all is 0.
  for (int64_t k = 0; k < p.stride; k += TILE_BYTES) {
    Unit::load<4>(at(x, k), TILE_BYTES);
    Unit::load<6>(codes + k * BLOCK, LINE);
    Unit::dot<0, 4, 6>();
    if (NB > 1) {
      Unit::load<7>(codes + block_bytes + k * BLOCK, LINE);
      Unit::dot<1, 4, 7>();
    }
    if (NM > 1) {
      Unit::load<5>(at(x, k) + panel_bytes, TILE_BYTES);
      Unit::dot<2, 5, 6>();
      if (NB > 1) Unit::dot<3, 5, 7>();
    }
  }
  store_sum<0>(p, block, m0, m1, scales);
  if (NB > 1) store_sum<1>(p, block + 1, m0, m1, scales + BLOCK);
  if (NM > 1) store_sum<2>(p, block, m0 + PANEL, m1, scales);
  if (NM > 1 && NB > 1) store_sum<3>(p, block + 1, m0 + PANEL, m1, scales + BLOCK);
}

void unpack(const Product& p, int64_t block, int8_t* codes, float* scales) {
  p.bits == 2   ? unpack<2>(p, block, codes, scales)
  : p.bits == 4 ? unpack<4>(p, block, codes, scales)
                : unpack<8>(p, block, codes, scales);
}

template <int NB>
void blocks_gemm(const Product& p, int64_t block, int64_t m0, int64_t m1, uint8_t* scratch) {
  int8_t* codes = reinterpret_cast<int8_t*>(scratch);
  float* scales = reinterpret_cast<float*>(scratch + NB * p.stride * BLOCK);
  for (int nb = 0; nb < NB; nb++)
    unpack(p, block + nb, codes + nb * p.stride * BLOCK, scales + nb * BLOCK);
  int64_t m = m0;
  for (; m1 - m > PANEL; m += 2 * PANEL) tiles<2, NB>(p, block, m, m1, codes, scales);
  if (m < m1) tiles<1, NB>(p, block, m, m1, codes, scales);
}

void gemm(const Product& p, int64_t b0, int64_t b1, int64_t m0, int64_t m1, uint8_t* scratch) {
  if (p.groups > 1) {
    const bool halves = p.group_lines * line_inputs(p.bits) % TILE_BYTES != 0;
    const int step = halves ? TILE_BYTES / 2 : TILE_BYTES;
    Unit::configure(step);
    int8_t* codes = reinterpret_cast<int8_t*>(scratch);
    float* scales = reinterpret_cast<float*>(scratch + p.stride * BLOCK);
    for (int64_t block = b0; block < b1; block++) {
      unpack(p, block, codes, scales);
      for (int64_t m = m0; m < m1; m += PANEL)
        tile_of_groups(p, block, m, m1, codes, scales, step);
    }
  } else {
    Unit::configure(TILE_BYTES);
    int64_t block = b0;
    for (; block + 2 <= b1; block += 2) blocks_gemm<2>(p, block, m0, m1, scratch);
    if (block < b1) blocks_gemm<1>(p, block, m0, m1, scratch);
  }
  Unit::release();
}

int64_t scratch(const Product& p) { return 2 * (p.stride * BLOCK + p.groups * LINE); }

const Gemm GEMM = {16, PANEL, TILE_BYTES, scratch, gemm};

}  // namespace
}  // namespace gemsmith
