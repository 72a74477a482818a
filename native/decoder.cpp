#include "decoder.h"

#include <cstring>
#include <utility>
#include <vector>

#include "kernels.h"
#include "layer.h"
#include "room.h"

namespace gemsmith {
namespace {

using Floats = Room<float>;

Floats floats(int64_t count) { return room<float>(count); }

// A Sight as layers take it, of all tokens of the pass or of those that ask.
struct View {
  std::vector<Seen> sequences;
  std::vector<std::pair<int64_t, int64_t>> runs;
  std::vector<int64_t> ranges;
  std::vector<float> angles;  // where some tokens do not ask
  const float *cosine, *sine;
  int64_t pairs;

  // window: 0 for all.
  View(const Pass& pass, const Sight& sight, int64_t window, bool asked)
      : cosine(sight.cosine), sine(sight.sine), pairs(sight.pairs) {
    auto run = sight.runs.begin();
    for (size_t i = 0; i < sight.counts.size(); i++, run += sight.counts[i - 1]) {
      const int64_t rows = asked ? pass.parts[i].asks : pass.parts[i].tokens;
      if (!rows) continue;
      sequences.push_back({rows, sight.counts[i], sight.origins[i]});
      int64_t keys = 0;
      for (auto its = run; its != run + sight.counts[i]; ++its) {
        runs.push_back(*its);
        keys += its->second;
      }
      for (int64_t stop = keys - rows + 1; stop <= keys; stop++) {
        ranges.push_back(window && stop > window ? stop - window : 0);
        ranges.push_back(stop);
      }
    }
  }

  // The angles of some of the tokens alone.
  void pick(const std::vector<int64_t>& rows) {
    const auto width = static_cast<size_t>(pairs);
    angles.resize(2 * rows.size() * width);
    float* to = angles.data();
    for (const float* from : {cosine, sine})
      for (const int64_t row : rows) {
        std::memcpy(to, from + row * pairs, width * sizeof(float));
        to += pairs;
      }
    cosine = angles.data();
    sine = cosine + static_cast<int64_t>(rows.size()) * pairs;
  }
};

// The slots of the pass's own tokens: of each sequence its last keys.
std::vector<int64_t> own_slots(const Pass& pass, const Sight& sight) {
  std::vector<int64_t> slots(pass.ids.size());
  auto run = sight.runs.begin();
  int64_t end = 0;
  for (size_t i = 0; i < sight.counts.size(); i++) {
    const auto first = run;
    run += sight.counts[i];
    end += pass.parts[i].tokens;
    int64_t at = end, left = pass.parts[i].tokens;
    for (auto its = run; its != first && left;) {
      --its;
      for (int64_t slot = its->first + its->second; slot > its->first && left; left--)
        slots[static_cast<size_t>(--at)] = --slot;
    }
  }
  return slots;
}

// Per-layer inputs of layers first..stop-1 for n tokens of embeddings h [n][D]: [n][(stop-first)*P].
// rows: where the table has theirs.
Floats per_layer(const Decoder& d, const float* h, const std::vector<const float*>& rows, int64_t first,
                 int64_t stop) {
  const auto n = static_cast<int64_t>(rows.size());
  const int64_t width = (stop - first) * d.P;
  const Weight& w = d.projection;
  Floats context = floats(n * width), made = floats(n * width);
  if (w.bits == 16) {
    const auto* weight = reinterpret_cast<const uint16_t*>(w.lines) + first * d.P * w.K;
    linear_bfloat16(weight, width, w.K, h, 32, n, context.get());
  } else {
    const int64_t block = first * d.P / BLOCK, groups = w.group ? w.K / w.group : 1;
    linear(w.lines + block * ceil_div(w.K, line_inputs(w.bits)) * LINE,
           static_cast<const uint8_t*>(w.scales) + block * scale_bytes(groups, w.scale_bits), width,
           w.K, w.bits, w.group, w.scale_bits, h, n, context.get());
  }
  for (int64_t i = 0; i < n * width; i++) context[i] *= d.projection_scale;
  for (int64_t m = 0; m < n; m++) {
    const float* from = rows[static_cast<size_t>(m)] + first * d.P;
    for (int64_t i = 0; i < width; i++) made[m * width + i] = from[i] * d.identity_scale;
  }
  add_norm(made.get(), context.get(), d.projection_norm, n * (stop - first), d.P, d.eps, d.sum_scale,
           made.get());
  return made;
}

struct Run {
  const Decoder& decoder;
  const std::vector<StoredInt8>& stores;
  const std::vector<int64_t> slots[2];  // full, sliding

