// What attention-amx-inl.h asks for, by AVX512.
#pragma once
#include <immintrin.h>

#include "unroll.h"

namespace gemsmith {
namespace {

// Within each quarter: words w of rows 4g .. 4g + 3 become x[4g + w].
template <int N>
inline void turn_words(__m512i* x) {
  __m512i y[N];
  UNROLL
  for (int i = 0; i < N; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  UNROLL
  for (int i = 0; i < N; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
}

// Quarters: quarter q of x[j] becomes quarter j of x[q].
inline void turn_quarters(__m512i* x) {
  const __m512i a = _mm512_shuffle_i32x4(x[0], x[1], 0x44);
  const __m512i b = _mm512_shuffle_i32x4(x[2], x[3], 0x44);
  const __m512i c = _mm512_shuffle_i32x4(x[0], x[1], 0xee);
  const __m512i d = _mm512_shuffle_i32x4(x[2], x[3], 0xee);
  x[0] = _mm512_shuffle_i32x4(a, b, 0x88);
  x[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
  x[2] = _mm512_shuffle_i32x4(c, d, 0x88);
  x[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
}

inline void transpose(const int8_t* const rows[16], int8_t* out) {
  __m512i x[16];
  UNROLL
  for (int i = 0; i < 16; i++) x[i] = _mm512_loadu_si512(rows[i]);
  turn_words<16>(x);
  // x[4g + w], quarter q: words 4q + w of rows 4g .. 4g + 3.
  UNROLL
  for (int w = 0; w < 4; w++) {
    __m512i words[4] = {x[w], x[4 + w], x[8 + w], x[12 + w]};
    turn_quarters(words);
    UNROLL
    for (int q = 0; q < 4; q++) _mm512_storeu_si512(out + 64 * (4 * q + w), words[q]);
  }
}

// Quarter q of tile j: dimensions 16q + 4j .. 16q + 4j + 3.
inline void interleave(const int8_t* const keys[4], int64_t count, int8_t* out, int64_t stride) {
  const __mmask64 there = ~uint64_t{0} >> (64 - count);
  const __m512i a = _mm512_maskz_loadu_epi8(there, keys[0]);
  const __m512i b = _mm512_maskz_loadu_epi8(there, keys[1]);
  const __m512i c = _mm512_maskz_loadu_epi8(there, keys[2]);
  const __m512i d = _mm512_maskz_loadu_epi8(there, keys[3]);
  const __m512i ab0 = _mm512_unpacklo_epi8(a, b), ab1 = _mm512_unpackhi_epi8(a, b);
  const __m512i cd0 = _mm512_unpacklo_epi8(c, d), cd1 = _mm512_unpackhi_epi8(c, d);
  _mm512_storeu_si512(out, _mm512_unpacklo_epi16(ab0, cd0));
  _mm512_storeu_si512(out + stride, _mm512_unpackhi_epi16(ab0, cd0));
  _mm512_storeu_si512(out + 2 * stride, _mm512_unpacklo_epi16(ab1, cd1));
  _mm512_storeu_si512(out + 3 * stride, _mm512_unpackhi_epi16(ab1, cd1));
}

inline void add_interleaved(const Sums* sums, int row, float scale, int64_t count, float* acc) {
  __m512i s[4];
  UNROLL
  for (int j = 0; j < 4; j++)
    s[j] = _mm512_add_epi32(_mm512_slli_epi32(_mm512_loadu_si512(sums[j].of[row]), 8),
                            _mm512_loadu_si512(sums[j].of[TILE_ROWS + row]));
  turn_quarters(s);
  UNROLL
  for (int q = 0; q < 4; q++) {
    if (16 * q >= count) break;
    const __m512 more = _mm512_mul_ps(_mm512_cvtepi32_ps(s[q]), _mm512_set1_ps(scale));
    _mm512_storeu_ps(acc + 16 * q, _mm512_add_ps(_mm512_loadu_ps(acc + 16 * q), more));
  }
}

inline void turn_scores(const Sums& sums, int64_t rows, const float* q_scale, const float* k_scale,
                        float (*scores)[KEYS]) {
  static_assert(TILE_ROWS == 8, "a key's rows fill half a register");
  // x[i]: all rows of key i, then of key i + 8.
  __m512i x[8], y[8];
  UNROLL
  for (int i = 0; i < 8; i++) {
    const __m512i a = _mm512_loadu_si512(sums.of[i]), b = _mm512_loadu_si512(sums.of[i + 8]);
    const __m512i first = _mm512_shuffle_i64x2(a, b, 0x44);
    x[i] = _mm512_add_epi32(_mm512_slli_epi32(first, 8), _mm512_shuffle_i64x2(a, b, 0xee));
  }
  turn_words<8>(x);
  // x[4g + w], quarter q: of keys 4g .. 4g + 3 (from q = 2 on: 8 more) row 4 * (q % 2) + w.
  const __m512i even = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
  const __m512i odd = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
  UNROLL
  for (int w = 0; w < 4; w++) {
    y[w] = _mm512_permutex2var_epi64(x[w], even, x[4 + w]);
    y[4 + w] = _mm512_permutex2var_epi64(x[w], odd, x[4 + w]);
  }
  const __m512 k = _mm512_loadu_ps(k_scale);
  UNROLL
  for (int row = 0; row < 8; row++) {
    if (row >= rows) break;
    const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(q_scale[row]), k);
    _mm512_storeu_ps(scores[row], _mm512_mul_ps(_mm512_cvtepi32_ps(y[row]), scale));
  }
}

inline void expect(const void* from, int64_t bytes) { prefetch_row(from, bytes); }

}  // namespace
}  // namespace gemsmith
