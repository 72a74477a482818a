// Python's view of kernels.h. Tensors come as addresses: an integer costs a twentieth of what an
// array argument does. src/gemsmith/ops is the only caller of kernels and checks everything;
// no function here holds the GIL while it works.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "decoder.h"
#include "kernels.h"
#include "layer.h"
#include "threads.h"
#include "without_gil.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace nb = nanobind;
using Address = uintptr_t;

void bind_tokenizer(nb::module_& m);  // bindings_tokenizer.cpp

namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void matmul(Address lines, Address scales, int64_t N, int64_t K, int bits, int64_t group,
            int scale_bits, Address x8, Address sx, int64_t M, Address y) {
  gemsmith::matmul(at<const uint8_t>(lines), at<const void>(scales), N, K, bits, group,
                   scale_bits, at<const int8_t>(x8), at<const float>(sx), M, at<float>(y));
}

void linear(Address lines, Address scales, int64_t N, int64_t K, int bits, int64_t group,
            int scale_bits, Address x, int64_t M, Address y) {
  gemsmith::linear(at<const uint8_t>(lines), at<const void>(scales), N, K, bits, group,
                   scale_bits, at<const float>(x), M, at<float>(y));
}

void linear_bfloat16(Address weight, int64_t N, int64_t K, Address x, int row_bits, int64_t M,
                     Address y) {
  gemsmith::linear_bfloat16(at<const uint16_t>(weight), N, K, at<const void>(x), row_bits, M,
                            at<void>(y));
}

void top(Address lines, Address scales, int64_t N, int64_t K, int bits, int64_t group,
         int scale_bits, Address x, int64_t M, int64_t count, Address skipped,
         int64_t skipped_count, Address values, Address ids, Address most) {
  gemsmith::top(at<const uint8_t>(lines), at<const void>(scales), N, K, bits, group, scale_bits,
                at<const float>(x), M, count, at<const int64_t>(skipped), skipped_count,
                at<float>(values), at<int64_t>(ids), at<float>(most));
}

void linear_of(Address lines, Address scales, int64_t N, int64_t K, int bits, int64_t group,
            int scale_bits, Address x, int64_t M, Address ids, int64_t count, Address y) {
  gemsmith::linear_of(at<const uint8_t>(lines), at<const void>(scales), N, K, bits, group, scale_bits,
                   at<const float>(x), M, at<const int64_t>(ids), count, at<float>(y));
}

// What stands between products, for rows of T.
template <class T>
void rows_of(nb::module_& m, const std::string& type) {
  const auto release = nb::call_guard<WithoutGil>();
  m.def(("norm_" + type).c_str(), [](Address x, Address weight, int64_t M, int64_t D, float eps,
                                     Address y) {
    gemsmith::norm(at<const T>(x), at<const T>(weight), M, D, eps, at<T>(y));
  }, release);
  m.def(("add_norm_" + type).c_str(), [](Address x, Address branch, Address weight, int64_t M,
                                         int64_t D, float eps, float scale, Address y) {
    gemsmith::add_norm(at<const T>(x), at<const T>(branch), at<const T>(weight), M, D, eps, scale,
                       at<T>(y));
  }, release);
  m.def(("geglu_" + type).c_str(), [](Address gate, int64_t gate_stride, Address up,
                                      int64_t up_stride, int64_t M, int64_t n, Address y) {
    gemsmith::geglu(at<const T>(gate), gate_stride, at<const T>(up), up_stride, M, n, at<T>(y));
  }, release);
  m.def(("rotate_" + type).c_str(), [](Address x, Address cosine, Address sine, int64_t M,
                                       int64_t heads, int64_t H, int64_t pairs, Address y) {
    gemsmith::rotate(at<const T>(x), at<const float>(cosine), at<const float>(sine), M, heads, H,
                     pairs, at<T>(y));
  }, release);
}

// (lines, scales, outputs, inputs, bits, group, scale_bits), or seven zeros for a weight that the layer lacks.
using WeightFields = std::array<int64_t, 7>;

gemsmith::Weight weight(const WeightFields& f) {
  return {at<const uint8_t>(static_cast<Address>(f[0])), at<const void>(static_cast<Address>(f[1])),
          f[2], f[3], static_cast<int>(f[4]), f[5], static_cast<int>(f[6])};
}

