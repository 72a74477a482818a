// Weights into the lines of kernels.h, once per weight, and single rows out of them: plain loops.
#include <cstring>

#include "kernels.h"
#include "threads.h"

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

// Floats [K] of one row of a weight, whose four bytes of a line lie at `from`: codes q times their
// group's scale, `scale_of` of the group's number.
template <int B, class Scale>
void unpack_row(const uint8_t* from, int64_t K, int64_t group, const Scale& scale_of, float* out) {
  constexpr int F = 8 / B, INPUTS = 4 * F, MASK = (1 << B) - 1, ZERO = 1 << (B - 1);
  for (int64_t k0 = 0; k0 < K; k0 += INPUTS, from += LINE) {  // a group is whole lines
    const float scale = scale_of(group ? k0 / group : 0);
    float values[INPUTS];
    for (int p = 0; p < F; p++)
      for (int i = 0; i < 4; i++)
        values[4 * p + i] = static_cast<float>((from[i] >> (p * B) & MASK) - ZERO) * scale;
    const int64_t there = K - k0 < INPUTS ? K - k0 : INPUTS;
    std::memcpy(out + k0, values, static_cast<size_t>(there) * sizeof(float));
  }
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
  const int64_t line_count = ceil_div(K, 32 / bits), groups = group ? K / group : 1;
  const auto one = [&](int64_t r) {
    const int64_t block = rows[r] / BLOCK, row = rows[r] % BLOCK;
    const uint8_t* from = lines + block * line_count * LINE + 4 * row;
    const uint8_t* its = static_cast<const uint8_t*>(scales) + block * scale_bytes(groups, scale_bits);
    const auto scale_of = [&](int64_t g) {
      const int64_t at = g * BLOCK + row;
      if (scale_bits == 16) return widened(reinterpret_cast<const uint16_t*>(its)[at]);
      const float* floats = reinterpret_cast<const float*>(its);
      return scale_bits == 8 ? static_cast<float>(static_cast<int8_t>(its[LINE + at])) * floats[row]
                             : floats[at];
    };
    if (bits == 2) unpack_row<2>(from, K, group, scale_of, out + r * K);
    else if (bits == 4) unpack_row<4>(from, K, group, scale_of, out + r * K);
    else unpack_row<8>(from, K, group, scale_of, out + r * K);
  };
  each_row(count, K, [&](int64_t r0, int64_t r1) {
    for (int64_t r = r0; r < r1; r++) one(r);
  });
}

void dequantize(const uint8_t* packed, const float* scales, int64_t N, int64_t K, int bits,
                int64_t group, float* out) {
  const int64_t bytes = K * bits / 8, groups = K / group;
  const auto widen = bits == 2 ? widen_codes<2> : bits == 4 ? widen_codes<4> : widen_codes<8>;
  each_row(N, K, [&](int64_t n0, int64_t n1) {
    for (int64_t n = n0; n < n1; n++) {
      float* row = out + n * K;
      widen(packed + n * bytes, bytes, row);
      for (int64_t g = 0; g < groups; g++, row += group) {
        const float scale = scales[n * groups + g];
        for (int64_t k = 0; k < group; k++) row[k] *= scale;
      }
    }
  });
}

}  // namespace gemsmith
