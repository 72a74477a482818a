// The tokenizer against byte-pair encoding written down as its definition, over vocabularies and
// texts made at random; then blocks cut short, altered and made up, which may give any ids but
// touch nothing outside. For sanitizers: blocks and texts have exactly the bytes that are promised.
// Ends with 1 at the first difference.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "tokenizer.h"

using namespace gemsmith;

namespace {

using Ids = std::vector<uint32_t>;

std::mt19937 random_bits(0);
size_t below(size_t n) { return random_bits() % n; }

const std::string SPACE = "\xE2\x96\x81";
// A few characters, so that pieces meet again; the last are in no vocabulary.
const std::vector<std::string> LETTERS = {"a", "b", "c", ">", "\n", SPACE, "\xC3\xA9", "\xE4\xB8\xAD",
                                          "\xF0\x9F\x98\x80", "<", "0", "x", "4", "z", "\xE2\x96\x82"};
constexpr size_t KNOWN = 13;

struct Model {
  std::vector<std::string> tokens;
  std::map<std::string, uint32_t> ids;
  std::map<std::pair<uint32_t, uint32_t>, std::pair<uint32_t, uint32_t>> merges;  // rank, merged
  std::vector<uint32_t> merge_list, markers, added;
  bool lines = false, bytes_merge = false;

