// What attention-inl.h asks for of int8 keys and values, as plain loops: see attention-plain-inl.h.
#include <cstring>

namespace gemsmith {
namespace {

// Exact int32 dot products: 512 * CODE_MOST * 127 < 2^31.
void scores_int8(const AttentionTile& t, const KeyBlock& b, float (*scores)[KEYS]) {
  for (int64_t s = 0; s < b.count; s++) {
    const auto* k = static_cast<const int8_t*>(b.k[s]);
    int16_t wide[MAX_HEAD];
    for (int64_t d = 0; d < t.H; d++) wide[d] = k[d];
    for (int64_t row = 0; row < t.rows; row++) {
      const int16_t* q = t.q16[row];
      int32_t sum = 0;
      for (int64_t d = 0; d < t.H; d++) sum += static_cast<int32_t>(q[d]) * wide[d];
      scores[row][s] = static_cast<float>(sum) * (t.q_scale[row] * b.k_scale[s]);
    }
  }
}

// Exact int32 sums: KEYS * CODE_MOST * 127 < 2^31. Then one multiplication and one addition a value.
void values_int8(const AttentionTile& t, const KeyBlock& b, const Weights& weights) {
  for (int64_t row = 0; row < t.rows; row++) {
    int32_t sums[MAX_HEAD] = {};
    for (int64_t s = 0; s < b.count; s++) {
      const auto* v = static_cast<const int8_t*>(b.v[s]);
      const int16_t w = weights.codes[row][s];
      for (int64_t d = 0; d < t.H; d++)
        sums[d] += static_cast<int32_t>(w) * static_cast<int16_t>(v[d]);
    }
    float* acc = t.acc[row];
    for (int64_t d = 0; d < t.H; d++)
      acc[d] += static_cast<float>(sums[d]) * weights.scale[row];
  }
}

}  // namespace
}  // namespace gemsmith
