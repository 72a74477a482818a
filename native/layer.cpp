#include "layer.h"

#include <cstring>
#include <initializer_list>
#include <utility>
#include <vector>

#include "kernels.h"
#include "math-inl.h"
#include "room.h"
#include "threads.h"

namespace gemsmith {
namespace {

// Rows that go through the MLP together: enough that reading the weights costs little beside the
// products, few enough that what lies between them stays in cache. The last may be half as many more:
// for a few rows of their own weights would be read once more.
constexpr int64_t ROWS = 256, MOST_ROWS = ROWS + ROWS / 2;

using Floats = Room<float>;

Floats floats(int64_t count) { return room<float>(count); }

// Rows rounded to int8, once for all the weights they are multiplied with.
struct Rounded {
  int64_t M;
  Room<int8_t> x8;
  Floats sx;

  Rounded(int64_t M, int64_t K) : M(M), x8(room<int8_t>(M * K)), sx(floats(M)) {}
  Rounded(const float* x, int64_t M, int64_t K)
      : Rounded(M, K) {
    quantize_rows(x, M, K, x8.get(), sx.get());
  }
  // make(m) puts row m at x, which is rounded at once, while it is in the nearest cache.
  template <class Make>
  Rounded(const float* x, int64_t M, int64_t K, const Make& make) : Rounded(M, K) {
    const Kernels& isa = kernels();
    each_row(M, K, [&](int64_t m0, int64_t m1) {
      for (int64_t m = m0; m < m1; m++) {
        make(m);
        isa.quantize(x, K, m, m + 1, x8.get(), sx.get());
      }
    });
  }
  void times(const Weight& w, float* y) const { times({{&w, y}}); }
  // Those that the layer has, in one job: threads wait for each other once.
  void times(std::initializer_list<std::pair<const Weight*, float*>> weights) const {
    Factor factors[3];
    int64_t count = 0, K = 0;
    for (const auto& [w, y] : weights) {
      if (!w->lines) continue;
      factors[count++] = {w->lines, w->scales, w->N, w->bits, w->group, w->scale_bits, y};
      K = w->K;
    }
    matmul(factors, count, K, x8.get(), sx.get(), M);
  }
};

struct Choice {
  int64_t row;
  float weight;
};

// Puts each token among the choices of its A best experts. scores [E] are overwritten.
void choose(float* scores, int64_t row, const Experts& experts,
            std::vector<std::vector<Choice>>& chosen) {
  const int64_t E = static_cast<int64_t>(chosen.size());
  float most = scores[0], sum = 0;
  for (int64_t e = 1; e < E; e++) most = scores[e] > most ? scores[e] : most;
  for (int64_t e = 0; e < E; e++) sum += scores[e] = exp_of(scores[e] - most);
  std::vector<int64_t> best;
  float total = 0;
  for (int64_t a = 0; a < experts.A; a++) {
    int64_t found = -1;
    for (int64_t e = 0; e < E; e++) {
      bool taken = false;
      for (const int64_t other : best) taken |= other == e;
      if (!taken && (found < 0 || scores[e] > scores[found])) found = e;
    }
    best.push_back(found);
    total += scores[found] / sum;
  }
  for (const int64_t e : best)
    chosen[static_cast<size_t>(e)].push_back({row, scores[e] / sum / total * experts.scale[e]});
}

}  // namespace

void Layer::mix(const float* x, int64_t M, float* y) const {
  const Kernels& isa = kernels();
  const int64_t E = static_cast<int64_t>(experts.gate_up.size()), F = experts.F;
  const Floats normed = floats(M * D), scores = floats(M * E);
  each_row(M, D + E * D, [&](int64_t m0, int64_t m1) {
    isa.floats.norm(x, experts.router_norm, D, eps, m0, m1, normed.get());
    for (int64_t m = m0; m < m1; m++)
      isa.dots(&normed[m * D], experts.router, D, 0, E, &scores[m * E]);
    isa.floats.norm(x, experts.before, D, eps, m0, m1, normed.get());
  });
  std::vector<std::vector<Choice>> chosen(static_cast<size_t>(E));
  for (int64_t m = 0; m < M; m++) choose(&scores[m * E], m, experts, chosen);

  const Rounded rows(normed.get(), M, D);
  std::memset(y, 0, static_cast<size_t>(M * D) * sizeof(float));
  for (size_t e = 0; e < chosen.size(); e++) {
    const std::vector<Choice>& its = chosen[e];
    const int64_t count = static_cast<int64_t>(its.size());
    if (count == 0) continue;
    Rounded some(count, D);
    for (int64_t i = 0; i < count; i++) {
      std::memcpy(&some.x8[i * D], &rows.x8[its[i].row * D], static_cast<size_t>(D));
      some.sx[i] = rows.sx[its[i].row];
    }
    const Floats both = floats(count * 2 * F), hidden = floats(count * F), out = floats(count * D);
    some.times(experts.gate_up[e], both.get());
    const Rounded units(hidden.get(), count, F, [&](int64_t m) {
      isa.floats.geglu(both.get(), 2 * F, both.get() + F, 2 * F, F, m, m + 1, hidden.get());
    });
    units.times(experts.down[e], out.get());
    for (int64_t i = 0; i < count; i++)
      for (int64_t d = 0; d < D; d++)
        y[its[i].row * D + d] += out[i * D + d] * its[i].weight;
  }
}

void Layer::before(const float* x, int64_t M, const float* cosine, const float* sine, int64_t pairs,
                   float* q, float* k, float* v) const {
  const Kernels& isa = kernels();
  const Floats normed = floats(M * D);
  const Rounded rows(normed.get(), M, D, [&](int64_t m) {
    isa.floats.norm(x, input_norm, D, eps, m, m + 1, normed.get());
  });
  rows.times({{&this->q, q}, {&this->k, k}, {&this->v, v}});
  each_row(M, heads * H, [&](int64_t m0, int64_t m1) {
    for (int64_t m = m0; m < m1; m++) {
      isa.floats.norm(q, q_norm, H, eps, m * heads, (m + 1) * heads, q);
      isa.floats.rotate(q, heads, H, pairs, cosine, sine, m, m + 1);
      if (!kv_heads) continue;
      isa.floats.norm(this->v.lines ? v : k, nullptr, H, eps, m * kv_heads, (m + 1) * kv_heads, v);
      isa.floats.norm(k, k_norm, H, eps, m * kv_heads, (m + 1) * kv_heads, k);
      isa.floats.rotate(k, kv_heads, H, pairs, cosine, sine, m, m + 1);
    }
  });
}

void Layer::after(const float* x, const float* o, const float* ple, int64_t ple_stride, int64_t M,
                  float* y) const {
  const Kernels& isa = kernels();
  const int64_t most = M < MOST_ROWS ? M : MOST_ROWS;
  const Floats branch = floats(most * D), normed = floats(most * D);
  const Floats gate_out = floats(most * (F > P ? F : P)), up_out = floats(most * F);
  for (int64_t start = 0, rows = 0; start < M; start += rows) {
    rows = M - start <= MOST_ROWS ? M - start : ROWS;
    const float* in = x + start * D;
    float* out = y + start * D;
    Rounded(o + start * heads * H, rows, heads * H).times(this->o, branch.get());
    const Rounded given(normed.get(), rows, D, [&](int64_t m) {
      isa.floats.add_norm(in, branch.get(), attention_norm, D, eps, 1.0f, m, m + 1, out);
      isa.floats.norm(out, before_mlp_norm, D, eps, m, m + 1, normed.get());
    });
    given.times({{&gate, gate_out.get()}, {&up, up_out.get()}});
    const Rounded units(gate_out.get(), rows, F, [&](int64_t m) {
      isa.floats.geglu(gate_out.get(), F, up_out.get(), F, F, m, m + 1, gate_out.get());
    });
    units.times(down, branch.get());
    if (!experts.gate_up.empty()) {
      mix(out, rows, normed.get());
      each_row(rows, D, [&](int64_t m0, int64_t m1) {
        isa.floats.norm(branch.get(), experts.after_mlp, D, eps, m0, m1, branch.get());
        isa.floats.norm(normed.get(), experts.after, D, eps, m0, m1, normed.get());
        for (int64_t i = m0 * D; i < m1 * D; i++) branch[i] += normed[i];
      });
    }
    if (!P) {
      each_row(rows, D, [&](int64_t m0, int64_t m1) {
        isa.floats.add_norm(out, branch.get(), after_mlp_norm, D, eps, scalar, m0, m1, out);
      });
      continue;
    }
    const Rounded gated(out, rows, D, [&](int64_t m) {
      isa.floats.add_norm(out, branch.get(), after_mlp_norm, D, eps, 1.0f, m, m + 1, out);
    });
    gated.times(ple_gate, gate_out.get());
    const float* ples = ple + start * ple_stride;
    const Rounded inputs(gate_out.get(), rows, P, [&](int64_t m) {
      isa.floats.geglu(gate_out.get(), P, ples, ple_stride, P, m, m + 1, gate_out.get());
    });
    inputs.times(ple_projection, branch.get());
    each_row(rows, D, [&](int64_t m0, int64_t m1) {
      isa.floats.add_norm(out, branch.get(), ple_norm, D, eps, scalar, m0, m1, out);
    });
  }
}

namespace {

// Rows k and v [M][heads][H], each in its slot; those of slots on end together.
void store(const Place& place, const float* k, const float* v, int64_t M, int64_t heads, int64_t H) {
  const StoredInt8& into = place.into;
  const int64_t row = heads * H;
  for (int64_t m = 0, count = 1; m < M; m += count, count = 1) {
    const int64_t slot = place.slots[m];
    while (m + count < M && place.slots[m + count] == slot + count) count++;
    quantize_rows(k + m * row, count * heads, H, into.k + slot * row, into.k_scale + slot * heads);
    quantize_rows(v + m * row, count * heads, H, into.v + slot * row, into.v_scale + slot * heads);
  }
}

void attend(const Layer& layer, const Place& place, const float* q, float* o) {
  Attention all{};
  all.q = q;
  all.N = layer.heads;
  all.K = place.kv_heads;
  all.H = layer.H;
  all.spans = place.spans.data();
  all.k_format = all.v_format = INT8;
  all.ranges = place.ranges;
  all.y = o;
  attention(all, place.sequences->data(), static_cast<int64_t>(place.sequences->size()));
}

}  // namespace

void run(const Layer* const* layers, const std::vector<Place>& places, const float* x,
         const float* ple, int64_t ple_stride, int64_t M, float* y) {
  int64_t q_size = 0, kv_size = 0;
  for (size_t i = 0; i < places.size(); i++) {
    const Layer& layer = *layers[i];
    const int64_t q = layer.heads * layer.H, kv = layer.kv_heads * layer.H;
    q_size = q > q_size ? q : q_size;
    kv_size = kv > kv_size ? kv : kv_size;
  }
  const Floats q = floats(M * q_size), o = floats(M * q_size);
  const Floats k = floats(M * kv_size), v = floats(M * kv_size);
  for (size_t i = 0; i < places.size(); i++) {
    const Layer& layer = *layers[i];
    const Place& place = places[i];
    const int64_t heads = layer.kv_heads;
    layer.before(i ? y : x, M, place.cosine, place.sine, place.pairs, q.get(), k.get(), v.get());
    if (heads) store(place, k.get(), v.get(), M, heads, layer.H);
    attend(layer, place, q.get(), o.get());
    layer.after(i ? y : x, o.get(), ple, ple_stride, M, y);
    if (ple) ple += layer.P;
  }
}

}  // namespace gemsmith
