// AVX512 with VNNI: a whole line in a register, and vpdpbusd, which adds four products u*x to an
// int32 without saturation.
//
// A sum in one register would wait for each vpdpbusd's latency; with few rows each row's sum is
// therefore spread over several registers that are added at the end (8 for one row: 2.7 times as
// fast from cache). Reading ahead by software is worth half again as much for one row.
#include <immintrin.h>

#include <cstring>

#include "kernels.h"
#include "unroll.h"

namespace gemsmith {
namespace {

constexpr int MOST_ROWS = 8;
constexpr int PAIR_ABOVE = 2;

#define INLINE __attribute__((always_inline))

// sum += u * x, four products a lane. With the intrinsic, GCC 12 copies most of 24 sums to other
// registers and to memory around each; it takes 2.5 times as long.
INLINE inline void dot(__m512i& sum, __m512i u, __m512i x) {
#if defined(__GNUC__)
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(x));
#else
  sum = _mm512_dpbusd_epi32(sum, u, x);
#endif
}

// The same of four x for all lanes.
INLINE inline void dot4(__m512i& sum, __m512i u, const int8_t* x) {
#if defined(__GNUC__)
  struct Four {
    int8_t bytes[4];
  };
  asm("vpdpbusd %2%{1to16%}, %1, %0"
      : "+v"(sum)
      : "v"(u), "m"(*reinterpret_cast<const Four*>(x)));
#else
  int32_t four;
  std::memcpy(&four, x, sizeof(four));
  dot(sum, u, _mm512_set1_epi32(four));
#endif
}

// Far ahead into L2, and from there into L1: one of the two alone keeps fewer lines on their way.
INLINE inline void read_ahead(const uint8_t* w) {
  _mm_prefetch(reinterpret_cast<const char*>(w) + 16384, _MM_HINT_T1);
  _mm_prefetch(reinterpret_cast<const char*>(w) + 2048, _MM_HINT_T0);
}

template <int B, int M, int NB, int A>
struct Sums {
  static constexpr int F = 8 / B;
  // Fields that stay where they are in a byte: such a sum is 2^(B * place) times what it should be,
  // which one exact shift at the end costs less than one of each line.
  static constexpr int PLACES = A < F ? A : F;
  __m512i sum[M][NB][A];

  // One line of each block, `apart` bytes from each other; the u-th of those that use different
  // registers.
  INLINE void add(const uint8_t* w, int64_t apart, const int8_t* x, int64_t stride, int u) {
    __m512i q[NB];
    UNROLL
    for (int nb = 0; nb < NB; nb++) {
      q[nb] = _mm512_loadu_si512(w + nb * apart);
      read_ahead(w + nb * apart);
    }
    UNROLL
    for (int f = 0; f < F; f++) {
      const __m512i mask = _mm512_set1_epi8(static_cast<char>(((1 << B) - 1) << (B * (f % PLACES))));
      __m512i code[NB];
      UNROLL
      for (int nb = 0; nb < NB; nb++) {
        if (f && f % PLACES == 0) q[nb] = _mm512_srli_epi16(q[nb], B * PLACES);
        code[nb] = B < 8 ? _mm512_and_si512(q[nb], mask) : q[nb];
      }
      const int a = (u * F + f) % A;
      UNROLL
      for (int m = 0; m < M; m++) {
        const int8_t* at = x + m * stride + 4 * f;
        if constexpr (NB == 1) {
          dot4(sum[m][0][a], code[0], at);
        } else {  // loaded once for both
          int32_t four;
          std::memcpy(&four, at, sizeof(four));
          const __m512i fours = _mm512_set1_epi32(four);
          UNROLL
          for (int nb = 0; nb < NB; nb++) dot(sum[m][nb][a], code[nb], fours);
        }
      }
    }
  }

