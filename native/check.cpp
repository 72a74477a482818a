// Every kernel of every instruction set this CPU has, against plain loops over the codes; then the
// thread pool, from several threads at once. For sanitizers: buffers have exactly the bytes that
// are promised. Ends with 1 at the first difference.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "kernels.h"
#include "decoder.h"
#include "layer.h"
#include "threads.h"

using namespace gemsmith;

namespace {

std::mt19937 random_bits(0);

float small() { return static_cast<float>(random_bits() % 2001) / 1000 - 1; }

struct Shape {
  int64_t N, K, group;
};

struct Case {
  int64_t N, K, group, M;
  int bits;
  std::vector<uint8_t> lines;
  std::vector<float> scales, sx, expected;
  std::vector<uint16_t> halves;  // the scales as bfloat16
  std::vector<int8_t> x8;
  std::vector<float> steps;  // the memory of scale steps, if it has them
};

// kind 0: random; 1: the largest sums there can be; 2: zeros.
Case make(const Shape& shape, int bits, int64_t M, int kind) {
  Case made{shape.N, shape.K, shape.group, M, bits, {}, {}, {}, {}, {}, {}, {}};
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
  for (float& scale : made.scales) {  // such as bfloat16 holds
    scale = static_cast<float>(random_bits() % 1000) / 999 - 0.5f;
    uint32_t word;
    std::memcpy(&word, &scale, sizeof(word));
    made.halves.push_back(static_cast<uint16_t>(word >> 16));
    scale = widened(made.halves.back());
  }
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

// As `make`, but for scales, which are steps; x is not below -127.
Case make_steps(const Shape& shape, int bits, int64_t M, int kind) {
  Case made = make(shape, bits, M, kind);
  const auto [N, K, group] = shape;
  const int64_t blocks = ceil_div(N, BLOCK), groups = K / group, bytes = scale_bytes(groups, 8);
  const int64_t padded = blocks * BLOCK;
  made.steps.resize(static_cast<size_t>(blocks * bytes / 4));
  auto* memory = reinterpret_cast<uint8_t*>(made.steps.data());
  std::vector<float> step(padded), q(N * K), ones(padded * groups, 1);
  std::vector<int8_t> multiple(padded * groups);
  for (int64_t n = 0; n < padded; n++) {
    step[n] = static_cast<float>(8 + random_bits() % 8) / 512;
    std::memcpy(memory + n / BLOCK * bytes + n % BLOCK * 4, &step[n], 4);
    for (int64_t g = 0; g < groups; g++) {
      const int some = static_cast<int>(random_bits() % 31) - 15;
      multiple[n * groups + g] = static_cast<int8_t>(kind ? n % 2 ? 15 : -15 : some);
      memory[n / BLOCK * bytes + LINE + g * BLOCK + n % BLOCK] =
          static_cast<uint8_t>(multiple[n * groups + g]);
    }
  }
  for (int8_t& x : made.x8) x = std::max<int8_t>(x, -127);
  std::vector<int64_t> rows(N);
  std::iota(rows.begin(), rows.end(), 0);
  unpack_rows(made.lines.data(), ones.data(), K, bits, group, 32, rows.data(), N, q.data());
  for (int64_t m = 0; m < M; m++)
    for (int64_t n = 0; n < N; n++) {
      int32_t total = 0;
      for (int64_t k = 0; k < K; k++)
        total += multiple[n * groups + k / group] * static_cast<int32_t>(q[n * K + k]) *
                 made.x8[m * K + k];
      const float scaled = static_cast<float>(total) * step[n];
      made.expected[m * N + n] = scaled * made.sx[m];
    }
  std::vector<float> found(N * K);
  unpack_rows(made.lines.data(), memory, K, bits, group, 8, rows.data(), N, found.data());
  for (int64_t i = 0; i < N * K; i++)
    if (found[i] != q[i] * (multiple[i / K * groups + i % K / group] * step[i / K])) {
      std::printf("rows with steps differ: N %ld K %ld bits %d\n", long(N), long(K), bits);
      std::exit(1);
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
  if (!c.steps.empty()) {
    std::vector<float> y(c.M * c.N, -1);
    matmul(c.lines.data(), c.steps.data(), c.N, c.K, c.bits, c.group, 8, c.x8.data(), c.sx.data(),
           c.M, y.data());
    return compare("product with steps", c, y);
  }
  for (int scale_bits : {32, 16}) {
    if (scale_bits == 16 && !c.group) continue;
    const void* scales = c.scales.data();
    if (scale_bits == 16) scales = c.halves.data();
    std::vector<float> y(c.M * c.N, -1);
    matmul(c.lines.data(), scales, c.N, c.K, c.bits, c.group, scale_bits, c.x8.data(),
           c.sx.data(), c.M, y.data());
    compare("product", c, y);
  }
}

void widen(const Shape& shape, int bits) {
  const auto [N, K, group] = shape;
  std::vector<uint8_t> packed(N * K * bits / 8);
  std::vector<float> scales(N * K / group), out(N * K, -1);
  for (uint8_t& byte : packed) byte = static_cast<uint8_t>(random_bits());
  for (float& scale : scales) scale = small();
  dequantize(packed.data(), scales.data(), N, K, bits, group, out.data());
  for (int64_t i = 0; i < N * K; i++) {
    const int code = packed[i * bits / 8] >> (i * bits % 8) & ((1 << bits) - 1);
    if (out[i] == static_cast<float>(code - (1 << (bits - 1))) * scales[i / group]) continue;
    std::printf("dequantize differs: K %ld group %ld bits %d\n", long(K), long(group), bits);
    std::exit(1);
  }
}

void norms(int64_t M, int64_t D) {
  std::vector<float> x(M * D), weight(D), y(M * D, -1);
  for (float& value : x) value = small();
  for (float& value : weight) value = small();
  norm(x.data(), weight.data(), M, D, 1e-6f, y.data());
  for (int64_t m = 0; m < M; m++) {
    double sum = 0;
    for (int64_t d = 0; d < D; d++) sum += double(x[m * D + d]) * x[m * D + d];
    for (int64_t d = 0; d < D; d++) {
      const double wanted = x[m * D + d] / std::sqrt(sum / D + 1e-6) * weight[d];
      if (std::fabs(y[m * D + d] - wanted) < 1e-5) continue;
      std::printf("%s: rms_norm differs: M %ld D %ld\n", kernels().name, long(M), long(D));
      std::exit(1);
    }
  }
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

// A weight of bfloat16 times rows of floats and of bfloat16, in the order that kernels.h says.
void wide(int64_t N, int64_t K, int64_t M) {
  std::vector<uint16_t> weight(N * K), halves(M * K), rounded(M * N, 1);
  std::vector<float> x(M * K), y(M * N, -1);
  for (uint16_t& bits : weight) bits = static_cast<uint16_t>(0x3f00 + random_bits() % 256);
  for (float& value : x) value = small();
  linear_bfloat16(weight.data(), N, K, x.data(), 32, M, y.data());
  for (int64_t i = 0; i < M * K; i++) halves[i] = narrowed(x[i]);
  linear_bfloat16(weight.data(), N, K, halves.data(), 16, M, rounded.data());
  const auto sum = [&](int64_t m, int64_t n, bool half) {
    float lanes[16] = {};
    for (int64_t k = 0; k < K; k++) {
      const float value = half ? widened(halves[m * K + k]) : x[m * K + k];
      lanes[k % 16] += value * widened(weight[n * K + k]);
    }
    for (int step = 8; step > 0; step /= 2)
      for (int i = 0; i < step; i++) lanes[i] += lanes[i + step];
    return lanes[0];
  };
  for (int64_t m = 0; m < M; m++)
    for (int64_t n = 0; n < N; n++) {
      if (y[m * N + n] != sum(m, n, false) || rounded[m * N + n] != narrowed(sum(m, n, true))) {
        std::printf("%s: linear_bfloat16 differs: N %ld K %ld M %ld\n", kernels().name, long(N),
                    long(K), long(M));
        std::exit(1);
      }
    }
}

// The greatest outputs, and some alone, of a weight: those of the whole product. ties: of a weight
// whose rows repeat.
void search(const Shape& shape, int bits, int64_t M, bool ties, bool steps = false) {
  Case c = steps ? make_steps(shape, bits, M, 0) : make(shape, bits, M, 0);
  const auto [N, K, group] = shape;
  const int64_t blocks = ceil_div(N, BLOCK);
  std::vector<float>& scales = steps ? c.steps : c.scales;
  const int width = steps ? 8 : 32;
  if (ties)  // every block as the first
    for (int64_t b = 1; b < blocks; b++) {
      const size_t lines = c.lines.size() / blocks, floats = scales.size() / blocks;
      std::memcpy(&c.lines[b * lines], &c.lines[0], lines);
      std::memcpy(&scales[b * floats], &scales[0], floats * sizeof(float));
    }
  std::vector<float> x(M * K), all(M * N);
  for (float& value : x) value = small();
  linear(c.lines.data(), scales.data(), N, K, bits, group, width, x.data(), M, all.data());
  std::vector<int64_t> skipped;
  for (int64_t n = 0; n < N; n += 3) skipped.push_back(n);
  const int64_t count = std::min<int64_t>(N - static_cast<int64_t>(skipped.size()), 40);
  std::vector<float> values(M * count), most(M);
  std::vector<int64_t> ids(M * count);
  top(c.lines.data(), scales.data(), N, K, bits, group, width, x.data(), M, count, skipped.data(),
      static_cast<int64_t>(skipped.size()), values.data(), ids.data(), most.data());
  std::vector<float> some(M * N);
  std::vector<int64_t> order;
  for (int64_t n = 0; n < N; n++) order.push_back((n * 7 + 5) % N);  // N is no multiple of 7
  linear_of(c.lines.data(), scales.data(), N, K, bits, group, width, x.data(), M, order.data(), N,
         some.data());
  bool same = true;
  for (int64_t m = 0; m < M; m++) {
    const float* row = &all[m * N];
    std::vector<int64_t> best;
    for (int64_t n = 0; n < N; n++)
      if (n % 3) best.push_back(n);
    std::stable_sort(best.begin(), best.end(), [&](int64_t a, int64_t b) { return row[a] > row[b]; });
    for (int64_t i = 0; i < count; i++)
      same = same && ids[m * count + i] == best[i] && values[m * count + i] == row[best[i]];
    for (int64_t n = 0; n < N; n++) same = same && some[m * N + n] == row[order[n]];
    same = same && most[m] == *std::max_element(row, row + N);
  }
  if (same) return;
  std::printf("%s: head differs: N %ld K %ld group %ld bits %d M %ld\n", kernels().name, long(N),
              long(K), long(group), bits, long(M));
  std::exit(1);
}

// Attention of R rows, the last of S keys, over a ring of S slots that has turned by `turn` and a
// second storage of S2: within 1e-3 of doubles, and the bits of the first instruction set. pairs: keys
// are rebuilt from the values by a rule that turns so many, in one span; else -1.
struct Attended {
  int64_t R, N, K, H, S, turn, S2, window;
  int k_format, v_format;
  std::vector<float> first;
  int64_t pairs = -1;
};


struct Stored {
  std::vector<uint8_t> bytes;
  std::vector<float> scales, plain;
};

Stored store(int64_t slots, int64_t K, int64_t H, int format) {
  Stored made;
  const int64_t size = format == INT8 ? 1 : format == BFLOAT16 ? 2 : 4;
  made.bytes.resize(slots * K * H * size);
  made.plain.resize(slots * K * H);
  if (format == INT8) made.scales.resize(slots * K);
  for (float& scale : made.scales) scale = 0.005f + static_cast<float>(random_bits() % 100) / 1e4f;
  for (int64_t i = 0; i < slots * K * H; i++) {
    float value = small();
    if (format == INT8) {
      const auto code = static_cast<int8_t>(random_bits() % 255 - 127);
      made.bytes[i] = static_cast<uint8_t>(code);
      value = code * made.scales[i / H];
    } else if (format == BFLOAT16) {
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      const auto half = static_cast<uint16_t>(bits >> 16);
      std::memcpy(&made.bytes[2 * i], &half, 2);
      bits &= 0xffff0000u;
      std::memcpy(&value, &bits, 4);
    } else {
      std::memcpy(&made.bytes[4 * i], &value, 4);
    }
    made.plain[i] = value;
  }
  return made;
}

// A rule with random norms and frequencies, its tables exactly as long as they must be.
struct Rule {
  std::vector<float> norm, frequency, near_cos, near_sin, far_cos, far_sin;
  Rule(int64_t H, int64_t pairs, int64_t S) {
    for (int64_t d = 0; d < H; d++) norm.push_back(small() + 1.5f);
    for (int64_t i = 0; i < pairs; i++) frequency.push_back(std::fabs(small()));
    for (int64_t s = 0; s < KEYS; s++) add(s, near_cos, near_sin);
    for (int64_t s = 0; s < S; s += KEYS) add(s, far_cos, far_sin);
  }
  void add(int64_t s, std::vector<float>& cosine, std::vector<float>& sine) const {
    for (const float f : frequency) {
      cosine.push_back(std::cos(static_cast<float>(s) * f));
      sine.push_back(std::sin(static_cast<float>(s) * f));
    }
  }
  KeyRule view() const {
    return {norm.data(),     static_cast<int64_t>(frequency.size()),
            frequency.data(), near_cos.data(), near_sin.data(), far_cos.data(), far_sin.data()};
  }
  // The keys of values [S][K][H], by the definition.
  std::vector<float> keys(const std::vector<float>& values, int64_t K, int64_t H) const {
    std::vector<float> made(values.size());
    for (size_t i = 0; i < values.size(); i++) made[i] = values[i] * norm[i % H];
    for (size_t row = 0; row < values.size() / H; row++)
      for (size_t i = 0; i < frequency.size(); i++) {
        float &a = made[row * H + i], &b = made[row * H + H / 2 + i];
        const float angle = static_cast<float>(row / K) * frequency[i];
        const float x = a * std::cos(angle) - b * std::sin(angle);
        b = b * std::cos(angle) + a * std::sin(angle);
        a = x;
      }
    return made;
  }
};

void attend(Attended& c) {
  random_bits.seed(static_cast<unsigned>(c.S * 31 + c.H));
  const bool rebuilt = c.pairs >= 0;
  Stored k = store(c.S, c.K, c.H, c.k_format);
  const Stored v = rebuilt ? k : store(c.S, c.K, c.H, c.v_format);
  const Rule made(c.H, rebuilt ? c.pairs : 0, c.S);
  const KeyRule rule = made.view();
  if (rebuilt) k.plain = made.keys(v.plain, c.K, c.H);
  const Stored k2 = store(c.S2, c.K, c.H, c.k_format), v2 = store(c.S2, c.K, c.H, c.v_format);
  std::vector<float> q(c.R * c.N * c.H), y(q.size(), -1);
  for (float& value : q) value = small() / 8;
  const auto scales = [](const Stored& s) { return s.scales.empty() ? nullptr : s.scales.data(); };
  const KeySpan spans[] = {
      {k.bytes.data(), scales(k), v.bytes.data(), scales(v), c.turn, c.S - c.turn},
      {k.bytes.data(), scales(k), v.bytes.data(), scales(v), 0, c.turn},
      {k2.bytes.data(), scales(k2), v2.bytes.data(), scales(v2), 0, c.S2}};
  const int64_t all = c.S + c.S2;
  std::vector<int64_t> ranges;
  for (int64_t r = 0; r < c.R; r++) {
    const int64_t last = all - c.R + r + 1;
    ranges.push_back(c.window && last > c.window ? last - c.window : 0);
    ranges.push_back(last);
  }
  const int64_t origin = rebuilt ? 0 : c.S * 7 % 300, count = rebuilt ? 1 : 3;
  const KeyRule* const its_rule = rebuilt ? &rule : nullptr;
  attention({q.data(), c.R, c.N, c.K, c.H, spans, count, c.k_format, c.v_format, ranges.data(),
             y.data(), origin, its_rule});
  // Twice at once, with another origin: the first is as before.
  std::vector<float> both(2 * y.size());
  const Attention pair[] = {{q.data(), c.R, c.N, c.K, c.H, spans, count, c.k_format, c.v_format,
                             ranges.data(), both.data(), origin, its_rule},
                            {q.data(), c.R, c.N, c.K, c.H, spans, count, c.k_format, c.v_format,
                             ranges.data(), both.data() + y.size(), 0, its_rule}};
  attention(pair, 2);
  const auto key = [&](const Stored& one, const Stored& two, int64_t s, int64_t head) {
    return s < c.S ? &one.plain[((s + c.turn) % c.S * c.K + head) * c.H]
                   : &two.plain[((s - c.S) * c.K + head) * c.H];
  };
  bool same = c.first.empty() || std::memcmp(c.first.data(), y.data(), y.size() * 4) == 0;
  same = same && std::memcmp(both.data(), y.data(), y.size() * 4) == 0;
  c.first = y;
  for (int64_t r = 0; same && r < c.R; r++)
    for (int64_t n = 0; same && n < c.N; n++) {
      const int64_t head = n / (c.N / c.K);
      const float* row = &q[(r * c.N + n) * c.H];
      std::vector<double> out(c.H);
      double total = 0;
      for (int64_t s = ranges[2 * r]; s < ranges[2 * r + 1]; s++) {
        const float* at = key(k, k2, s, head);
        double score = 0;
        for (int64_t d = 0; d < c.H; d++) score += double(row[d]) * at[d];
        const double weight = std::exp(score);
        total += weight;
        for (int64_t d = 0; d < c.H; d++) out[d] += weight * key(v, v2, s, head)[d];
      }
      for (int64_t d = 0; d < c.H; d++)
        same = same && std::fabs(out[d] / total - y[(r * c.N + n) * c.H + d]) < 1e-3;
    }
  if (same) return;
  std::printf("%s: attention differs: R %ld N %ld K %ld H %ld S %ld formats %d %d pairs %ld\n",
              kernels().name, long(c.R), long(c.N), long(c.K), long(c.H), long(c.S), c.k_format,
              c.v_format, long(c.pairs));
  std::exit(1);
}

// Many small jobs, so that workers sleep, wake and come late.
// A decoder layer with random weights; its outputs, the first time, are what every other instruction
// set and number of threads must give. tests/weights/test_fuse.py compares it with the model.
struct LayerCase {
  static constexpr int64_t D = 80, HEADS = 3, H = 32, F = 72, P = 12, E = 4, PAIRS = 8, STRIDE = 20;
  Layer layer;
  std::vector<Case> weights;
  std::vector<std::vector<float>> arrays;
  std::map<int64_t, std::vector<float>> expected;  // by rows

  Weight weight(int64_t N, int64_t K, int bits) {
    weights.push_back(make({N, K, 0}, bits, 1, 0));
    const Case& c = weights.back();
    return {c.lines.data(), c.scales.data(), N, K, bits, 0, 32};
  }
  const float* array(int64_t count) {
    arrays.emplace_back(count);
    for (float& each : arrays.back()) each = small() + 1.5f;
    return arrays.back().data();
  }
  LayerCase(bool own_kv, bool ple, bool experts) {
    weights.reserve(40);
    arrays.reserve(40);
    layer.D = D, layer.heads = HEADS, layer.kv_heads = own_kv, layer.H = H, layer.F = F;
    layer.P = ple ? P : 0, layer.eps = 1e-6f, layer.scalar = 0.75f;
    layer.q = weight(HEADS * H, D, 4), layer.o = weight(D, HEADS * H, 8);
    layer.gate = weight(F, D, 2), layer.up = weight(F, D, 4), layer.down = weight(D, F, 4);
    if (own_kv) layer.k = weight(H, D, 8);
    if (own_kv && ple) layer.v = weight(H, D, 4);
    layer.input_norm = array(D), layer.q_norm = array(H), layer.k_norm = array(H);
    layer.attention_norm = array(D), layer.before_mlp_norm = array(D);
    layer.after_mlp_norm = array(D), layer.ple_norm = array(D);
    if (ple) layer.ple_gate = weight(P, D, 8), layer.ple_projection = weight(D, P, 8);
    if (!experts) return;
    layer.experts.A = 2, layer.experts.F = F;
    for (int64_t e = 0; e < E; e++) {
      layer.experts.gate_up.push_back(weight(2 * F, D, 4));
      layer.experts.down.push_back(weight(D, F, 4));
    }
    layer.experts.router = array(E * D), layer.experts.router_norm = array(D);
    layer.experts.scale = array(E), layer.experts.before = array(D);
    layer.experts.after_mlp = array(D), layer.experts.after = array(D);
  }
  void run(int64_t M) {
    std::mt19937 bits(static_cast<unsigned>(M));
    const auto values = [&](int64_t count) {
      std::vector<float> made(count);
      for (float& each : made) each = static_cast<float>(bits() % 2001) / 1000 - 1;
      return made;
    };
    const std::vector<float> x = values(M * D), cosine = values(M * PAIRS), sine = values(M * PAIRS);
    const std::vector<float> ple = values((M - 1) * STRIDE + P);
    std::vector<float> q(M * HEADS * H), k(M * layer.kv_heads * H), v(k), y(M * D);
    layer.before(x.data(), M, cosine.data(), sine.data(), PAIRS, q.data(), k.data(), v.data());
    layer.after(x.data(), q.data(), ple.data(), STRIDE, M, y.data());
    for (const std::vector<float>* part : {&q, &k, &v}) y.insert(y.end(), part->begin(), part->end());
    const auto known = expected.emplace(M, y);
    for (size_t i = 0; i < y.size(); i++)
      if (!std::isfinite(y[i]) || y[i] != known.first->second[i]) {
        std::printf("%s: layer, %lld rows: value %zu is %g, not %g\n", kernels().name,
                    static_cast<long long>(M), i, y[i], known.first->second[i]);
        std::exit(1);
      }
    if (layer.kv_heads && M <= 5) run_twice(M, x, cosine, sine);
  }
  // The layer twice over, in one call with its attention: what its parts give one by one.
  void run_twice(int64_t M, const std::vector<float>& x, const std::vector<float>& cosine,
                 const std::vector<float>& sine) const {
    constexpr int64_t FIRST = 2, PAST = 3;  // slots before those of the rows; those that are seen
    const std::vector<float> ple(M * 2 * P, 0.5f);
    const Stored past = store(FIRST + M, 1, H, INT8);
    std::vector<int64_t> ranges;
    for (int64_t m = 0; m < M; m++) ranges.insert(ranges.end(), {m ? 1 : 0, PAST + m});
    Stored one[] = {past, past, past, past}, other[] = {past, past, past, past};
    const auto codes = [](Stored& s) { return reinterpret_cast<int8_t*>(s.bytes.data()); };
    std::vector<Place> places(2);
    // As two sequences with the same keys; rows in slots on end.
    const std::vector<Seen> sequences =
        M > 1 ? std::vector<Seen>{{1, 2, 0}, {M - 1, 2, 0}} : std::vector<Seen>{{M, 2, 0}};
    std::vector<int64_t> slots;
    for (int64_t m = 0; m < M; m++) slots.push_back(FIRST + m);
    std::vector<float> wanted(x);
    for (size_t i = 0; i < 2; i++) {
      Stored &k = one[2 * i], &v = one[2 * i + 1], &k2 = other[2 * i], &v2 = other[2 * i + 1];
      const auto spans = [&](Stored& a, Stored& b) -> std::vector<KeySpan> {
        return {{codes(a), a.scales.data(), codes(b), b.scales.data(), 0, FIRST},
                {codes(a), a.scales.data(), codes(b), b.scales.data(), FIRST, M}};
      };
      std::vector<KeySpan> seen = spans(k, v);
      if (M > 1) seen.insert(seen.end(), {seen[0], seen[1]});
      places[i] = {{codes(k), k.scales.data(), codes(v), v.scales.data()}, slots.data(), 1,
                   cosine.data(), sine.data(), PAIRS, ranges.data(), &sequences, seen};
      std::vector<float> q(M * HEADS * H), o(q), key(M * H), value(M * H), y(M * D);
      layer.before(wanted.data(), M, cosine.data(), sine.data(), PAIRS, q.data(), key.data(),
                   value.data());
      quantize_rows(key.data(), M, H, codes(k2) + FIRST * H, k2.scales.data() + FIRST);
      quantize_rows(value.data(), M, H, codes(v2) + FIRST * H, v2.scales.data() + FIRST);
      const std::vector<KeySpan> past2 = spans(k2, v2);
      attention({q.data(), M, HEADS, 1, H, past2.data(), 2, INT8, INT8, ranges.data(), o.data()});
      layer.after(wanted.data(), o.data(), ple.data() + i * P, 2 * P, M, y.data());
      wanted = y;
    }
    const Layer* const both[] = {&layer, &layer};
    std::vector<float> y(M * D);
    gemsmith::run(both, places, x.data(), ple.data(), 2 * P, M, y.data());
    bool same = y == wanted;
    for (int i = 0; i < 4; i++)
      same = same && one[i].bytes == other[i].bytes && one[i].scales == other[i].scales;
    if (same) return;
    std::printf("%s: layers in one call differ from layers one by one\n", kernels().name);
    std::exit(1);
  }
};

// A decoder of three layers, the last of which reads the first one's keys and values: tokens read
// together give what they give in several passes, beside another sequence, and what every other
// instruction set gave. tests/weights/test_pass.py compares it with the model.
struct DecoderCase {
  static constexpr int64_t D = LayerCase::D, H = LayerCase::H, P = LayerCase::P, V = 40, L = 3;
  static constexpr int64_t PAIRS = LayerCase::PAIRS, TOKENS = 9, HOLE = 5, SLOTS = 2 * TOKENS + 2;
  std::vector<LayerCase> layers;
  std::vector<Case> weights;
  std::vector<uint16_t> projection;
  std::vector<float> norm, projection_norm, table, cosine, sine, expected;
  Decoder decoder;

  DecoderCase() {
    layers.reserve(L);
    for (const bool own : {true, true, false}) layers.emplace_back(own, true, false);
    const auto some = [](int64_t count) {
      std::vector<float> made(static_cast<size_t>(count));
      for (float& each : made) each = small();
      return made;
    };
    weights.push_back(make({V, D, 0}, 4, 1, 0));
    const Case& c = weights.back();
    decoder.embedding = decoder.head = {c.lines.data(), c.scales.data(), V, D, 4, 0, 32};
    for (const float each : some(L * P * D)) projection.push_back(narrowed(each));
    decoder.projection = {reinterpret_cast<const uint8_t*>(projection.data()), nullptr, L * P, D, 16,
                          0, 0};
    norm = some(D), projection_norm = some(P), table = some(V * L * P);
    cosine = some(TOKENS * PAIRS), sine = some(TOKENS * PAIRS);
    decoder.norm = norm.data(), decoder.projection_norm = projection_norm.data();
    decoder.stages = {{&layers[0].layer, 0, false}, {&layers[1].layer, 1, true},
                      {&layers[2].layer, 0, false}};
    decoder.shared = 2, decoder.D = D, decoder.P = P, decoder.window = 4, decoder.eps = 1e-6f;
    decoder.embedding_scale = 8.0f;
  }
  // Tokens first..stop-1 of a sequence, whose slots have a hole, and of another, which begins at slot
  // TOKENS + 1 and has one more token; y: of the last `asks` tokens of both.
  void read(std::vector<Stored>& kept, int64_t first, int64_t stop, int64_t asks, bool rows,
            std::vector<float>& y) {
    std::vector<StoredInt8> stores(L);
    for (size_t i = 0; i < 2; i++)
      stores[i] = {reinterpret_cast<int8_t*>(kept[2 * i].bytes.data()), kept[2 * i].scales.data(),
                   reinterpret_cast<int8_t*>(kept[2 * i + 1].bytes.data()),
                   kept[2 * i + 1].scales.data()};
    Pass pass;
    std::vector<float> given, turns[2];
    for (const int64_t more : {0, 1}) {
      const int64_t tokens = stop - first, begins = more * (TOKENS + 1);
      pass.parts.push_back({tokens, asks});
      for (int64_t t = first; t < stop; t++) {
        pass.ids.push_back((7 * t + 3 + more) % V);
        const float* row = &table[static_cast<size_t>(pass.ids.back() * L * P)];
        given.insert(given.end(), row, row + L * P);
        for (int i = 0; i < 2; i++) {
          const float* angle = (i ? sine : cosine).data() + t * PAIRS;
          turns[i].insert(turns[i].end(), angle, angle + PAIRS);
        }
      }
      for (Sight* sight : {&pass.full, &pass.sliding}) {
        const int64_t before = stop < HOLE ? stop : HOLE;
        sight->runs.emplace_back(begins, before);
        if (stop > HOLE) sight->runs.emplace_back(begins + HOLE + 1, stop - HOLE);
        sight->counts.push_back(stop > HOLE ? 2 : 1);
        sight->origins.push_back(0);
      }
    }
    for (Sight* sight : {&pass.full, &pass.sliding}) {
      sight->cosine = turns[0].data(), sight->sine = turns[1].data();
      sight->pairs = PAIRS;
    }
    decoder.table = rows ? nullptr : table.data();
    pass.rows = given.data();
    std::vector<float> out(static_cast<size_t>(2 * asks * D));
    gemsmith::read(decoder, pass, stores, out.data());
    y.insert(y.end(), out.begin(), out.end());
  }
  void run() {
    std::vector<Stored> one;
    for (int i = 0; i < 4; i++) one.push_back(store(SLOTS, 1, H, INT8));
    std::vector<Stored> other = one;
    std::vector<float> together, apart;
    read(one, 0, TOKENS, 1, false, together);
    read(other, 0, 4, 0, false, apart);
    read(other, 4, 7, 0, true, apart);
    read(other, 7, 8, 0, false, apart);
    read(other, 8, TOKENS, 1, true, apart);
    bool same = together == apart;
    for (size_t i = 0; i < 4; i++)
      same = same && one[i].bytes == other[i].bytes && one[i].scales == other[i].scales;
    read(one, 0, TOKENS, TOKENS, false, together);
    if (expected.empty()) expected = together;
    for (const float each : together) same = same && std::isfinite(each);
    if (same && together == expected) return;
    std::printf("%s: tokens read together differ from tokens in several passes\n", kernels().name);
    std::exit(1);
  }
};

void hammer(const Case& c, int repeats) {
  for (int i = 0; i < repeats; i++) {
    run(c);
    if (i % 50 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
}

}  // namespace

int main() {
  const Shape shapes[] = {{1, 1, 0},   {16, 16, 0},   {17, 33, 0},   {40, 130, 0},
                          {96, 640, 0}, {15, 128, 32}, {33, 256, 64}, {16, 384, 128},
                          {50, 288, 96}, {20, 224, 32}, {33, 320, 32}};
  const int64_t rows[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 17, 35, 48};
  std::vector<Case> cases;
  for (const Shape& shape : shapes)
    for (int bits : {2, 4, 8})
      for (int64_t M : rows) cases.push_back(make(shape, bits, M, 0));
  for (int bits : {2, 4, 8})
    for (int kind : {1, 2})
      for (int64_t M : {4, 33}) cases.push_back(make({16, 4096, 0}, bits, M, kind));
  for (const Shape& shape : {Shape{15, 128, 32}, Shape{20, 224, 32}, Shape{33, 320, 32}, Shape{16, 96, 32}})
    for (int bits : {2, 4})
      for (int64_t M : rows) cases.push_back(make_steps(shape, bits, M, 0));
  for (int64_t M : {1, 9, 33}) {
    cases.push_back(make_steps({17, 384, 128}, 2, M, 0));
    cases.push_back(make_steps({16, 65536, 32}, 4, M, 1));  // the largest sums
    cases.push_back(make_steps({16, 4096, 128}, 2, M, 1));
  }
  const Case large = make({2048, 512, 0}, 4, 1, 0);  // enough for several threads
  for (int bits : {2, 4, 8})
    for (const Shape& shape : {Shape{3, 24, 24}, Shape{2, 96, 32}}) widen(shape, bits);
  std::vector<Attended> attended;
  for (int format : {FLOAT32, BFLOAT16, INT8}) {
    attended.push_back({1, 1, 1, 16, 1, 0, 0, 0, format, format, {}});
    attended.push_back({1, 8, 1, 512, 300, 0, 0, 0, format, format, {}});
    attended.push_back({3, 6, 2, 48, 131, 40, 5, 100, format, INT8, {}});
    attended.push_back({33, 4, 1, 64, 200, 199, 33, 150, format, FLOAT32, {}});
    attended.push_back({1, 16, 2, 512, 300, 0, 0, 0, format, format, {}, 64});
    attended.push_back({9, 3, 1, 48, 257, 0, 0, 90, format, format, {}, 5});
    attended.push_back({2, 2, 2, 32, 129, 0, 0, 0, format, format, {}, 0});
  }
  attended.push_back({2, 8, 1, 256, 2100, 7, 2, 0, INT8, INT8, {}});  // several threads
  std::vector<LayerCase> layers;
  layers.reserve(3);
  layers.emplace_back(true, true, false);
  layers.emplace_back(false, true, false);
  layers.emplace_back(true, false, true);
  DecoderCase decoder;
  int count = 0;
  const char* const* names = isas(&count);
  for (int i = 0; i < count; i++) {
    force_isa(names[i]);
    for (int64_t n : {1, 3}) {
      set_threads(n);
      for (const Case& c : cases) run(c);
      run(large);
      for (int64_t M : {1, 5, 64}) quantize(M, 1037);
      for (int64_t M : {1, 70}) norms(M, 1037);  // the latter by several threads
      for (int64_t M : {1, 6, 29}) {
        wide(5, 37, M);
        wide(300, 256, M);  // several threads
      }
      for (Attended& c : attended) attend(c);
      for (const bool ties : {false, true}) {
        search({17, 33, 0}, 2, 3, ties);
        search({5003, 64, 32}, 4, 2, ties);
        search({5003, 64, 32}, 4, 2, ties, true);
        search({600, 96, 32}, 2, 40, ties, true);
        search({9000, 20, 0}, 8, 1, ties);
      }
      for (LayerCase& c : layers)
        for (int64_t M : {1, 5, 300}) c.run(M);
      decoder.run();
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