// Orders as in `Layer` of layer.h.
gemsmith::Layer layer(const std::array<int64_t, 6>& sizes, float eps, float scalar,
                      const std::array<WeightFields, 9>& weights, const std::array<Address, 7>& norms) {
  gemsmith::Layer made;
  int64_t* const size[] = {&made.D, &made.heads, &made.kv_heads, &made.H, &made.F, &made.P};
  for (int i = 0; i < 6; i++) *size[i] = sizes[i];
  gemsmith::Weight* const each[] = {&made.q, &made.k, &made.v, &made.o, &made.gate,
                                    &made.up, &made.down, &made.ple_gate, &made.ple_projection};
  for (int i = 0; i < 9; i++) *each[i] = weight(weights[i]);
  const float** const norm[] = {&made.input_norm, &made.q_norm, &made.k_norm, &made.attention_norm,
                                &made.before_mlp_norm, &made.after_mlp_norm, &made.ple_norm};
  for (int i = 0; i < 7; i++) *norm[i] = at<const float>(norms[i]);
  made.eps = eps;
  made.scalar = scalar;
  return made;
}

// arrays: router, router_norm, scale, before, after_mlp, after.
void set_experts(gemsmith::Layer& layer, int64_t A, int64_t F,
                 const std::vector<WeightFields>& gate_up, const std::vector<WeightFields>& down,
                 const std::array<Address, 6>& arrays) {
  gemsmith::Experts& made = layer.experts;
  made.A = A;
  made.F = F;
  for (const WeightFields& each : gate_up) made.gate_up.push_back(weight(each));
  for (const WeightFields& each : down) made.down.push_back(weight(each));
  const float** const all[] = {&made.router, &made.router_norm, &made.scale,
                               &made.before, &made.after_mlp, &made.after};
  for (int i = 0; i < 6; i++) *all[i] = at<const float>(arrays[i]);
}

// What KeyRule has, or zeros where keys are stored.
using Rule = std::array<int64_t, 7>;
using Numbers = std::vector<int64_t>;

gemsmith::KeyRule key_rule(const Rule& rule) {
  const auto floats = [&](size_t i) { return at<const float>(static_cast<Address>(rule[i])); };
  return {floats(0), rule[1], floats(2), floats(3), floats(4), floats(5), floats(6)};
}

// Three numbers a sequence, as Seen has them.
std::vector<gemsmith::Seen> seen(const Numbers& sequences) {
  std::vector<gemsmith::Seen> found;
  for (size_t i = 0; i + 3 <= sequences.size(); i += 3)
    found.push_back({sequences[i], sequences[i + 1], sequences[i + 2]});
  return found;
}

// spans: the number of a storage, the first slot and a count of each; storages: addresses of k,
// k_scale, v and v_scale of each, from storages[first] on.
std::vector<gemsmith::KeySpan> key_spans(const Numbers& spans, const Numbers& storages, size_t first) {
  std::vector<gemsmith::KeySpan> found;
  for (size_t i = 0; i + 3 <= spans.size(); i += 3) {
    const auto address = [&](size_t j) {
      return static_cast<Address>(storages.at(first + 4 * static_cast<size_t>(spans[i]) + j));
    };
    found.push_back({at<const void>(address(0)), at<const float>(address(1)),
                     at<const void>(address(2)), at<const float>(address(3)), spans[i + 1],
                     spans[i + 2]});
  }
  return found;
}

// Each reading: sequences and spans as in `attention`, the address of their ranges. Each place: what
// Place in layer.h has up to its ranges, a reading's number, then storages as in `attention`.
using Reading = std::tuple<Numbers, Numbers, Address>;
void run_layers(const std::vector<const gemsmith::Layer*>& layers,
                const std::vector<Numbers>& places, const std::vector<Reading>& readings, Address x,
                Address ple, int64_t ple_stride, int64_t M, Address y) {
  constexpr size_t FIXED = 10;
  std::vector<std::vector<gemsmith::Seen>> sequences;
  for (const Reading& reading : readings) sequences.push_back(seen(std::get<0>(reading)));
  std::vector<gemsmith::Place> made;
  for (const Numbers& f : places) {
    const auto address = [&](size_t i) { return static_cast<Address>(f.at(i)); };
    const auto number = static_cast<size_t>(f.at(9));
    gemsmith::Place place;
    place.into = {at<int8_t>(address(0)), at<float>(address(1)), at<int8_t>(address(2)),
                  at<float>(address(3))};
    place.slots = at<const int64_t>(address(4));
    place.kv_heads = f[5];
    place.cosine = at<const float>(address(6));
    place.sine = at<const float>(address(7));
    place.pairs = f[8];
    place.ranges = at<const int64_t>(std::get<2>(readings.at(number)));
    place.sequences = &sequences[number];
    place.spans = key_spans(std::get<1>(readings[number]), f, FIXED);
    made.push_back(std::move(place));
  }
  gemsmith::run(layers.data(), made, at<const float>(x), at<const float>(ple), ple_stride, M,
                at<float>(y));
}

