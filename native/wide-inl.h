// Products of float32 rows with weights of 16 bits, widened on the way; lanes as in layer-inl.h.
// Included after it by each isa_*.cpp that has nothing of its own; internal linkage, see
// CMakeLists.txt.

namespace gemsmith {
namespace {

void wide(const float* x, const uint16_t* w, int64_t D, int64_t N, int64_t M, int64_t n0, int64_t n1,
          float*, void* y, int y_bits) {
  for (int64_t n = n0; n < n1; n++)
    for (int64_t m = 0; m < M; m++) {
      const float* in = x + m * D;
      const uint16_t* row = w + n * D;
      float lanes[16] = {};
      int64_t d = 0;
      for (; d + 16 <= D; d += 16)
        for (int i = 0; i < 16; i++) lanes[i] += in[d + i] * widened(row[d + i]);
      for (int i = 0; d + i < D; i++) lanes[i] += in[d + i] * widened(row[d + i]);
      const float sum = sum_of(lanes);
      if (y_bits == 16)
        static_cast<uint16_t*>(y)[m * N + n] = narrowed(sum);
      else
        static_cast<float*>(y)[m * N + n] = sum;
    }
}

}  // namespace
}  // namespace gemsmith