  INLINE __m512i of_row(int m, int nb) const {
    __m512i all = sum[m][nb][0];
    UNROLL
    for (int a = 1; a < A; a++)
      all = _mm512_add_epi32(all, _mm512_srai_epi32(sum[m][nb][a], B * (a % PLACES)));
    return all;
  }
};

// The 16 scales from the at-th on.
template <int S>
inline __m512 load_scales(const void* scales, int64_t at) {
  if constexpr (S == 16) {
    const __m256i bits = _mm256_loadu_si256(
        reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(scales) + at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  } else {
    return _mm512_loadu_ps(static_cast<const float*>(scales) + at);
  }
}

// 16 multiples as 32 bits each, of which the upper 16 are 0: vpdpwssd then multiplies by them what fits
// 16 bits, and adds.
INLINE inline __m512i load_multiples(const int8_t* at) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  return _mm512_and_si512(_mm512_cvtepi8_epi32(bytes), _mm512_set1_epi32(0xffff));
}

// Two blocks at a time share what is loaded of x: with 8 rows a load for each vpdpbusd takes what the
// load units have (of 2 bits, 1.3 times as fast from cache).
template <int B, int M, int S, int NB>
void tile(const Product& p, int64_t block, int64_t m0) {
  constexpr int F = 8 / B, MN = M * NB;
  constexpr int A = S ? (M == 1 ? 2 : 1) : M == 1 ? 8 / NB : MN <= 3 ? 4 : MN <= 8 ? 2 : 1;
  constexpr int U = A > F ? A / F : 1;  // lines at a time
  const int64_t groups = S ? p.groups : 1, apart = p.line_count * LINE;
  const uint8_t* w = p.lines + block * apart;
  int64_t scale = block * groups * BLOCK;
  const uint8_t* steps = p.scales_of(block);
  const int8_t* multiples = reinterpret_cast<const int8_t*>(steps) + LINE;
  const int8_t* x = p.x + m0 * p.stride;
  __m512 total[M][NB];
  __m512i exact[M];  // with steps
  UNROLL
  for (int m = 0; m < M; m++) {
    exact[m] = _mm512_setzero_si512();
    UNROLL
    for (int nb = 0; nb < NB; nb++) total[m][nb] = _mm512_setzero_ps();
  }
  for (int64_t g = 0; g < groups; g++, scale += BLOCK) {
    Sums<B, M, NB, A> sums;
    UNROLL
    for (int m = 0; m < M; m++)
      UNROLL
      for (int nb = 0; nb < NB; nb++) {
        sums.sum[m][nb][0] = _mm512_set1_epi32(p.sums[(m0 + m) * groups + g]);
        UNROLL
        for (int a = 1; a < A; a++) sums.sum[m][nb][a] = _mm512_setzero_si512();
      }
    int64_t l = 0;
    for (; l + U <= p.group_lines; l += U)
      UNROLL
      for (int u = 0; u < U; u++, w += LINE, x += 4 * F) sums.add(w, apart, x, p.stride, u);
    for (; l < p.group_lines; l++, w += LINE, x += 4 * F) sums.add(w, apart, x, p.stride, 0);
    // A second stream from memory: not read ahead, it costs a tenth of the speed.
    if constexpr (S == 8) {
      _mm_prefetch(reinterpret_cast<const char*>(multiples) + 1024, _MM_HINT_T0);
      const __m512i by = load_multiples(multiples);
      UNROLL
      for (int m = 0; m < M; m++) exact[m] = _mm512_dpwssd_epi32(exact[m], sums.of_row(m, 0), by);
      multiples += BLOCK;
      continue;
    }
    if (S) _mm_prefetch(static_cast<const char*>(p.scales) + scale * (S / 8) + 1024, _MM_HINT_T0);
    UNROLL
    for (int nb = 0; nb < NB; nb++) {
      const __m512 s = load_scales<S>(p.scales, scale + nb * BLOCK);
      UNROLL
      for (int m = 0; m < M; m++) {
        const __m512 sum = _mm512_cvtepi32_ps(sums.of_row(m, nb));
        total[m][nb] = _mm512_add_ps(total[m][nb], _mm512_mul_ps(sum, s));
      }
    }
  }
  if constexpr (S == 8)
    UNROLL
    for (int m = 0; m < M; m++)
      total[m][0] = _mm512_mul_ps(_mm512_cvtepi32_ps(exact[m]),
                                  _mm512_loadu_ps(reinterpret_cast<const float*>(steps)));
  UNROLL
  for (int nb = 0; nb < NB; nb++) {
    const int64_t n0 = (block + nb) * BLOCK, left = p.N - n0;
    const __mmask16 there = static_cast<__mmask16>(left >= BLOCK ? 0xffff : (1 << left) - 1);
    UNROLL
    for (int m = 0; m < M; m++)
      _mm512_mask_storeu_ps(p.y + (m0 + m) * p.N + n0, there,
                            _mm512_mul_ps(total[m][nb], _mm512_set1_ps(p.sx[m0 + m])));
  }
}

// Many rows. A panel of 12 rows times 2 blocks of outputs fills 24 registers with sums, so that each
// load of weights serves 12 vpdpbusd and each broadcast of x 2: as fast as the two units that
// multiply allow, whereas a load for each vpdpbusd would take what the load units have.
constexpr int PANEL = 12;
constexpr int PAIR = 2;  // blocks

// Codes u of bytes times their multiples, offset as those of 8 bits are: q * multiple + 128. amx-inl.h says
// how; 2^(B-1) * size ^ sign has the offset in it.
template <int B>
struct Multiplied {
  __m512i size, sign, zero;

