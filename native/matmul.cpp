// What surrounds the kernels of an instruction set: sums of the activations, and the sharing of the
// work among threads.
#include <cstring>
#include <memory>

#include "kernels.h"
#include "threads.h"

namespace gemsmith {
namespace {

// Activations that one pass over the weights works on; they stay in a core's L2 cache.
constexpr int64_t PASS_BYTES = 512 * 1024;
// Less than this is done by the caller before a worker could have woken.
constexpr int64_t ALONE_BYTES = 128 * 1024;
// Bytes of a piece: few enough that threads end together, many enough to stream.
constexpr int64_t MIN_PIECE = 16 * 1024, MAX_PIECE = 512 * 1024;

int64_t clamp(int64_t value, int64_t least, int64_t most) {
  return value < least ? least : value > most ? most : value;
}

// `total` things of `bytes` work each: how many make a piece, for about four pieces a thread.
int64_t piece_size(int64_t total, int64_t bytes) {
  if (total * bytes < ALONE_BYTES || threads() == 1) return total;
  const int64_t size = clamp(total * bytes / (4 * threads()), MIN_PIECE, MAX_PIECE);
  return clamp(size / bytes, 1, total);
}

struct Slices {
  int64_t total, size;
  int64_t count() const { return ceil_div(total, size); }
  int64_t begin(int64_t piece) const { return piece * size; }
  int64_t end(int64_t piece) const { return clamp((piece + 1) * size, 0, total); }
};

struct ProductJob {
  const Kernels& kernels;
  const Product& product;
  Slices blocks;
  int64_t m0, m1;
};

void run_product(const void* data, int64_t piece) {
  const auto& job = *static_cast<const ProductJob*>(data);
  const Slices& blocks = job.blocks;
  job.kernels.product(job.product, blocks.begin(piece), blocks.end(piece), job.m0, job.m1);
}

struct QuantizeJob {
  const Kernels& kernels;
  const float* x;
  int64_t K;
  int8_t* x8;
  float* sx;
  Slices rows;
};

void run_quantize(const void* data, int64_t piece) {
  const auto& job = *static_cast<const QuantizeJob*>(data);
  job.kernels.quantize(job.x, job.K, job.rows.begin(piece), job.rows.end(piece), job.x8, job.sx);
}

struct ReadJob {
  const Kernels& kernels;
  const uint8_t* data;
  Slices lines;
  uint64_t* sums;
};

void run_read(const void* data, int64_t piece) {
  const auto& job = *static_cast<const ReadJob*>(data);
  job.sums[piece] = job.kernels.read(job.data, job.lines.begin(piece), job.lines.end(piece));
}

constexpr int64_t CHECKED = 1 << 20;  // bytes of a piece of a checksum
constexpr uint64_t ODD = 0x9e3779b97f4a7c15u;

struct CheckJob {
  const uint8_t* data;
  int64_t bytes;
  uint64_t* sums;
};

// Eight lanes of words, each a sum and the sum of its sums: these know where a word stood.
void run_check(const void* data, int64_t piece) {
  const auto& job = *static_cast<const CheckJob*>(data);
  const int64_t end = clamp((piece + 1) * CHECKED, 0, job.bytes);
  uint64_t sum[8] = {}, sums[8] = {};
  for (int64_t at = piece * CHECKED; at < end; at += 64) {
    uint64_t words[8];
    std::memcpy(words, job.data + at, 64);
    for (int i = 0; i < 8; i++) sums[i] += sum[i] += words[i];
  }
  uint64_t mixed = 0;
  for (int i = 0; i < 8; i++) mixed = ((mixed ^ sum[i]) * ODD ^ sums[i]) * ODD;
  job.sums[piece] = mixed;
}

}  // namespace

void quantize_rows(const float* x, int64_t M, int64_t K, int8_t* x8, float* sx) {
  if (M == 0) return;
  const int64_t row_bytes = K * static_cast<int64_t>(sizeof(float));
  const QuantizeJob job{kernels(), x, K, x8, sx, {M, piece_size(M, row_bytes)}};
  parallel(job.rows.count(), run_quantize, &job);
}

void matmul(const uint8_t* lines, const float* scales, int64_t N, int64_t K, int bits,
            int64_t group, const int8_t* x8, const float* sx, int64_t M, float* y) {
  const int64_t inputs = line_inputs(bits), count = ceil_div(K, inputs), stride = count * inputs;
  const int64_t groups = group ? K / group : 1;
  const int64_t size = group ? group : K;

  std::unique_ptr<int8_t[]> padded;  // kernels read whole lines' worth of x
  if (stride != K) {
    padded.reset(new int8_t[static_cast<size_t>(M * stride)]());
    for (int64_t m = 0; m < M; m++)
      std::memcpy(&padded[static_cast<size_t>(m * stride)], x8 + m * K, static_cast<size_t>(K));
    x8 = padded.get();
  }
  const std::unique_ptr<int32_t[]> sums(new int32_t[static_cast<size_t>(M * groups)]);
  for (int64_t m = 0; m < M; m++)
    for (int64_t g = 0; g < groups; g++) {
      int32_t sum = 0;
      const int8_t* row = x8 + m * stride + g * size;
      for (int64_t k = 0; k < size; k++) sum += row[k];
      sums[static_cast<size_t>(m * groups + g)] = -(1 << (bits - 1)) * sum;
    }

  const Product product{lines, scales, N,      count,      group ? group / inputs : count,
                        groups, bits,  x8,     stride,     sums.get(),
                        sx,     y};
  const int64_t rows = clamp(PASS_BYTES / stride, 16, M < 16 ? 16 : M);
  for (int64_t m0 = 0; m0 < M; m0 += rows) {
    const int64_t m1 = m0 + rows < M ? m0 + rows : M;
    // Each further row is about as much work again as a 16th of the bytes.
    const int64_t bytes = count * LINE * (1 + (m1 - m0) / 16);
    const int64_t blocks = ceil_div(N, BLOCK);
    const ProductJob job{kernels(), product, {blocks, piece_size(blocks, bytes)}, m0, m1};
    parallel(job.blocks.count(), run_product, &job);
  }
}

void linear(const uint8_t* lines, const float* scales, int64_t N, int64_t K, int bits,
            int64_t group, const float* x, int64_t M, float* y) {
  const std::unique_ptr<int8_t[]> x8(new int8_t[static_cast<size_t>(M * K)]);
  const std::unique_ptr<float[]> sx(new float[static_cast<size_t>(M)]);
  quantize_rows(x, M, K, x8.get(), sx.get());
  matmul(lines, scales, N, K, bits, group, x8.get(), sx.get(), M, y);
}

uint64_t checksum(const uint8_t* data, int64_t bytes) {
  const int64_t count = ceil_div(bytes, CHECKED);
  if (count == 0) return 0;
  const std::unique_ptr<uint64_t[]> sums(new uint64_t[static_cast<size_t>(count)]);
  const CheckJob job{data, bytes, sums.get()};
  parallel(count, run_check, &job);
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; i++) sum = (sum ^ sums[static_cast<size_t>(i)]) * ODD + 1;
  return sum;
}

uint64_t read_memory(const uint8_t* data, int64_t bytes) {
  const int64_t count = bytes / LINE;
  if (count == 0) return 0;
  const Slices lines{count, piece_size(count, LINE)};
  const std::unique_ptr<uint64_t[]> sums(new uint64_t[static_cast<size_t>(lines.count())]);
  const ReadJob job{kernels(), data, lines, sums.get()};
  parallel(lines.count(), run_read, &job);
  uint64_t sum = 0;
  for (int64_t i = 0; i < lines.count(); i++) sum += sums[static_cast<size_t>(i)];
  return sum;
}

}  // namespace gemsmith
