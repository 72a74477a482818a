// What stands between the products of a decoder layer, for rows of float32 or bfloat16: norms,
// rotation and the gated unit. Inside all is float32; what comes out is rounded once. Included by each
// isa_*.cpp; internal linkage, see CMakeLists.txt.
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

inline float value_of(float value) { return value; }
inline float value_of(uint16_t value) { return widened(value); }
inline void put(float value, float& to) { to = value; }
inline void put(float value, uint16_t& to) { to = narrowed(value); }

template <class T>
inline float dot_lanes(const T* a, const T* b, int64_t D) {
  float lanes[16] = {};
  int64_t d = 0;
  for (; d + 16 <= D; d += 16)
    for (int i = 0; i < 16; i++) lanes[i] += value_of(a[d + i]) * value_of(b[d + i]);
  for (int i = 0; d + i < D; i++) lanes[i] += value_of(a[d + i]) * value_of(b[d + i]);
  return sum_of(lanes);
}

// 1 / rms of one row.
template <class T>
inline float inverse_rms(const T* x, int64_t D, float eps) {
  return 1.0f / std::sqrt(dot_lanes(x, x, D) / static_cast<float>(D) + eps);
}

// y = x / rms(x) * weight for rows m0..m1; weight null: none. y may be x.
template <class T>
void norm(const T* x, const T* weight, int64_t D, float eps, int64_t m0, int64_t m1, T* y) {
  for (int64_t m = m0; m < m1; m++) {
    const T* in = x + m * D;
    T* out = y + m * D;
    const float r = inverse_rms(in, D, eps);
    if (weight)
      for (int64_t d = 0; d < D; d++) put(value_of(in[d]) * r * value_of(weight[d]), out[d]);
    else
      for (int64_t d = 0; d < D; d++) put(value_of(in[d]) * r, out[d]);
  }
}

// y = (x + branch / rms(branch) * weight) * scale for rows m0..m1; y may be x.
template <class T>
void add_norm(const T* x, const T* branch, const T* weight, int64_t D, float eps, float scale,
              int64_t m0, int64_t m1, T* y) {
  for (int64_t m = m0; m < m1; m++) {
    const T *in = x + m * D, *add = branch + m * D;
    T* out = y + m * D;
    const float r = inverse_rms(add, D, eps);
    for (int64_t d = 0; d < D; d++)
      put((value_of(in[d]) + value_of(add[d]) * r * value_of(weight[d])) * scale, out[d]);
  }
}

// y = gelu(gate) * up for rows m0..m1 of n; the rows of `up` and `gate` may be apart by more.
template <class T>
void geglu(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, int64_t n, int64_t m0,
           int64_t m1, T* y) {
  for (int64_t m = m0; m < m1; m++) {
    const T *g = gate + m * gate_stride, *u = up + m * up_stride;
    T* out = y + m * n;
    for (int64_t i = 0; i < n; i++) put(gelu_tanh(value_of(g[i])) * value_of(u[i]), out[i]);
  }
}

// y[n] = sum of x * w[n] for rows n0..n1 of w [N][D].
void dots(const float* x, const float* w, int64_t D, int64_t n0, int64_t n1, float* y) {
  for (int64_t n = n0; n < n1; n++) y[n] = dot_lanes(x, w + n * D, D);
}

// Turns the pairs (i, i + H/2), i < pairs, of each head of rows m0..m1 of x [M][heads][H], in place,
// by the angles whose cosines and sines are [M][pairs].
template <class T>
void rotate(T* x, int64_t heads, int64_t H, int64_t pairs, const float* cosine, const float* sine,
            int64_t m0, int64_t m1) {
  for (int64_t m = m0; m < m1; m++) {
    const float *c = cosine + m * pairs, *s = sine + m * pairs;
    for (int64_t h = 0; h < heads; h++) {
      T* a = x + (m * heads + h) * H;
      T* b = a + H / 2;
      for (int64_t i = 0; i < pairs; i++) {
        const float first = value_of(a[i]), second = value_of(b[i]);
        put(first * c[i] - second * s[i], a[i]);
        put(second * c[i] + first * s[i], b[i]);
      }
    }
  }
}

const RowKernels<uint16_t> BFLOAT16_ROWS = {norm, add_norm, geglu, rotate};

}  // namespace
}  // namespace gemsmith
