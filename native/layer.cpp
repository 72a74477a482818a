#include "layer.h"

#include <memory>

#include "kernels.h"
#include "threads.h"

namespace gemsmith {
namespace {

// Rows that go through the MLP together: enough that reading the weights costs little beside the
// products, few enough that what lies between them stays in cache.
constexpr int64_t ROWS = 128;
// Floats of rows that are done by the caller before a worker could have woken.
constexpr int64_t ALONE = 1 << 15;

using Floats = std::unique_ptr<float[]>;

Floats floats(int64_t count) { return Floats(new float[static_cast<size_t>(count)]); }

// body(m0, m1) over 0..M by all threads, rows of `width` floats each.
template <class Body>
void each_row(int64_t M, int64_t width, const Body& body) {
  if (M * width <= ALONE || threads() == 1) return body(0, M);
  struct Job {
    const Body& body;
    int64_t M, size;
  };
  const int64_t size = ceil_div(M, 4 * threads());
  const Job job{body, M, size};
  parallel(
      ceil_div(M, size),
      [](const void* data, int64_t piece) {
        const auto& job = *static_cast<const Job*>(data);
        const int64_t end = (piece + 1) * job.size;
        job.body(piece * job.size, end < job.M ? end : job.M);
      },
      &job);
}

// Rows rounded to int8, once for all the weights they are multiplied with.
struct Rounded {
  int64_t M;
  std::unique_ptr<int8_t[]> x8;
  Floats sx;

  Rounded(const float* x, int64_t M, int64_t K)
      : M(M), x8(new int8_t[static_cast<size_t>(M * K)]), sx(floats(M)) {
    quantize_rows(x, M, K, x8.get(), sx.get());
  }
  void times(const Weight& w, float* y) const {
    matmul(w.lines, w.scales, w.N, w.K, w.bits, w.group, w.scale_bits, x8.get(), sx.get(), M, y);
  }
};

}  // namespace

void Layer::before(const float* x, int64_t M, const float* cosine, const float* sine, int64_t pairs,
                   float* q, float* k, float* v) const {
  const Kernels& isa = kernels();
  const Floats normed = floats(M * D);
  each_row(M, D, [&](int64_t m0, int64_t m1) {
    isa.norm(x, input_norm, D, eps, m0, m1, normed.get());
  });
  const Rounded rows(normed.get(), M, D);
  rows.times(this->q, q);
  if (kv_heads) {
    rows.times(this->k, k);
    if (this->v.lines) rows.times(this->v, v);
  }
  each_row(M, heads * H, [&](int64_t m0, int64_t m1) {
    isa.norm(q, q_norm, H, eps, m0 * heads, m1 * heads, q);
    isa.rotate(q, heads, H, pairs, cosine, sine, m0, m1);
    if (!kv_heads) return;
    isa.norm(this->v.lines ? v : k, nullptr, H, eps, m0 * kv_heads, m1 * kv_heads, v);
    isa.norm(k, k_norm, H, eps, m0 * kv_heads, m1 * kv_heads, k);
    isa.rotate(k, kv_heads, H, pairs, cosine, sine, m0, m1);
  });
}

void Layer::after(const float* x, const float* o, const float* ple, int64_t ple_stride, int64_t M,
                  float* y) const {
  const Kernels& isa = kernels();
  const int64_t most = M < ROWS ? M : ROWS;
  const Floats branch = floats(most * D), normed = floats(most * D);
  const Floats gate_out = floats(most * (F > P ? F : P)), up_out = floats(most * F);
  for (int64_t start = 0; start < M; start += ROWS) {
    const int64_t rows = M - start < ROWS ? M - start : ROWS;
    const float* in = x + start * D;
    float* out = y + start * D;
    Rounded(o + start * heads * H, rows, heads * H).times(this->o, branch.get());
    each_row(rows, D, [&](int64_t m0, int64_t m1) {
      isa.add_norm(in, branch.get(), attention_norm, D, eps, 1.0f, m0, m1, out);
      isa.norm(out, before_mlp_norm, D, eps, m0, m1, normed.get());
    });
    {
      const Rounded input(normed.get(), rows, D);
      input.times(gate, gate_out.get());
      input.times(up, up_out.get());
    }
    each_row(rows, F, [&](int64_t m0, int64_t m1) {
      isa.geglu(gate_out.get(), F, up_out.get(), F, F, m0, m1, gate_out.get());
    });
    Rounded(gate_out.get(), rows, F).times(down, branch.get());
    each_row(rows, D, [&](int64_t m0, int64_t m1) {
      isa.add_norm(out, branch.get(), after_mlp_norm, D, eps, P ? 1.0f : scalar, m0, m1, out);
    });
    if (!P) continue;
    Rounded(out, rows, D).times(ple_gate, gate_out.get());
    each_row(rows, P, [&](int64_t m0, int64_t m1) {
      isa.geglu(gate_out.get(), P, ple + start * ple_stride, ple_stride, P, m0, m1, gate_out.get());
    });
    Rounded(gate_out.get(), rows, P).times(ple_projection, branch.get());
    each_row(rows, D, [&](int64_t m0, int64_t m1) {
      isa.add_norm(out, branch.get(), ple_norm, D, eps, scalar, m0, m1, out);
    });
  }
}

}  // namespace gemsmith
