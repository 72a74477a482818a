// Python's view of tokenizer.h. src/gemsmith/text/compact.py is the only caller; a vocabulary is
// any object that gives its bytes, a mapped file above all.
#include <nanobind/nanobind.h>

#include "tokenizer.h"
#include "without_gil.h"

namespace nb = nanobind;

namespace {

// The bytes of an object, which cannot be closed or resized meanwhile.
class Bytes {
 public:
  explicit Bytes(nb::handle object) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) != 0) nb::raise_python_error();
  }
  ~Bytes() { PyBuffer_Release(&view_); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  const uint8_t* data() const { return static_cast<const uint8_t*>(view_.buf); }
  size_t size() const { return static_cast<size_t>(view_.len); }
  const uint32_t* words() const { return static_cast<const uint32_t*>(view_.buf); }
  uint32_t count() const { return static_cast<uint32_t>(size() / sizeof(uint32_t)); }

 private:
  Py_buffer view_;
};

// A block that has the form; ValueError otherwise.
class Block : public Bytes, public gemsmith::Vocabulary {
 public:
  explicit Block(nb::handle object) : Bytes(object) {
    if (!gemsmith::open_vocabulary(data(), size(), this)) throw nb::value_error("no vocabulary");
  }
};

nb::bytes bytes_of(const uint8_t* data, size_t size) {
  return nb::bytes(reinterpret_cast<const char*>(data), size);
}

// None where it cannot be built.
nb::object build(nb::object bytes, nb::object offsets, nb::object merges, nb::object markers,
                 nb::object added, bool lines, nb::object source) {
  const Bytes text(bytes), at(offsets), merge(merges), marker(markers), add(added), digest(source);
  if (at.count() == 0 || at.words()[at.count() - 1] != text.size() || digest.size() != 32)
    throw nb::value_error("sizes do not agree");
  std::vector<uint8_t> block;
  bool built;
  {
    WithoutGil released;
    built = gemsmith::build_vocabulary(
        {text.data(), at.words(), at.count() - 1, merge.words(), merge.count() / 3, marker.words(),
         marker.count(), add.words(), add.count(), lines, digest.data()}, &block);
  }
  return built ? nb::object(bytes_of(block.data(), block.size())) : nb::none();
}

bool verify(nb::object block, nb::object source) {
  const Bytes bytes(block), digest(source);
  WithoutGil released;
  return digest.size() == 32 &&
         gemsmith::verify_vocabulary(bytes.data(), bytes.size(), digest.data());
}

uint32_t size_of(nb::object block) { return Block(block).tokens; }

nb::list markers(nb::object block) {
  const Block v(block);
  nb::list ids;
  for (uint32_t i = 0; i < v.marker_count; i++) ids.append(gemsmith::marker(v, i));
  return ids;
}

nb::object encode(nb::object block, nb::bytes text) {
  const Block v(block);
  std::vector<uint32_t> ids;
  const uint8_t* const data = reinterpret_cast<const uint8_t*>(text.c_str());
  bool encoded;
  {
    WithoutGil released;
    encoded = gemsmith::encode(v, data, text.size(), &ids);
  }
  if (!encoded) {
    PyErr_NoMemory();
    nb::raise_python_error();
  }
  PyObject* const list = PyList_New(static_cast<Py_ssize_t>(ids.size()));
  if (!list) nb::raise_python_error();
  nb::object owner = nb::steal(list);
  for (size_t i = 0; i < ids.size(); i++) {
    PyObject* const id = PyLong_FromUnsignedLong(ids[i]);
    if (!id) nb::raise_python_error();
    PyList_SetItem(list, static_cast<Py_ssize_t>(i), id);
  }
  return owner;
}

// None where an id lies outside.
nb::object decode(nb::object block, nb::object ids) {
  const Block v(block);
  const Bytes given(ids);
  std::vector<uint8_t> text;
  if (!gemsmith::decode(v, given.words(), given.size() / sizeof(uint32_t), &text))
    return nb::none();
  return bytes_of(text.data(), text.size());
}

nb::object spelling(nb::object block, uint32_t id) {
  const Block v(block);
  size_t size = 0;
  const uint8_t* const text = gemsmith::spelling(v, id, &size);
  return text ? nb::object(bytes_of(text, size)) : nb::none();
}

nb::object find(nb::object block, nb::bytes text) {
  const Block v(block);
  const uint32_t id =
      gemsmith::find_token(v, reinterpret_cast<const uint8_t*>(text.c_str()), text.size());
  return id == gemsmith::NO_TOKEN ? nb::none() : nb::object(nb::int_(id));
}

}  // namespace

void bind_tokenizer(nb::module_& m) {
  m.attr("VOCABULARY_VERSION") = gemsmith::VOCABULARY_VERSION;
  m.def("vocabulary_build", build);
  m.def("vocabulary_verify", verify);
  m.def("vocabulary_size", size_of);
  m.def("vocabulary_markers", markers);
  m.def("vocabulary_encode", encode);
  m.def("vocabulary_decode", decode);
  m.def("vocabulary_spelling", spelling);
  m.def("vocabulary_find", find);
}
