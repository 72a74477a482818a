// What attention-inl.h asks for of int8 keys and values, on a matrix unit; for an isa_*.cpp to
// include after amx-inl.h (see Unit there) and after defining
//   void transpose(const int8_t* const rows[16], int8_t* out);
//     out [16][16][4]: four bytes j of row n at [j][n]
//   void interleave(const int8_t* const keys[4], int64_t count, int8_t* out, int64_t stride);
//     `count` bytes of four keys, up to 64, as a row of each of four tiles `stride` apart: all four
//     bytes of a dimension on end, in an order of dimensions that `add_interleaved` knows
//   void add_interleaved(const Sums*, int row, float scale, int64_t count, float* acc);
//     acc[d] += scale * (256 * the first sum + the second) of the row's dimensions d < count
//   void turn_scores(const Sums&, int64_t rows, const float* q_scale, const float* k_scale,
//                    float (*scores)[KEYS]);
//     scores of 16 keys: 256 * the first sum + the second of each row, times both scales
//   void expect(const void*, int64_t bytes);  asks for memory that is read soon
//
// A code of 16 bits is 256 times one signed byte plus another, so a tile's 8 rows are 16 rows of
// bytes: first bytes of all, then second bytes. Sums of both are exact, and so is what they make.
//
// Keys are the left factor of scores as they lie in memory, 16 at a time, queries the right one,
// arranged once for all keys. The weights are the left factor of what is added up, and the values
// the right one, four keys interleaved, once for all tiles of a block.
#include <cstring>

#include "unroll.h"

