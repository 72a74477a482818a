// A decoder layer of low-bit weights, for M rows of float32 hidden states: before attention, after
// it, and several layers on end with their attention. src/gemsmith/model/text.py, DecoderLayer, is
// the definition; names are its. Sizes are checked by the caller (src/gemsmith/ops/cpu_layers.py).
#pragma once
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace gemsmith {

// As matmul in kernels.h takes it; lines null: the layer has no such weight.
struct Weight {
  const uint8_t* lines = nullptr;
  const void* scales = nullptr;
  int64_t N = 0, K = 0;
  int bits = 0;
  int64_t group = 0;
  int scale_bits = 32;
};

// Experts beside the MLP: each token runs through the A of E that the router likes best.
struct Experts {
  int64_t A = 0, F = 0;               // F: width of an expert
  std::vector<Weight> gate_up, down;  // of each expert; gate rows before up rows
  const float* router = nullptr;      // [E][D]
  const float* router_norm = nullptr; // [D], what the router's input is multiplied with
  const float* scale = nullptr;       // [E]: of what comes out of each
  // Norms [D]: of the experts' input, of the MLP's output, of theirs.
  const float *before = nullptr, *after_mlp = nullptr, *after = nullptr;
};

struct Layer {
  int64_t D = 0;         // hidden size
  int64_t heads = 0;     // of queries
  int64_t kv_heads = 0;  // 0: reads another layer's keys and values
  int64_t H = 0;         // head size
  int64_t F = 0;         // width of the MLP
  int64_t P = 0;         // per-layer inputs; 0: none
  float eps = 0, scalar = 1;
  Weight q, k, v, o, gate, up, down, ple_gate, ple_projection;  // v null where K = V
  // Weights of norms, float32. k_norm null without keys, ple_norm without per-layer inputs.
  const float *input_norm = nullptr, *q_norm = nullptr, *k_norm = nullptr, *attention_norm = nullptr,
              *before_mlp_norm = nullptr, *after_mlp_norm = nullptr, *ple_norm = nullptr;

  Experts experts;  // none: gate_up is empty

  // x [M][D] -> q [M][heads][H], k and v [M][kv_heads][H]: projected, normed, turned by the angles
  // whose cosines and sines are [M][pairs].
  void before(const float* x, int64_t M, const float* cosine, const float* sine, int64_t pairs,
              float* q, float* k, float* v) const;
  // x and attention's output o [M][heads * H] -> the layer's output y [M][D]. ple: [M][P], its rows
  // ple_stride apart.
  void after(const float* x, const float* o, const float* ple, int64_t ple_stride, int64_t M,
             float* y) const;

 private:
  // y [M][D] = the weighted sum of what the chosen experts make of x [M][D].
  void mix(const float* x, int64_t M, float* y) const;
};

// Keys and values as int8: [slots][K][H], scales [slots][K] float32.
struct StoredInt8 {
  int8_t* k = nullptr;
  float* k_scale = nullptr;
  int8_t* v = nullptr;
  float* v_scale = nullptr;
};

// What a layer does with keys and values: it stores those of its M rows, if it owns any, each in its
// slot, and attends to what each sequence sees; see Attention in kernels.h.
struct Place {
  StoredInt8 into;
  const int64_t* slots = nullptr;  // [M]
  int64_t kv_heads = 0;            // of those that are read
  const float *cosine = nullptr, *sine = nullptr;  // see Layer::before
  int64_t pairs = 0;
  const int64_t* ranges = nullptr;  // [M][2]
  const std::vector<Seen>* sequences = nullptr;
  std::vector<KeySpan> spans;  // of all sequences
};

// Layers one after the other, x [M][D] -> y [M][D]; a place for each. ple: [M][layers][P], rows
// ple_stride apart.
void run(const Layer* const* layers, const std::vector<Place>& places, const float* x,
         const float* ple, int64_t ple_stride, int64_t M, float* y);

}  // namespace gemsmith
