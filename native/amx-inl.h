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
// Sixteen unpacked lines are a tile of weights as it is. 2 blocks of outputs times 2 panels of 16
// rows make four independent sums, and each tile loaded serves two. Codes are signed here, so sums
// need no start; at a group's end they go through memory to be scaled in float32.
//
// Groups of 32 inputs fill half a tile. Tiles are then configured to be that small: zeros in the
// other half would cost the same loads and stores, and as much or more time in the unit.
#include <cstring>

namespace gemsmith {
namespace {

constexpr int PANEL = 16, TILE_BYTES = 64;

// q of all fields of a block, int8 [stride/4][64]; scales as float32 [G][16].
template <int B>
void unpack(const Product& p, int64_t block, int8_t* codes, float* scales) {
  constexpr int F = 8 / B;
  constexpr unsigned MASK = (1u << B) - 1, ZERO = 1u << (B - 1);
  const uint8_t* w = p.lines + block * p.line_count * LINE;
  int8_t* to = codes;
  for (int64_t l = 0; l < p.line_count; l++, w += LINE)
    for (int f = 0; f < F; f++, to += LINE)
      for (int i = 0; i < LINE; i++) {
        const unsigned u = static_cast<uint8_t>(w[i] >> (B * f)) & MASK;
        to[i] = static_cast<int8_t>(static_cast<uint8_t>(u - ZERO));
      }
  std::memset(to, 0, static_cast<size_t>(codes + p.stride * BLOCK - to));
  const int64_t first = block * p.groups * BLOCK;
  for (int64_t i = 0; i < p.groups * BLOCK; i++)
    scales[i] = p.scale_bits == 16 ? widened(static_cast<const uint16_t*>(p.scales)[first + i])
                                   : static_cast<const float*>(p.scales)[first + i];
}

struct Sums {
  alignas(64) int32_t of[4][PANEL][BLOCK];
  alignas(64) float total[4][PANEL][BLOCK];
};

template <int T>
inline void add_scaled(Sums& sums, const float* scale) {
  Unit::store<T>(sums.of[T][0]);
  for (int m = 0; m < PANEL; m++)
    for (int n = 0; n < BLOCK; n++)
      sums.total[T][m][n] += static_cast<float>(sums.of[T][m][n]) * scale[n];
}

template <int T>
inline void store_rows(const Product& p, const Sums& sums, int64_t block, int64_t m0, int64_t m1) {
  const int64_t n0 = block * BLOCK, count = p.N - n0 < BLOCK ? p.N - n0 : BLOCK;
  for (int64_t m = m0; m < m1 && m < m0 + PANEL; m++)
    for (int64_t n = 0; n < count; n++)
      p.y[m * p.N + n0 + n] = sums.total[T][m - m0][n] * p.sx[m];
}

// Rows m0.. of NM panels and NB blocks, up to m1. codes, scales: as unpacked, blocks one after the
// other. Sum 2i + j is of panel i and block j.
template <int NM, int NB>
void tiles(const Product& p, int64_t block, int64_t m0, int64_t m1, const int8_t* codes,
           const float* scales, int step) {
  Sums sums;
  std::memset(sums.total, 0, sizeof(sums.total));
  const int8_t* x = p.x + m0 * p.stride;
  const int64_t block_bytes = p.stride * BLOCK, panel_bytes = p.stride * PANEL;
  // A group's inputs; a single group goes on to the end of the panels, where all is 0.
  const int64_t size = p.groups > 1 ? p.group_lines * line_inputs(p.bits) : p.stride;
  for (int64_t g = 0; g < p.groups; g++) {
    Unit::zero<0>();
    if (NB > 1) Unit::zero<1>();
    if (NM > 1) Unit::zero<2>();
    if (NM > 1 && NB > 1) Unit::zero<3>();
    for (int64_t k = g * size; k < (g + 1) * size; k += step) {
      const int8_t* a = x + k / TILE_BYTES * (PANEL * TILE_BYTES) + k % TILE_BYTES;
      Unit::load<4>(a, TILE_BYTES);
      Unit::load<6>(codes + k * BLOCK, LINE);
      Unit::dot<0, 4, 6>();
      if (NB > 1) {
        Unit::load<7>(codes + block_bytes + k * BLOCK, LINE);
        Unit::dot<1, 4, 7>();
      }
      if (NM > 1) {
        Unit::load<5>(a + panel_bytes, TILE_BYTES);
        Unit::dot<2, 5, 6>();
        if (NB > 1) Unit::dot<3, 5, 7>();
      }
    }
    const float* scale = scales + g * BLOCK;
    const float* scale_1 = scale + p.groups * BLOCK;
    add_scaled<0>(sums, scale);
    if (NB > 1) add_scaled<1>(sums, scale_1);
    if (NM > 1) add_scaled<2>(sums, scale);
    if (NM > 1 && NB > 1) add_scaled<3>(sums, scale_1);
  }
  store_rows<0>(p, sums, block, m0, m1);
  if (NB > 1) store_rows<1>(p, sums, block + 1, m0, m1);
  if (NM > 1) store_rows<2>(p, sums, block, m0 + PANEL, m1);
  if (NM > 1 && NB > 1) store_rows<3>(p, sums, block + 1, m0 + PANEL, m1);
}

template <int NB>
void blocks_gemm(const Product& p, int64_t block, int64_t m0, int64_t m1, uint8_t* scratch,
                 int step) {
  int8_t* codes = reinterpret_cast<int8_t*>(scratch);
  float* scales = reinterpret_cast<float*>(scratch + NB * p.stride * BLOCK);
  for (int nb = 0; nb < NB; nb++) {
    int8_t* to = codes + nb * p.stride * BLOCK;
    float* scales_to = scales + nb * p.groups * BLOCK;
    p.bits == 2   ? unpack<2>(p, block + nb, to, scales_to)
    : p.bits == 4 ? unpack<4>(p, block + nb, to, scales_to)
                  : unpack<8>(p, block + nb, to, scales_to);
  }
  int64_t m = m0;
  for (; m1 - m > PANEL; m += 2 * PANEL) tiles<2, NB>(p, block, m, m1, codes, scales, step);
  if (m < m1) tiles<1, NB>(p, block, m, m1, codes, scales, step);
}

void gemm(const Product& p, int64_t b0, int64_t b1, int64_t m0, int64_t m1, uint8_t* scratch) {
  const bool halves = p.groups > 1 && p.group_lines * line_inputs(p.bits) % TILE_BYTES != 0;
  const int step = halves ? TILE_BYTES / 2 : TILE_BYTES;
  Unit::configure(step);
  int64_t block = b0;
  for (; block + 2 <= b1; block += 2) blocks_gemm<2>(p, block, m0, m1, scratch, step);
  if (block < b1) blocks_gemm<1>(p, block, m0, m1, scratch, step);
  Unit::release();
}

int64_t scratch(const Product& p) { return 2 * (p.stride * BLOCK + p.groups * LINE); }

const Gemm GEMM = {16, PANEL, TILE_BYTES, scratch, gemm};

}  // namespace
}  // namespace gemsmith
