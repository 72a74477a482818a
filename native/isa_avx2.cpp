// AVX2: x86 CPUs since 2013. Half a line (8 outputs x 4 bytes) in a register.
//
// vpmaddubsw adds two products u*x in 16 bits and saturates. 2- and 4-bit codes stay below that for
// several steps, which are added in 16 bits before they are widened; 8-bit codes would pass it at
// once, so they are widened first.
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace gemsmith {
namespace {

constexpr int MOST_ROWS = 4;
constexpr int PAIR_ABOVE = 0;  // no two blocks at a time

inline __m256i broadcast4(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof(four));
  return _mm256_set1_epi32(four);
}

// 8 scales, the at-th and on.
template <int S>
inline __m256 load_scales(const void* scales, int64_t at) {
  if constexpr (S == 16) {
    const __m128i bits = _mm_loadu_si128(
        reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(scales) + at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  } else {
    return _mm256_loadu_ps(static_cast<const float*>(scales) + at);
  }
}

// 8 multiples as 32 bits each, of which the upper 16 are 0: vpmaddwd then multiplies by them what fits
// 16 bits.
inline __m256i load_multiples(const int8_t* at) {
  const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
  return _mm256_and_si256(wide, _mm256_set1_epi32(0xffff));
}

template <int B, int M, int S, int NB>
void tile(const Product& p, int64_t block, int64_t m0) {
  constexpr int F = 8 / B;
  // Lines added in 16 bits: 8 steps of 2 * 15 * 128, or 32 steps of 2 * 3 * 128, fit.
  constexpr int64_t TOGETHER = B == 4 ? 4 : 8;
  const __m256i mask = _mm256_set1_epi8((1 << B) - 1), ones = _mm256_set1_epi16(1);
  const __m256i low_bytes = _mm256_set1_epi16(0xff);
  const int64_t n0 = block * BLOCK;
  for (int half = 0; half < 2 && n0 + 8 * half < p.N; half++) {
    const uint8_t* w = p.lines + block * p.line_count * LINE + 32 * half;
    int64_t scale = block * p.groups * BLOCK + 8 * half;
    const uint8_t* steps = p.scales_of(block) + 32 * half;
    const int8_t* multiples = reinterpret_cast<const int8_t*>(p.scales_of(block)) + LINE + 8 * half;
    const int8_t* x = p.x + m0 * p.stride;
    __m256 total[M];
    __m256i exact[M];  // with steps
    for (int m = 0; m < M; m++) total[m] = _mm256_setzero_ps(), exact[m] = _mm256_setzero_si256();
    for (int64_t g = 0; g < p.groups; g++, scale += BLOCK) {
      __m256i sum[M];
      for (int m = 0; m < M; m++) sum[m] = _mm256_set1_epi32(p.sums[(m0 + m) * p.groups + g]);
      if constexpr (B == 8) {
        for (int64_t l = 0; l < p.group_lines; l++, w += LINE, x += 4) {
          const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
          _mm_prefetch(reinterpret_cast<const char*>(w) + 2048, _MM_HINT_T0);
          const __m256i even = _mm256_and_si256(q, low_bytes), odd = _mm256_srli_epi16(q, 8);
          for (int m = 0; m < M; m++) {
            const __m256i four = broadcast4(x + m * p.stride);
            const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8);
            const __m256i x_odd = _mm256_srai_epi16(four, 8);
            sum[m] = _mm256_add_epi32(
                sum[m], _mm256_add_epi32(_mm256_madd_epi16(even, x_even),
                                         _mm256_madd_epi16(odd, x_odd)));
          }
        }
      } else {
        for (int64_t l = 0; l < p.group_lines;) {
          const int64_t end = l + TOGETHER < p.group_lines ? l + TOGETHER : p.group_lines;
          __m256i shorts[M];
          for (int m = 0; m < M; m++) shorts[m] = _mm256_setzero_si256();
          for (; l < end; l++, w += LINE) {
            __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
            _mm_prefetch(reinterpret_cast<const char*>(w) + 2048, _MM_HINT_T0);
            for (int f = 0; f < F; f++, x += 4) {
              const __m256i u = _mm256_and_si256(q, mask);
              q = _mm256_srli_epi16(q, B);
              for (int m = 0; m < M; m++)
                shorts[m] = _mm256_add_epi16(
                    shorts[m], _mm256_maddubs_epi16(u, broadcast4(x + m * p.stride)));
            }
          }
          for (int m = 0; m < M; m++)
            sum[m] = _mm256_add_epi32(sum[m], _mm256_madd_epi16(shorts[m], ones));
        }
      }
      if constexpr (S == 8) {
        const __m256i by = load_multiples(multiples + g * BLOCK);
        for (int m = 0; m < M; m++)
          exact[m] = _mm256_add_epi32(exact[m], _mm256_madd_epi16(sum[m], by));
      } else {
        const __m256 s = load_scales<S>(p.scales, scale);
        for (int m = 0; m < M; m++)
          total[m] = _mm256_add_ps(total[m], _mm256_mul_ps(_mm256_cvtepi32_ps(sum[m]), s));
      }
    }
    if constexpr (S == 8) {
      const __m256 step = _mm256_loadu_ps(reinterpret_cast<const float*>(steps));
      for (int m = 0; m < M; m++) total[m] = _mm256_mul_ps(_mm256_cvtepi32_ps(exact[m]), step);
    }
    const int64_t left = p.N - n0 - 8 * half;
    for (int m = 0; m < M; m++) {
      float* y = p.y + (m0 + m) * p.N + n0 + 8 * half;
      const __m256 scaled = _mm256_mul_ps(total[m], _mm256_set1_ps(p.sx[m0 + m]));
      if (left >= 8) {
        _mm256_storeu_ps(y, scaled);
      } else {
        float row[8];
        _mm256_storeu_ps(row, scaled);
        std::memcpy(y, row, static_cast<size_t>(left) * sizeof(float));
      }
    }
  }
}

bool runs_here() { return __builtin_cpu_supports("avx2"); }

}  // namespace
}  // namespace gemsmith

#include "attention-avx2-inl.h"
#include "attention-inl.h"
#include "layer-inl.h"
#include "product-inl.h"
#include "rows-inl.h"
#include "wide-inl.h"

namespace gemsmith {
const Kernels AVX2 = {"avx2", runs_here, product, quantize, {norm, add_norm, geglu, rotate},
    BFLOAT16_ROWS, dots, wide, read, sums, ATTENTION};
}