  INLINE explicit Multiplied(const int8_t* at) {
    const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    sign = _mm512_srai_epi32(wide, 31);
    const __m512i each = _mm512_abs_epi32(wide), high = _mm512_slli_epi32(each, 16);
    size = _mm512_or_si512(each, high);
    const __m512i bytes = _mm512_or_si512(size, _mm512_slli_epi32(size, 8));
    // Times 2^(B-1) a byte stays below 128.
    const __m512i zeros = _mm512_xor_si512(_mm512_slli_epi32(bytes, B - 1), sign);
    zero = _mm512_sub_epi8(zeros, _mm512_set1_epi8(-128));
  }
  INLINE __m512i operator()(__m512i codes) const {
    return _mm512_sub_epi8(_mm512_xor_si512(_mm512_mullo_epi16(codes, size), sign), zero);
  }
};

// Codes of all fields of NB blocks, 8 bits each, as [line][block][64], times their multiples where there
// are some; their scales as float32 [G][block][16], or steps [block][16].
template <int B, int NB>
void unpack(const Product& p, int64_t block, uint8_t* codes, float* scales) {
  constexpr int F = 8 / B;
  const __m512i mask = _mm512_set1_epi8((1 << B) - 1);
  if (B < 8 && p.steps()) {
    for (int nb = 0; nb < NB; nb++) {
      const uint8_t *w = p.lines + (block + nb) * p.line_count * LINE, *its = p.scales_of(block + nb);
      uint8_t* to = codes + nb * LINE;
      std::memcpy(scales + nb * BLOCK, its, LINE);
      for (int64_t g = 0; g < p.groups; g++) {
        const Multiplied<B> multiplied(reinterpret_cast<const int8_t*>(its) + LINE + g * BLOCK);
        for (int64_t l = 0; l < p.group_lines; l++, w += LINE) {
          const __m512i q = _mm512_loadu_si512(w);
          read_ahead(w);
          UNROLL
          for (int f = 0; f < F; f++, to += NB * LINE)
            _mm512_store_si512(to, multiplied(_mm512_and_si512(_mm512_srli_epi16(q, B * f), mask)));
        }
      }
    }
    return;
  }
  for (int nb = 0; nb < NB; nb++) {
    const uint8_t* w = p.lines + (block + nb) * p.line_count * LINE;
    uint8_t* to = codes + nb * LINE;
    for (int64_t l = 0; l < p.line_count; l++, w += LINE) {
      const __m512i q = _mm512_loadu_si512(w);
      read_ahead(w);
      UNROLL
      for (int f = 0; f < F; f++, to += NB * LINE) {
        __m512i code = f ? _mm512_srli_epi16(q, B * f) : q;
        if (B < 8) code = _mm512_and_si512(code, mask);
        _mm512_store_si512(to, code);
      }
    }
    int64_t scale = (block + nb) * p.groups * BLOCK;
    for (int64_t g = 0; g < p.groups; g++, scale += BLOCK)
      _mm512_store_ps(scales + (g * NB + nb) * BLOCK, p.scale_bits == 16
                                                          ? load_scales<16>(p.scales, scale)
                                                          : load_scales<32>(p.scales, scale));
  }
}

// f(0), f(1), ... f(N - 1), each a constant already when GCC decides what stays in registers; after
// an unrolled loop it would be too late.
template <int I>
struct Index {
  constexpr operator int() const { return I; }
};
template <int N, int I = 0, class F>
INLINE inline void each(F&& f) {
  if constexpr (I < N) {
    f(Index<I>());
    each<N, I + 1>(f);
  }
}
// Of R rows of a panel and NB blocks, before they are multiplied by sx: total[R * NB][16].
// steps: fours of inputs in a group. start: of the first row, p.sums. ahead: memory to be fetched
// into the L2 cache on the way, `stride` bytes of it a step.
template <int R, int NB>
__attribute__((noinline)) void panel(const uint8_t* codes, const float* scale, const int8_t* x,
                                     const int32_t* start, int64_t steps, int64_t groups,
                                     const uint8_t* ahead, int64_t stride, float* totals) {
  alignas(64) float total[R * NB][BLOCK] = {};  // all registers are taken by sums
  for (int64_t g = 0; g < groups; g++, start++, scale += NB * BLOCK) {
    __m512i sum[R * NB];
    each<R>([&](auto r) INLINE {
      const __m512i first = _mm512_set1_epi32(start[r * groups]);
      each<NB>([&](auto nb) INLINE { sum[r * NB + nb] = first; });
    });
    for (int64_t s = 0; s < steps; s++, codes += NB * LINE, x += 4 * PANEL, ahead += stride) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
      __m512i code[NB];
      each<NB>([&](auto nb) INLINE { code[nb] = _mm512_load_si512(codes + nb * LINE); });
      each<R>([&](auto r) INLINE {
        int32_t four;
        std::memcpy(&four, x + 4 * r, sizeof(four));
        const __m512i fours = _mm512_set1_epi32(four);
        each<NB>([&](auto nb) INLINE { dot(sum[r * NB + nb], code[nb], fours); });
      });
    }
    each<NB>([&](auto nb) INLINE {
      const __m512 by = _mm512_load_ps(scale + nb * BLOCK);
      each<R>([&](auto r) INLINE {
        float* into = total[r * NB + nb];
        const __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r * NB + nb]), by);
        _mm512_store_ps(into, _mm512_add_ps(_mm512_load_ps(into), part));
      });
    });
  }
  std::memcpy(totals, total, sizeof(total));
}

