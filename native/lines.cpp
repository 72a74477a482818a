// Weights into the lines of kernels.h, once per weight, and single rows out of them: plain loops.
#include <cstring>

#include "kernels.h"

namespace gemsmith {
namespace {

// Codes q as floats, all of each byte: the shifts are constants, so that loops become vectors.
template <int B>
void widen_codes(const uint8_t* packed, int64_t bytes, float* out) {
  constexpr int F = 8 / B, MASK = (1 << B) - 1, ZERO = 1 << (B - 1);
  for (int64_t i = 0; i < bytes; i++)
    for (int f = 0; f < F; f++)
      out[i * F + f] = static_cast<float>((packed[i] >> (f * B) & MASK) - ZERO);
}

}  // namespace

void pack_lines(const uint8_t* packed, int64_t N, int64_t K, int bits, uint8_t* lines) {
  const int fields = 8 / bits;
  const int64_t inputs = 4 * fields, count = ceil_div(K, inputs), row_bytes = ceil_div(K, fields);
  const unsigned mask = (1u << bits) - 1, zero = 1u << (bits - 1);
  for (int64_t block = 0; block < ceil_div(N, BLOCK); block++)
    for (int64_t l = 0; l < count; l++) {
      uint8_t line[LINE];
      for (int row = 0; row < BLOCK; row++) {
        const int64_t n = block * BLOCK + row;
        const uint8_t* from = packed + n * row_bytes;
        for (int i = 0; i < 4; i++) {
          unsigned byte = 0;
          for (int p = 0; p < fields; p++) {
            const int64_t k = l * inputs + 4 * p + i;
            const unsigned code =
                n < N && k < K ? from[k / fields] >> (k % fields * bits) & mask : zero;
            byte |= code << (p * bits);
          }
          line[4 * row + i] = static_cast<uint8_t>(byte);
        }
      }
      std::memcpy(lines + (block * count + l) * LINE, line, LINE);
    }
}

void unpack_rows(const uint8_t* lines, const void* scales, int64_t K, int bits, int64_t group,
                 int scale_bits, const int64_t* rows, int64_t count, float* out) {
  const int fields = 8 / bits;
  const int64_t inputs = 4 * fields, line_count = ceil_div(K, inputs), groups = group ? K / group : 1;
  const int mask = (1 << bits) - 1, zero = 1 << (bits - 1);
  for (int64_t r = 0; r < count; r++, out += K) {
    const int64_t block = rows[r] / BLOCK, row = rows[r] % BLOCK;
    const uint8_t* from = lines + block * line_count * LINE + 4 * row;
    const int64_t first = block * groups * BLOCK + row;
    for (int64_t k = 0; k < K; k++) {
      const int64_t field = k % inputs / 4;
      const int code = from[k / inputs * LINE + k % 4] >> (field * bits) & mask;
      const int64_t at = first + (group ? k / group * BLOCK : 0);
      const float scale = scale_bits == 16 ? widened(static_cast<const uint16_t*>(scales)[at])
                                           : static_cast<const float*>(scales)[at];
      out[k] = static_cast<float>(code - zero) * scale;
    }
  }
}

void dequantize(const uint8_t* packed, const float* scales, int64_t N, int64_t K, int bits,
                int64_t group, float* out) {
  const int64_t bytes = K * bits / 8;
  const auto widen = bits == 2 ? widen_codes<2> : bits == 4 ? widen_codes<4> : widen_codes<8>;
  for (int64_t n = 0; n < N; n++, packed += bytes) {
    widen(packed, bytes, out);
    for (const float* end = out + K; out < end; out += group, scales++)
      for (int64_t k = 0; k < group; k++) out[k] *= *scales;
  }
}

}  // namespace gemsmith
