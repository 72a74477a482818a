// Any CPU: what the others must equal.
#include "kernels.h"

namespace gemsmith {
namespace {

constexpr int MOST_ROWS = 4;
constexpr int PAIR_ABOVE = 0;  // no two blocks at a time

template <int B, int M, int S, int NB>
void tile(const Product& p, int64_t block, int64_t m0) {
  constexpr int F = 8 / B;
  constexpr unsigned MASK = (1u << B) - 1;
  const uint8_t* w = p.lines + block * p.line_count * LINE;
  const uint8_t* scales = p.scales_of(block);
  const int8_t* x = p.x + m0 * p.stride;
  float total[M][BLOCK] = {};
  int32_t exact[M][BLOCK] = {};  // with steps
  for (int64_t g = 0; g < p.groups; g++) {
    int32_t sum[M][BLOCK];
    for (int m = 0; m < M; m++)
      for (int row = 0; row < BLOCK; row++) sum[m][row] = p.sums[(m0 + m) * p.groups + g];
    for (int64_t l = 0; l < p.group_lines; l++, w += LINE)
      for (int f = 0; f < F; f++, x += 4)
        for (int m = 0; m < M; m++) {
          const int8_t* at = x + m * p.stride;
          for (int row = 0; row < BLOCK; row++)
            for (int i = 0; i < 4; i++)
              sum[m][row] += static_cast<int32_t>(w[4 * row + i] >> (B * f) & MASK) * at[i];
        }
    if constexpr (S == 8) {
      const auto* multiple = reinterpret_cast<const int8_t*>(scales + LINE) + g * BLOCK;
      for (int m = 0; m < M; m++)
        for (int row = 0; row < BLOCK; row++) exact[m][row] += sum[m][row] * multiple[row];
      continue;
    }
    float scale[BLOCK];
    for (int row = 0; row < BLOCK; row++) {
      const int64_t at = g * BLOCK + row;
      if constexpr (S == 16)
        scale[row] = widened(reinterpret_cast<const uint16_t*>(scales)[at]);
      else
        scale[row] = reinterpret_cast<const float*>(scales)[at];
    }
    for (int m = 0; m < M; m++)
      for (int row = 0; row < BLOCK; row++)
        total[m][row] += static_cast<float>(sum[m][row]) * scale[row];
  }
  if constexpr (S == 8)
    for (int m = 0; m < M; m++)
      for (int row = 0; row < BLOCK; row++)
        total[m][row] = static_cast<float>(exact[m][row]) * reinterpret_cast<const float*>(scales)[row];
  const int64_t n0 = block * BLOCK;
  for (int m = 0; m < M; m++)
    for (int64_t row = 0; row < BLOCK && n0 + row < p.N; row++)
      p.y[(m0 + m) * p.N + n0 + row] = total[m][row] * p.sx[m0 + m];
}

bool runs_here() { return true; }

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
const Kernels GENERIC = {"generic", runs_here, product, quantize, {norm, add_norm, geglu, rotate},
    BFLOAT16_ROWS, dots, wide, read, sums, ATTENTION};
}
