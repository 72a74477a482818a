// What attention-inl.h asks for of float keys and values, as plain loops that a compiler turns into
// vectors by itself: what every instruction set must equal to the bit. Internal linkage, see CMakeLists.txt.
#include <cstring>

namespace gemsmith {
namespace {

inline void widen(const void* x, int format, int64_t count, float* out) {
  if (format == FLOAT32) {
    std::memcpy(out, x, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  const auto* halves = static_cast<const uint16_t*>(x);
  for (int64_t d = 0; d < count; d++) {
    const uint32_t bits = static_cast<uint32_t>(halves[d]) << 16;
    std::memcpy(out + d, &bits, sizeof(bits));
  }
}

// Sixteen lanes, d mod 16, then a tree.
void scores_float(const AttentionTile& t, const KeyBlock& b, float (*scores)[KEYS]) {
  for (int64_t s = 0; s < b.count; s++) {
    float k[MAX_HEAD];
    widen(b.k[s], t.k_format, t.H, k);
    for (int64_t row = 0; row < t.rows; row++) {
      const float* q = t.q[row];
      float lanes[16] = {};
      for (int64_t d = 0; d < t.H; d += 16)
        for (int j = 0; j < 16; j++) lanes[j] += q[d + j] * k[d + j];
      float sum[8];
      for (int i = 0; i < 8; i++) sum[i] = lanes[i] + lanes[i + 8];
      for (int i = 0; i < 4; i++) sum[i] += sum[i + 4];
      scores[row][s] = (sum[0] + sum[2]) + (sum[1] + sum[3]);
    }
  }
}

// One key after the other.
void values_float(const AttentionTile& t, const KeyBlock& b, const Weights& weights) {
  for (int64_t s = 0; s < b.count; s++) {
    float v[MAX_HEAD];
    widen(b.v[s], t.v_format, t.H, v);
    for (int64_t row = 0; row < t.rows; row++) {
      const float w = weights.values[row][s];
      float* acc = t.acc[row];
      for (int64_t d = 0; d < t.H; d++) acc[d] += w * v[d];
    }
  }
}

}  // namespace
}  // namespace gemsmith
