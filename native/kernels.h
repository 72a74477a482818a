// What the extension computes: products of quantized weights with int8 activations, and attention
// over stored keys and values.
//
// Plain C++ on pointers and sizes: no Python, no torch, no exceptions. Callers check every length
// (src/gemsmith/ops); here sizes are trusted.
//
// Letters, all at least 1 but M, which may be 0: N outputs (rows of the weight), K inputs, M rows of
// activations (tokens), G groups along K that share a scale (1 = one scale per output), b bits,
// f = 8 / b fields in a byte.
//
// Weights lie in lines of 64 bytes, 16 outputs x 4 bytes, so that one vector register holds
// consecutive inputs of 16 outputs. lines is [ceil(N/16)][ceil(K/4f)][64]: in line l of block r,
// byte 4*row + i, bits p*b.. hold input k = l*4f + 4p + i of output 16r + row, as the unsigned code
// u = q + 2^(b-1). Unpacked fields of 16 lines are an AMX B tile; 8-row halves suit AVX2.
// scales is [ceil(N/16)][G][16], float32 or, where that holds them exactly, bfloat16 (scale_bits: 32
// or 16). Outputs and inputs beyond N and K hold the code of 0.
//
// y[m][n] = sx[m] * sum over groups of scale[n][g] * (sum of q*x over the group)
// The inner sum is an exact int32; then a multiplication and an addition per group in ascending
// order and one multiplication by sx, each rounded to float32 and never fused. Every instruction
// set therefore gives the same bits.
//
// Scale steps (scale_bits: 8): scale[n][g] = multiple[n][g] * step[n], |multiple| <= 15. scales is
// [ceil(N/16)] times one line of float32 steps [16] and int8 multiples [G up to a multiple of 4][16].
// y[m][n] = sx[m] * (step[n] * float(sum over groups of multiple[n][g] * (sum of q*x over the group)))
// Both sums are exact int32. Only of 2 and 4 bits, x in -127..127, and groups so small that their sums
// fit 16 bits: multiplied, codes still fit 8 bits, so that many rows are those of a weight of 8 bits
// with one scale a row; few rows scale and add in one instruction where there is one.
#pragma once
#include <cstdint>
#include <cstring>

namespace gemsmith {

constexpr int64_t LINE = 64;   // bytes of a line
constexpr int64_t BLOCK = 16;  // outputs of a line
constexpr int64_t WIDE_ROOM = 4;  // outputs of a bfloat16 weight that `wide` widens together

static inline int64_t line_inputs(int bits) { return 4 * (8 / bits); }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// Bytes of a block's scales.
static inline int64_t scale_bytes(int64_t groups, int scale_bits) {
  return scale_bits == 8 ? LINE * (1 + ceil_div(groups, 4)) : groups * BLOCK * scale_bits / 8;
}
// Of the bits of a bfloat16; exact.
static inline float widened(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}
// The nearest bfloat16, of two the even one; a NaN stays a NaN.
static inline uint16_t narrowed(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof(word));
  if (value != value) return static_cast<uint16_t>(word >> 16 | 0x40);
  return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

// One product, as the kernels of one instruction set see it.
struct Product {
  const uint8_t* lines;
  const void* scales;   // float32, bfloat16 or steps, see scale_bits
  int64_t N;
  int64_t line_count;   // lines of a block
  int64_t group_lines;  // lines of a group; line_count where G = 1
  int64_t groups;       // G
  int bits;
  int scale_bits;
  const int8_t* x;      // [M][stride], zero from K up to stride; or panels, see Gemm
  int64_t stride;
  const int32_t* sums;  // [M][G]: -2^(b-1) * sum of x over the group, where a sum of u*x starts
  const float* sx;      // [M]
  float* y;             // [M][N]