namespace gemsmith {
namespace {

constexpr int64_t TILE_KEYS = 16, CHUNK = 64, TILE_SIZE = TILE_KEYS * CHUNK;
static_assert(2 * TILE_ROWS == PANEL, "first and second bytes of all rows fill a tile");
static_assert(KEYS == 2 * CHUNK && TILE_KEYS == BLOCK, "blocks of keys are whole tiles");

inline void split(const int16_t* codes, int64_t count, int8_t* first, int8_t* second) {
  for (int64_t i = 0; i < count; i++) {
    first[i] = static_cast<int8_t>((codes[i] + 128) >> 8);
    second[i] = static_cast<int8_t>(codes[i]);
  }
}

int64_t chunks_of(int64_t H) { return ceil_div(H, CHUNK); }

// See AttentionKernels.
int64_t arranged_bytes(int64_t H) { return chunks_of(H) * TILE_SIZE; }

// See AttentionKernels: [chunks][16][16][4].
void arrange(const AttentionTile& t, int8_t* out) {
  alignas(64) int8_t bytes[PANEL][MAX_HEAD];
  const int64_t width = (t.H + 31) / 32 * 32, chunks = chunks_of(t.H);
  for (int64_t row = 0; row < TILE_ROWS; row++) {
    int8_t *first = bytes[row], *second = bytes[TILE_ROWS + row];
    const int64_t there = row < t.rows ? width : 0;
    split(t.q16[row], there, first, second);
    std::memset(first + there, 0, static_cast<size_t>(chunks * CHUNK - there));
    std::memset(second + there, 0, static_cast<size_t>(chunks * CHUNK - there));
  }
  for (int64_t c = 0; c < chunks; c++) {
    const int8_t* rows[PANEL];
    for (int n = 0; n < PANEL; n++) rows[n] = bytes[n] + c * CHUNK;
    transpose(rows, out + c * TILE_SIZE);
  }
}

// Sixteen keys: where they lie, a stride apart.
struct TileOfKeys {
  const int8_t* at;
  int64_t stride;
};

// Where they do not lie so, or fill no whole chunks, they are copied to `room`.
inline TileOfKeys tile_of_keys(const KeyBlock& b, int64_t s, int64_t H, int8_t* room) {
  const auto* first = static_cast<const int8_t*>(b.k[s]);
  const int64_t stride = static_cast<const int8_t*>(b.k[s + 1]) - first;
  int64_t away = H % CHUNK;
  for (int64_t i = 0; i < TILE_KEYS; i++)
    away |= static_cast<const int8_t*>(b.k[s + i]) - first - i * stride;
  if (!away) return {first, stride};
  const int64_t width = chunks_of(H) * CHUNK;
  for (int64_t i = 0; i < TILE_KEYS; i++) {
    std::memcpy(room + i * width, b.k[s + i], static_cast<size_t>(H));
    std::memset(room + i * width + H, 0, static_cast<size_t>(width - H));
  }
  return {room, width};
}

template <int C>
inline void key_dots(const TileOfKeys& keys, int64_t chunk) {
  Unit::load<4 + C % 2>(keys.at + chunk * CHUNK, keys.stride);
  Unit::dot<C, 4 + C % 2, 6>();
}

void scores_int8(const AttentionTile& t, const KeyBlock& b, float (*scores)[KEYS]) {
  constexpr int TURN = 2;  // tiles of keys that share a load of the queries
  alignas(64) int8_t room[TURN][TILE_KEYS * MAX_HEAD];
  Sums sums[KEYS / TILE_KEYS];
  const int64_t tiles = (b.count + TILE_KEYS - 1) / TILE_KEYS, chunks = chunks_of(t.H);
  for (int64_t first = 0; first < tiles; first += TURN) {
    const int64_t count = tiles - first < TURN ? tiles - first : TURN;
    TileOfKeys keys[TURN];
    for (int64_t i = 0; i < count; i++) {
      keys[i] = tile_of_keys(b, (first + i) * TILE_KEYS, t.H, room[i]);
      // Values are read after all scores: ask for them, and for the next keys, now.
      for (int64_t s = (first + i) * TILE_KEYS; t.ahead && s < (first + i + 1) * TILE_KEYS; s++) {
        expect(b.v[s], t.H * value_bytes(t.v_format));
        if (s + TURN * TILE_KEYS < KEYS) expect(b.k[s + TURN * TILE_KEYS], t.H);
      }
    }
    Unit::zero<0>();
    Unit::zero<1>();
    for (int64_t c = 0; c < chunks; c++) {
      Unit::load<6>(t.arranged + c * TILE_SIZE, CHUNK);
      key_dots<0>(keys[0], c);
      if (count > 1) key_dots<1>(keys[1], c);
    }
    Unit::store<0>(sums[first].of[0]);
    if (count > 1) Unit::store<1>(sums[first + 1].of[0]);
  }
  for (int64_t i = 0; i < tiles; i++) {
    float(*to)[KEYS] = reinterpret_cast<float(*)[KEYS]>(&scores[0][i * TILE_KEYS]);
    turn_scores(sums[i], t.rows, t.q_scale, b.k_scale + i * TILE_KEYS, to);
  }
}

template <int C>
inline void value_dots(const int8_t* values) {
  Unit::load<6 + C % 2>(values + C * TILE_SIZE, CHUNK);
  Unit::dot<C, 4, 6 + C % 2>();
}

void values_int8(const AttentionTile& t, const KeyBlock& b, const Weights& weights) {
  // Of the block that this thread is at: [chunks of H][chunks of keys][4 tiles][16][16][4].
  alignas(64) thread_local int8_t values[MAX_HEAD * KEYS];
  alignas(64) int8_t codes[PANEL][KEYS];
  Sums sums[2][4];
  for (int64_t row = 0; row < TILE_ROWS; row++) {
    if (row < t.rows) {
      split(weights.codes[row], KEYS, codes[row], codes[TILE_ROWS + row]);
    } else {
      std::memset(codes[row], 0, KEYS);
      std::memset(codes[TILE_ROWS + row], 0, KEYS);
    }
  }
  const int64_t chunks = chunks_of(t.H), parts = b.count > CHUNK ? 2 : 1;
  for (int64_t c = 0; c <= chunks; c++) {
    if (c < chunks) {
      int8_t* to = values + c * KEYS * CHUNK;
      const int64_t there = t.H - c * CHUNK < CHUNK ? t.H - c * CHUNK : CHUNK;
      for (int64_t s = 0; t.ahead && s < parts * CHUNK; s += 4) {
        const int8_t* keys[4];
        for (int i = 0; i < 4; i++) keys[i] = static_cast<const int8_t*>(b.v[s + i]) + c * CHUNK;
        interleave(keys, there, to + s / CHUNK * 4 * TILE_SIZE + s % CHUNK * BLOCK, TILE_SIZE);
      }
      Unit::zero<0>();
      Unit::zero<1>();
      Unit::zero<2>();
      Unit::zero<3>();
      for (int64_t part = 0; part < parts; part++) {
        Unit::load<4>(codes[0] + part * CHUNK, KEYS);
        value_dots<0>(to + part * 4 * TILE_SIZE);
        value_dots<1>(to + part * 4 * TILE_SIZE);
        value_dots<2>(to + part * 4 * TILE_SIZE);
        value_dots<3>(to + part * 4 * TILE_SIZE);
      }
      Unit::store<0>(sums[c % 2][0].of[0]);
      Unit::store<1>(sums[c % 2][1].of[0]);
      Unit::store<2>(sums[c % 2][2].of[0]);
      Unit::store<3>(sums[c % 2][3].of[0]);
    }
    // What the unit stores can be read only once it lies in the cache: so a chunk later.
    for (int64_t row = 0; c > 0 && row < t.rows; row++) {
      const int64_t d = (c - 1) * CHUNK, there = t.H - d < CHUNK ? t.H - d : CHUNK;
      add_interleaved(sums[(c - 1) % 2], static_cast<int>(row), weights.scale[row], there,
                      t.acc[row] + d);
    }
  }
}

}  // namespace
}  // namespace gemsmith

#include "attention-inl.h"

namespace gemsmith {
namespace {

void attend_on_unit(const AttentionTile& t, const KeyBlock& b, const KeyBlock* turned) {
  const bool used = t.k_format == INT8 || t.v_format == INT8;
  if (used) Unit::configure(CHUNK);
  attend(t, b, turned);
  if (used) Unit::release();
}

const AttentionKernels UNIT_ATTENTION = {quantize16, attend_on_unit, turn, fold, arranged_bytes,
                                         arrange};

}  // namespace
}  // namespace gemsmith
