// AVX512 with VNNI: a whole line in a register, and vpdpbusd, which adds four products u*x to an
// int32 without saturation.
//
// A sum in one register would wait for each vpdpbusd's latency; with few rows each row's sum is
// therefore spread over several registers that are added at the end (8 for one row: 2.7 times as
// fast from cache). Reading ahead by software is worth 12 % for one row, 60 % for four.
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace gemsmith {
namespace {

constexpr int SMALL_TILE = 8, LARGE_TILE = 16;
constexpr int AHEAD = 2048;  // bytes

template <int B, int M, int A>
struct Sums {
  static constexpr int F = 8 / B;
  __m512i sum[M][A];

  // One line, the u-th of those that use different registers.
  __attribute__((always_inline)) void add(const uint8_t* w, const int8_t* x, int64_t stride,
                                          int u) {
    const __m512i mask = _mm512_set1_epi8((1 << B) - 1);
    const __m512i q = _mm512_loadu_si512(w);
    _mm_prefetch(reinterpret_cast<const char*>(w) + AHEAD, _MM_HINT_T0);
    UNROLL
    for (int f = 0; f < F; f++) {
      __m512i code = f ? _mm512_srli_epi16(q, B * f) : q;
      if (B < 8) code = _mm512_and_si512(code, mask);
      UNROLL
      for (int m = 0; m < M; m++) {
        int32_t four;
        std::memcpy(&four, x + m * stride + 4 * f, sizeof(four));
        __m512i& into = sum[m][(u * F + f) % A];
        into = _mm512_dpbusd_epi32(into, code, _mm512_set1_epi32(four));
      }
    }
  }
};

template <int B, int M, bool G>
void tile(const Product& p, int64_t block, int64_t m0) {
  constexpr int F = 8 / B;
  constexpr int A = G ? (M == 1 ? 2 : 1) : M == 1 ? 8 : M <= 3 ? 4 : M <= 7 ? 2 : 1;
  constexpr int U = A > F ? A / F : 1;  // lines at a time
  const uint8_t* w = p.lines + block * p.line_count * LINE;
  const float* scale = p.scales + block * p.groups * BLOCK;
  const int8_t* x = p.x + m0 * p.stride;
  __m512 total[M];
  UNROLL
  for (int m = 0; m < M; m++) total[m] = _mm512_setzero_ps();
  for (int64_t g = 0; g < p.groups; g++, scale += BLOCK) {
    Sums<B, M, A> sums;
    UNROLL
    for (int m = 0; m < M; m++) {
      sums.sum[m][0] = _mm512_set1_epi32(p.sums[(m0 + m) * p.groups + g]);
      UNROLL
      for (int a = 1; a < A; a++) sums.sum[m][a] = _mm512_setzero_si512();
    }
    int64_t l = 0;
    for (; l + U <= p.group_lines; l += U)
      UNROLL
      for (int u = 0; u < U; u++, w += LINE, x += 4 * F) sums.add(w, x, p.stride, u);
    for (; l < p.group_lines; l++, w += LINE, x += 4 * F) sums.add(w, x, p.stride, 0);
    const __m512 s = _mm512_loadu_ps(scale);
    UNROLL
    for (int m = 0; m < M; m++) {
      __m512i sum = sums.sum[m][0];
      UNROLL
      for (int a = 1; a < A; a++) sum = _mm512_add_epi32(sum, sums.sum[m][a]);
      total[m] = _mm512_add_ps(total[m], _mm512_mul_ps(_mm512_cvtepi32_ps(sum), s));
    }
  }
  const int64_t left = p.N - block * BLOCK;
  const __mmask16 there = static_cast<__mmask16>(left >= BLOCK ? 0xffff : (1 << left) - 1);
  UNROLL
  for (int m = 0; m < M; m++)
    _mm512_mask_storeu_ps(p.y + (m0 + m) * p.N + block * BLOCK, there,
                          _mm512_mul_ps(total[m], _mm512_set1_ps(p.sx[m0 + m])));
}

bool runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

}  // namespace
}  // namespace gemsmith

#include "attention-avx512-inl.h"
#include "attention-inl.h"
#include "layer-inl.h"
#include "product-inl.h"
#include "rows-inl.h"

namespace gemsmith {
const Kernels AVX512VNNI = {"avx512vnni", runs_here, product, quantize, norm,
                             add_norm, geglu, rotate, read, ATTENTION};
}
