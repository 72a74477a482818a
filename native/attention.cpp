// What surrounds the attention kernels of an instruction set: which keys a block holds, and the
// sharing of the work among threads.
//
// Blocks of KEYS keys and splits of SPLIT keys begin at multiples of these, counted from the
// sequence's first token. A row sums each split by itself and then adds the splits in their order;
// so its bits depend on the keys it sees alone: not on the rows beside it, on how much of the
// sequence was computed before, or on threads. A piece of work is one key/value head and up to ROWS
// of its query rows, with all splits, or one where there are few rows ("flash decoding"). In a
// piece each block of keys serves all its rows before the next.
#include <cstring>
#include <memory>
#include <vector>

#include "kernels.h"
#include "room.h"
#include "threads.h"

namespace gemsmith {
namespace {

// Most query rows of a piece: their sums stay in a core's L2 cache.
constexpr int64_t ROWS = 64;
// Fewest, where heads are too few for all threads: kernels load each key once for so many.
constexpr int64_t FEW_ROWS = 4;
// Keys that a row sums before it adds them to the rest.
constexpr int64_t SPLIT = 2 * KEYS;
// From so many pieces on each has all splits.
constexpr int64_t PIECES = 32;
// Fewer multiplications than this are done by the caller before a worker could have woken.
constexpr int64_t ALONE = 1024 * 1024;

int64_t less(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t more(int64_t a, int64_t b) { return a > b ? a : b; }

struct Job {
  const Kernels& kernels;
  const Attention& a;
  int64_t group;    // N / K
  int64_t rows;     // R * group: query rows of a key/value head
  int64_t chunk_rows, chunks;  // of them, at most ROWS each
  int64_t low;      // where the first block begins; below 0 where its first keys are not given
  int64_t splits;   // from the one that the first block lies in
  bool apart;       // whether each piece has one split
  int64_t stride;   // of q16
  const int16_t* q16;
  const int8_t* arranged;  // tiles of each chunk [K][chunks][ceil(chunk_rows / TILE_ROWS)], or null
  int64_t arranged_bytes;  // of a tile
  const float* q_scale;  // [R][N]
  int64_t turning_width;
  const float* turning;  // [R][N][turning_width]: q of the dimensions that turn, or null
  // most and sum of each row [K][rows]; apart, for each split [K][splits][rows] and with
  // acc [K][splits][rows][H].
  float *acc, *most, *sum;

  // Query row i of a key/value head: a token, and one of the heads that share this one.
  int64_t token(int64_t i) const { return i / group; }
  int64_t query(int64_t head, int64_t i) const {
    return token(i) * a.N + head * group + i % group;
  }
  float* output(int64_t head, int64_t i) const { return a.y + query(head, i) * a.H; }
  // The arranged tile that begins with query row i.
  const int8_t* tile(int64_t head, int64_t i) const {
    const int64_t chunk = i / chunk_rows, place = i % chunk_rows / TILE_ROWS;
    const int64_t in_chunk = ceil_div(chunk_rows, TILE_ROWS);
    return arranged + ((head * chunks + chunk) * in_chunk + place) * arranged_bytes;
  }
  // Keys of a split, from `low`'s block on.
  int64_t begin(int64_t split) const {
    const int64_t origin = a.origin + low;
    return more(low, (origin / SPLIT + split) * SPLIT - a.origin);
  }
};

// Keys first .. first + count of a head; those below 0 nobody sees.
void find(const Attention& a, int64_t head, int64_t first, int64_t count, KeyBlock& block) {
  const int64_t k_row = a.H * value_bytes(a.k_format), v_row = a.H * value_bytes(a.v_format);
  const int64_t absent = more(0, -first);
  int64_t found = absent, before = 0;
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
  for (int64_t i = 0; i < absent; i++) {
    block.k[i] = block.k[absent];
    block.v[i] = block.v[absent];
    block.k_scale[i] = block.v_scale[i] = 0.0f;
  }
  for (int64_t i = count; i < KEYS; i++) {
    block.k[i] = block.k[count - 1];
    block.v[i] = block.v[count - 1];
    block.k_scale[i] = block.v_scale[i] = 0.0f;
  }
}

// Sums of the rows of a piece over some keys: acc [rows][H], and most and sum of each.
struct Sums {
  float *acc, *most, *sum;
};

// The tile of rows i0.. of a head at one block; false where none of them sees any of it. sums are
// those of row `base` and on.
bool look(const Job& job, int64_t head, int64_t base, const Sums& sums, int64_t i0, int64_t i1,
          int64_t first, int64_t count, AttentionTile& tile) {
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
    tile.acc[row] = sums.acc + (i - base) * a.H;
  }
  if (job.arranged) tile.arranged = job.tile(head, i0);
  tile.most = sums.most + i0 - base;
  tile.sum = sums.sum + i0 - base;
  return any;
}

// Rows i0..i1 of a head over one split; b0 and b1 bound the keys that any of them sees.
void run_split(const Job& job, int64_t head, int64_t split, int64_t i0, int64_t i1, int64_t b0,
               int64_t b1, const Sums& sums) {
  const Attention& a = job.a;
  for (int64_t i = 0; i < i1 - i0; i++) {
    sums.most[i] = -__builtin_inff();
    sums.sum[i] = 0.0f;
  }
  std::memset(sums.acc, 0, static_cast<size_t>((i1 - i0) * a.H) * sizeof(float));
  // Where the block lies that the first of these keys is in.
  const int64_t from = more(job.begin(split), b0), skipped = (from - job.low) / KEYS * KEYS;
  const int64_t stop = less(job.begin(split + 1), b1);
  KeyBlock block, turned;
  AttentionTile tile;
  std::unique_ptr<float[]> keys;
  if (a.rule) {
    keys.reset(new float[static_cast<size_t>(KEYS * job.turning_width)]());
    for (int64_t s = 0; s < KEYS; s++) turned.k[s] = turned.v[s] = &keys[s * job.turning_width];
  }
  for (int64_t first = job.low + skipped; first < stop; first += KEYS) {
    const int64_t count = less(KEYS, stop - first);
    find(a, head, first, count, block);
    if (a.rule) {
      turned.count = count;
      job.kernels.attention.turn(*a.rule, block, a.v_format, a.H, a.origin + first,
                                 job.turning_width, keys.get());
    }
    tile.ahead = true;
    for (int64_t i = i0; i < i1; i += TILE_ROWS)
      if (look(job, head, i0, sums, i, less(i + TILE_ROWS, i1), first, count, tile)) {
        job.kernels.attention.attend(tile, block, a.rule ? &turned : nullptr);
        tile.ahead = false;
      }
  }
}

void run_piece(const void* data, int64_t piece) {
  const auto& job = *static_cast<const Job*>(data);
  const Attention& a = job.a;
  const int64_t parts = job.apart ? job.splits : 1;
  const int64_t part = piece % parts, rest = piece / parts;
  const int64_t head = rest % a.K, chunk = rest / a.K;
  const int64_t i0 = chunk * job.chunk_rows, i1 = less(i0 + job.chunk_rows, job.rows);
  int64_t low = a.ranges[2 * job.token(i0)], high = 0;
  for (int64_t token = job.token(i0); token <= job.token(i1 - 1); token++) {
    low = less(low, a.ranges[2 * token]);
    high = more(high, a.ranges[2 * token + 1]);
  }
  if (job.apart) {
    const int64_t state = (head * job.splits + part) * job.rows + i0;
    run_split(job, head, part, i0, i1, low, high,
              {job.acc + state * a.H, job.most + state, job.sum + state});
    return;
  }
  thread_local float acc[ROWS * MAX_HEAD];
  float most[ROWS], sum[ROWS];
  const int64_t state = head * job.rows + i0;
  for (int64_t i = i0; i < i1; i++) {
    std::memset(job.output(head, i), 0, static_cast<size_t>(a.H) * sizeof(float));
    job.most[state + i - i0] = -__builtin_inff();
    job.sum[state + i - i0] = 0.0f;
  }
  for (int64_t split = 0; split < job.splits; split++) {
    if (job.begin(split + 1) <= low || job.begin(split) >= high) continue;
    run_split(job, head, split, i0, i1, low, high, {acc, most, sum});
    for (int64_t i = 0; i < i1 - i0; i++)
      job.kernels.attention.fold(acc + i * a.H, most[i], sum[i], a.H, job.output(head, i0 + i),
                                 job.most + state + i, job.sum + state + i);
  }
  for (int64_t i = 0; i < i1 - i0; i++) {
    float* y = job.output(head, i0 + i);
    for (int64_t d = 0; d < a.H; d++) y[d] /= job.sum[state + i];
  }
}

// A piece: a query row of all its heads, of splits computed apart.
void run_combine(const void* data, int64_t piece) {
  const auto& job = *static_cast<const Job*>(data);
  const Attention& a = job.a;
  const int64_t head = piece / job.rows, i = piece % job.rows;
  float *y = job.output(head, i), most = -__builtin_inff(), sum = 0.0f;
  std::memset(y, 0, static_cast<size_t>(a.H) * sizeof(float));
  for (int64_t split = 0; split < job.splits; split++) {
    const int64_t state = (head * job.splits + split) * job.rows + i;
    job.kernels.attention.fold(job.acc + state * a.H, job.most[state], job.sum[state], a.H, y,
                               &most, &sum);
  }
  for (int64_t d = 0; d < a.H; d++) y[d] /= sum;
}

// One sequence's attention, ready to run, and the memory it needs.
struct Prepared {
  Attention a;
  std::unique_ptr<int64_t[]> ranges;
  std::unique_ptr<int16_t[]> q16;
  Room<int8_t> arranged;
  std::unique_ptr<float[]> still, turning, q_scale, state, acc;
  std::unique_ptr<Job> job;
  int64_t pieces = 0, ends = 0, work = 0;
};

// All tiles of q16, as Job::tile finds them.
void arrange(const Job& job, int8_t* out) {
  each_row(job.a.K * job.chunks, job.chunk_rows * job.a.H, [&](int64_t first, int64_t end) {
    AttentionTile tile;
    tile.H = job.a.H;
    for (int64_t n = first; n < end; n++) {
      const int64_t head = n / job.chunks, chunk = n % job.chunks;
      const int64_t i1 = less((chunk + 1) * job.chunk_rows, job.rows);
      for (int64_t i = chunk * job.chunk_rows; i < i1; i += TILE_ROWS) {
        tile.rows = less(TILE_ROWS, i1 - i);
        for (int64_t row = 0; row < tile.rows; row++)
          tile.q16[row] = job.q16 + job.query(head, i + row) * job.stride;
        job.kernels.attention.arrange(tile, out + (job.tile(head, i) - job.arranged));
      }
    }
  });
}

// sequences: how many are attended together.
void prepare(const Attention& given, int64_t sequences, Prepared& made) {
  const auto size = [](int64_t count) { return static_cast<size_t>(count); };
  Attention& a = made.a = given;
  int64_t S = 0;
  for (int64_t n = 0; n < a.span_count; n++) S += a.spans[n].count;
  made.ranges.reset(new int64_t[size(2 * a.R)]);
  for (int64_t i = 0; i < 2 * a.R; i++) made.ranges[size(i)] = less(more(given.ranges[i], 0), S);
  a.ranges = made.ranges.get();
  int64_t low = a.ranges[0], high = 0;
  for (int64_t r = 0; r < a.R; r++) {
    low = less(low, a.ranges[2 * r]);
    high = more(high, a.ranges[2 * r + 1]);
  }
  const int64_t group = a.N / a.K, rows = a.R * group;
  const int64_t sharers = ceil_div(threads(), a.K * sequences);  // threads for a head of each
  const int64_t chunk_rows = less(ROWS, ceil_div(rows, FEW_ROWS * sharers) * FEW_ROWS);
  const int64_t chunks = ceil_div(rows, chunk_rows);
  if (high > low)
    low = (a.origin + low) / KEYS * KEYS - a.origin;
  else
    high = low = 0;
  const int64_t splits =
      high > low ? (a.origin + high - 1) / SPLIT - (a.origin + low) / SPLIT + 1 : 1;
  const bool apart = splits > 1 && a.K * chunks * 2 <= PIECES;
  const int64_t stride = ceil_div(a.H, 32) * 32;

  const Kernels& kernels = gemsmith::kernels();
  // With keys rebuilt from values q meets them in two parts, see KeyRule.
  const int64_t pairs = a.rule ? a.rule->pairs : 0, turning_width = ceil_div(2 * pairs, 16) * 16;
  if (a.rule) {
    made.still.reset(new float[size(a.R * a.N * a.H)]);
    made.turning.reset(new float[size(a.R * a.N * turning_width)]());
    for (int64_t n = 0; n < a.R * a.N; n++) {
      const float* q = a.q + n * a.H;
      float *rest = &made.still[size(n * a.H)], *part = made.turning.get() + n * turning_width;
      for (int64_t d = 0; d < a.H; d++) rest[d] = q[d] * a.rule->norm[d];
      for (int64_t i = 0; i < pairs; i++) {
        part[i] = q[i];
        part[pairs + i] = q[a.H / 2 + i];
        rest[i] = rest[a.H / 2 + i] = 0.0f;
      }
    }
    a.q = made.still.get();
  }
  made.q_scale.reset(new float[size(a.R * a.N)]());
  if (a.k_format == INT8) {
    made.q16.reset(new int16_t[size(a.R * a.N * stride)]);
    each_row(a.R * a.N, a.H, [&](int64_t first, int64_t end) {
      for (int64_t n = first; n < end; n++) {
        int16_t* codes = made.q16.get() + n * stride;
        made.q_scale[size(n)] = kernels.attention.quantize16(a.q + n * a.H, a.H, codes);
        std::memset(codes + a.H, 0, size(stride - a.H) * sizeof(*codes));
      }
    });
  }
  const bool arranges = a.k_format == INT8 && kernels.attention.arrange;
  const int64_t tile_bytes = arranges ? kernels.attention.arranged_bytes(a.H) : 0;
  if (arranges)
    made.arranged = room<int8_t>(a.K * chunks * ceil_div(chunk_rows, TILE_ROWS) * tile_bytes);
  const int64_t parts = apart ? splits : 1, states = a.K * parts * rows;
  made.state.reset(new float[size(2 * states)]);
  if (apart) made.acc.reset(new float[size(states * a.H)]);
  made.job.reset(new Job{kernels, a, group, rows, chunk_rows, chunks, low, splits, apart, stride,
                         made.q16.get(), made.arranged.get(), tile_bytes, made.q_scale.get(),
                         turning_width, made.turning.get(),
                         made.acc.get(), made.state.get(), made.state.get() + states});
  if (arranges) arrange(*made.job, made.arranged.get());
  made.pieces = a.K * chunks * parts;
  made.ends = apart ? a.K * rows : 0;
  made.work = a.K * rows * (high - low) * a.H;
}

struct Batch {
  const Prepared* all;
  int64_t count;
};

void run_any_piece(const void* data, int64_t piece) {
  const auto& batch = *static_cast<const Batch*>(data);
  const Prepared* one = batch.all;
  for (; piece >= one->pieces; one++) piece -= one->pieces;
  run_piece(one->job.get(), piece);
}

void run_any_end(const void* data, int64_t piece) {
  const auto& batch = *static_cast<const Batch*>(data);
  const Prepared* one = batch.all;
  for (; piece >= one->ends; one++) piece -= one->ends;
  run_combine(one->job.get(), piece);
}

}  // namespace

void attention(const Attention* given, int64_t count) {
  std::vector<Prepared> all(static_cast<size_t>(count));
  int64_t used = 0, pieces = 0, ends = 0, work = 0, folds = 0;
  for (int64_t i = 0; i < count; i++) {
    if (given[i].R == 0) continue;
    Prepared& one = all[static_cast<size_t>(used++)];
    prepare(given[i], count, one);
    pieces += one.pieces, ends += one.ends, work += one.work;
    folds += one.ends * one.job->splits * one.a.H;
  }
  const Batch batch{all.data(), used};
  if (work < ALONE)
    for (int64_t i = 0; i < pieces; i++) run_any_piece(&batch, i);
  else
    parallel(pieces, run_any_piece, &batch);
  if (folds < ALONE)
    for (int64_t i = 0; i < ends; i++) run_any_end(&batch, i);
  else
    parallel(ends, run_any_end, &batch);
}

void attention(const Attention& all, const Seen* sequences, int64_t count) {
  std::vector<Attention> asked(static_cast<size_t>(count), all);
  int64_t row = 0, span = 0;
  for (int64_t i = 0; i < count; i++) {
    const Seen& seen = sequences[i];
    Attention& one = asked[static_cast<size_t>(i)];
    one.q += row * all.N * all.H;
    one.R = seen.rows;
    one.spans += span;
    one.span_count = seen.spans;
    one.ranges += 2 * row;
    one.y += row * all.N * all.H;
    one.origin = seen.origin;
    row += seen.rows, span += seen.spans;
  }
  attention(asked.data(), count);
}

}  // namespace gemsmith
