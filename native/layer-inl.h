// What stands between the products of a decoder layer, for rows of floats: norms, rotation and the
// gated unit. Included by each isa_*.cpp; internal linkage, see CMakeLists.txt.
//
// Sums run in 16 lanes, lane i over the elements i, i + 16, ..., which are then added in pairs: a
// register or four of it, and the same bits on every instruction set.
#include <cmath>

#include "math-inl.h"

namespace gemsmith {
namespace {

inline float sum_of(float lanes[16]) {
  for (int step = 8; step > 0; step /= 2)
    for (int i = 0; i < step; i++) lanes[i] += lanes[i + step];
  return lanes[0];
}

inline float dot_lanes(const float* a, const float* b, int64_t D) {
  float lanes[16] = {};
  int64_t d = 0;
  for (; d + 16 <= D; d += 16)
    for (int i = 0; i < 16; i++) lanes[i] += a[d + i] * b[d + i];
  for (int i = 0; d + i < D; i++) lanes[i] += a[d + i] * b[d + i];
  return sum_of(lanes);
}

// 1 / rms of one row.
inline float inverse_rms(const float* x, int64_t D, float eps) {
  return 1.0f / std::sqrt(dot_lanes(x, x, D) / static_cast<float>(D) + eps);
}

// y = x / rms(x) * weight for rows m0..m1; weight null: none. y may be x.
void norm(const float* x, const float* weight, int64_t D, float eps, int64_t m0, int64_t m1,
          float* y) {
  for (int64_t m = m0; m < m1; m++) {
    const float* in = x + m * D;
    float* out = y + m * D;
    const float r = inverse_rms(in, D, eps);
    if (weight)
      for (int64_t d = 0; d < D; d++) out[d] = in[d] * r * weight[d];
    else
      for (int64_t d = 0; d < D; d++) out[d] = in[d] * r;
  }
}

// y = (x + branch / rms(branch) * weight) * scale for rows m0..m1; y may be x.
void add_norm(const float* x, const float* branch, const float* weight, int64_t D, float eps,
              float scale, int64_t m0, int64_t m1, float* y) {
  for (int64_t m = m0; m < m1; m++) {
    const float *in = x + m * D, *add = branch + m * D;
    float* out = y + m * D;
    const float r = inverse_rms(add, D, eps);
    for (int64_t d = 0; d < D; d++) out[d] = (in[d] + add[d] * r * weight[d]) * scale;
  }
}

// y = gelu(gate) * up for rows m0..m1 of n; the rows of `up` and `gate` may be apart by more.
void geglu(const float* gate, int64_t gate_stride, const float* up, int64_t up_stride, int64_t n,
           int64_t m0, int64_t m1, float* y) {
  for (int64_t m = m0; m < m1; m++) {
    const float *g = gate + m * gate_stride, *u = up + m * up_stride;
    float* out = y + m * n;
    for (int64_t i = 0; i < n; i++) out[i] = gelu_tanh(g[i]) * u[i];
  }
}

// y[n] = sum of x * w[n] for rows n0..n1 of w [N][D].
void dots(const float* x, const float* w, int64_t D, int64_t n0, int64_t n1, float* y) {
  for (int64_t n = n0; n < n1; n++) y[n] = dot_lanes(x, w + n * D, D);
}

// Turns the pairs (i, i + H/2), i < pairs, of each head of rows m0..m1 of x [M][heads][H], in place,
// by the angles whose cosines and sines are [M][pairs].
void rotate(float* x, int64_t heads, int64_t H, int64_t pairs, const float* cosine,
            const float* sine, int64_t m0, int64_t m1) {
  for (int64_t m = m0; m < m1; m++) {
    const float *c = cosine + m * pairs, *s = sine + m * pairs;
    for (int64_t h = 0; h < heads; h++) {
      float* a = x + (m * heads + h) * H;
      float* b = a + H / 2;
      for (int64_t i = 0; i < pairs; i++) {
        const float first = a[i] * c[i] - b[i] * s[i];
        b[i] = b[i] * c[i] + a[i] * s[i];
        a[i] = first;
      }
    }
  }
}

}  // namespace
}  // namespace gemsmith
