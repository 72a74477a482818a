// Attention of a few query rows over one block of keys, for an isa_*.cpp to include after defining
// (see attention-plain-inl.h and attention-plain-int8-inl.h, which is what they must equal)
//   void scores_int8(const AttentionTile&, const KeyBlock&, float (*scores)[KEYS])
//   void scores_float(const AttentionTile&, const KeyBlock&, float (*scores)[KEYS])
//   void values_int8(const AttentionTile&, const KeyBlock&, const Weights&)
//   void values_float(const AttentionTile&, const KeyBlock&, const Weights&)
// Internal linkage, see CMakeLists.txt.
#include <cstring>

#include "math-inl.h"
#include "unroll.h"

namespace gemsmith {
namespace {

constexpr float MINUS_INFINITY = -__builtin_inff();

// See AttentionKernels.
float quantize16(const float* x, int64_t count, int16_t* out) {
  constexpr int32_t INFINITE = 0x7f800000;  // no finite float has greater bits
  constexpr float ROUND = 12582912.0f;      // 1.5 * 2^23: adding it leaves no fraction bits
  int32_t most = 0;
  for (int64_t k = 0; k < count; k++) {
    int32_t bits;
    std::memcpy(&bits, x + k, sizeof(bits));
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  float largest;
  std::memcpy(&largest, &most, sizeof(largest));
  if (most >= INFINITE || largest < 1e-30f) {
    std::memset(out, 0, static_cast<size_t>(count) * sizeof(*out));
    return most >= INFINITE ? largest - largest : 0.0f;  // a NaN, of infinity too
  }
  const float inverse = CODE_MOST / largest;
  for (int64_t k = 0; k < count; k++)
    out[k] = static_cast<int16_t>(static_cast<int32_t>((x[k] * inverse + ROUND) - ROUND));
  return largest / CODE_MOST;
}

// Sum of 16 floats as a tree: halves are added until one is left.
inline float tree(const float* lanes) {
  float sum[8];
  for (int i = 0; i < 8; i++) sum[i] = lanes[i] + lanes[i + 8];
  for (int i = 0; i < 4; i++) sum[i] += sum[i + 4];
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

inline float greater(float a, float b) { return a > b ? a : b; }

// The greatest of KEYS scores and one more, NaNs left out. Halves are compared, for compilers make no
// vectors of a loop that goes over lanes in turns.
inline float greatest(const float* scores, float least) {
  constexpr int HALF = static_cast<int>(KEYS / 2);
  float most[HALF];
  for (int i = 0; i < HALF; i++)
    most[i] = greater(greater(scores[i], least), greater(scores[i + HALF], least));
  UNROLL
  for (int n = HALF / 2; n > 0; n /= 2)
    for (int i = 0; i < n; i++) most[i] = greater(most[i], most[i + n]);
  return most[0];
}

// One row's softmax weights of a block, in place of its scores; brings the row's state up to date.
inline void soften(const AttentionTile& t, const KeyBlock& b, int64_t row, float* scores) {
  const int64_t first = t.first[row], last = t.last[row];
  const int64_t end = (b.count + 15) / 16 * 16;
  for (int64_t i = 0; i < first; i++) scores[i] = MINUS_INFINITY;
  for (int64_t i = last; i < KEYS; i++) scores[i] = MINUS_INFINITY;
  const float most = greatest(scores, t.most[row]);
  for (int64_t i = 0; i < end; i++) scores[i] = exp_of(scores[i] - most);
  float lanes[16];
  for (int j = 0; j < 16; j++) lanes[j] = 0.0f;
  for (int64_t i = 0; i < end; i += 16)
    for (int j = 0; j < 16; j++) lanes[j] += scores[i + j];
  if (most != t.most[row]) {
    const float shrink = exp_of(t.most[row] - most);
    float* acc = t.acc[row];
    for (int64_t d = 0; d < t.H; d++) acc[d] *= shrink;
    t.sum[row] *= shrink;
    t.most[row] = most;
  }
  t.sum[row] += tree(lanes);
}

// Values d0 .. d0 + count of a stored row.
inline void read_values(const void* row, float scale, int format, int64_t d0, int64_t count,
                        float* out) {
  if (format == FLOAT32) {
    std::memcpy(out, static_cast<const float*>(row) + d0, static_cast<size_t>(count) * sizeof(float));
  } else if (format == INT8) {
    const auto* codes = static_cast<const int8_t*>(row) + d0;
    for (int64_t d = 0; d < count; d++) out[d] = static_cast<float>(codes[d]) * scale;
  } else {
    const auto* halves = static_cast<const uint16_t*>(row) + d0;
    for (int64_t d = 0; d < count; d++) out[d] = widened(halves[d]);
  }
}

// See AttentionKernels.
void turn(const KeyRule& rule, const KeyBlock& block, int format, int64_t H, int64_t first,
          int64_t width, float* keys) {
  const int64_t pairs = rule.pairs;
  const float *fc = rule.far_cos + first / KEYS * pairs, *fs = rule.far_sin + first / KEYS * pairs;
  const float *norm_a = rule.norm, *norm_b = rule.norm + H / 2;
  for (int64_t s = 0; s < block.count; s++) {
    float a[MAX_HEAD / 2], b[MAX_HEAD / 2];
    read_values(block.v[s], block.v_scale[s], format, 0, pairs, a);
    read_values(block.v[s], block.v_scale[s], format, H / 2, pairs, b);
    const float *nc = rule.near_cos + s * pairs, *ns = rule.near_sin + s * pairs;
    const float far = static_cast<float>(first), near = static_cast<float>(s);
    const float position = static_cast<float>(first + s);
    for (int64_t i = 0; i < pairs; i++) {
      const float f = rule.frequency[i];
      const float left = (position * f - far * f) - near * f;
      const float cosine = fc[i] * nc[i] - fs[i] * ns[i], sine = fs[i] * nc[i] + fc[i] * ns[i];
      const float c = cosine - left * (sine + 0.5f * left * cosine);
      const float n = sine + left * (cosine - 0.5f * left * sine);
      const float x = a[i] * norm_a[i], y = b[i] * norm_b[i];
      a[i] = x * c - y * n;
      b[i] = y * c + x * n;
    }
    float* out = keys + s * width;
    std::memcpy(out, a, static_cast<size_t>(pairs) * sizeof(float));
    std::memcpy(out + pairs, b, static_cast<size_t>(pairs) * sizeof(float));
  }
}

// Adds to scores what the dimensions that turn contribute.
inline void add_turning(const AttentionTile& t, const KeyBlock& turned, float (*scores)[KEYS]) {
  alignas(64) float more[TILE_ROWS][KEYS];
  AttentionTile part;
  part.rows = t.rows;
  part.H = t.turning_width;
  part.k_format = part.v_format = FLOAT32;
  part.ahead = false;
  for (int64_t row = 0; row < t.rows; row++) part.q[row] = t.turning[row];
  scores_float(part, turned, more);
  for (int64_t row = 0; row < t.rows; row++)
    for (int64_t i = 0; i < turned.count; i++) scores[row][i] += more[row][i];
}

// See AttentionKernels.
void attend(const AttentionTile& t, const KeyBlock& b, const KeyBlock* turned) {
  alignas(64) float scores[TILE_ROWS][KEYS];
  Weights weights;
  if (t.k_format == INT8)
    scores_int8(t, b, scores);
  else
    scores_float(t, b, scores);
  if (turned) add_turning(t, *turned, scores);
  for (int64_t row = 0; row < t.rows; row++) {
    float* w = scores[row];
    if (t.first[row] >= t.last[row]) {
      std::memset(w, 0, sizeof(scores[row]));
    } else {
      soften(t, b, row, w);
      for (int64_t i = (b.count + 15) / 16 * 16; i < KEYS; i++) w[i] = 0.0f;
    }
    if (t.v_format == INT8) {
      for (int64_t i = 0; i < KEYS; i++) w[i] *= b.v_scale[i];
      weights.scale[row] = quantize16(w, KEYS, weights.codes[row]);
    }
  }
  weights.values = scores;
  if (t.v_format == INT8)
    values_int8(t, b, weights);
  else
    values_float(t, b, weights);
}

// See AttentionKernels.
void fold(const float* acc, float most, float sum, int64_t H, float* y, float* y_most,
          float* y_sum) {
  if (sum == 0.0f) return;  // it saw none of these keys
  const float top = most > *y_most ? most : *y_most;
  const float before = exp_of(*y_most - top), now = exp_of(most - top);
  for (int64_t d = 0; d < H; d++) y[d] = y[d] * before + acc[d] * now;
  *y_sum = *y_sum * before + sum * now;
  *y_most = top;
}

const AttentionKernels ATTENTION = {quantize16, attend, turn, fold};

}  // namespace
}  // namespace gemsmith
