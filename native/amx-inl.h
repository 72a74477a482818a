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
//     Floats multiply_add(a, b, c);           a * b + c; asked for only where a * b is exact
//     Ints widened(const int8_t*);            16 of them
// All else here is plain C++ that compilers turn into vectors, so that it is tested on any CPU, with
// a unit of plain loops.
//
// Sixteen unpacked lines are a tile of weights as it is. Codes are signed here, so sums need no start.
//
// One scale a row: 2 blocks of outputs times 2 panels of 16 rows make four independent sums, and each
// tile loaded serves two; while they are computed, the four before them are scaled. Groups: sums leave
// the unit at each group's end to be scaled in float32, a tile of totals is all that fits into vector
// registers, and the four sums are of four groups, so that the unit works on two of them while the
// others are scaled. Scale steps are multiplied into the codes, which then have one scale a row.
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
using Shorts = uint16_t __attribute__((vector_size(64)));

// q of all fields of a block times its group's multiple, int8 [stride/4][64]; steps [16].
//
// u times the multiple's size is at most 15 * 15: two of them are one product of 16 bits, and by sign s
// (0 or -1) q * multiple = (u * size ^ s) - (2^(B-1) * size ^ s).
template <int B>
void unpack_steps(const Product& p, int64_t block, int8_t* codes, float* steps) {
  constexpr uint64_t MASK = ((1u << B) - 1) * 0x0101010101010101u;
  constexpr int32_t ZEROS = (1 << (B - 1)) * 0x01010101;
  const uint8_t *w = p.lines + block * p.line_count * LINE, *scales = p.scales_of(block);
  std::memcpy(steps, scales, LINE);
  int8_t* to = codes;
  for (int64_t g = 0; g < p.groups; g++) {
    const auto* multiples = reinterpret_cast<const int8_t*>(scales) + LINE + g * BLOCK;
    const Ints wide = Unit::widened<Ints>(multiples), sign = wide < 0;
    const Ints size = (wide ^ sign) - sign;
    const Shorts by = reinterpret_cast<Shorts>(size * 0x00010001);
    const Bytes flip = reinterpret_cast<Bytes>(sign);
    const Bytes zero = reinterpret_cast<Bytes>(size * ZEROS) ^ flip;
    for (int64_t l = 0; l < p.group_lines; l++, w += LINE) {
      Words u;
      std::memcpy(&u, w, LINE);
      UNROLL
      for (int f = 0; f < 8 / B; f++, to += LINE) {
        const Words field = (u >> (B * f)) & MASK;
        const Shorts product = reinterpret_cast<Shorts>(field) * by;
        const Bytes q = (reinterpret_cast<Bytes>(product) ^ flip) - zero;
        std::memcpy(to, &q, LINE);
      }
    }
  }
  std::memset(to, 0, static_cast<size_t>(codes + p.stride * BLOCK - to));
}

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

void unpack(const Product& p, int64_t block, int8_t* codes, float* scales) {
  if (p.steps())
    return p.bits == 2 ? unpack_steps<2>(p, block, codes, scales)
                       : unpack_steps<4>(p, block, codes, scales);
  p.bits == 2   ? unpack<2>(p, block, codes, scales)
  : p.bits == 4 ? unpack<4>(p, block, codes, scales)
                : unpack<8>(p, block, codes, scales);
}

struct alignas(64) Sums {
  int32_t of[PANEL][BLOCK];
};

inline Floats floats_at(const float* from) {
  Floats value;
  std::memcpy(&value, from, LINE);
  return value;
}

inline Floats sum_at(const Sums& sums, int m) {
  Ints sum;
  std::memcpy(&sum, sums.of[m], LINE);
  return __builtin_convertvector(sum, Floats);
}

// Row m of y in the block that begins with output n0; the last block may have fewer than 16.
inline void put(const Product& p, int64_t n0, int64_t m, const Floats& y) {
  float* to = p.y + m * p.N + n0;
  if (p.N - n0 >= BLOCK)
    std::memcpy(to, &y, LINE);
  else
    std::memcpy(to, &y, static_cast<size_t>(p.N - n0) * sizeof(float));
}

// Asks for what `put` will write of a panel: fetched from memory by then, not when it is due.
inline void expect(const Product& p, int64_t n0, int64_t m0, int64_t m1) {
  for (int64_t m = m0; m < m1 && m < m0 + PANEL; m++) __builtin_prefetch(p.y + m * p.N + n0, 1);
}

// Packed lines of the next blocks, before b1: asked for while others are multiplied, since they come
// from memory.
struct Ahead {
  const uint8_t *line, *end;
  int64_t each;

