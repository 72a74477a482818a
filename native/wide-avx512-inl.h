// What wide-inl.h computes, by AVX512: a register holds the lanes of one sum, and tiles of outputs
// and rows share what is loaded and widened. Included by isa_avx512vnni.cpp and isa_amx.cpp.
#pragma once
#include <immintrin.h>

#include "unroll.h"

namespace gemsmith {
namespace {

// Outputs and rows of a tile; from so many rows on its outputs are widened once for all.
constexpr int TILE = WIDE_ROOM, TILE_ROWS = 6, MANY_ROWS = 24;

inline __m512 widened16(__m256i bits) {
  // One permutation puts each before its zeros, where a shift would be a second step.
  const __m512i places = _mm512_set_epi16(
      15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2,
      1, 1, 0, 0);
  return _mm512_castsi512_ps(
      _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, places, _mm512_castsi256_si512(bits)));
}

inline __m512 load16(const uint16_t* w) {
  return widened16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
}
inline __m512 load16(const float* w) { return _mm512_loadu_ps(w); }

inline __m512 load16(const uint16_t* w, __mmask16 there) {
  return widened16(_mm256_maskz_loadu_epi16(there, w));
}
inline __m512 load16(const float* w, __mmask16 there) { return _mm512_maskz_loadu_ps(there, w); }

// The sums of four registers' lanes, in the order of sum_of.
inline __m128 sums_of(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
  __m512 each = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
  each = _mm512_add_ps(each, _mm512_permute_ps(each, 0x4e));
  each = _mm512_add_ps(each, _mm512_permute_ps(each, 0xb1));
  const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  return _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, each));
}

// The first `count` of four.
inline void store(float* y, int count, __m128 sums) {
  _mm_mask_storeu_ps(y, static_cast<__mmask8>((1 << count) - 1), sums);
}

// As `narrowed` does.
inline void store(uint16_t* y, int count, __m128 sums) {
  const __m128i word = _mm_castps_si128(sums), high = _mm_srli_epi32(word, 16);
  const __m128i odd = _mm_and_si128(high, _mm_set1_epi32(1));
  const __m128i up = _mm_add_epi32(_mm_add_epi32(word, _mm_set1_epi32(0x7fff)), odd);
  const __mmask8 nan = _mm_cmp_ps_mask(sums, sums, _CMP_UNORD_Q);
  const __m128i bits = _mm_mask_or_epi32(_mm_srli_epi32(up, 16), nan, high, _mm_set1_epi32(0x40));
  _mm_mask_cvtepi32_storeu_epi16(y, static_cast<__mmask8>((1 << count) - 1), bits);
}

// Rows that give bfloat16 were bfloat16: a product is exact, and one step has the bits of two.
template <class Y>
inline __m512 multiply_add(__m512 x, __m512 weight, __m512 sum) {
  if constexpr (sizeof(Y) == sizeof(uint16_t)) return _mm512_fmadd_ps(x, weight, sum);
  return _mm512_add_ps(sum, _mm512_mul_ps(x, weight));
}

// R rows of x with W outputs, whose weights are bfloat16 or widened; rows of y are N apart.
template <int R, int W, class Weight, class Y>
inline void wide_tile(const float* x, const Weight* w, int64_t D, int64_t N, Y* y) {
  __m512 sum[R][TILE];
  UNROLL
  for (int r = 0; r < R; r++)
    UNROLL
    for (int j = 0; j < TILE; j++) sum[r][j] = _mm512_setzero_ps();
  int64_t d = 0;
  for (; d + 16 <= D; d += 16) {
    __m512 in[R];
    UNROLL
    for (int r = 0; r < R; r++) in[r] = _mm512_loadu_ps(x + r * D + d);
    UNROLL
    for (int j = 0; j < W; j++) {
      const Weight* at = w + j * D + d;
      // The same place of the outputs that come next: nearer, it would arrive too late.
      if constexpr (sizeof(Weight) == sizeof(uint16_t))
        _mm_prefetch(reinterpret_cast<const char*>(at + W * D), _MM_HINT_T0);
      const __m512 weight = load16(at);
      UNROLL
      for (int r = 0; r < R; r++) sum[r][j] = multiply_add<Y>(in[r], weight, sum[r][j]);
    }
  }
  if (d < D) {
    const __mmask16 there = static_cast<__mmask16>((1 << (D - d)) - 1);
    UNROLL
    for (int j = 0; j < W; j++) {
      const __m512 weight = load16(w + j * D + d, there);
      UNROLL
      for (int r = 0; r < R; r++)
        sum[r][j] = _mm512_mask_mov_ps(
            sum[r][j], there, multiply_add<Y>(load16(x + r * D + d, there), weight, sum[r][j]));
    }
  }
  UNROLL
  for (int r = 0; r < R; r++)
    store(y + r * N, W, sums_of(sum[r][0], sum[r][1], sum[r][2], sum[r][3]));
}

template <int W, class Weight, class Y>
void wide_rows(const float* x, const Weight* w, int64_t D, int64_t N, int64_t M, Y* y) {
  for (; M >= TILE_ROWS; M -= TILE_ROWS, x += TILE_ROWS * D, y += TILE_ROWS * N)
    wide_tile<TILE_ROWS, W>(x, w, D, N, y);
  switch (M) {
    case 5: return wide_tile<5, W>(x, w, D, N, y);
    case 4: return wide_tile<4, W>(x, w, D, N, y);
    case 3: return wide_tile<3, W>(x, w, D, N, y);
    case 2: return wide_tile<2, W>(x, w, D, N, y);
    case 1: return wide_tile<1, W>(x, w, D, N, y);
  }
}

template <int W, class Y>
void wide_outputs(const float* x, const uint16_t* w, int64_t D, int64_t N, int64_t M, float* room,
                  Y* y) {
  if (M < MANY_ROWS) return wide_rows<W>(x, w, D, N, M, y);
  int64_t at = 0;
  for (; at + 16 <= W * D; at += 16) _mm512_storeu_ps(room + at, load16(w + at));
  for (; at < W * D; at++) room[at] = widened(w[at]);
  wide_rows<W>(x, room, D, N, M, y);
}

template <class Y>
void wide_columns(const float* x, const uint16_t* w, int64_t D, int64_t N, int64_t M, int64_t n0,
                  int64_t n1, float* room, Y* y) {
  int64_t n = n0;
  for (; n + TILE <= n1; n += TILE) wide_outputs<TILE>(x, w + n * D, D, N, M, room, y + n);
  for (; n < n1; n++) wide_outputs<1>(x, w + n * D, D, N, M, room, y + n);
}

void wide(const float* x, const uint16_t* w, int64_t D, int64_t N, int64_t M, int64_t n0, int64_t n1,
          float* room, void* y, int y_bits) {
  if (y_bits == 16)
    wide_columns(x, w, D, N, M, n0, n1, room, static_cast<uint16_t*>(y));
  else
    wide_columns(x, w, D, N, M, n0, n1, room, static_cast<float*>(y));
}

}  // namespace
}  // namespace gemsmith