// sizes: shared, D, P and window of Decoder in decoder.h; scales: eps and the four others, arrays: the
// norm, the projection's and the table, weights: embedding, head and projection, in its order.
gemsmith::Decoder decoder(const std::vector<const gemsmith::Layer*>& layers, const Numbers& sources,
                          const Numbers& sliding, const std::array<int64_t, 4>& sizes,
                          const std::array<float, 5>& scales, const std::array<Address, 3>& arrays,
                          const std::array<WeightFields, 3>& weights) {
  gemsmith::Decoder made;
  for (size_t i = 0; i < layers.size(); i++)
    made.stages.push_back({layers[i], sources.at(i), sliding.at(i) != 0});
  int64_t* const size[] = {&made.shared, &made.D, &made.P, &made.window};
  for (int i = 0; i < 4; i++) *size[i] = sizes[i];
  float* const scale[] = {&made.eps, &made.embedding_scale, &made.projection_scale,
                          &made.identity_scale, &made.sum_scale};
  for (int i = 0; i < 5; i++) *scale[i] = scales[i];
  const float** const array[] = {&made.norm, &made.projection_norm, &made.table};
  for (int i = 0; i < 3; i++) *array[i] = at<const float>(arrays[i]);
  gemsmith::Weight* const each[] = {&made.embedding, &made.head, &made.projection};
  for (int i = 0; i < 3; i++) *each[i] = weight(weights[i]);
  return made;
}

// Where each layer keeps keys and values, as run_layers has them; zeros where it owns none.
struct Stores {
  std::vector<gemsmith::StoredInt8> of;
};

Stores stores(const std::vector<std::array<Address, 4>>& layers) {
  Stores made;
  for (const auto& f : layers)
    made.of.push_back({at<int8_t>(f[0]), at<float>(f[1]), at<int8_t>(f[2]), at<float>(f[3])});
  return made;
}

// sight: origin, number of runs, and first slot and count of each run, of each sequence. angles:
// addresses of cosines and sines, and their pairs.
gemsmith::Sight sight(const Numbers& sight, const std::array<int64_t, 3>& angles) {
  gemsmith::Sight made;
  for (size_t i = 0; i < sight.size();) {
    made.origins.push_back(sight.at(i++));
    made.counts.push_back(sight.at(i++));
    for (int64_t n = 0; n < made.counts.back(); n++, i += 2)
      made.runs.emplace_back(sight.at(i), sight.at(i + 1));
  }
  made.cosine = at<const float>(static_cast<Address>(angles[0]));
  made.sine = at<const float>(static_cast<Address>(angles[1]));
  made.pairs = angles[2];
  return made;
}

// parts: tokens and asks of each sequence; top: count, address and number of skipped ids, addresses of
// values, ids and most, as `top` has them; count 0: none is looked for.
void pass(const gemsmith::Decoder& decoder, const Stores& stores, Numbers ids, const Numbers& parts,
          const Numbers& full, const Numbers& sliding,
          const std::array<std::array<int64_t, 3>, 2>& angles, Address rows, Address y,
          const std::array<int64_t, 6>& top) {
  gemsmith::Pass made;
  made.ids = std::move(ids);
  int64_t asks = 0;
  for (size_t i = 0; i + 2 <= parts.size(); i += 2) {
    made.parts.push_back({parts[i], parts[i + 1]});
    asks += parts[i + 1];
  }
  made.full = sight(full, angles[0]);
  made.sliding = sight(sliding, angles[1]);
  made.rows = at<const float>(rows);
  gemsmith::read(decoder, made, stores.of, at<float>(y));
  const auto address = [&](int i) { return static_cast<Address>(top[i]); };
  const gemsmith::Weight& w = decoder.head;
  if (top[0])
    gemsmith::top(w.lines, w.scales, w.N, w.K, w.bits, w.group, w.scale_bits, at<const float>(y),
                  asks, top[0], at<const int64_t>(address(1)), top[2], at<float>(address(3)),
                  at<int64_t>(address(4)), at<float>(address(5)));
}