  // `count` blocks from `block` on, evenly within so many calls of `ask`.
  Ahead(const Product& p, int64_t block, int64_t count, int64_t b1, int64_t calls)
      : line(p.lines + block * p.line_count * LINE),
        end(p.lines + (block + count < b1 ? block + count : b1) * p.line_count * LINE),
        each(ceil_div(count * p.line_count, calls)) {}
  inline void ask() {
    for (int64_t i = 0; i < each && line < end; i++, line += LINE) __builtin_prefetch(line, 0, 2);
  }
};

// What a panel of activations has at input k.
inline const int8_t* at(const int8_t* panel, uint64_t k) {
  return panel + k / TILE_BYTES * (PANEL * TILE_BYTES) + k % TILE_BYTES;
}

// -- groups -----------------------------------------------------------------------------------

// Whether a group's sum times its scale has no more digits than a float32: then to round only after
// the addition changes nothing.
inline bool exact_products(const Product& p) {
  const int64_t size = p.group_lines * line_inputs(p.bits);
  return p.scale_bits == 16 && size * 127 << (p.bits - 1) <= 1 << 16;
}

template <bool EXACT>
inline void add_scaled(const Sums& sums, const float* scales, Floats* total) {
  const Floats scale = floats_at(scales);
  UNROLL
  for (int m = 0; m < PANEL; m++)
    total[m] = EXACT ? Unit::multiply_add(sum_at(sums, m), scale, total[m])
                     : total[m] + sum_at(sums, m) * scale;
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

template <int C, bool EXACT>
inline void pair_add(const Sums* sums, const float* scales, Floats* total) {
  add_scaled<EXACT>(sums[C], scales, total);
  add_scaled<EXACT>(sums[C + 1], scales + BLOCK, total);
}

// The panel that begins with row m0, its rows up to m1, and one block, of several groups. What the
// unit stores can be read only once it lies in the cache: so while pair i is stored, pair i + 1 is
// computed and pair i - 1 is scaled.
template <bool EXACT>
void tile_of_groups(const Product& p, int64_t block, int64_t m0, int64_t m1, const int8_t* codes,
                    const float* scales, int step, Ahead& ahead) {
  const int8_t* x = p.x + m0 * p.stride;
  const int64_t size = p.group_lines * line_inputs(p.bits), pairs = p.groups / 2;
  const int64_t turn = 2 * size, scale_turn = 2 * BLOCK;
  Sums sums[4];
  Floats total[PANEL] = {};
  expect(p, block * BLOCK, m0, m1);
  pair_dots<0>(x, codes, 0, size, step);
  for (int64_t i = 0; i < pairs; i += 2) {
    ahead.ask();
    pair_store<0>(sums);
    if (i + 1 < pairs) pair_dots<2>(x, codes, (i + 1) * turn, size, step);
    if (i > 0) pair_add<2, EXACT>(sums, scales + (i - 1) * scale_turn, total);
    if (i + 1 < pairs) pair_store<2>(sums);
    if (i + 2 < pairs) pair_dots<0>(x, codes, (i + 2) * turn, size, step);
    pair_add<0, EXACT>(sums, scales + i * scale_turn, total);
  }
  if (pairs % 2 == 0) pair_add<2, EXACT>(sums, scales + (pairs - 1) * scale_turn, total);
  if (p.groups % 2) {
    dots<0>(x, codes, pairs * turn, pairs * turn + size, step);
    Unit::store<0>(sums[0].of[0]);
    add_scaled<EXACT>(sums[0], scales + pairs * scale_turn, total);
  }
  UNROLL
  for (int m = 0; m < PANEL; m++) {
    if (m0 + m >= m1) break;
    put(p, block * BLOCK, m0 + m, total[m] * p.sx[m0 + m]);
  }
}

template <bool EXACT>
void groups_gemm(const Product& p, int64_t b0, int64_t b1, int64_t m0, int64_t m1, uint8_t* scratch) {
  const int step = p.group_lines * line_inputs(p.bits) % TILE_BYTES ? TILE_BYTES / 2 : TILE_BYTES;
  Unit::configure(step);
  int8_t* codes = reinterpret_cast<int8_t*>(scratch);
  float* scales = reinterpret_cast<float*>(scratch + p.stride * BLOCK);
  for (int64_t block = b0; block < b1; block++) {
    unpack(p, block, codes, scales);
    Ahead ahead(p, block + 1, 1, b1, ceil_div(m1 - m0, PANEL) * ceil_div(p.groups, 4));
    for (int64_t m = m0; m < m1; m += PANEL)
      tile_of_groups<EXACT>(p, block, m, m1, codes, scales, step, ahead);
  }
}

// -- one scale a row, or steps --------------------------------------------------------------------

// Four sums that have left the unit and are not yet y; that happens row by row, while the next four are
// computed. Sum 2i + j is of panel i and block j.
struct Due {
  Sums sums[4];
  const float* scales;
  int64_t n0, m0;
  int blocks = 0, row = 0, rows = 0;

  // The next `count` rows become y.
  inline void settle(const Product& p, int count) {
    for (const int end = row + count < rows ? row + count : rows; row < end; row++) {
      const int panel = row / PANEL, m = row % PANEL;
      for (int j = 0; j < blocks; j++) {
        const Floats scale = floats_at(scales + j * BLOCK);
        const Floats total = Floats{} + sum_at(sums[2 * panel + j], m) * scale;
        put(p, n0 + j * BLOCK, m0 + row, total * p.sx[m0 + row]);
      }
    }
  }
};

// Rows m0.. of NM panels and NB blocks, up to m1. codes: as unpacked, blocks one after the other.
// Meanwhile what is due of the last such tiles is settled.
template <int NM, int NB>
void tiles(const Product& p, int64_t m0, const int8_t* codes, Due& last, Ahead& ahead) {
  const int8_t* x = p.x + m0 * p.stride;
  const int64_t block_bytes = p.stride * BLOCK, panel_bytes = p.stride * PANEL;
  const int rows = static_cast<int>(ceil_div(2 * PANEL * TILE_BYTES, p.stride));
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
    last.settle(p, rows);
    ahead.ask();
  }
}

