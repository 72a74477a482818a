// What stands between products, for all rows and by all threads; kernels.h says what.
#include <cstring>

#include "kernels.h"
#include "threads.h"

namespace gemsmith {
namespace {

template <class T>
const RowKernels<T>& row_kernels();
template <>
const RowKernels<float>& row_kernels() {
  return kernels().floats;
}
template <>
const RowKernels<uint16_t>& row_kernels() {
  return kernels().bfloats;
}

}  // namespace

template <class T>
void norm(const T* x, const T* weight, int64_t M, int64_t D, float eps, T* y) {
  const auto& isa = row_kernels<T>();
  each_row(M, D, [&](int64_t m0, int64_t m1) { isa.norm(x, weight, D, eps, m0, m1, y); });
}

template <class T>
void add_norm(const T* x, const T* branch, const T* weight, int64_t M, int64_t D, float eps,
              float scale, T* y) {
  const auto& isa = row_kernels<T>();
  each_row(M, D, [&](int64_t m0, int64_t m1) {
    isa.add_norm(x, branch, weight, D, eps, scale, m0, m1, y);
  });
}

template <class T>
void geglu(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, int64_t M, int64_t n,
           T* y) {
  const auto& isa = row_kernels<T>();
  each_row(M, n, [&](int64_t m0, int64_t m1) {
    isa.geglu(gate, gate_stride, up, up_stride, n, m0, m1, y);
  });
}

template <class T>
void rotate(const T* x, const float* cosine, const float* sine, int64_t M, int64_t heads, int64_t H,
            int64_t pairs, T* y) {
  const auto& isa = row_kernels<T>();
  const int64_t row = heads * H;
  each_row(M, row, [&](int64_t m0, int64_t m1) {
    for (int64_t m = m0; m < m1; m++) {
      std::memcpy(y + m * row, x + m * row, static_cast<size_t>(row) * sizeof(T));
      isa.rotate(y, heads, H, pairs, cosine, sine, m, m + 1);
    }
  });
}

#define FOR_ROWS_OF(T)                                                                            \
  template void norm(const T*, const T*, int64_t, int64_t, float, T*);                            \
  template void add_norm(const T*, const T*, const T*, int64_t, int64_t, float, float, T*);       \
  template void geglu(const T*, int64_t, const T*, int64_t, int64_t, int64_t, T*);                \
  template void rotate(const T*, const float*, const float*, int64_t, int64_t, int64_t, int64_t, T*)
FOR_ROWS_OF(float);
FOR_ROWS_OF(uint16_t);

}  // namespace gemsmith