  uint32_t id(const std::string& token) {
    const auto [found, fresh] = ids.emplace(token, static_cast<uint32_t>(tokens.size()));
    if (fresh) tokens.push_back(token);
    return found->second;
  }
};

// kind 0: merges never join a U+2581 to what is before it; 1: they may; 2: byte tokens merge too;
// 3: merges of four letters alone, so that they get in each other's way.
Model random_model(int kind) {
  Model m;
  m.markers = {m.id("<m>"), m.id("</m>")};
  char name[8];
  for (int byte = 0; byte < 256; byte++) {
    std::snprintf(name, sizeof name, "<0x%02X>", byte);
    m.id(name);
  }
  std::vector<std::string> parts(LETTERS.begin(), LETTERS.begin() + KNOWN);
  for (const std::string& letter : parts) m.id(letter);
  if (kind == 3) parts.resize(4);
  m.bytes_merge = kind == 2;
  if (kind == 2) parts.insert(parts.end(), {"<0xE2>", "<0x82>", "<0x96>"});
  for (int i = 0; i < 150; i++) {
    const std::string left = parts[below(parts.size())], right = parts[below(parts.size())];
    const bool begins = right.compare(0, 3, SPACE) == 0;
    if (kind == 0 && begins && left.compare(left.size() - std::min<size_t>(3, left.size()), 3, SPACE))
      continue;
    if (left.size() + right.size() > 40) continue;
    const uint32_t l = m.id(left), r = m.id(right), merged = m.id(left + right);
    const uint32_t rank = static_cast<uint32_t>(m.merge_list.size() / 3);
    if (!m.merges.emplace(std::make_pair(l, r), std::make_pair(rank, merged)).second) continue;
    m.merge_list.insert(m.merge_list.end(), {l, r, merged});
    parts.push_back(left + right);
  }
  m.lines = below(2);
  if (below(2))
    for (const char* token : {"<x>", "<x", "aa", "\n\n", "\n\n\n", "<x>a"}) m.added.push_back(m.id(token));
  return m;
}

std::unique_ptr<uint8_t[]> exact(const void* data, size_t bytes) {
  std::unique_ptr<uint8_t[]> copy(new uint8_t[bytes]);
  if (bytes) std::memcpy(copy.get(), data, bytes);
  return copy;
}

struct Block {
  std::unique_ptr<uint8_t[]> data;
  size_t bytes;
};

const uint8_t SOURCE[32] = {7};

Block build(const Model& m) {
  std::string bytes;
  std::vector<uint32_t> offsets = {0};
  for (const std::string& token : m.tokens) {
    bytes += token;
    offsets.push_back(static_cast<uint32_t>(bytes.size()));
  }
  std::vector<uint8_t> block;
  const VocabularyParts parts = {
      reinterpret_cast<const uint8_t*>(bytes.data()), offsets.data(), uint32_t(m.tokens.size()),
      m.merge_list.data(), uint32_t(m.merge_list.size() / 3), m.markers.data(),
      uint32_t(m.markers.size()), m.added.data(), uint32_t(m.added.size()), m.lines, SOURCE};
  if (!build_vocabulary(parts, &block)) {
    std::printf("a vocabulary could not be built\n");
    std::exit(1);
  }
  return {exact(block.data(), block.size()), block.size()};
}

size_t character(const std::string& text, size_t i) {
  const uint8_t c = static_cast<uint8_t>(text[i]);
  return c < 0x80 ? 1 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : 4;
}

// Byte-pair encoding of one word, as it is defined.
void slow_word(const Model& m, const std::string& word, Ids* out) {
  Ids ids;
  for (size_t i = 0; i < word.size();) {
    const size_t length = character(word, i);
    const auto found = m.ids.find(word.substr(i, length));
    if (found != m.ids.end()) ids.push_back(found->second);
    else
      for (size_t k = i; k < i + length; k++) ids.push_back(2 + static_cast<uint8_t>(word[k]));
    i += length;
  }
  for (;;) {
    std::pair<uint32_t, uint32_t> best = {~0u, 0};
    size_t where = 0;
    for (size_t i = 0; i + 1 < ids.size(); i++) {
      const auto found = m.merges.find({ids[i], ids[i + 1]});
      if (found != m.merges.end() && found->second.first < best.first) {
        best = found->second;
        where = i;
      }
    }
    if (best.first == ~0u) break;
    ids[where] = best.second;
    ids.erase(ids.begin() + static_cast<ptrdiff_t>(where) + 1);
  }
  out->insert(out->end(), ids.begin(), ids.end());
}

void slow_piece(const Model& m, const std::string& text, Ids* out) {
  std::string spelled;
  for (const char c : text) spelled += c == ' ' ? SPACE : std::string(1, c);
  for (size_t from = 0, to; from < spelled.size(); from = to) {
    for (to = from + 1; to < spelled.size(); to++)
      if (m.lines && (spelled[to] == '\n') != (spelled[from] == '\n')) break;
    slow_word(m, spelled.substr(from, to - from), out);
  }
}

Ids slow(const Model& m, const std::string& text) {
  Ids out;
  size_t from = 0;
  for (size_t i = 0; i < text.size();) {
    std::string longest;
    for (const uint32_t id : m.added) {
      const std::string& token = m.tokens[id];
      if (token.size() > longest.size() && text.compare(i, token.size(), token) == 0) longest = token;
    }
    if (longest.empty()) {
      i++;
      continue;
    }
    slow_piece(m, text.substr(from, i - from), &out);
    out.push_back(m.ids.at(longest));
    from = i += longest.size();
  }
  slow_piece(m, text.substr(from), &out);
  return out;
}

std::string random_text(size_t letters) {
  static const std::vector<std::string> runs = {" ", "\n", "aa", "<x>", "<x", "<0x41>", "<m>", "ab"};
  std::string text;
  while (letters--) {
    if (below(8)) text += LETTERS[below(LETTERS.size())];
    else
      for (size_t n = 1 + below(6), k = below(runs.size()); n > 0; n--) text += runs[k];
  }
  return text;
}

Ids fast(const Vocabulary& v, const std::string& text) {
  const auto copy = exact(text.data(), text.size());
  Ids ids;
  if (!encode(v, copy.get(), text.size(), &ids)) std::exit(1);
  return ids;
}

std::string decoded(const Vocabulary& v, const Ids& ids) {
  std::vector<uint8_t> text;
  if (!decode(v, ids.data(), ids.size(), &text)) return "?";
  return std::string(text.begin(), text.end());
}

void fail(const char* what, const std::string& text) {
  std::printf("%s: %s\n", what, text.c_str());
  std::exit(1);
}

void same(const Model& m, const Vocabulary& v, const std::string& text) {
  const Ids ids = fast(v, text);
  if (ids != slow(m, text)) fail("other ids than defined", text);
  std::string back = text;
  for (size_t at; (at = back.find(SPACE)) != std::string::npos;) back.replace(at, 3, " ");
  // A token merged from byte tokens is their spelling, not their bytes.
  if (!m.bytes_merge && decoded(v, ids) != back) fail("does not come back", text);
}

// Whatever the block says, nothing outside of it is read. Text may be no UTF-8 either.
void use(const uint8_t* block, size_t bytes) {
  Vocabulary v;
  if (!open_vocabulary(block, bytes, &v)) return;
  std::string text = random_text(12);
  if (!text.empty()) text[below(text.size())] = static_cast<char>(random_bits());
  Ids ids = fast(v, text + std::string(60, 'a') + text.substr(0, below(text.size() + 1)));
  ids.push_back(random_bits());
  decoded(v, ids);
  for (uint32_t i = 0; i < 4; i++) {
    size_t length = 0;
    spelling(v, static_cast<uint32_t>(below(v.tokens + 2)), &length);
    marker(v, i);
  }
  find_token(v, reinterpret_cast<const uint8_t*>("ab"), 2);
}

void damage(const Block& block) {
  for (size_t bytes = 0; bytes < block.bytes; bytes += 1 + bytes / 8) {
    const auto copy = exact(block.data.get(), bytes);
    use(copy.get(), bytes);
    if (verify_vocabulary(copy.get(), bytes, SOURCE)) fail("verified", "a block cut short");
  }
  const auto copy = exact(block.data.get(), block.bytes);
  for (int i = 0; i < 2000; i++) {
    // Half of them in the header, some at the very end.
    const size_t at = i % 2 ? below(block.bytes) : i % 20 ? below(1800) : block.bytes - 1 - below(32);
    const size_t many = i % 3 ? 1 : std::min<size_t>(4, block.bytes - at);
    uint8_t before[4];
    std::memcpy(before, copy.get() + at, many);
    for (size_t k = 0; k < many; k++) copy[at + k] ^= static_cast<uint8_t>(1 + below(255));
    if (verify_vocabulary(copy.get(), block.bytes, SOURCE)) fail("verified", "an altered block");
    use(copy.get(), block.bytes);
    std::memcpy(copy.get() + at, before, many);
  }
  if (!verify_vocabulary(copy.get(), block.bytes, SOURCE)) fail("not verified", "a good block");
  const uint8_t other[32] = {8};
  if (verify_vocabulary(copy.get(), block.bytes, other)) fail("verified", "another source");
  // All tables full of noise behind a good header, then of one value.
  for (int i = 0; i < 40; i++) {
    for (size_t at = HEADER_BYTES; at < block.bytes; at++)
      copy[at] = static_cast<uint8_t>(i < 20 ? random_bits() % (i + 1) : i * 7);
    use(copy.get(), block.bytes);
  }
}

}  // namespace