template <int NM, int NB>
void store(Due& due, int64_t n0, int64_t m0, int64_t m1, const float* scales) {
  Unit::store<0>(due.sums[0].of[0]);
  if (NB > 1) Unit::store<1>(due.sums[1].of[0]);
  if (NM > 1) Unit::store<2>(due.sums[2].of[0]);
  if (NM > 1 && NB > 1) Unit::store<3>(due.sums[3].of[0]);
  due.scales = scales;
  due.n0 = n0, due.m0 = m0;
  due.blocks = NB, due.row = 0;
  due.rows = static_cast<int>(m1 - m0 < NM * PANEL ? m1 - m0 : NM * PANEL);
}

template <int NB>
void blocks_gemm(const Product& p, int64_t block, int64_t b1, int64_t m0, int64_t m1, uint8_t* scratch) {
  int8_t* codes = reinterpret_cast<int8_t*>(scratch);
  float* scales = reinterpret_cast<float*>(scratch + NB * p.stride * BLOCK);
  for (int nb = 0; nb < NB; nb++)
    unpack(p, block + nb, codes + nb * p.stride * BLOCK, scales + nb * BLOCK);
  Due due[2];
  Ahead ahead(p, block + NB, 2, b1, ceil_div(m1 - m0, 2 * PANEL) * (p.stride / TILE_BYTES));
  int turn = 0;
  int64_t m = m0;
  for (; m1 - m > PANEL; m += 2 * PANEL, turn ^= 1) {
    tiles<2, NB>(p, m, codes, due[turn ^ 1], ahead);
    store<2, NB>(due[turn], block * BLOCK, m, m1, scales);
  }
  if (m < m1) {
    tiles<1, NB>(p, m, codes, due[turn ^ 1], ahead);
    store<1, NB>(due[turn], block * BLOCK, m, m1, scales);
    turn ^= 1;
  }
  due[turn ^ 1].settle(p, 2 * PANEL);
}

void gemm(const Product& p, int64_t b0, int64_t b1, int64_t m0, int64_t m1, uint8_t* scratch) {
  if (p.groups > 1 && !p.steps()) {
    exact_products(p) ? groups_gemm<true>(p, b0, b1, m0, m1, scratch)
                      : groups_gemm<false>(p, b0, b1, m0, m1, scratch);
  } else {
    Unit::configure(TILE_BYTES);
    int64_t block = b0;
    for (; block + 2 <= b1; block += 2) blocks_gemm<2>(p, block, b1, m0, m1, scratch);
    if (block < b1) blocks_gemm<1>(p, block, b1, m0, m1, scratch);
  }
  Unit::release();
}

int64_t scratch(const Product& p) { return 2 * (p.stride * BLOCK + p.groups * LINE); }

const Gemm GEMM = {16, PANEL, TILE_BYTES, false, scratch, gemm};

}  // namespace
}  // namespace gemsmith
