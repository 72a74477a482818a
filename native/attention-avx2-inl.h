// What attention-inl.h asks for, by AVX2. Included by isa_avx2.cpp alone.
//
// int8 is widened to 16 bits as it is loaded: vpmaddwd then adds two exact products a lane.
#include <immintrin.h>

namespace gemsmith {
namespace {

inline __m256i load16(const void* x) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(x)));
}

// Sums of the 8 lanes of each of four registers.
inline __m128i sums4(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i abcd = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  return _mm_add_epi32(_mm256_castsi256_si128(abcd), _mm256_extracti128_si256(abcd, 1));
}

template <int M>
void scores_int8_rows(const AttentionTile& t, const KeyBlock& b, int64_t row,
                      float (*scores)[KEYS]) {
  for (int64_t s = 0; s < b.count; s += 4) {
    __m256i sum[M][4];
    for (int j = 0; j < 4; j++)
      for (int m = 0; m < M; m++) sum[m][j] = _mm256_setzero_si256();
    for (int64_t d = 0; d < t.H; d += 16) {
      __m256i q[M];
      for (int m = 0; m < M; m++)
        q[m] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(t.q16[row + m] + d));
      for (int j = 0; j < 4; j++) {
        const __m256i k = load16(static_cast<const int8_t*>(b.k[s + j]) + d);
        for (int m = 0; m < M; m++)
          sum[m][j] = _mm256_add_epi32(sum[m][j], _mm256_madd_epi16(k, q[m]));
      }
    }
    const __m128 k_scale = _mm_loadu_ps(b.k_scale + s);
    for (int m = 0; m < M; m++) {
      const __m128 dots = _mm_cvtepi32_ps(sums4(sum[m][0], sum[m][1], sum[m][2], sum[m][3]));
      const __m128 scale = _mm_mul_ps(_mm_set1_ps(t.q_scale[row + m]), k_scale);
      _mm_storeu_ps(scores[row + m] + s, _mm_mul_ps(dots, scale));
    }
  }
}

void scores_int8(const AttentionTile& t, const KeyBlock& b, float (*scores)[KEYS]) {
  int64_t row = 0;
  for (; t.rows - row >= 2; row += 2) scores_int8_rows<2>(t, b, row, scores);
  if (row < t.rows) scores_int8_rows<1>(t, b, row, scores);
}

template <int FORMAT>
inline __m256 load_float(const void* x, int64_t d) {
  if (FORMAT == FLOAT32) return _mm256_loadu_ps(static_cast<const float*>(x) + d);
  const __m128i halves =
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(x) + d));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

