// Every kernel of every instruction set this CPU has, against plain loops over the codes; then the
// thread pool, from several threads at once. For sanitizers: buffers have exactly the bytes that
// are promised. Ends with 1 at the first difference.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "kernels.h"
#include "threads.h"

using namespace gemsmith;

namespace {

std::mt19937 random_bits(0);

struct Shape {
  int64_t N, K, group;
};

struct Case {
  int64_t N, K, group, M;
  int bits;
  std::vector<uint8_t> lines;
  std::vector<float> scales, sx, expected;
  std::vector<int8_t> x8;
};

// kind 0: random; 1: the largest sums there can be; 2: zeros.
Case make(const Shape& shape, int bits, int64_t M, int kind) {
  Case made{shape.N, shape.K, shape.group, M, bits, {}, {}, {}, {}, {}};
  const auto [N, K, group] = shape;
  const int64_t blocks = ceil_div(N, BLOCK), groups = group ? K / group : 1;
  const int64_t row_bytes = ceil_div(K * bits, 8);
  const unsigned mask = (1u << bits) - 1;
  std::vector<uint8_t> codes(N * K), packed(N * row_bytes);
  for (int64_t n = 0; n < N; n++)
    for (int64_t k = 0; k < K; k++) {
      const unsigned code = kind == 0 ? random_bits() & mask : kind == 1 ? 0 : 1u << (bits - 1);
      codes[n * K + k] = static_cast<uint8_t>(code);
      packed[n * row_bytes + k * bits / 8] |= static_cast<uint8_t>(code << (k * bits % 8));
    }
  made.lines.resize(blocks * ceil_div(K, line_inputs(bits)) * LINE);
  pack_lines(packed.data(), N, K, bits, made.lines.data());
  made.scales.resize(blocks * groups * BLOCK);
  for (float& scale : made.scales) scale = static_cast<float>(random_bits() % 1000) / 999 - 0.5f;
  made.x8.resize(M * K);
  for (int8_t& x : made.x8) x = static_cast<int8_t>(kind == 0 ? random_bits() % 256 - 128 : -128);
  made.sx.resize(M);
  for (float& s : made.sx) s = static_cast<float>(random_bits() % 1000) / 333;
  made.expected.resize(M * N);
  for (int64_t m = 0; m < M; m++)
    for (int64_t n = 0; n < N; n++) {
      float total = 0;
      for (int64_t g = 0; g < groups; g++) {
        int32_t sum = 0;
        for (int64_t k = g * (group ? group : K); k < (g + 1) * (group ? group : K); k++)
          sum += (codes[n * K + k] - (1 << (bits - 1))) * made.x8[m * K + k];
        const float part = static_cast<float>(sum) *
                           made.scales[(n / BLOCK * groups + g) * BLOCK + n % BLOCK];
        total += part;
      }
      made.expected[m * N + n] = total * made.sx[m];
    }
  return made;
}

void compare(const char* what, const Case& c, const std::vector<float>& y) {
  if (std::memcmp(y.data(), c.expected.data(), y.size() * sizeof(float)) == 0) return;
  std::printf("%s: %s differs: N %ld K %ld group %ld bits %d M %ld\n", kernels().name, what,
              long(c.N), long(c.K), long(c.group), c.bits, long(c.M));
  std::exit(1);
}

void run(const Case& c) {
  std::vector<float> y(c.M * c.N, -1);
  matmul(c.lines.data(), c.scales.data(), c.N, c.K, c.bits, c.group, c.x8.data(), c.sx.data(), c.M,
         y.data());
  compare("product", c, y);
}

void quantize(int64_t M, int64_t K) {
  std::vector<float> x(M * K), sx(M, -1);
  std::vector<int8_t> x8(M * K);
  for (float& value : x) value = static_cast<float>(random_bits()) / 65536 - 32768;
  if (M > 1) std::memset(&x[K], 0, K * sizeof(float));
  if (M > 2) x[2 * K] = INFINITY;
  if (M > 3) x[3 * K] = NAN;
  quantize_rows(x.data(), M, K, x8.data(), sx.data());
  for (int64_t m = 0; m < M; m++) {
    float most = 0;
    for (int64_t k = 0; k < K; k++) most = std::fmax(most, std::fabs(x[m * K + k]));
    const bool finite = m != 2 && m != 3;
    const float scale = most == 0 ? 1 : most / 127;
    bool same = finite ? sx[m] == scale : std::isnan(sx[m]);
    for (int64_t k = 0; k < K; k++)
      same = same && x8[m * K + k] == (finite ? std::nearbyint(x[m * K + k] / scale) : 0);
    if (!same) {
      std::printf("%s: quantize_rows differs: M %ld K %ld\n", kernels().name, long(M), long(K));
      std::exit(1);
    }
  }
}

// Many small jobs, so that workers sleep, wake and come late.
void hammer(const Case& c, int repeats) {
  for (int i = 0; i < repeats; i++) {
    run(c);
    if (i % 50 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
}

}  // namespace

int main() {
  const Shape shapes[] = {{1, 1, 0},   {16, 16, 0},   {17, 33, 0},   {40, 130, 0},
                          {96, 640, 0}, {15, 128, 32}, {33, 256, 64}, {16, 384, 128}};
  const int64_t rows[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 35};
  std::vector<Case> cases;
  for (const Shape& shape : shapes)
    for (int bits : {2, 4, 8})
      for (int64_t M : rows) cases.push_back(make(shape, bits, M, 0));
  for (int bits : {2, 4, 8})
    for (int kind : {1, 2}) cases.push_back(make({16, 4096, 0}, bits, 4, kind));
  const Case large = make({2048, 512, 0}, 4, 1, 0);  // enough for several threads
  int count = 0;
  const char* const* names = isas(&count);
  for (int i = 0; i < count; i++) {
    force_isa(names[i]);
    for (int64_t n : {1, 3}) {
      set_threads(n);
      for (const Case& c : cases) run(c);
      run(large);
      for (int64_t M : {1, 5, 64}) quantize(M, 1037);
    }
    if (read_memory(large.lines.data(), 0) != 0) return 1;
    std::printf("%s: %zu products as they should be\n", names[i], 2 * cases.size());
  }
  force_isa("");
  set_threads(3);
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; i++) callers.emplace_back([&] { hammer(large, 300); });
  for (std::thread& caller : callers) caller.join();
  std::printf("3 callers of 3 threads: as they should be\n");
  return 0;
}