// Groups as they are left after `unpack`.
inline int64_t left_groups(const Product& p) { return p.steps() ? 1 : p.groups; }

// Rows m0..m0+rows of y, of which R are computed.
template <int R, int NB>
void panel_rows(const Product& p, int64_t block, int64_t m0, int64_t rows, const uint8_t* codes,
                const float* scales, const uint8_t* ahead, int64_t stride) {
  // Rows of y lie far apart: without this, storing them takes a third of the time.
  for (int64_t r = 0; r < rows; r++) {
    const char* y = reinterpret_cast<const char*>(p.y + (m0 + r) * p.N + block * BLOCK);
    for (int nb = 0; nb < NB; nb++) _mm_prefetch(y + nb * LINE, _MM_HINT_T0);
    _mm_prefetch(y + NB * LINE - 1, _MM_HINT_T0);
  }
  alignas(64) float totals[R * NB][BLOCK];
  const int64_t groups = left_groups(p);
  panel<R, NB>(codes, scales, p.x + m0 * p.stride, p.sums + m0 * groups,
               p.line_count / groups * (8 / p.bits), groups, ahead, stride, totals[0]);
  for (int nb = 0; nb < NB; nb++) {
    const int64_t n0 = (block + nb) * BLOCK, left = p.N - n0;
    const __mmask16 there = static_cast<__mmask16>(left >= BLOCK ? 0xffff : (1 << left) - 1);
    for (int64_t r = 0; r < rows; r++)
      _mm512_mask_storeu_ps(
          p.y + (m0 + r) * p.N + n0, there,
          _mm512_mul_ps(_mm512_load_ps(totals[r * NB + nb]), _mm512_set1_ps(p.sx[m0 + r])));
  }
}

int64_t scratch(const Product& p) { return PAIR * (p.stride * BLOCK + p.groups * LINE); }

template <int NB>
void blocks_gemm(const Product& p, int64_t block, int64_t m0, int64_t m1, uint8_t* codes) {
  float* scales = reinterpret_cast<float*>(codes + NB * p.stride * BLOCK);
  p.bits == 2   ? unpack<2, NB>(p, block, codes, scales)
  : p.bits == 4 ? unpack<4, NB>(p, block, codes, scales)
                : unpack<8, NB>(p, block, codes, scales);
  // Meanwhile the lines of the next blocks are fetched, a share with each panel.
  const int64_t bytes = NB * p.line_count * LINE, panels = ceil_div(m1 - m0, PANEL);
  const int64_t stride = ceil_div(bytes, panels * p.line_count * (8 / p.bits));
  const uint8_t* ahead = p.lines + block * p.line_count * LINE + bytes;
  for (int64_t m = m0; m < m1; m += PANEL, ahead += bytes / panels) {
    const int64_t rows = m1 - m < PANEL ? m1 - m : PANEL;
    if (rows > 8)
      panel_rows<12, NB>(p, block, m, rows, codes, scales, ahead, stride);
    else if (rows > 4)
      panel_rows<8, NB>(p, block, m, rows, codes, scales, ahead, stride);
    else
      panel_rows<4, NB>(p, block, m, rows, codes, scales, ahead, stride);
  }
}

void gemm(const Product& p, int64_t b0, int64_t b1, int64_t m0, int64_t m1, uint8_t* codes) {
  int64_t block = b0;
  for (; block + PAIR <= b1; block += PAIR) blocks_gemm<PAIR>(p, block, m0, m1, codes);
  if (block < b1) blocks_gemm<1>(p, block, m0, m1, codes);
}

const Gemm GEMM = {24, PANEL, 4, true, scratch, gemm};

bool runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

}  // namespace
}  // namespace gemsmith

#include "attention-avx512-inl.h"
#include "attention-avx512-int8-inl.h"
#include "attention-inl.h"
#include "layer-inl.h"
#include "product-inl.h"
#include "rows-inl.h"
#include "wide-avx512-inl.h"

namespace gemsmith {
const Kernels AVX512VNNI = {"avx512vnni", runs_here, product, quantize, {norm, add_norm, geglu, rotate},
    BFLOAT16_ROWS, dots, wide, read, sums, ATTENTION, &GEMM};
}
