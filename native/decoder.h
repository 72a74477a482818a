// A whole pass of a decoder of low-bit weights: token ids in, normed hidden states out, and the
// greatest logits. src/gemsmith/model/text.py, TextModel.forward, is the definition; names are its.
// Sizes, ids and slots are checked by the caller (src/gemsmith/ops/cpu_decoder.py).
#pragma once
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "layer.h"

namespace gemsmith {

// A layer, and where it stands: whose keys and values it reads (its own number where it owns some),
// and whether it sees a window of tokens alone.
struct Stage {
  const Layer* layer = nullptr;
  int64_t source = 0;
  bool sliding = false;
};

struct Decoder {
  std::vector<Stage> stages;
  int64_t shared = 0;  // from this layer on none owns keys and values: all run at asked rows alone
  int64_t D = 0, P = 0, window = 0;
  float eps = 0;
  Weight embedding, head;
  float embedding_scale = 1;
  const float* norm = nullptr;  // [D]
  // Per-layer inputs, where P > 0. projection [layers * P][D]; bits 16: lines are bfloat16. table
  // [vocabulary][layers * P] of float32; null: each pass is given its tokens' rows.
  Weight projection;
  const float *projection_norm = nullptr, *table = nullptr;
  float projection_scale = 1, identity_scale = 1, sum_scale = 1;
};

// Tokens that one sequence has in a pass, and after how many of them, the last ones, what follows is
// asked.
struct Part {
  int64_t tokens, asks;
};

// What the sequences of a pass see in layers of one kind: of each a number of runs of slots
// (first, count), its keys one after the other, the last of them its own tokens'; and which token of
// the sequence the first key is.
struct Sight {
  std::vector<int64_t> counts, origins;  // a sequence
  std::vector<std::pair<int64_t, int64_t>> runs;
  const float *cosine = nullptr, *sine = nullptr;  // [M][pairs]
  int64_t pairs = 0;
};

struct Pass {
  std::vector<int64_t> ids;  // M of them, of one sequence after the other
  std::vector<Part> parts;
  Sight full, sliding;
  const float* rows = nullptr;  // of the per-layer table [M][layers * P], where the decoder has none
};

// Stores the keys and values of all tokens; y [R][D]: the final norm's output of those that ask.
// stores: by layer, of those that own keys and values.
void read(const Decoder& decoder, const Pass& pass, const std::vector<StoredInt8>& stores, float* y);

}  // namespace gemsmith
