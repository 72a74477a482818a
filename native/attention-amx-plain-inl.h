// What attention-amx-inl.h asks for, as plain loops.
#include <cstring>

namespace gemsmith {
namespace {

inline void transpose(const int8_t* const rows[16], int8_t* out) {
  for (int n = 0; n < 16; n++)
    for (int j = 0; j < 16; j++) std::memcpy(out + 64 * j + 4 * n, rows[n] + 4 * j, 4);
}

// Tile j: dimensions 16j .. 16j + 15.
inline void interleave(const int8_t* const keys[4], int64_t count, int8_t* out, int64_t stride) {
  for (int64_t d = 0; d < 64; d++)
    for (int i = 0; i < 4; i++)
      out[d / 16 * stride + d % 16 * 4 + i] = d < count ? keys[i][d] : int8_t{0};
}

inline void add_interleaved(const Sums* sums, int row, float scale, int64_t count, float* acc) {
  for (int64_t d = 0; d < count; d++) {
    const int32_t(*of)[BLOCK] = sums[d / 16].of;
    acc[d] += static_cast<float>(256 * of[row][d % 16] + of[TILE_ROWS + row][d % 16]) * scale;
  }
}

inline void turn_scores(const Sums& sums, int64_t rows, const float* q_scale, const float* k_scale,
                        float (*scores)[KEYS]) {
  for (int64_t row = 0; row < rows; row++)
    for (int s = 0; s < 16; s++)
      scores[row][s] = static_cast<float>(256 * sums.of[s][row] + sums.of[s][TILE_ROWS + row]) *
                       (q_scale[row] * k_scale[s]);
}

inline void expect(const void*, int64_t) {}

}  // namespace
}  // namespace gemsmith
