// Plain loops that a compiler turns into vectors by itself: quantization of activations and their
// sums, and the reading of memory. Included by each isa_*.cpp; internal linkage, see CMakeLists.txt.
#include <cstring>

namespace gemsmith {
namespace {

// What quantize_rows in kernels.h says, for rows m0..m1.
void quantize(const float* x, int64_t K, int64_t m0, int64_t m1, int8_t* x8, float* sx) {
  constexpr int32_t INFINITE = 0x7f800000;  // no finite float has greater bits
  constexpr float ROUND = 12582912.0f;      // 1.5 * 2^23: adding it leaves no fraction bits
  for (int64_t m = m0; m < m1; m++) {
    const float* row = x + m * K;
    int8_t* out = x8 + m * K;
    // Bits of |x| order as integers do, NaN above infinity.
    int32_t most = 0;
    for (int64_t k = 0; k < K; k++) {
      int32_t bits;
      std::memcpy(&bits, row + k, sizeof(bits));
      bits &= 0x7fffffff;
      most = bits > most ? bits : most;
    }
    if (most >= INFINITE) {
      const int32_t nan = 0x7fc00000;
      std::memcpy(sx + m, &nan, sizeof(nan));
      std::memset(out, 0, static_cast<size_t>(K));
      continue;
    }
    float scale;
    std::memcpy(&scale, &most, sizeof(scale));
    scale /= 127.0f;
    if (scale == 0.0f) scale = 1.0f;
    sx[m] = scale;
    for (int64_t k = 0; k < K; k++) {
      float q = (row[k] / scale + ROUND) - ROUND;
      // Only a scale too small to be exact (below 2^-126) can lead beyond 127.
      q = q > 127.0f ? 127.0f : q;
      q = q < -127.0f ? -127.0f : q;
      out[k] = static_cast<int8_t>(static_cast<int32_t>(q));
    }
  }
}

void sums(const int8_t* x, int64_t count, int64_t size, int32_t factor, int32_t* sums) {
  for (int64_t i = 0; i < count; i++, x += size) {
    int32_t sum = 0;
    for (int64_t k = 0; k < size; k++) sum += x[k];
    sums[i] = factor * sum;
  }
}

uint64_t read(const uint8_t* data, int64_t line0, int64_t line1) {
  uint64_t sums[LINE / 8] = {};
  for (int64_t line = line0; line < line1; line++) {
    uint64_t words[LINE / 8];
    std::memcpy(words, data + line * LINE, LINE);
#if defined(__GNUC__)
    __builtin_prefetch(data + line * LINE + 2048);
#endif
    for (int i = 0; i < LINE / 8; i++) sums[i] += words[i];
  }
  uint64_t sum = 0;
  for (int i = 0; i < LINE / 8; i++) sum += sums[i];
  return sum;
}

}  // namespace
}  // namespace gemsmith