  bool steps() const { return scale_bits == 8; }
  const uint8_t* scales_of(int64_t block) const {
    return static_cast<const uint8_t*>(scales) + block * scale_bytes(groups, scale_bits);
  }
};

// -- attention (attention.cpp) ----------------------------------------------------------------
//
// Letters: R query rows (tokens), N query heads, K key/value heads that N / K query heads share
// each, H values a head (a multiple of 16 up to MAX_HEAD), S keys.
//
// Scores are q . k, the softmax has scale 1. Keys are taken in blocks of KEYS, query heads of one
// key/value head in tiles of TILE_ROWS. With int8 keys q is rounded to 16 bits a head and the dot
// products are exact; with int8 values the softmax weights of a block (each times its key's scale)
// are rounded to 16 bits and the sums of a block are exact. Everything else is float32 in one
// order, so every instruction set and any number of threads give the same bits; and so does any
// division of a sequence into steps, for a row's order follows from where its keys lie in it.
constexpr int64_t KEYS = 128;
constexpr int64_t TILE_ROWS = 8;
constexpr int CODE_MOST = 127 * 256 + 127;  // of 16 bits: 256 times a signed byte plus another
constexpr int64_t MAX_HEAD = 512;

enum Format : int { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };
static inline int64_t value_bytes(int format) {
  return format == INT8 ? 1 : format == BFLOAT16 ? 2 : 4;
}

// Keys first .. first + count of [slots][K][H] stored keys and values; int8 ones with scales
// [slots][K] float32. Pointers are to slot 0.
struct KeySpan {
  const void* k;
  const float* k_scale;
  const void* v;
  const float* v_scale;
  int64_t first, count;
};

// How keys follow from stored values, where no keys are stored (K = V layers): those of position s
// are norm * value, of which pairs (i, i + H/2), i < pairs, are then turned by the angle
// s * frequency[i], rounded to float32 as it is where keys are stored.
//
// One table of all positions would be as large as the values. So an angle is far (of the first
// position of its block of KEYS) + near (of the place in it) + what the three roundings leave, up to
// 3 * s / 2^25, which turns by its series. A block of keys is rebuilt once for all query rows, and
// only the dimensions that turn: norm is multiplied into q for the others.
struct KeyRule {
  const float* norm;       // [H]
  int64_t pairs;           // at most H / 2
  const float* frequency;  // [pairs]
  const float *near_cos, *near_sin;  // [KEYS][pairs]
  const float *far_cos, *far_sin;    // [blocks][pairs]
};

struct Attention {
  const float* q;  // [R][N][H]
  int64_t R, N, K, H;
  const KeySpan* spans;  // one after the other they are keys 0 .. S
  int64_t span_count;
  int k_format, v_format;
  const int64_t* ranges;  // [R][2]: row r sees keys ranges[r][0] .. ranges[r][1], cut to 0 .. S;
                          // one that sees none gets NaN
  float* y;               // [R][N][H]
  int64_t origin = 0;     // which token of its sequence the first key is
  const KeyRule* rule = nullptr;  // null: keys are stored. Else k and v of spans are the same, and key
                                  // s stands at position origin + s
};

// Keys of one key/value head. Pointers and scales go on to KEYS, the last pointers again and
// zeros.
struct KeyBlock {
  int64_t count;
  const void* k[KEYS];
  const void* v[KEYS];
  float k_scale[KEYS], v_scale[KEYS];
};

// Query rows of one key/value head, and what they have seen so far.
struct AttentionTile {
  int64_t rows, H;
  int k_format, v_format;
  bool ahead;                               // first of those that work on this block
  const float* q[TILE_ROWS];                // [H]
  const float* turning[TILE_ROWS];          // [turning_width], of q where keys are rebuilt
  int64_t turning_width;
  const int16_t* q16[TILE_ROWS];            // [H up to a multiple of 32], for int8 keys
  const int8_t* arranged;                   // q16 as `arrange` made it, if there is one
  float q_scale[TILE_ROWS];
  int64_t first[TILE_ROWS], last[TILE_ROWS];  // keys of the block that the row sees
  float* acc[TILE_ROWS];                    // [H]: sum of e^(score - most) * value
  float* most;                              // [rows]: greatest score
  float* sum;                               // [rows]: sum of e^(score - most)
};

// Softmax weights of a block: values, or codes * scale.
struct Weights {
  const float (*values)[KEYS];
  int16_t codes[TILE_ROWS][KEYS];
  float scale[TILE_ROWS];
};

struct AttentionKernels {
  // x rounded to codes * (the result): the largest becomes CODE_MOST. Zeros and 0 below 1e-30;
  // zeros and NaN where x is not finite.
  float (*quantize16)(const float* x, int64_t count, int16_t* codes);
  // turned: what `turn` made of the block's keys, or null.
  void (*attend)(const AttentionTile&, const KeyBlock&, const KeyBlock* turned);
  // The dimensions that turn, of keys first .. first + count rebuilt from the block's values: float32
  // [count][width], all first of pairs before all second. first: a multiple of KEYS.
  void (*turn)(const KeyRule&, const KeyBlock&, int format, int64_t H, int64_t first, int64_t width,
               float* keys);
  // Adds one row's sums over further keys, acc with its most and sum, to those in y.
  void (*fold)(const float* acc, float most, float sum, int64_t H, float* y, float* y_most,
               float* y_sum);
  // The form in which `attend` reads a tile's q16, if it is another: its bytes, a multiple of 64, and
  // what makes it.
  int64_t (*arranged_bytes)(int64_t H) = nullptr;
  void (*arrange)(const AttentionTile&, int8_t* arranged) = nullptr;
};

// A product of many rows, which unpacks weights once for all of them. It reads activations in
// panels: x is [ceil(M/rows)][stride/bytes][rows][bytes], rows beyond M and inputs beyond K are 0,
// and stride is a multiple of bytes. sums, where it needs some, has as many rows as the panels; of
// scale steps they are [M][1], -128 * sum of x: for codes multiplied, offset as those of 8 bits are.
struct Gemm {
  int64_t least;  // from so many rows on it is faster than Kernels::product
  int64_t rows, bytes;  // bytes: 4 or 64
  bool sums;  // whether it multiplies codes without a sign, for which sums make up
  // Bytes that a run needs beside, aligned to 64.
  int64_t (*scratch)(const Product&);
  // Rows m0..m1 of y for blocks b0..b1 of outputs; m0 is a multiple of rows.
  void (*run)(const Product&, int64_t b0, int64_t b1, int64_t m0, int64_t m1, uint8_t* scratch);
};

// What stands between products, of rows of float32 or of bfloat16 (uint16_t); see layer-inl.h.
template <class T>
struct RowKernels {
  void (*norm)(const T* x, const T* weight, int64_t D, float eps, int64_t m0, int64_t m1, T* y);
  void (*add_norm)(const T* x, const T* branch, const T* weight, int64_t D, float eps, float scale,
                   int64_t m0, int64_t m1, T* y);
  void (*geglu)(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, int64_t n,
                int64_t m0, int64_t m1, T* y);
  void (*rotate)(T* x, int64_t heads, int64_t H, int64_t pairs, const float* cosine,
                 const float* sine, int64_t m0, int64_t m1);
};

// The kernels of one instruction set. Each may run on many threads at once, over disjoint outputs.
struct Kernels {
  const char* name;
  bool (*runs_here)();
  // Rows m0..m1 of y for blocks b0..b1 of outputs.
  void (*product)(const Product&, int64_t b0, int64_t b1, int64_t m0, int64_t m1);
  // See quantize_rows below, for rows m0..m1.
  void (*quantize)(const float* x, int64_t K, int64_t m0, int64_t m1, int8_t* x8, float* sx);
  RowKernels<float> floats;
  RowKernels<uint16_t> bfloats;
  void (*dots)(const float* x, const float* w, int64_t D, int64_t n0, int64_t n1, float* y);
  // Columns n0..n1 of y [M][N]: x [M][D] times rows of w [N][D], bfloat16, widened on the way. y is
  // float32 or bfloat16 (y_bits: 32 or 16). room: WIDE_ROOM * D floats to work in.
  void (*wide)(const float* x, const uint16_t* w, int64_t D, int64_t N, int64_t M, int64_t n0,
               int64_t n1, float* room, void* y, int y_bits);
  // Sum of 64-byte lines as 64-bit words: reads memory and does nothing else, for benchmarks.
  uint64_t (*read)(const uint8_t* data, int64_t line0, int64_t line1);
  // Sums of x [count][size] over size, times factor.
  void (*sums)(const int8_t* x, int64_t count, int64_t size, int32_t factor, int32_t* sums);
  AttentionKernels attention;
  const Gemm* gemm = nullptr;  // none: `product` computes any number of rows
};

// isa_*.cpp, those that were compiled
extern const Kernels AMX_EMULATED, GENERIC, AVX2, AVX512VNNI, AMX, NEON;

// dispatch.cpp: the choice among the instruction sets compiled in, made on first use.
const Kernels& kernels();
// Names of those this CPU runs, slowest first; `count` of them.
const char* const* isas(int* count);
// Whether `name` is one of them; from now on it is used. "" means the fastest.
bool force_isa(const char* name);

// lines.cpp
// packed: uint8 [N][ceil(K*b/8)], codes u of consecutive inputs from the low bits up.
void pack_lines(const uint8_t* packed, int64_t N, int64_t K, int bits, uint8_t* lines);
// Floats [count][K] of some rows (outputs) of a weight; group as in matmul.
void unpack_rows(const uint8_t* lines, const void* scales, int64_t K, int bits, int64_t group,
                 int scale_bits, const int64_t* rows, int64_t count, float* out);

// Floats [N][K] of codes packed [N][K*bits/8], as pack_lines takes them, and scales [N][K/group].
void dequantize(const uint8_t* packed, const float* scales, int64_t N, int64_t K, int bits,
                int64_t group, float* out);

// matmul.cpp
// Per row of x [M][K]: sx = max|x| / 127, or 1 where that is 0; x8 = x / sx rounded half to even.
// A row with an infinity or a NaN gets sx = NaN and zeros, so that its products are NaN.
void quantize_rows(const float* x, int64_t M, int64_t K, int8_t* x8, float* sx);
// The product above; scale_bits: 32, 16 for bfloat16, or 8 for steps; group: inputs that share a scale,
// a divisor of K and a multiple of 32, or 0.
// K is at most 65536: sums of 255 * 128 then fit 32 bits.
void matmul(const uint8_t* lines, const void* scales, int64_t N, int64_t K, int bits,
            int64_t group, int scale_bits, const int8_t* x8, const float* sx, int64_t M, float* y);
// Several such products of the same rows, which threads share out together.
struct Factor {
  const uint8_t* lines;
  const void* scales;
  int64_t N;
  int bits;
  int64_t group;
  int scale_bits;
  float* y;
};
void matmul(const Factor* factors, int64_t count, int64_t K, const int8_t* x8, const float* sx,
            int64_t M);
// quantize_rows and matmul: y of float rows x [M][K].
void linear(const uint8_t* lines, const void* scales, int64_t N, int64_t K, int bits,
            int64_t group, int scale_bits, const float* x, int64_t M, float* y);
// y [M][N] of rows x [M][K] and a weight of bfloat16 [N][K]: products and sums float32, lane i
// of 16 over the inputs i, i + 16, ..., then added in pairs. x and y are float32 or both bfloat16
// (row_bits: 32 or 16); then products are exact, and may be fused with the addition.
void linear_bfloat16(const uint16_t* weight, int64_t N, int64_t K, const void* x, int row_bits,
                     int64_t M, void* y);
// Of the outputs that `linear` would give, the `count` greatest of each row: values and ids [M][count],
// greatest first, equal ones lowest id first. Ids in skipped (ascending) are passed over; there are at
// least count others. most [M]: the greatest of all, skipped ones too; NaN if any is, and then no
// other result of the row means anything. All outputs are never in memory.
void top(const uint8_t* lines, const void* scales, int64_t N, int64_t K, int bits, int64_t group,
         int scale_bits, const float* x, int64_t M, int64_t count, const int64_t* skipped,
         int64_t skipped_count, float* values, int64_t* ids, float* most);
// The outputs `ids` alone: y [M][count]. Of the weight the blocks of 16 are read in which they lie;
// neighbours that follow each other are read once.
void linear_of(const uint8_t* lines, const void* scales, int64_t N, int64_t K, int bits, int64_t group,
               int scale_bits, const float* x, int64_t M, const int64_t* ids, int64_t count, float* y);
// Reads `bytes` of memory with all threads; a multiple of 64.
uint64_t read_memory(const uint8_t* data, int64_t bytes);
// A number that any changed, lost or moved bytes change, all but one time in 2^64; no defence
// against malice. The same on every instruction set; bytes: a multiple of 64.
uint64_t checksum(const uint8_t* data, int64_t bytes);

// rows.cpp: RowKernels for all rows 0..M by all threads. T: float, or uint16_t for bfloat16.
// y = x / rms(x) * weight; weight null: none.
template <class T>
void norm(const T* x, const T* weight, int64_t M, int64_t D, float eps, T* y);
// y = (x + branch / rms(branch) * weight) * scale.
template <class T>
void add_norm(const T* x, const T* branch, const T* weight, int64_t M, int64_t D, float eps,
              float scale, T* y);
// y [M][n] = gelu(gate) * up, whose rows lie a stride apart.
template <class T>
void geglu(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, int64_t M, int64_t n,
           T* y);
// y [M][heads][H] = x with the pairs (i, i + H/2), i < pairs, of each head turned by the angles whose
// cosines and sines are [M][pairs].
template <class T>
void rotate(const T* x, const float* cosine, const float* sine, int64_t M, int64_t heads, int64_t H,
            int64_t pairs, T* y);

// attention.cpp
// Of several sequences at once.
void attention(const Attention* given, int64_t count);
// Rows of a sequence, one after the other, the spans that are its keys, and which of its tokens the
// first key is.
struct Seen {
  int64_t rows, spans, origin;
};
// The same, of sequences whose rows q, ranges and y, and whose spans, follow each other in `all`.
void attention(const Attention& all, const Seen* sequences, int64_t count);
inline void attention(const Attention& given) { attention(&given, 1); }

}  // namespace gemsmith