int main() {
  for (int i = 0; i < 60; i++) {
    const Model m = random_model(i % 4);
    const Block block = build(m);
    Vocabulary v;
    if (!verify_vocabulary(block.data.get(), block.bytes, SOURCE) ||
        !open_vocabulary(block.data.get(), block.bytes, &v))
      fail("does not open", "a vocabulary just built");
    for (uint32_t id = 0; id < m.tokens.size(); id++) {
      const std::string& token = m.tokens[id];
      size_t length = 0;
      const uint8_t* spelled = spelling(v, id, &length);
      if (std::string(spelled, spelled + length) != token ||
          find_token(v, reinterpret_cast<const uint8_t*>(token.data()), token.size()) != id)
        fail("lost", token);
      same(m, v, token);
    }
    for (size_t letters : {0, 1, 2, 3, 5, 8, 13, 31, 32, 33, 60, 150})
      for (int k = 0; k < 12; k++) same(m, v, random_text(letters));
    for (int k = 0; k < 40; k++) {  // long words, where merges that no longer apply are met
      std::string word;
      for (size_t n = 33 + below(80); n > 0; n--) word += "abc>"[below(4)];
      same(m, v, word);
    }
    for (const char* letter : {"a", " ", "\n", "<x", "\xF0\x9F\x98\x80"}) {
      std::string run;
      for (int k = 0; k < 200; k++) run += letter;
      same(m, v, run);
    }
    if (i < 6) damage(block);
  }
  std::printf("60 vocabularies as they should be\n");

  const Model m = random_model(1);
  const Block block = build(m);
  Vocabulary v;
  open_vocabulary(block.data.get(), block.bytes, &v);
  const std::string text = random_text(400);
  const Ids expected = slow(m, text);
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; i++)
    threads.emplace_back([&] {
      for (int k = 0; k < 200; k++)
        if (fast(v, text) != expected) fail("differs among threads", text);
    });
  for (std::thread& thread : threads) thread.join();
  std::printf("3 threads: as they should be\n");
  return 0;
}
