// What surrounds the kernels of an instruction set: sums of the activations, and the sharing of the
// work among threads; and the head's outputs of which only the greatest, or a few, are wanted.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "kernels.h"
#include "room.h"
#include "threads.h"

namespace gemsmith {
namespace {

// Activations that one pass over the weights works on; they stay in a core's L2 cache.
constexpr int64_t PASS_BYTES = 512 * 1024;
// Rows for which weights are unpacked at least, however long: unpacking is then a few percent.
constexpr int64_t MANY_ROWS = 144;
// The same for weights that are widened; a multiple of the rows that `wide` takes together.
constexpr int64_t WIDE_ROWS = 24;
// Less than this is done by the caller before a worker could have woken.
constexpr int64_t ALONE_BYTES = 256 * 1024;
// Bytes of a piece: few enough that threads end together, many enough to stream.
constexpr int64_t MIN_PIECE = 16 * 1024, MAX_PIECE = 8 * 1024 * 1024;
// Pieces a thread: where each has to be begun, and where one goes on with the next.
constexpr int64_t FEW = 4, MANY = 64;

int64_t clamp(int64_t value, int64_t least, int64_t most) {
  return value < least ? least : value > most ? most : value;
}

// Bytes of a piece, of about so many a thread.
int64_t piece_bytes(int64_t bytes, int64_t pieces) {
  return clamp(bytes / (pieces * threads()), MIN_PIECE, MAX_PIECE);
}

// `total` things of `bytes` work each: how many make a piece.
int64_t piece_size(int64_t total, int64_t bytes) {
  if (total * bytes < ALONE_BYTES || threads() == 1) return total;
  return clamp(piece_bytes(total * bytes, FEW) / bytes, 1, total);
}

int64_t pass_rows(int64_t stride, int64_t least) {
  return PASS_BYTES / stride > least ? PASS_BYTES / stride : least;
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
  int64_t M;
};

void run_product(const ProductJob& job, int64_t piece) {
  const Product& p = job.product;
  const int64_t b0 = job.blocks.begin(piece), b1 = job.blocks.end(piece);
  const int64_t rows = pass_rows(p.stride, 16);
  for (int64_t m = 0; m < job.M; m += rows)
    job.kernels.product(p, b0, b1, m, m + rows < job.M ? m + rows : job.M);
}

// Pieces of one product after those of the other.
void run_products(const void* data, int64_t piece) {
  const auto& jobs = *static_cast<const std::vector<ProductJob>*>(data);
  size_t i = 0;
  for (; piece >= jobs[i].blocks.count(); i++) piece -= jobs[i].blocks.count();
  run_product(jobs[i], piece);
}

// As long as its thread lives: to ask the system for it each time would cost more than to unpack.
uint8_t* aligned_scratch(int64_t bytes) {
  thread_local Room<uint8_t> there;
  thread_local int64_t size = 0;
  if (size < bytes) {
    there.reset();
    there = room<uint8_t>(bytes);
    size = bytes;
  }
  return there.get();
}

// All M rows of blocks b0..b1.
void run_gemm_rows(const Kernels& k, const Product& p, int64_t b0, int64_t b1, int64_t M) {
  const Gemm& gemm = *k.gemm;
  const int64_t rows = pass_rows(p.stride, MANY_ROWS) / gemm.rows * gemm.rows;
  uint8_t* scratch = aligned_scratch(gemm.scratch(p));
  for (int64_t m = 0; m < M; m += rows)
    gemm.run(p, b0, b1, m, m + rows < M ? m + rows : M, scratch);
}

void run_gemm(const void* data, int64_t piece) {
  const auto& job = *static_cast<const ProductJob*>(data);
  run_gemm_rows(job.kernels, job.product, job.blocks.begin(piece), job.blocks.end(piece), job.M);
}

// Activations in panels, and their sums, for run_gemm.
struct ArrangeJob {
  const Kernels& kernels;
  const int8_t* x8;
  int64_t M, K, stride, groups;
  int32_t factor;
  int8_t* x;      // [ceil(M/rows)] panels
  int32_t* sums;  // [panels * rows][groups], or null where the product needs none
  Slices panels;
};

template <int64_t BYTES>
inline void copy_apart(const int8_t* from, int64_t count, int8_t* to, int64_t rows) {
  for (int64_t i = 0; i < count; i++) std::memcpy(to + i * rows * BYTES, from + i * BYTES, BYTES);
}

void run_arrange(const void* data, int64_t piece) {
  const auto& job = *static_cast<const ArrangeJob*>(data);
  const int64_t rows = job.kernels.gemm->rows, bytes = job.kernels.gemm->bytes;
  for (int64_t panel = job.panels.begin(piece); panel < job.panels.end(piece); panel++) {
    int8_t* to = job.x + panel * rows * job.stride;
    const int64_t m0 = panel * rows, there = clamp(job.M - m0, 0, rows);
    const int8_t* from = job.x8 + m0 * job.K;
    if (job.sums) {
      int32_t* sums = job.sums + m0 * job.groups;
      job.kernels.sums(from, there * job.groups, job.K / job.groups, job.factor, sums);
      std::memset(sums + there * job.groups, 0,
                  static_cast<size_t>((rows - there) * job.groups) * sizeof(int32_t));
    }
    if (there < rows || job.stride != job.K)
      std::memset(to, 0, static_cast<size_t>(rows * job.stride));
    for (int64_t r = 0; r < there; r++, from += job.K) {
      const int64_t whole = job.K / bytes;
      int8_t* at = to + r * bytes;
      // Constants, for the compiler.
      bytes == 4 ? copy_apart<4>(from, whole, at, rows) : copy_apart<LINE>(from, whole, at, rows);
      std::memcpy(at + whole * rows * bytes, from + whole * bytes,
                  static_cast<size_t>(job.K - whole * bytes));
    }
  }
}

// Activations of a few rows as Kernels::product reads them.
struct FewRows {
  std::unique_ptr<int8_t[]> padded;  // where a row's length is no whole number of lines
  std::unique_ptr<int32_t[]> sums;

