// Functions of single floats that a compiler turns into vectors inside plain loops: the same bits on
// every instruction set, since each step is rounded by itself. Included by each isa_*.cpp; internal
// linkage, see CMakeLists.txt.
#pragma once
#include <cstdint>
#include <cstring>

namespace gemsmith {
namespace {

// e^x within 2 units in the last place; 0 below -87.3, e^88 above 88; NaN becomes a NaN.
inline float exp_of(float x) {
  constexpr float LOG2E = 1.44269504f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
  constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction bits
  const float bounded = x > 88.0f ? 88.0f : x;
  const float n = (bounded * LOG2E + ROUND) - ROUND;
  const float r = (bounded - n * LN2_HIGH) - n * LN2_LOW;
  float p = 1.98756915e-4f;  // minimax on [-ln2/2, ln2/2], as in Cephes expf
  p = p * r + 1.39819995e-3f;
  p = p * r + 8.33345190e-3f;
  p = p * r + 4.16657962e-2f;
  p = p * r + 1.66666655e-1f;
  p = p * r + 5.00000012e-1f;
  p = (p * r) * r + r + 1.0f;
  // 2^n: n is in -126..127 where the result counts.
  const float low = n < -126.0f ? -126.0f : n;
  const int32_t bits = (static_cast<int32_t>(low) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return x < -87.3f ? 0.0f : p * power;
}

// 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), written as x / (1 + e^-2u).
inline float gelu_tanh(float x) {
  constexpr float TWO_ROOT = 1.59576912f;  // 2 sqrt(2 / pi)
  const float u2 = TWO_ROOT * (x + 0.044715f * (x * x * x));
  return x / (1.0f + exp_of(-u2));
}

}  // namespace
}  // namespace gemsmith