// Lanes i and i + 4 of 16 after halves were added twice.
inline __m128 quarter(__m256 low, __m256 high) {
  const __m256 half = _mm256_add_ps(low, high);
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

template <int M, int FORMAT>
void scores_float_rows(const AttentionTile& t, const KeyBlock& b, int64_t row,
                       float (*scores)[KEYS]) {
  for (int64_t s = 0; s < b.count; s++) {
    __m256 low[M], high[M];
    for (int m = 0; m < M; m++) low[m] = high[m] = _mm256_setzero_ps();
    for (int64_t d = 0; d < t.H; d += 16) {
      const __m256 k0 = load_float<FORMAT>(b.k[s], d), k1 = load_float<FORMAT>(b.k[s], d + 8);
      for (int m = 0; m < M; m++) {
        const float* q = t.q[row + m] + d;
        low[m] = _mm256_add_ps(low[m], _mm256_mul_ps(_mm256_loadu_ps(q), k0));
        high[m] = _mm256_add_ps(high[m], _mm256_mul_ps(_mm256_loadu_ps(q + 8), k1));
      }
    }
    for (int m = 0; m < M; m++) {
      float x[4];
      _mm_storeu_ps(x, quarter(low[m], high[m]));
      scores[row + m][s] = (x[0] + x[2]) + (x[1] + x[3]);
    }
  }
}

template <int FORMAT>
void scores_float_all(const AttentionTile& t, const KeyBlock& b, float (*scores)[KEYS]) {
  int64_t row = 0;
  for (; t.rows - row >= 4; row += 4) scores_float_rows<4, FORMAT>(t, b, row, scores);
  for (; row < t.rows; row++) scores_float_rows<1, FORMAT>(t, b, row, scores);
}

void scores_float(const AttentionTile& t, const KeyBlock& b, float (*scores)[KEYS]) {
  return t.k_format == FLOAT32 ? scores_float_all<FLOAT32>(t, b, scores)
                               : scores_float_all<BFLOAT16>(t, b, scores);
}

template <int M>
void values_int8_rows(const AttentionTile& t, const KeyBlock& b, const Weights& weights,
                      int64_t row) {
  for (int64_t d = 0; d < t.H; d += 16) {
    __m256i sum[M][2];
    for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = _mm256_setzero_si256();
    for (int64_t s = 0; s < b.count; s += 2) {
      const __m256i even = load16(static_cast<const int8_t*>(b.v[s]) + d);
      const __m256i odd = load16(static_cast<const int8_t*>(b.v[s + 1]) + d);
      // Dimensions 0-3 and 8-11 of the two keys, interleaved; then 4-7 and 12-15.
      const __m256i pairs0 = _mm256_unpacklo_epi16(even, odd);
      const __m256i pairs1 = _mm256_unpackhi_epi16(even, odd);
      for (int m = 0; m < M; m++) {
        int32_t two;
        std::memcpy(&two, &weights.codes[row + m][s], sizeof(two));
        const __m256i w = _mm256_set1_epi32(two);
        sum[m][0] = _mm256_add_epi32(sum[m][0], _mm256_madd_epi16(pairs0, w));
        sum[m][1] = _mm256_add_epi32(sum[m][1], _mm256_madd_epi16(pairs1, w));
      }
    }
    for (int m = 0; m < M; m++) {
      const __m256 scale = _mm256_set1_ps(weights.scale[row + m]);
      const __m256i first = _mm256_permute2x128_si256(sum[m][0], sum[m][1], 0x20);
      const __m256i second = _mm256_permute2x128_si256(sum[m][0], sum[m][1], 0x31);
      float* acc = t.acc[row + m] + d;
      _mm256_storeu_ps(acc, _mm256_add_ps(_mm256_loadu_ps(acc),
                                          _mm256_mul_ps(_mm256_cvtepi32_ps(first), scale)));
      acc += 8;
      _mm256_storeu_ps(acc, _mm256_add_ps(_mm256_loadu_ps(acc),
                                          _mm256_mul_ps(_mm256_cvtepi32_ps(second), scale)));
    }
  }
}

void values_int8(const AttentionTile& t, const KeyBlock& b, const Weights& weights) {
  int64_t row = 0;
  for (; t.rows - row >= 4; row += 4) values_int8_rows<4>(t, b, weights, row);
  for (; row < t.rows; row++) values_int8_rows<1>(t, b, weights, row);
}

template <int M, int FORMAT>
void values_float_rows(const AttentionTile& t, const KeyBlock& b, const Weights& weights,
                       int64_t row) {
  for (int64_t d = 0; d < t.H; d += 16) {
    __m256 low[M], high[M];
    for (int m = 0; m < M; m++) {
      low[m] = _mm256_loadu_ps(t.acc[row + m] + d);
      high[m] = _mm256_loadu_ps(t.acc[row + m] + d + 8);
    }
    for (int64_t s = 0; s < b.count; s++) {
      const __m256 v0 = load_float<FORMAT>(b.v[s], d), v1 = load_float<FORMAT>(b.v[s], d + 8);
      for (int m = 0; m < M; m++) {
        const __m256 w = _mm256_set1_ps(weights.values[row + m][s]);
        low[m] = _mm256_add_ps(low[m], _mm256_mul_ps(w, v0));
        high[m] = _mm256_add_ps(high[m], _mm256_mul_ps(w, v1));
      }
    }
    for (int m = 0; m < M; m++) {
      _mm256_storeu_ps(t.acc[row + m] + d, low[m]);
      _mm256_storeu_ps(t.acc[row + m] + d + 8, high[m]);
    }
  }
}

template <int FORMAT>
void values_float_all(const AttentionTile& t, const KeyBlock& b, const Weights& weights) {
  int64_t row = 0;
  for (; t.rows - row >= 4; row += 4) values_float_rows<4, FORMAT>(t, b, weights, row);
  for (; row < t.rows; row++) values_float_rows<1, FORMAT>(t, b, weights, row);
}

void values_float(const AttentionTile& t, const KeyBlock& b, const Weights& weights) {
  return t.v_format == FLOAT32 ? values_float_all<FLOAT32>(t, b, weights)
                               : values_float_all<BFLOAT16>(t, b, weights);
}

}  // namespace
}  // namespace gemsmith