  FewRows(const Kernels& k, const int8_t* x8, int64_t M, int64_t K, int64_t stride, int64_t groups,
          int bits)
      : sums(new int32_t[static_cast<size_t>(M * groups)]) {
    if (stride != K) {
      padded.reset(new int8_t[static_cast<size_t>(M * stride)]());
      for (int64_t m = 0; m < M; m++)
        std::memcpy(&padded[static_cast<size_t>(m * stride)], x8 + m * K, static_cast<size_t>(K));
    }
    k.sums(x8, M * groups, K / groups, -(1 << (bits - 1)), sums.get());
  }
};

// Activations of many rows as Gemm::run reads them, given to the product that they are for.
struct ManyRows {
  Room<int8_t> x;
  std::unique_ptr<int32_t[]> sums;

  ManyRows(const Kernels& k, const int8_t* x8, int64_t M, int64_t K, Product* p) {
    // Multiplied by their steps, codes are those of 8 bits with one scale a row.
    const int64_t groups = p->steps() ? 1 : p->groups;
    const int bits = p->steps() ? 8 : p->bits;
    const int64_t stride = ceil_div(p->stride, k.gemm->bytes) * k.gemm->bytes;
    const int64_t panels = ceil_div(M, k.gemm->rows), rows = panels * k.gemm->rows;
    if (k.gemm->sums) sums.reset(new int32_t[static_cast<size_t>(rows * groups)]);
    x = room<int8_t>(rows * stride);
    const ArrangeJob arrange{k, x8, M, K, stride, groups, -(1 << (bits - 1)), x.get(), sums.get(),
                             {panels, piece_size(panels, k.gemm->rows * stride)}};
    parallel(arrange.panels.count(), run_arrange, &arrange);
    p->x = x.get();
    p->stride = stride;
    p->sums = sums.get();
  }
};

// A product of which some outputs are computed at a time, each time into a place of their own.
struct Head {
  const Kernels& kernels;
  std::unique_ptr<int8_t[]> x8;
  std::unique_ptr<float[]> sx;
  std::unique_ptr<FewRows> few;
  std::unique_ptr<ManyRows> many;
  Product product;
  int64_t M;

