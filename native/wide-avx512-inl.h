// What wide-inl.h computes, by AVX512: a register holds the lanes of one sum, and tiles of outputs
// and rows share what is loaded and widened. Included by isa_avx512vnni.cpp and isa_amx.cpp.
#pragma once
#include <immintrin.h>

#include "unroll.h"

namespace gemsmith {
namespace {

inline __m512 widened16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// R rows of x with W of w, y N apart.
template <int R, int W>
inline void wide_tile(const float* x, const uint16_t* w, int64_t D, int64_t N, float* y) {
  __m512 sum[R][W];
  UNROLL
  for (int r = 0; r < R; r++)
    UNROLL
    for (int j = 0; j < W; j++) sum[r][j] = _mm512_setzero_ps();
  for (int64_t d = 0; d < D; d += 16) {
    const int64_t left = D - d;
    const __mmask16 there = static_cast<__mmask16>(left >= 16 ? 0xffff : (1 << left) - 1);
    __m512 in[R];
    UNROLL
    for (int r = 0; r < R; r++) in[r] = _mm512_maskz_loadu_ps(there, x + r * D + d);
    UNROLL
    for (int j = 0; j < W; j++) {
      const uint16_t* at = w + j * D + d;
      // The same place of the outputs that come next: nearer, it would arrive too late.
      _mm_prefetch(reinterpret_cast<const char*>(at + W * D), _MM_HINT_T0);
      const __m512 weight = widened16(_mm256_maskz_loadu_epi16(there, at));
      UNROLL
      for (int r = 0; r < R; r++)
        sum[r][j] = _mm512_mask_add_ps(sum[r][j], there, sum[r][j], _mm512_mul_ps(in[r], weight));
    }
  }
  UNROLL
  for (int r = 0; r < R; r++)
    UNROLL
    for (int j = 0; j < W; j++) {
      float lanes[16];
      _mm512_storeu_ps(lanes, sum[r][j]);
      y[r * N + j] = sum_of(lanes);
    }
}

template <int W>
inline void wide_rows(const float* x, const uint16_t* w, int64_t D, int64_t N, int64_t M, float* y) {
  int64_t m = 0;
  for (; m + 4 <= M; m += 4) wide_tile<4, W>(x + m * D, w, D, N, y + m * N);
  for (; m < M; m++) wide_tile<1, W>(x + m * D, w, D, N, y + m * N);
}

void wide(const float* x, const uint16_t* w, int64_t D, int64_t N, int64_t M, int64_t n0, int64_t n1,
          float* y) {
  int64_t n = n0;
  for (; n + 4 <= n1; n += 4) wide_rows<4>(x, w + n * D, D, N, M, y + n);
  for (; n < n1; n++) wide_rows<1>(x, w + n * D, D, N, M, y + n);
}

}  // namespace
}  // namespace gemsmith