// sequences: as `seen` takes them; spans and storages: as `key_spans` does; q, ranges and y: rows of
// all.
void attention(Address q, int64_t N, int64_t K, int64_t H, const Numbers& storages, int k_format,
               int v_format, const Numbers& sequences, const Numbers& spans, Address ranges,
               Address y, const Rule& rule) {
  const gemsmith::KeyRule rebuilt = key_rule(rule);
  const std::vector<gemsmith::KeySpan> found = key_spans(spans, storages, 0);
  const std::vector<gemsmith::Seen> asked = seen(sequences);
  gemsmith::attention({at<const float>(q), 0, N, K, H, found.data(), 0, k_format, v_format,
                       at<const int64_t>(ranges), at<float>(y), 0, rule[0] ? &rebuilt : nullptr},
                      asked.data(), static_cast<int64_t>(asked.size()));
}

nb::list isas() {
  int count = 0;
  const char* const* names = gemsmith::isas(&count);
  nb::list found;
  for (int i = 0; i < count; i++) found.append(names[i]);
  return found;
}

// Asks the kernel for 2 MiB pages behind the whole pages of a buffer.
bool advise_hugepages([[maybe_unused]] Address data, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  constexpr Address PAGE = 4096;
  const Address first = (data + PAGE - 1) / PAGE * PAGE;
  const Address last = (data + static_cast<Address>(bytes)) / PAGE * PAGE;
  return last > first && madvise(at<void>(first), last - first, MADV_HUGEPAGE) == 0;
#else
  return false;
#endif
}

}  // namespace

NB_MODULE(_native, m) {
  const auto release = nb::call_guard<WithoutGil>();
  m.def("isa", [] { return gemsmith::kernels().name; });
  m.def("isas", isas);
  m.def("force_isa", [](const std::string& name) { return gemsmith::force_isa(name.c_str()); });
  m.def("set_threads", gemsmith::set_threads);
  m.def("threads", gemsmith::threads);
  m.def("pack_lines", [](Address packed, int64_t N, int64_t K, int bits, Address lines) {
    gemsmith::pack_lines(at<const uint8_t>(packed), N, K, bits, at<uint8_t>(lines));
  }, release);
  m.def("unpack_rows", [](Address lines, Address scales, int64_t K, int bits, int64_t group,
                          int scale_bits, Address rows, int64_t count, Address out) {
    gemsmith::unpack_rows(at<const uint8_t>(lines), at<const void>(scales), K, bits, group,
                          scale_bits, at<const int64_t>(rows), count, at<float>(out));
  }, release);
  m.def("dequantize", [](Address packed, Address scales, int64_t N, int64_t K, int bits,
                         int64_t group, Address out) {
    gemsmith::dequantize(at<const uint8_t>(packed), at<const float>(scales), N, K, bits, group,
                         at<float>(out));
  }, release);
  m.def("quantize_rows", [](Address x, int64_t M, int64_t K, Address x8, Address sx) {
    gemsmith::quantize_rows(at<const float>(x), M, K, at<int8_t>(x8), at<float>(sx));
  }, release);
  m.def("matmul", matmul, release);
  m.def("linear", linear, release);
  m.def("linear_bfloat16", linear_bfloat16, release);
  m.def("top", top, release);
  m.def("linear_of", linear_of, release);
  nb::class_<gemsmith::Layer>(m, "Layer")
      .def("before", [](const gemsmith::Layer& self, Address x, int64_t M, Address cosine,
                        Address sine, int64_t pairs, Address q, Address k, Address v) {
        self.before(at<const float>(x), M, at<const float>(cosine), at<const float>(sine), pairs,
                    at<float>(q), at<float>(k), at<float>(v));
      }, release)
      .def("after", [](const gemsmith::Layer& self, Address x, Address o, Address ple,
                       int64_t ple_stride, int64_t M, Address y) {
        self.after(at<const float>(x), at<const float>(o), at<const float>(ple), ple_stride, M,
                   at<float>(y));
      }, release);
  m.def("layer", layer);
  m.def("set_experts", set_experts);
  // Turned from Python's lists into C++ before the GIL is released.
  m.def("run_layers", run_layers, release);
  nb::class_<Stores>(m, "Stores");
  m.def("stores", stores);
  nb::class_<gemsmith::Decoder>(m, "Decoder").def("read", pass, release);
  m.def("decoder", decoder);
  rows_of<float>(m, "float32");
  rows_of<uint16_t>(m, "bfloat16");
  m.def("attention", attention, release);
  m.def("read_memory", [](Address data, int64_t bytes) {
    return gemsmith::read_memory(at<const uint8_t>(data), bytes);
  }, release);
  m.def("checksum", [](Address data, int64_t bytes) {
    return gemsmith::checksum(at<const uint8_t>(data), bytes);
  }, release);
  m.def("advise_hugepages", advise_hugepages, release);
  bind_tokenizer(m);
}
