// NEON with dot product: Arm CPUs since about 2018. A quarter of a line (4 outputs x 4 bytes) in a
// register; sdot adds four products of signed bytes to each of four int32.
//
// Codes of 2 and 4 bits are positive as signed bytes too; those of 8 bits become q = u - 128 by a
// flipped bit, and their sums start at 0.
#include <arm_neon.h>

#include <cstring>

#include "kernels.h"

#if defined(__linux__)
#include <sys/auxv.h>
#endif

namespace gemsmith {
namespace {

constexpr int MOST_ROWS = 4;
constexpr int PAIR_ABOVE = 0;  // no two blocks at a time

// 4 of a block's scales, the at-th and on.
template <int S>
inline float32x4_t load_scales(const uint8_t* scales, int64_t at) {
  if constexpr (S == 16)
    return vreinterpretq_f32_u32(
        vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(scales) + at), 16));
  else
    return vld1q_f32(reinterpret_cast<const float*>(scales) + at);
}

template <int B, int M, int S, int NB>
void tile(const Product& p, int64_t block, int64_t m0) {
  constexpr int F = 8 / B, QUARTERS = 4;
  const uint8x16_t mask = vdupq_n_u8(B == 8 ? 0xff : (1 << B) - 1), high = vdupq_n_u8(0x80);
  const uint8_t* w = p.lines + block * p.line_count * LINE;
  const int8_t* x = p.x + m0 * p.stride;
  const uint8_t* scales = p.scales_of(block);
  float32x4_t total[M][QUARTERS];
  int32x4_t exact[M][QUARTERS];  // with steps
  for (int m = 0; m < M; m++)
    for (int i = 0; i < QUARTERS; i++) total[m][i] = vdupq_n_f32(0), exact[m][i] = vdupq_n_s32(0);
  for (int64_t g = 0; g < p.groups; g++) {
    int32x4_t sum[M][QUARTERS];
    for (int m = 0; m < M; m++) {
      const int32_t start = B == 8 ? 0 : p.sums[(m0 + m) * p.groups + g];
      for (int i = 0; i < QUARTERS; i++) sum[m][i] = vdupq_n_s32(start);
    }
    for (int64_t l = 0; l < p.group_lines; l++, w += LINE) {
      __builtin_prefetch(w + 2048);
      uint8x16_t q[QUARTERS];
      for (int i = 0; i < QUARTERS; i++) q[i] = vld1q_u8(w + 16 * i);
      for (int f = 0; f < F; f++, x += 4) {
        int8x16_t code[QUARTERS];
        for (int i = 0; i < QUARTERS; i++) {
          code[i] = vreinterpretq_s8_u8(B == 8 ? veorq_u8(q[i], high) : vandq_u8(q[i], mask));
          if constexpr (B < 8) q[i] = vshrq_n_u8(q[i], B);
        }
        for (int m = 0; m < M; m++) {
          int32_t four;
          std::memcpy(&four, x + m * p.stride, sizeof(four));
          const int8x16_t fours = vreinterpretq_s8_s32(vdupq_n_s32(four));
          for (int i = 0; i < QUARTERS; i++) sum[m][i] = vdotq_s32(sum[m][i], code[i], fours);
        }
      }
    }
    if constexpr (S == 8) {
      const int8x16_t bytes = vld1q_s8(reinterpret_cast<const int8_t*>(scales) + LINE + g * BLOCK);
      const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
      const int32x4_t by[QUARTERS] = {vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)),
                                      vmovl_s16(vget_low_s16(high)), vmovl_s16(vget_high_s16(high))};
      for (int i = 0; i < QUARTERS; i++)
        for (int m = 0; m < M; m++) exact[m][i] = vmlaq_s32(exact[m][i], sum[m][i], by[i]);
    } else {
      for (int i = 0; i < QUARTERS; i++) {
        const float32x4_t by = load_scales<S>(scales, g * BLOCK + 4 * i);
        for (int m = 0; m < M; m++)
          total[m][i] = vaddq_f32(total[m][i], vmulq_f32(vcvtq_f32_s32(sum[m][i]), by));
      }
    }
  }
  if constexpr (S == 8)
    for (int i = 0; i < QUARTERS; i++) {
      const float32x4_t step = vld1q_f32(reinterpret_cast<const float*>(scales) + 4 * i);
      for (int m = 0; m < M; m++) total[m][i] = vmulq_f32(vcvtq_f32_s32(exact[m][i]), step);
    }
  const int64_t n0 = block * BLOCK, left = p.N - n0 < BLOCK ? p.N - n0 : BLOCK;
  for (int m = 0; m < M; m++) {
    float row[BLOCK];
    for (int i = 0; i < QUARTERS; i++)
      vst1q_f32(row + 4 * i, vmulq_f32(total[m][i], vdupq_n_f32(p.sx[m0 + m])));
    std::memcpy(p.y + (m0 + m) * p.N + n0, row, static_cast<size_t>(left) * sizeof(float));
  }
}

bool runs_here() {
#if defined(__linux__)
  constexpr unsigned long DOT_PRODUCT = 1ul << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & DOT_PRODUCT;
#elif defined(__APPLE__)
  return true;  // every Mac with an Arm processor
#else
  return false;
#endif
}

}  // namespace
}  // namespace gemsmith

#include "attention-plain-inl.h"
#include "attention-plain-int8-inl.h"
#include "attention-inl.h"
#include "layer-inl.h"
#include "product-inl.h"
#include "rows-inl.h"
#include "wide-inl.h"

namespace gemsmith {
const Kernels NEON = {"neon", runs_here, product, quantize, {norm, add_norm, geglu, rotate},
    BFLOAT16_ROWS, dots, wide,
                 read, sums, ATTENTION};
}