  // Layers first..stop-1 over rows x [M][D], in place of what comes out.
  void layers(int64_t first, int64_t stop, const View& full, const View& sliding, const float* x,
              const float* ple, int64_t M, float* y) const {
    std::vector<const Layer*> layers;
    std::vector<Place> places;
    for (int64_t i = first; i < stop; i++) {
      const Stage& stage = decoder.stages[static_cast<size_t>(i)];
      const View& view = stage.sliding ? sliding : full;
      const StoredInt8& kv = stores[static_cast<size_t>(stage.source)];
      Place place;
      if (stage.layer->kv_heads) {
        place.into = kv;
        place.slots = slots[stage.sliding].data();
      }
      place.kv_heads = decoder.stages[static_cast<size_t>(stage.source)].layer->kv_heads;
      place.cosine = view.cosine;
      place.sine = view.sine;
      place.pairs = view.pairs;
      place.ranges = view.ranges.data();
      place.sequences = &view.sequences;
      for (const auto& [at, count] : view.runs)
        place.spans.push_back({kv.k, kv.k_scale, kv.v, kv.v_scale, at, count});
      layers.push_back(stage.layer);
      places.push_back(std::move(place));
    }
    run(layers.data(), places, x, ple, (stop - first) * decoder.P, M, y);
  }
};

}  // namespace

void read(const Decoder& d, const Pass& pass, const std::vector<StoredInt8>& stores, float* y) {
  const auto M = static_cast<int64_t>(pass.ids.size());
  const auto L = static_cast<int64_t>(d.stages.size()), D = d.D;
  std::vector<int64_t> asked;
  int64_t end = 0;
  for (const Part& part : pass.parts) {
    end += part.tokens;
    for (int64_t row = end - part.asks; row < end; row++) asked.push_back(row);
  }
  const auto R = static_cast<int64_t>(asked.size());
  const int64_t middle = R == M ? L : d.shared;

  const Floats h = floats(M * D), x = floats(M * D);
  const Weight& e = d.embedding;
  unpack_rows(e.lines, e.scales, e.K, e.bits, e.group, e.scale_bits, pass.ids.data(), M, h.get());
  for (int64_t i = 0; i < M * D; i++) h[i] *= d.embedding_scale;
  std::vector<const float*> rows;
  for (int64_t m = 0; d.P && m < M; m++)
    rows.push_back(d.table ? d.table + pass.ids[static_cast<size_t>(m)] * L * d.P
                           : pass.rows + m * L * d.P);

  const Run run{d, stores, {own_slots(pass, pass.full), own_slots(pass, pass.sliding)}};
  if (middle) {
    const View full(pass, pass.full, 0, false), sliding(pass, pass.sliding, d.window, false);
    const Floats ple = d.P ? per_layer(d, h.get(), rows, 0, middle) : nullptr;
    run.layers(0, middle, full, sliding, h.get(), ple.get(), M, x.get());
  }
  if (R == 0) return;
  if (R == M) return norm(x.get(), d.norm, R, D, d.eps, y);
  const Floats few = floats(R * D), out = floats(R * D);
  const float* last = few.get();
  const auto pick = [&](const Floats& from) {
    for (int64_t r = 0; r < R; r++)
      std::memcpy(few.get() + r * D, from.get() + asked[static_cast<size_t>(r)] * D,
                  static_cast<size_t>(D) * sizeof(float));
  };
  if (middle < L) {
    View full(pass, pass.full, 0, true), sliding(pass, pass.sliding, d.window, true);
    full.pick(asked);
    sliding.pick(asked);
    pick(h);
    std::vector<const float*> its;
    for (const int64_t row : asked)
      if (d.P) its.push_back(rows[static_cast<size_t>(row)]);
    const Floats ple = d.P ? per_layer(d, few.get(), its, middle, L) : nullptr;
    pick(x);
    run.layers(middle, L, full, sliding, few.get(), ple.get(), R, out.get());
    last = out.get();
  } else {
    pick(x);
  }
  norm(last, d.norm, R, D, d.eps, y);
}

}  // namespace gemsmith
