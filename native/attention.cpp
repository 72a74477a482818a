// What surrounds the attention kernels of an instruction set: which keys a block holds, and the
// sharing of the work among threads.
//
// A piece of work is one key/value head, up to ROWS of its query rows, and a split of the keys
// ("flash decoding"). How many splits there are follows from the sizes alone, so that the result
// does not depend on threads. In a piece each block of keys serves all its rows before the next.
#include <cstring>
#include <memory>

#include "kernels.h"
#include "threads.h"

namespace gemsmith {
namespace {

// Query rows of a piece: their sums stay in a core's L2 cache.
constexpr int64_t ROWS = 64;
// Pieces there should be, if there are keys enough; each is at least a block.
constexpr int64_t PIECES = 32;
// Fewer multiplications than this are done by the caller before a worker could have woken.
constexpr int64_t ALONE = 256 * 1024;

int64_t less(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t more(int64_t a, int64_t b) { return a > b ? a : b; }

struct Job {
  const Kernels& kernels;
  const Attention& a;
  int64_t group;    // N / K
  int64_t rows;     // R * group: query rows of a key/value head
  int64_t chunks;   // of ROWS of them
  int64_t low;      // the first key that any row sees
  int64_t blocks;   // from there
  int64_t splits;
  int64_t stride;   // of q16
  const int16_t* q16;
  const float* q_scale;  // [R][N]
  int64_t turning_width;
  const float* turning;  // [R][N][turning_width]: q of the dimensions that turn, or null
  // [K][splits][rows][H], [K][splits][rows] twice; acc is y where there is one split.
  float *acc, *most, *sum;

  // Query row i of a key/value head: a token, and one of the heads that share this one.
  int64_t token(int64_t i) const { return i / group; }
  int64_t query(int64_t head, int64_t i) const {
    return token(i) * a.N + head * group + i % group;
  }
  float* acc_of(int64_t head, int64_t split, int64_t i) const {
    return splits == 1 ? a.y + query(head, i) * a.H
                       : acc + ((head * splits + split) * rows + i) * a.H;
  }
};

int64_t value_bytes(int format) { return format == INT8 ? 1 : format == BFLOAT16 ? 2 : 4; }

// Keys first .. first + count of a head.
void find(const Attention& a, int64_t head, int64_t first, int64_t count, KeyBlock& block) {
  const int64_t k_row = a.H * value_bytes(a.k_format), v_row = a.H * value_bytes(a.v_format);
  int64_t found = 0, before = 0;
  for (int64_t n = 0; n < a.span_count && found < count; n++) {
    const KeySpan& span = a.spans[n];
    for (; found < count && first + found < before + span.count; found++) {
      const int64_t at = (span.first + first + found - before) * a.K + head;
      block.k[found] = static_cast<const char*>(span.k) + at * k_row;
      block.v[found] = static_cast<const char*>(span.v) + at * v_row;
      block.k_scale[found] = span.k_scale ? span.k_scale[at] : 1.0f;
      block.v_scale[found] = span.v_scale ? span.v_scale[at] : 1.0f;
    }
    before += span.count;
  }
  block.count = count;
  for (int64_t i = count; i < KEYS; i++) {
    block.k[i] = block.k[count - 1];
    block.v[i] = block.v[count - 1];
    block.k_scale[i] = block.v_scale[i] = 0.0f;
  }
}

// The tile of rows i0.. of a head at one block; false where none of them sees any of it.
bool look(const Job& job, int64_t head, int64_t split, int64_t i0, int64_t i1, int64_t first,
          int64_t count, AttentionTile& tile) {
  const Attention& a = job.a;
  tile.rows = i1 - i0;
  tile.H = a.H;
  tile.k_format = a.k_format;
  tile.v_format = a.v_format;
  tile.turning_width = job.turning_width;
  bool any = false;
  for (int64_t i = i0; i < i1; i++) {
    const int64_t* range = a.ranges + 2 * job.token(i);
    const int64_t row = i - i0, query = job.query(head, i);
    tile.first[row] = less(more(range[0] - first, 0), count);
    tile.last[row] = less(more(range[1] - first, 0), count);
    any = any || tile.first[row] < tile.last[row];
    tile.q[row] = a.q + query * a.H;
    tile.turning[row] = job.turning + query * job.turning_width;
    tile.q16[row] = job.q16 + query * job.stride;
    tile.q_scale[row] = job.q_scale[query];
    tile.acc[row] = job.acc_of(head, split, i);
  }
  const int64_t state = (head * job.splits + split) * job.rows + i0;
  tile.most = job.most + state;
  tile.sum = job.sum + state;
  return any;
}

void run_piece(const void* data, int64_t piece) {
  const auto& job = *static_cast<const Job*>(data);
  const Attention& a = job.a;
  const int64_t split = piece % job.splits, rest = piece / job.splits;
  const int64_t head = rest % a.K, chunk = rest / a.K;
  const int64_t i0 = chunk * ROWS, i1 = less(i0 + ROWS, job.rows);
  const int64_t state = (head * job.splits + split) * job.rows;
  for (int64_t i = i0; i < i1; i++) {
    job.most[state + i] = -__builtin_inff();
    job.sum[state + i] = 0.0f;
    std::memset(job.acc_of(head, split, i), 0, static_cast<size_t>(a.H) * sizeof(float));
  }
  // Blocks that some row of this chunk sees.
  int64_t low = a.ranges[2 * job.token(i0)], high = 0;
  for (int64_t token = job.token(i0); token <= job.token(i1 - 1); token++) {
    low = less(low, a.ranges[2 * token]);
    high = more(high, a.ranges[2 * token + 1]);
  }
  const int64_t b0 = more(split * job.blocks / job.splits, (low - job.low) / KEYS);
  const int64_t b1 = less((split + 1) * job.blocks / job.splits,
                          ceil_div(more(high - job.low, 0), KEYS));
  KeyBlock block, turned;
  AttentionTile tile;
  std::unique_ptr<float[]> keys;
  if (a.rule) {
    keys.reset(new float[static_cast<size_t>(KEYS * job.turning_width)]());
    for (int64_t s = 0; s < KEYS; s++) turned.k[s] = turned.v[s] = &keys[s * job.turning_width];
  }
  for (int64_t b = b0; b < b1; b++) {
    const int64_t first = job.low + b * KEYS, count = less(KEYS, high - first);
    find(a, head, first, count, block);
    if (a.rule) {
      turned.count = count;
      job.kernels.attention.turn(*a.rule, block, a.v_format, a.H, first, job.turning_width,
                                 keys.get());
    }
    tile.ahead = true;
    for (int64_t i = i0; i < i1; i += TILE_ROWS)
      if (look(job, head, split, i, less(i + TILE_ROWS, i1), first, count, tile)) {
        job.kernels.attention.attend(tile, block, a.rule ? &turned : nullptr);
        tile.ahead = false;
      }
  }
}

// A piece: a query row of all its heads.
void run_combine(const void* data, int64_t piece) {
  const auto& job = *static_cast<const Job*>(data);
  const Attention& a = job.a;
  const int64_t head = piece / job.rows, i = piece % job.rows;
  const int64_t state = head * job.splits * job.rows + i;
  float* y = a.y + job.query(head, i) * a.H;
  if (job.splits == 1) {
    const float sum = job.sum[state];
    for (int64_t d = 0; d < a.H; d++) y[d] /= sum;
    return;
  }
  job.kernels.attention.combine(job.acc + state * a.H, job.most + state, job.sum + state,
                                job.splits, job.rows, job.rows * a.H, a.H, y);
}

}  // namespace

void attention(const Attention& given) {
  if (given.R == 0) return;
  Attention a = given;
  int64_t S = 0;
  for (int64_t n = 0; n < a.span_count; n++) S += a.spans[n].count;
  const std::unique_ptr<int64_t[]> ranges(new int64_t[static_cast<size_t>(2 * a.R)]);
  for (int64_t i = 0; i < 2 * a.R; i++)
    ranges[static_cast<size_t>(i)] = less(more(given.ranges[i], 0), S);
  a.ranges = ranges.get();
  int64_t low = a.ranges[0], high = 0;
  for (int64_t r = 0; r < a.R; r++) {
    low = less(low, a.ranges[2 * r]);
    high = more(high, a.ranges[2 * r + 1]);
  }
  if (a.rule) low -= low % KEYS;  // blocks begin where the rule's do
  const int64_t group = a.N / a.K, rows = a.R * group, chunks = ceil_div(rows, ROWS);
  const int64_t blocks = ceil_div(high - low, KEYS);
  const int64_t splits = less(blocks, more(1, PIECES / (a.K * chunks)));
  const int64_t stride = ceil_div(a.H, 32) * 32;
  const auto size = [](int64_t count) { return static_cast<size_t>(count); };

  const Kernels& kernels = gemsmith::kernels();
  // With keys rebuilt from values q meets them in two parts, see KeyRule.
  std::unique_ptr<float[]> still, turning;
  const int64_t pairs = a.rule ? a.rule->pairs : 0, turning_width = ceil_div(2 * pairs, 16) * 16;
  if (a.rule) {
    still.reset(new float[size(a.R * a.N * a.H)]);
    turning.reset(new float[size(a.R * a.N * turning_width)]());
    for (int64_t n = 0; n < a.R * a.N; n++) {
      const float* q = a.q + n * a.H;
      float *rest = &still[size(n * a.H)], *part = turning.get() + n * turning_width;
      for (int64_t d = 0; d < a.H; d++) rest[d] = q[d] * a.rule->norm[d];
      for (int64_t i = 0; i < pairs; i++) {
        part[i] = q[i];
        part[pairs + i] = q[a.H / 2 + i];
        rest[i] = rest[a.H / 2 + i] = 0.0f;
      }
    }
    a.q = still.get();
  }
  std::unique_ptr<int16_t[]> q16;
  const std::unique_ptr<float[]> q_scale(new float[size(a.R * a.N)]());
  if (a.k_format == INT8) {
    q16.reset(new int16_t[size(a.R * a.N * stride)]());
    for (int64_t n = 0; n < a.R * a.N; n++)
      q_scale[size(n)] =
          kernels.attention.quantize16(a.q + n * a.H, a.H, q16.get() + n * stride);
  }
  const int64_t states = a.K * splits * rows;
  const std::unique_ptr<float[]> state(new float[size(2 * states)]);
  const std::unique_ptr<float[]> acc(splits == 1 ? nullptr : new float[size(states * a.H)]);
  const Job job{kernels,       a,         group,         rows,          chunks,        low,
                blocks,        splits,    stride,        q16.get(),     q_scale.get(), turning_width,
                turning.get(), acc.get(), state.get(),   state.get() + states};
  const int64_t pieces = a.K * chunks * splits, ends = a.K * rows;
  if (a.K * rows * (high - low) * a.H < ALONE) {
    for (int64_t i = 0; i < pieces; i++) run_piece(&job, i);
    for (int64_t i = 0; i < ends; i++) run_combine(&job, i);
    return;
  }
  parallel(pieces, run_piece, &job);
  if (states * a.H < ALONE)
    for (int64_t i = 0; i < ends; i++) run_combine(&job, i);
  else
    parallel(ends, run_combine, &job);
}

}  // namespace gemsmith
