// What attention-inl.h asks for of float keys and values, by AVX512. Included by
// isa_avx512vnni.cpp and isa_amx.cpp.
#pragma once
#include <immintrin.h>

#include "unroll.h"

namespace gemsmith {
namespace {

// Lanes i and i + 4 of what is left after halves were added twice.
inline __m128 quarter(__m512 x) {
  const __m256 half = _mm256_add_ps(
      _mm512_castps512_ps256(x),
      _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

inline __m128 trees4(__m512 a, __m512 b, __m512 c, __m512 d) {
  __m128 x0 = quarter(a), x1 = quarter(b), x2 = quarter(c), x3 = quarter(d);
  _MM_TRANSPOSE4_PS(x0, x1, x2, x3);
  return _mm_add_ps(_mm_add_ps(x0, x2), _mm_add_ps(x1, x3));
}

// Values are read a block later, in strips: ask for whole rows now.
inline void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64)
    _mm_prefetch(static_cast<const char*>(row) + i, _MM_HINT_T1);
}

inline __m512 load_float(const void* x, int format, int64_t d) {
  if (format == FLOAT32) return _mm512_loadu_ps(static_cast<const float*>(x) + d);
  const __m256i halves = _mm256_loadu_si256(
      reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(x) + d));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

template <int M, int FORMAT>
void scores_float_rows(const AttentionTile& t, const KeyBlock& b, int64_t row,
                       float (*scores)[KEYS]) {
  for (int64_t s = 0; s < b.count; s += 4) {
    __m512 sum[M][4];
    UNROLL
    for (int j = 0; j < 4; j++) {
      if (t.ahead && row == 0) prefetch_row(b.v[s + j], t.H * value_bytes(t.v_format));
      UNROLL
      for (int m = 0; m < M; m++) sum[m][j] = _mm512_setzero_ps();
    }
    for (int64_t d = 0; d < t.H; d += 16) {
      __m512 q[M];
      UNROLL
      for (int m = 0; m < M; m++) q[m] = _mm512_loadu_ps(t.q[row + m] + d);
      UNROLL
      for (int j = 0; j < 4; j++) {
        const __m512 k = load_float(b.k[s + j], FORMAT, d);
        UNROLL
        for (int m = 0; m < M; m++)
          sum[m][j] = _mm512_add_ps(sum[m][j], _mm512_mul_ps(q[m], k));
      }
    }
    UNROLL
    for (int m = 0; m < M; m++)
      _mm_storeu_ps(scores[row + m] + s, trees4(sum[m][0], sum[m][1], sum[m][2], sum[m][3]));
  }
}

template <int M, int FORMAT>
void values_float_rows(const AttentionTile& t, const KeyBlock& b, const Weights& weights) {
  for (int64_t d = 0; d < t.H; d += 16) {
    __m512 acc[M];
    UNROLL
    for (int m = 0; m < M; m++) acc[m] = _mm512_loadu_ps(t.acc[m] + d);
    for (int64_t s = 0; s < b.count; s++) {
      const __m512 v = load_float(b.v[s], FORMAT, d);
      UNROLL
      for (int m = 0; m < M; m++)
        acc[m] = _mm512_add_ps(acc[m], _mm512_mul_ps(_mm512_set1_ps(weights.values[m][s]), v));
    }
    UNROLL
    for (int m = 0; m < M; m++) _mm512_storeu_ps(t.acc[m] + d, acc[m]);
  }
}

template <int FORMAT>
void scores_float_all(const AttentionTile& t, const KeyBlock& b, float (*scores)[KEYS]) {
  int64_t row = 0;
  for (; t.rows - row >= 4; row += 4) scores_float_rows<4, FORMAT>(t, b, row, scores);
  switch (t.rows - row) {
    case 1: return scores_float_rows<1, FORMAT>(t, b, row, scores);
    case 2: return scores_float_rows<2, FORMAT>(t, b, row, scores);
    case 3: return scores_float_rows<3, FORMAT>(t, b, row, scores);
  }
}

void scores_float(const AttentionTile& t, const KeyBlock& b, float (*scores)[KEYS]) {
  return t.k_format == FLOAT32 ? scores_float_all<FLOAT32>(t, b, scores)
                               : scores_float_all<BFLOAT16>(t, b, scores);
}

template <int FORMAT>
void values_float_all(const AttentionTile& t, const KeyBlock& b, const Weights& weights) {
  switch (t.rows) {
    case 1: return values_float_rows<1, FORMAT>(t, b, weights);
    case 2: return values_float_rows<2, FORMAT>(t, b, weights);
    case 3: return values_float_rows<3, FORMAT>(t, b, weights);
    case 4: return values_float_rows<4, FORMAT>(t, b, weights);
    case 5: return values_float_rows<5, FORMAT>(t, b, weights);
    case 6: return values_float_rows<6, FORMAT>(t, b, weights);
    case 7: return values_float_rows<7, FORMAT>(t, b, weights);
    case 8: return values_float_rows<8, FORMAT>(t, b, weights);
  }
}

void values_float(const AttentionTile& t, const KeyBlock& b, const Weights& weights) {
  return t.v_format == FLOAT32 ? values_float_all<FLOAT32>(t, b, weights)
                               : values_float_all<BFLOAT16>(t, b, weights);
}

}  // namespace
}  // namespace gemsmith
