// What attention-inl.h asks for of int8 keys and values, by AVX512 with VNNI. After
// attention-avx512-inl.h.
//
// int8 is widened to 16 bits as it is loaded: vpdpwssd then adds two exact products a lane. Four
// rows share each key's load, eight rows each value's.
#pragma once
#include <immintrin.h>

#include "unroll.h"

namespace gemsmith {
namespace {

// The last, half chunk of a head whose size is no multiple of 32.
inline __mmask32 chunk_mask(int64_t left) { return left >= 32 ? 0xffffffffu : 0xffffu; }

// Sums of the 16 lanes of each of four registers.
inline __m128i sums4(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i abcd =
      _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

template <int M>
void scores_int8_rows(const AttentionTile& t, const KeyBlock& b, int64_t row,
                      float (*scores)[KEYS]) {
  for (int64_t s = 0; s < b.count; s += 4) {
    const int8_t* k[4];
    __m512i sum[M][4];
    UNROLL
    for (int j = 0; j < 4; j++) {
      k[j] = static_cast<const int8_t*>(b.k[s + j]);
      if (t.ahead && row == 0) {
        prefetch_row(b.v[s + j], t.H * value_bytes(t.v_format));
        if (s + j + 16 < b.count) prefetch_row(b.k[s + j + 16], t.H);
      }
      UNROLL
      for (int m = 0; m < M; m++) sum[m][j] = _mm512_setzero_si512();
    }
    for (int64_t d = 0; d < t.H; d += 32) {
      const __mmask32 there = chunk_mask(t.H - d);
      __m512i q[M];
      UNROLL
      for (int m = 0; m < M; m++) q[m] = _mm512_loadu_si512(t.q16[row + m] + d);
      UNROLL
      for (int j = 0; j < 4; j++) {
        const __m512i wide = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(there, k[j] + d));
        UNROLL
        for (int m = 0; m < M; m++) sum[m][j] = _mm512_dpwssd_epi32(sum[m][j], wide, q[m]);
      }
    }
    const __m128 k_scale = _mm_loadu_ps(b.k_scale + s);
    UNROLL
    for (int m = 0; m < M; m++) {
      const __m128 dots = _mm_cvtepi32_ps(sums4(sum[m][0], sum[m][1], sum[m][2], sum[m][3]));
      const __m128 scale = _mm_mul_ps(_mm_set1_ps(t.q_scale[row + m]), k_scale);
      _mm_storeu_ps(scores[row + m] + s, _mm_mul_ps(dots, scale));
    }
  }
}

template <int M>
void values_int8_rows(const AttentionTile& t, const KeyBlock& b, const Weights& weights) {
  // Interleaving 16-bit lanes of two keys leaves dimensions in this order; see unpack below.
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high =
      _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int64_t d = 0; d < t.H; d += 32) {
    const __mmask32 there = chunk_mask(t.H - d);
    __m512i sum[M][2];
    UNROLL
    for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = _mm512_setzero_si512();
    for (int64_t s = 0; s < b.count; s += 2) {
      const __m512i even = _mm512_cvtepi8_epi16(
          _mm256_maskz_loadu_epi8(there, static_cast<const int8_t*>(b.v[s]) + d));
      const __m512i odd = _mm512_cvtepi8_epi16(
          _mm256_maskz_loadu_epi8(there, static_cast<const int8_t*>(b.v[s + 1]) + d));
      const __m512i pairs0 = _mm512_unpacklo_epi16(even, odd);
      const __m512i pairs1 = _mm512_unpackhi_epi16(even, odd);
      UNROLL
      for (int m = 0; m < M; m++) {
        int32_t two;
        std::memcpy(&two, &weights.codes[m][s], sizeof(two));
        const __m512i w = _mm512_set1_epi32(two);
        sum[m][0] = _mm512_dpwssd_epi32(sum[m][0], pairs0, w);
        sum[m][1] = _mm512_dpwssd_epi32(sum[m][1], pairs1, w);
      }
    }
    const __mmask16 both = there == 0xffffu ? 0 : 0xffff;
    UNROLL
    for (int m = 0; m < M; m++) {
      const __m512 scale = _mm512_set1_ps(weights.scale[m]);
      const __m512i first = _mm512_permutex2var_epi32(sum[m][0], low, sum[m][1]);
      const __m512i second = _mm512_permutex2var_epi32(sum[m][0], high, sum[m][1]);
      float* acc = t.acc[m] + d;
      _mm512_storeu_ps(acc, _mm512_add_ps(_mm512_loadu_ps(acc),
                                          _mm512_mul_ps(_mm512_cvtepi32_ps(first), scale)));
      _mm512_mask_storeu_ps(
          acc + 16, both,
          _mm512_add_ps(_mm512_maskz_loadu_ps(both, acc + 16),
                        _mm512_mul_ps(_mm512_cvtepi32_ps(second), scale)));
    }
  }
}

void scores_int8(const AttentionTile& t, const KeyBlock& b, float (*scores)[KEYS]) {
  int64_t row = 0;
  for (; t.rows - row >= 4; row += 4) scores_int8_rows<4>(t, b, row, scores);
  switch (t.rows - row) {
    case 1: return scores_int8_rows<1>(t, b, row, scores);
    case 2: return scores_int8_rows<2>(t, b, row, scores);
    case 3: return scores_int8_rows<3>(t, b, row, scores);
  }
}

void values_int8(const AttentionTile& t, const KeyBlock& b, const Weights& weights) {
  switch (t.rows) {
    case 1: return values_int8_rows<1>(t, b, weights);
    case 2: return values_int8_rows<2>(t, b, weights);
    case 3: return values_int8_rows<3>(t, b, weights);
    case 4: return values_int8_rows<4>(t, b, weights);
    case 5: return values_int8_rows<5>(t, b, weights);
    case 6: return values_int8_rows<6>(t, b, weights);
    case 7: return values_int8_rows<7>(t, b, weights);
    case 8: return values_int8_rows<8>(t, b, weights);
  }
}

}  // namespace
}  // namespace gemsmith