  Head(const uint8_t* lines, const void* scales, int64_t N, int64_t K, int bits, int64_t group,
       int scale_bits, const float* x, int64_t M)
      : kernels(gemsmith::kernels()),
        x8(new int8_t[static_cast<size_t>(M * K)]),
        sx(new float[static_cast<size_t>(M)]),
        M(M) {
    const int64_t inputs = line_inputs(bits), count = ceil_div(K, inputs), stride = count * inputs;
    const int64_t groups = group ? K / group : 1;
    quantize_rows(x, M, K, x8.get(), sx.get());
    product = {lines,  scales, N,          count, group ? group / inputs : count,
               groups, bits,   scale_bits, x8.get(), stride, nullptr, sx.get(), nullptr};
    if (kernels.gemm && M >= kernels.gemm->least) {
      many.reset(new ManyRows(kernels, x8.get(), M, K, &product));
    } else {
      few.reset(new FewRows(kernels, x8.get(), M, K, stride, groups, bits));
      if (few->padded) product.x = few->padded.get();
      product.sums = few->sums.get();
    }
  }
  // How many outputs blocks b0..b1 hold; into y [M][that many].
  int64_t some(int64_t b0, int64_t b1, float* y) const {
    Product part = product;
    part.lines += b0 * part.line_count * LINE;
    part.scales = part.scales_of(b0);
    part.N = clamp(part.N - b0 * BLOCK, 0, (b1 - b0) * BLOCK);
    part.y = y;
    if (many)
      run_gemm_rows(kernels, part, 0, b1 - b0, M);
    else
      kernels.product(part, 0, b1 - b0, 0, M);
    return part.N;
  }
};

// Outputs of a piece: their values stay in a core's L1 cache until they have been looked through.
constexpr int64_t LOOKED = 2048;

struct Found {
  float value;
  int64_t id;
  // The order in which they are given: the greatest first, of equal ones the lowest id.
  bool operator<(const Found& other) const {
    return value > other.value || (value == other.value && id < other.id);
  }
};

struct TopJob {
  const Head& head;
  int64_t count;
  const int64_t *skipped, *skipped_end;
  // [M]: what a value must reach, since so many others do.
  std::atomic<float>* bounds;
  // [pieces][M]
  std::vector<Found>* found;
  float* most;  // the greatest, NaN if there is one
};

void lift(std::atomic<float>& bound, float value) {
  float seen = bound.load(std::memory_order_relaxed);
  while (value > seen && !bound.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
}

// A value that `count` of these reach: the least of the greatest of so many groups of them, or less.
// most: the greatest of all, NaN if there is one.
float reached_by(const float* y, int64_t size, int64_t count, float& most) {
  constexpr int64_t GROUPS = 256;
  constexpr float MINUS_INFINITY = -__builtin_inff();
  float greatest[GROUPS];
  std::fill(greatest, greatest + GROUPS, MINUS_INFINITY);
  int strays = 0;
  const auto group = [&](int64_t i, int64_t count) {
    for (int64_t g = 0; g < count; g++) {
      strays |= y[i + g] != y[i + g];
      greatest[g] = y[i + g] > greatest[g] ? y[i + g] : greatest[g];
    }
  };
  const int64_t whole = size / GROUPS * GROUPS;
  for (int64_t i = 0; i < whole; i += GROUPS) group(i, GROUPS);
  group(whole, size - whole);
  most = strays ? __builtin_nanf("") : *std::max_element(greatest, greatest + GROUPS);
  if (count > GROUPS) return MINUS_INFINITY;
  std::nth_element(greatest, greatest + count - 1, greatest + GROUPS, std::greater<float>());
  return greatest[count - 1];
}

// Values y of the outputs from `first` on of row m; those that are skipped are lost. What is passed
// over is less than `count` others, so what is found in the end does not depend on the order in which
// pieces run. room: to work in.
void look_through(const TopJob& job, float* y, int64_t size, int64_t first, int64_t m,
                  std::vector<Found>& room, std::vector<Found>& found, float& most) {
  const auto* skipped = std::lower_bound(job.skipped, job.skipped_end, first);
  float bound = reached_by(y, size, job.count, most);
  if (skipped < job.skipped_end && *skipped < first + size) {
    for (; skipped < job.skipped_end && *skipped < first + size; skipped++)
      y[*skipped - first] = __builtin_nanf("");  // neither great nor small
    float rest;
    bound = reached_by(y, size, job.count, rest);
  }
  const float others = job.bounds[m].load(std::memory_order_relaxed);
  bound = others > bound ? others : bound;
  room.clear();
  for (int64_t i = 0; i < size; i += BLOCK) {  // outputs come in whole blocks but for the last
    const int64_t end = i + BLOCK < size ? i + BLOCK : size;
    int any = 0;
    for (int64_t j = i; j < end; j++) any |= y[j] >= bound;
    for (int64_t j = i; any && j < end; j++)
      if (y[j] >= bound) room.push_back({y[j], first + j});
  }
  if (static_cast<int64_t>(room.size()) >= job.count) {
    const auto last = room.begin() + job.count - 1;
    std::nth_element(room.begin(), last, room.end());
    room.resize(static_cast<size_t>(job.count));
    lift(job.bounds[m], room.back().value);
  }
  found.assign(room.begin(), room.end());
}

void run_top(const void* data, int64_t piece) {
  const auto& job = *static_cast<const TopJob*>(data);
  const int64_t M = job.head.M, size = LOOKED / BLOCK, blocks = ceil_div(job.head.product.N, BLOCK);
  const int64_t b0 = piece * size, b1 = b0 + size < blocks ? b0 + size : blocks;
  const std::unique_ptr<float[]> y(new float[static_cast<size_t>(M * LOOKED)]);
  const int64_t outputs = job.head.some(b0, b1, y.get());
  std::vector<Found> room;
  for (int64_t m = 0; m < M; m++)
    look_through(job, y.get() + m * outputs, outputs, b0 * BLOCK, m, room,
                 job.found[piece * M + m], job.most[piece * M + m]);
}

struct ChosenJob {
  const Head& head;
  const int64_t* ids;
  float* y;
  Slices chosen;
};

void run_chosen(const void* data, int64_t piece) {
  const auto& job = *static_cast<const ChosenJob*>(data);
  const int64_t M = job.head.M;
  const std::unique_ptr<float[]> y(new float[static_cast<size_t>(M * BLOCK)]);
  int64_t block = -1, outputs = 0;
  for (int64_t i = job.chosen.begin(piece); i < job.chosen.end(piece); i++) {
    const int64_t its = job.ids[i] / BLOCK;
    if (its != block) outputs = job.head.some(its, its + 1, y.get());
    block = its;
    for (int64_t m = 0; m < M; m++)
      job.y[m * job.chosen.total + i] = y[static_cast<size_t>(m * outputs + job.ids[i] % BLOCK)];
  }
}

struct WidenJob {
  const uint16_t* x;
  float* out;
  Slices values;
};

void run_widen(const void* data, int64_t piece) {
  const auto& job = *static_cast<const WidenJob*>(data);
  const int64_t end = job.values.end(piece);
  for (int64_t i = job.values.begin(piece); i < end; i++) job.out[i] = widened(job.x[i]);
}

struct WideJob {
  const Kernels& kernels;
  const float* x;
  const uint16_t* weight;
  int64_t K, M;
  char* y;
  int y_bits;
  Slices outputs;
};

void run_wide(const void* data, int64_t piece) {
  const auto& job = *static_cast<const WideJob*>(data);
  const std::unique_ptr<float[]> room(new float[static_cast<size_t>(WIDE_ROOM * job.K)]);
  const int64_t N = job.outputs.total;
  const int64_t row_bytes = job.K * static_cast<int64_t>(sizeof(float));
  // Outputs, each far from the one of the next row, take room as well.
  const int64_t pass = pass_rows(2 * row_bytes, WIDE_ROWS) / WIDE_ROWS * WIDE_ROWS;
  for (int64_t m = 0; m < job.M; m += pass)
    job.kernels.wide(job.x + m * job.K, job.weight, job.K, N, clamp(job.M - m, 0, pass),
                     job.outputs.begin(piece), job.outputs.end(piece), room.get(),
                     job.y + m * N * job.y_bits / 8, job.y_bits);
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
  const Kernels& isa = kernels();
  each_row(M, K, [&](int64_t m0, int64_t m1) { isa.quantize(x, K, m0, m1, x8, sx); });
}

namespace {

// Many rows: weights are unpacked, and activations arranged, for one product at a time.
void multiply_many(const Kernels& k, const Factor& w, int64_t K, const int8_t* x8, const float* sx,
                   int64_t M) {
  const int64_t inputs = line_inputs(w.bits), count = ceil_div(K, inputs);
  const int64_t groups = w.group ? K / w.group : 1, blocks = ceil_div(w.N, BLOCK);
  Product product{w.lines, w.scales,     w.N, count,          w.group ? w.group / inputs : count, groups,
                  w.bits,  w.scale_bits, x8,  count * inputs, nullptr, sx, w.y};
  const ManyRows given(k, x8, M, K, &product);
  // Each further row is about as much work again as a 16th of the bytes.
  int64_t size = piece_size(blocks, count * LINE * (1 + M / 16));
  if (size < blocks) size += size % 2;  // kernels take blocks by twos
  const ProductJob job{k, product, {blocks, size}, M};
  parallel(job.blocks.count(), run_gemm, &job);
}

}  // namespace

void matmul(const Factor* factors, int64_t count, int64_t K, const int8_t* x8, const float* sx,
            int64_t M) {
  if (M == 0) return;
  const Kernels& k = kernels();
  if (k.gemm && M >= k.gemm->least) {
    for (int64_t i = 0; i < count; i++) multiply_many(k, factors[i], K, x8, sx, M);
    return;
  }
  std::vector<FewRows> given;
  given.reserve(static_cast<size_t>(count));
  std::vector<Product> products;
  int64_t bytes = 0;
  for (int64_t i = 0; i < count; i++) {
    const Factor& w = factors[i];
    const int64_t inputs = line_inputs(w.bits), line_count = ceil_div(K, inputs);
    const int64_t groups = w.group ? K / w.group : 1, stride = line_count * inputs;
    Product p{w.lines, w.scales, w.N, line_count, w.group ? w.group / inputs : line_count,
              groups, w.bits, w.scale_bits, x8, stride, nullptr, sx, w.y};
    if (i && w.bits == factors[i - 1].bits && w.group == factors[i - 1].group) {
      p.x = products.back().x;
      p.sums = products.back().sums;
    } else {
      const FewRows& own = given.emplace_back(k, x8, M, K, stride, groups, w.bits);
      p.sums = own.sums.get();
      if (own.padded) p.x = own.padded.get();
    }
    bytes += ceil_div(w.N, BLOCK) * line_count * LINE;
    products.push_back(p);
  }
  // Each further row is about as much work again as a 16th of the bytes.
  const int64_t work = 1 + M / 16;
  const bool alone = bytes * work < ALONE_BYTES || threads() == 1;
  std::vector<ProductJob> jobs;
  int64_t pieces = 0;
  for (const Product& p : products) {
    const int64_t blocks = ceil_div(p.N, BLOCK);
    int64_t size = piece_bytes(bytes * work, MANY) / (p.line_count * LINE * work);
    size += size % 2;  // kernels take blocks by twos
    jobs.push_back({k, p, {blocks, alone ? blocks : clamp(size, 1, blocks)}, M});
    pieces += jobs.back().blocks.count();
  }
  if (alone)
    for (const ProductJob& job : jobs) run_product(job, 0);
  else
    parallel(pieces, run_products, &jobs);
}

void matmul(const uint8_t* lines, const void* scales, int64_t N, int64_t K, int bits,
            int64_t group, int scale_bits, const int8_t* x8, const float* sx, int64_t M, float* y) {
  const Factor factor{lines, scales, N, bits, group, scale_bits, y};
  matmul(&factor, 1, K, x8, sx, M);
}

void linear(const uint8_t* lines, const void* scales, int64_t N, int64_t K, int bits,
            int64_t group, int scale_bits, const float* x, int64_t M, float* y) {
  const Room<int8_t> x8 = room<int8_t>(M * K);
  const std::unique_ptr<float[]> sx(new float[static_cast<size_t>(M)]);
  quantize_rows(x, M, K, x8.get(), sx.get());
  matmul(lines, scales, N, K, bits, group, scale_bits, x8.get(), sx.get(), M, y);
}

void linear_bfloat16(const uint16_t* weight, int64_t N, int64_t K, const void* x, int row_bits,
                     int64_t M, void* y) {
  if (M == 0) return;
  std::unique_ptr<float[]> floats;
  if (row_bits == 16) {
    floats.reset(new float[static_cast<size_t>(M * K)]);
    const WidenJob job{static_cast<const uint16_t*>(x), floats.get(),
                       {M * K, piece_size(M * K, sizeof(uint16_t))}};
    parallel(job.values.count(), run_widen, &job);
  }
  const float* rows = floats ? floats.get() : static_cast<const float*>(x);
  // Each further row is about as much work again as a 16th of the bytes.
  const int64_t work = K * static_cast<int64_t>(sizeof(uint16_t)) * (1 + M / 16);
  const WideJob job{kernels(), rows, weight, K, M, static_cast<char*>(y), row_bits,
                    {N, piece_size(N, work)}};
  parallel(job.outputs.count(), run_wide, &job);
}

void top(const uint8_t* lines, const void* scales, int64_t N, int64_t K, int bits, int64_t group,
         int scale_bits, const float* x, int64_t M, int64_t count, const int64_t* skipped,
         int64_t skipped_count, float* values, int64_t* ids, float* most) {
  if (M == 0) return;
  constexpr float MINUS_INFINITY = -__builtin_inff();
  const Head head(lines, scales, N, K, bits, group, scale_bits, x, M);
  const int64_t pieces = ceil_div(N, LOOKED);
  const std::unique_ptr<std::atomic<float>[]> bounds(new std::atomic<float>[static_cast<size_t>(M)]);
  for (int64_t m = 0; m < M; m++) bounds[static_cast<size_t>(m)] = MINUS_INFINITY;
  std::vector<std::vector<Found>> found(static_cast<size_t>(pieces * M));
  std::vector<float> greatest(static_cast<size_t>(pieces * M), MINUS_INFINITY);
  const TopJob job{head,         count,        skipped,        skipped + skipped_count,
                   bounds.get(), found.data(), greatest.data()};
  parallel(pieces, run_top, &job);
  std::vector<Found> all;
  for (int64_t m = 0; m < M; m++) {
    all.clear();
    most[m] = MINUS_INFINITY;
    for (int64_t piece = 0; piece < pieces; piece++) {
      const auto& some = found[static_cast<size_t>(piece * M + m)];
      all.insert(all.end(), some.begin(), some.end());
      const float its = greatest[static_cast<size_t>(piece * M + m)];
      if (std::isnan(its) || its > most[m]) most[m] = its;
      if (std::isnan(its)) break;
    }
    // Where there are NaNs fewer may have been found.
    const int64_t there = clamp(static_cast<int64_t>(all.size()), 0, count);
    const auto end = all.begin() + there;
    if (end != all.end()) std::nth_element(all.begin(), end, all.end());
    std::sort(all.begin(), end);
    for (int64_t i = 0; i < count; i++) {
      values[m * count + i] = i < there ? all[static_cast<size_t>(i)].value : MINUS_INFINITY;
      ids[m * count + i] = i < there ? all[static_cast<size_t>(i)].id : 0;
    }
  }
}

void linear_of(const uint8_t* lines, const void* scales, int64_t N, int64_t K, int bits, int64_t group,
               int scale_bits, const float* x, int64_t M, const int64_t* ids, int64_t count, float* y) {
  if (M == 0 || count == 0) return;
  const Head head(lines, scales, N, K, bits, group, scale_bits, x, M);
  const ChosenJob job{head, ids, y, {count, piece_size(count, head.product.line_count * LINE)}};
  parallel(job.chosen.count(), run_chosen, &job);
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
