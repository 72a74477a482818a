#include "tokenizer.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <new>

namespace gemsmith {
namespace {

// Header: magic, version, byte order, and then at these offsets.
constexpr char MAGIC[8] = {'G', 'E', 'M', 'V', 'O', 'C', 'A', 'B'};
constexpr uint32_t ORDER = 0x01020304;
constexpr size_t AT_VERSION = 8, AT_ORDER = 12, AT_SIZE = 16, AT_CHECKSUM = 24, AT_SOURCE = 32,
                 AT_TOKENS = 64, AT_MERGE_SLOTS = 68, AT_PIECE_SLOTS = 72, AT_MARKERS = 76,
                 AT_BYTES = 80, AT_LONGEST = 84, AT_FLAGS = 88,
                 AT_JOINS = 96,     // [8]: bytes after which a U+2581 may belong to the same word
                 AT_STARTS = 128,   // [8]: bytes that an added token begins with
                 AT_LENGTHS = 160,  // [8]: lengths of added tokens
                 AT_ASCII = 192,    // [128]: ids of one-byte tokens
                 AT_FALLBACK = AT_ASCII + 4 * 128;  // [256]: ids of byte tokens
static_assert(AT_FALLBACK + 4 * 256 <= HEADER_BYTES, "the header has to hold its tables");

constexpr uint32_t LINES = 1, HAS_ADDED = 2;                // flags of a vocabulary
constexpr uint32_t WHOLE = 1u << 31, ADDED = 1u << 30;      // of a piece: a word that ends as one
constexpr uint32_t ID = ADDED - 1;                          // token; a token cut out first
constexpr uint32_t MOST_TOKENS = 1u << 24, MOST_SLOTS = 1u << 27;
constexpr uint32_t MOST_PROBES = 1024;  // longer chains are refused when a table is filled
constexpr uint32_t NO_RANK = 0xFFFFFFFFu;
constexpr size_t SHORT = 32;  // symbols of a word up to which a scan beats a heap
constexpr uint8_t SPACE[3] = {0xE2, 0x96, 0x81};

uint32_t load(const uint8_t* at) {
  uint32_t value;
  std::memcpy(&value, at, 4);
  return value;
}

uint64_t load64(const uint8_t* at) {
  uint64_t value;
  std::memcpy(&value, at, 8);
  return value;
}

void store(uint8_t* at, uint32_t value) { std::memcpy(at, &value, 4); }
void store64(uint8_t* at, uint64_t value) { std::memcpy(at, &value, 8); }

bool bit(const uint8_t* words, uint8_t i) { return words[i / 8] >> (i % 8) & 1; }
void set_bit(uint8_t* words, uint8_t i) { words[i / 8] |= static_cast<uint8_t>(1u << (i % 8)); }

uint64_t mixed(uint64_t h) {
  h *= 0x9E3779B97F4A7C15u;
  return h ^ h >> 32;
}

uint64_t hash_of(const uint8_t* text, size_t bytes) {
  uint64_t h = bytes;
  for (; bytes >= 8; bytes -= 8, text += 8) h = mixed(h ^ load64(text));
  uint64_t tail = 0;
  for (size_t i = 0; i < bytes; i++) tail |= static_cast<uint64_t>(text[i]) << 8 * i;
  return mixed(mixed(h ^ tail));
}

uint64_t hash_of(uint32_t left, uint32_t right) {
  return mixed(static_cast<uint64_t>(left) << 32 | right);
}

// Four chains, so that the processor multiplies one while it waits for another. Each step can be
// undone, so a change of one word always changes the sum.
uint64_t checksum(const uint8_t* data, size_t bytes) {
  uint64_t h[4] = {1, 2, 3, bytes};
  size_t i = 0;
  for (; i + 32 <= bytes; i += 32)
    for (int k = 0; k < 4; k++) h[k] = mixed(h[k] ^ load64(data + i + 8 * k));
  for (; i < bytes; i++) h[0] = mixed(h[0] ^ data[i]);
  return mixed(mixed(mixed(h[0] ^ mixed(h[1])) ^ mixed(h[2])) ^ mixed(h[3]));
}

// The byte that a spelling such as <0x0A> stands for, or -1.
int byte_of(const uint8_t* spelling, size_t bytes, bool lower_case) {
  if (bytes != 6 || std::memcmp(spelling, "<0x", 3) != 0 || spelling[5] != '>') return -1;
  int value = 0;
  for (int i = 3; i < 5; i++) {
    const uint8_t c = spelling[i];
    if (c >= '0' && c <= '9') value = value * 16 + c - '0';
    else if (c >= 'A' && c <= 'F') value = value * 16 + c - 'A' + 10;
    else if (lower_case && c >= 'a' && c <= 'f') value = value * 16 + c - 'a' + 10;
    else return -1;
  }
  return value;
}

// id | flags of a piece, or NO_TOKEN.
uint32_t find_piece(const Vocabulary& v, const uint8_t* text, size_t bytes) {
  const uint64_t h = hash_of(text, bytes);
  const uint32_t tag = static_cast<uint32_t>(h >> 32);
  uint32_t slot = static_cast<uint32_t>(h) & v.piece_mask;
  for (uint32_t i = 0; i < MOST_PROBES; i++, slot = (slot + 1) & v.piece_mask) {
    const uint8_t* at = v.pieces + size_t{8} * slot;
    const uint32_t value = load(at + 4);
    if (value == NO_TOKEN) break;
    if (load(at) != tag) continue;
    size_t length = 0;
    const uint8_t* found = spelling(v, value & ID, &length);
    if (found && length == bytes && std::memcmp(found, text, bytes) == 0) return value;
  }
  return NO_TOKEN;
}

struct Merge {
  uint32_t rank, merged;
};

Merge find_merge(const Vocabulary& v, uint32_t left, uint32_t right) {
  uint32_t slot = static_cast<uint32_t>(hash_of(left, right)) & v.merge_mask;
  for (uint32_t i = 0; i < MOST_PROBES; i++, slot = (slot + 1) & v.merge_mask) {
    const uint8_t* at = v.merges + size_t{16} * slot;
    const uint32_t found = load(at);
    if (found == NO_TOKEN) break;
    if (found != left || load(at + 4) != right) continue;
    const Merge merge{load(at + 8), load(at + 12)};
    if (merge.merged < v.tokens) return merge;
    break;
  }
  return {NO_RANK, NO_TOKEN};
}

// Bytes of the character that begins here; text that is no UTF-8 is cut somehow.
size_t character(const uint8_t* text, size_t bytes) {
  const uint8_t c = *text;
  const size_t length = c < 0xC0 ? 1 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : 4;
  return std::min(length, bytes);
}

class Encoder {
 public:
  Encoder(const Vocabulary& v, std::vector<uint32_t>* ids) : v_(v), ids_(*ids) {}

  void text(const uint8_t* text, size_t bytes) {
    size_t from = 0;
    if (v_.has_added)
      for (size_t i = 0; i < bytes;) {
        uint32_t id = NO_TOKEN;
        const size_t length = added(text + i, bytes - i, &id);
        if (length == 0) {
          i++;
          continue;
        }
        piece(text + from, i - from);
        ids_.push_back(id);
        from = i += length;
      }
    piece(text + from, bytes - from);
  }

  // A word without the look-up of the whole.
  void merge_word(const uint8_t* word, size_t bytes) {
    symbols_.clear();
    for (size_t i = 0; i < bytes;) {
      const size_t length = character(word + i, bytes - i);
      uint32_t id = NO_TOKEN;
      if (word[i] < 0x80) {
        id = load(v_.header + AT_ASCII + 4 * word[i]);
        if (id >= v_.tokens) id = NO_TOKEN;
      } else {
        const uint32_t found = find_piece(v_, word + i, length);
        if (found != NO_TOKEN) id = found & ID;
      }
      if (id != NO_TOKEN) add(id);
      else
        for (size_t k = 0; k < length; k++)
          add(std::min(load(v_.header + AT_FALLBACK + 4 * word[i + k]), v_.tokens - 1));
      i += length;
    }
    for (size_t i = 0; i + 1 < symbols_.size(); i++) pair(symbols_[i], symbols_[i + 1]);
    if (symbols_.size() <= SHORT) merge_short();
    else merge_long();
  }

 private:
  struct Symbol {
    uint32_t id;
    uint32_t rank, merged;  // of the merge with the next symbol
    uint32_t prev, next;    // for merge_long
  };
  static constexpr uint32_t END = 0xFFFFFFFFu;

  // Bytes and id of the longest added token that begins here; 0 for none.
  size_t added(const uint8_t* text, size_t bytes, uint32_t* id) const {
    if (!bit(v_.header + AT_STARTS, *text)) return 0;
    for (size_t length = std::min<size_t>(bytes, 255); length > 0; length--) {
      if (!bit(v_.header + AT_LENGTHS, static_cast<uint8_t>(length))) continue;
      const uint32_t value = find_piece(v_, text, length);
      if (value == NO_TOKEN || !(value & ADDED)) continue;
      *id = value & ID;
      return length;
    }
    return 0;
  }

  // Text between added tokens.
  void piece(const uint8_t* text, size_t bytes) {
    spelled_.clear();
    spelled_.reserve(bytes + bytes / 4);
    for (size_t i = 0; i < bytes; i++)
      if (text[i] == ' ') spelled_.insert(spelled_.end(), SPACE, SPACE + 3);
      else spelled_.push_back(text[i]);
    const uint8_t* const at = spelled_.data();
    const size_t size = spelled_.size();
    for (size_t from = 0, to; from < size; from = to) {
      to = from + 1;
      if (v_.lines && at[from] == '\n') {
        while (to < size && at[to] == '\n') to++;
      } else {
        while (to < size && !(v_.lines && at[to] == '\n') && !begins_word(at + to, size - to)) to++;
      }
      word(at + from, to - from);
    }
  }

  // Whether no merge joins what begins here to the byte before.
  bool begins_word(const uint8_t* at, size_t bytes) const {
    return at[0] == SPACE[0] && bytes >= 3 && at[1] == SPACE[1] && at[2] == SPACE[2] &&
           !bit(v_.header + AT_JOINS, at[-1]);
  }

  void word(const uint8_t* word, size_t bytes) {
    if (bytes <= v_.longest) {
      const uint32_t value = find_piece(v_, word, bytes);
      if (value != NO_TOKEN && value & WHOLE) {
        ids_.push_back(value & ID);
        return;
      }
    }
    merge_word(word, bytes);
  }

  void add(uint32_t id) { symbols_.push_back({id, NO_RANK, NO_TOKEN, END, END}); }

  void pair(Symbol& left, const Symbol& right) const {
    const Merge found = find_merge(v_, left.id, right.id);
    left.rank = found.rank;
    left.merged = found.merged;
  }

  void merge_short() {
    for (;;) {
      size_t best = 0, count = symbols_.size();
      for (size_t i = 1; i < count; i++)
        if (symbols_[i].rank < symbols_[best].rank) best = i;
      if (count == 0 || symbols_[best].rank == NO_RANK || best + 1 == count) break;
      symbols_[best].id = symbols_[best].merged;
      symbols_[best].rank = NO_RANK;
      symbols_.erase(symbols_.begin() + static_cast<ptrdiff_t>(best) + 1);
      if (best + 1 < symbols_.size()) pair(symbols_[best], symbols_[best + 1]);
      if (best > 0) pair(symbols_[best - 1], symbols_[best]);
    }
    for (const Symbol& symbol : symbols_) ids_.push_back(symbol.id);
  }

  // A heap of rank and position. An entry whose symbol has another rank by now is out of date: a
  // rank belongs to one pair.
  void merge_long() {
    const size_t count = symbols_.size();
    if (count >= END) throw std::bad_alloc();  // positions have 32 bits
    heap_.clear();
    for (uint32_t i = 0; i < count; i++) {
      symbols_[i].prev = i == 0 ? END : i - 1;
      symbols_[i].next = i + 1 == count ? END : i + 1;
      if (symbols_[i].rank != NO_RANK) heap_.push_back(entry(i));
    }
    std::make_heap(heap_.begin(), heap_.end(), std::greater<>());
    while (!heap_.empty()) {
      std::pop_heap(heap_.begin(), heap_.end(), std::greater<>());
      const uint32_t rank = static_cast<uint32_t>(heap_.back() >> 32);
      const uint32_t at = static_cast<uint32_t>(heap_.back());
      heap_.pop_back();
      Symbol& symbol = symbols_[at];
      if (symbol.rank != rank || symbol.next == END) continue;
      Symbol& right = symbols_[symbol.next];
      symbol.id = symbol.merged;
      symbol.rank = right.rank = NO_RANK;
      symbol.next = right.next;
      if (symbol.next != END) {
        symbols_[symbol.next].prev = at;
        pair(symbol, symbols_[symbol.next]);
        push(at);
      }
      if (symbol.prev != END) {
        pair(symbols_[symbol.prev], symbol);
        push(symbol.prev);
      }
    }
    for (uint32_t i = 0; i != END; i = symbols_[i].next) ids_.push_back(symbols_[i].id);
  }

  uint64_t entry(uint32_t at) const { return static_cast<uint64_t>(symbols_[at].rank) << 32 | at; }

  void push(uint32_t at) {
    if (symbols_[at].rank == NO_RANK) return;
    heap_.push_back(entry(at));
    std::push_heap(heap_.begin(), heap_.end(), std::greater<>());
  }

  const Vocabulary& v_;
  std::vector<uint32_t>& ids_;
  std::vector<uint8_t> spelled_;
  std::vector<Symbol> symbols_;
  std::vector<uint64_t> heap_;
};

bool little_endian() {
  uint8_t bytes[4];
  store(bytes, ORDER);
  return bytes[0] == 4;
}

uint32_t slots_for(uint32_t count) {
  uint32_t slots = 16;
  while (slots < 2 * count) slots *= 2;
  return slots;
}

bool put_piece(const Vocabulary& v, uint8_t* pieces, uint32_t id) {
  size_t bytes = 0;
  const uint8_t* text = spelling(v, id, &bytes);
  const uint64_t h = hash_of(text, bytes);
  uint32_t slot = static_cast<uint32_t>(h) & v.piece_mask;
  for (uint32_t i = 0; i < MOST_PROBES; i++, slot = (slot + 1) & v.piece_mask) {
    uint8_t* at = pieces + size_t{8} * slot;
    if (load(at + 4) != NO_TOKEN) continue;
    store(at, static_cast<uint32_t>(h >> 32));
    store(at + 4, id);
    return true;
  }
  return false;
}

bool put_merge(const Vocabulary& v, uint8_t* merges, const uint32_t* merge, uint32_t rank) {
  uint32_t slot = static_cast<uint32_t>(hash_of(merge[0], merge[1])) & v.merge_mask;
  for (uint32_t i = 0; i < MOST_PROBES; i++, slot = (slot + 1) & v.merge_mask) {
    uint8_t* at = merges + size_t{16} * slot;
    if (load(at) != NO_TOKEN) continue;
    store(at, merge[0]);
    store(at + 4, merge[1]);
    store(at + 8, rank);
    store(at + 12, merge[2]);
    return true;
  }
  return false;
}

bool build(const VocabularyParts& parts, std::vector<uint8_t>* block) {
  if (!little_endian() || parts.tokens == 0 || parts.tokens > MOST_TOKENS ||
      parts.merge_count > MOST_SLOTS / 4)
    return false;
  for (uint32_t id = 0; id < parts.tokens; id++)
    if (parts.offsets[0] != 0 || parts.offsets[id + 1] <= parts.offsets[id]) return false;
  for (uint32_t i = 0; i < 3 * parts.merge_count; i++)
    if (parts.merges[i] >= parts.tokens) return false;
  for (uint32_t i = 0; i < parts.marker_count; i++)
    if (parts.markers[i] >= parts.tokens) return false;
  for (uint32_t i = 0; i < parts.added_count; i++)
    if (parts.added[i] >= parts.tokens) return false;
  const uint32_t merge_slots = slots_for(parts.merge_count), piece_slots = slots_for(parts.tokens);
  const uint32_t byte_count = parts.offsets[parts.tokens];
  const size_t table_bytes = size_t{16} * merge_slots + size_t{8} * piece_slots;
  const size_t size = HEADER_BYTES + table_bytes + size_t{4} * (parts.tokens + 1) +
                      size_t{4} * parts.marker_count + byte_count;
  block->assign(size, 0);
  uint8_t* const head = block->data();
  uint32_t longest = 0;
  for (uint32_t id = 0; id < parts.tokens; id++)
    longest = std::max(longest, parts.offsets[id + 1] - parts.offsets[id]);
  std::memcpy(head, MAGIC, sizeof MAGIC);
  std::memcpy(head + AT_SOURCE, parts.source, 32);
  const uint32_t flags = (parts.lines ? LINES : 0) | (parts.added_count ? HAS_ADDED : 0);
  const struct { size_t at; uint32_t value; } numbers[] = {
      {AT_VERSION, VOCABULARY_VERSION}, {AT_ORDER, ORDER}, {AT_TOKENS, parts.tokens},
      {AT_MERGE_SLOTS, merge_slots}, {AT_PIECE_SLOTS, piece_slots}, {AT_MARKERS, parts.marker_count},
      {AT_BYTES, byte_count}, {AT_LONGEST, longest}, {AT_FLAGS, flags}};
  for (const auto& number : numbers) store(head + number.at, number.value);
  store64(head + AT_SIZE, size);
  uint8_t* const merges = head + HEADER_BYTES;
  uint8_t* const pieces = merges + size_t{16} * merge_slots;
  uint8_t* const offsets = pieces + size_t{8} * piece_slots;
  uint8_t* const markers = offsets + size_t{4} * (parts.tokens + 1);
  std::memset(merges, 0xFF, table_bytes);
  std::memcpy(offsets, parts.offsets, size_t{4} * (parts.tokens + 1));
  if (parts.marker_count) std::memcpy(markers, parts.markers, size_t{4} * parts.marker_count);
  std::memcpy(markers + size_t{4} * parts.marker_count, parts.bytes, byte_count);

  Vocabulary v;
  if (!open_vocabulary(head, size, &v)) return false;
  for (uint32_t id = 0; id < parts.tokens; id++)
    if (!put_piece(v, pieces, id)) return false;
  for (uint32_t i = 0; i < parts.merge_count; i++)
    if (!put_merge(v, merges, parts.merges + size_t{3} * i, i)) return false;

  for (uint32_t c = 0; c < 128; c++) {
    const uint8_t text = static_cast<uint8_t>(c);
    store(head + AT_ASCII + 4 * c, find_token(v, &text, 1));
  }
  std::memset(head + AT_FALLBACK, 0xFF, 4 * 256);
  std::vector<bool> stands_for_byte(parts.tokens, false);
  for (uint32_t id = 0; id < parts.tokens; id++) {
    size_t bytes = 0;
    const uint8_t* text = spelling(v, id, &bytes);
    const int value = byte_of(text, bytes, false);
    if (value < 0) continue;
    store(head + AT_FALLBACK + 4 * value, id);
    stands_for_byte[id] = true;
  }
  for (int value = 0; value < 256; value++)
    if (load(head + AT_FALLBACK + 4 * value) == NO_TOKEN) return false;

  // A merge of a byte token would join a byte that its spelling does not end in.
  for (uint32_t i = 0; i < parts.merge_count; i++) {
    const uint32_t *merge = parts.merges + size_t{3} * i, left = merge[0], right = merge[1];
    if (stands_for_byte[left] || stands_for_byte[right]) std::memset(head + AT_JOINS, 0xFF, 32);
    size_t bytes = 0;
    const uint8_t* text = spelling(v, right, &bytes);
    if (bytes >= 3 && std::memcmp(text, SPACE, 3) == 0) {
      text = spelling(v, left, &bytes);
      set_bit(head + AT_JOINS, text[bytes - 1]);
    }
  }
  for (uint32_t i = 0; i < parts.added_count; i++) {
    size_t bytes = 0;
    const uint8_t* text = spelling(v, parts.added[i], &bytes);
    if (bytes > 255) return false;
    set_bit(head + AT_STARTS, text[0]);
    set_bit(head + AT_LENGTHS, static_cast<uint8_t>(bytes));
  }

  std::vector<bool> is_added(parts.tokens, false);
  for (uint32_t i = 0; i < parts.added_count; i++) is_added[parts.added[i]] = true;
  std::vector<uint32_t> ids;
  Encoder encoder(v, &ids);
  for (uint32_t slot = 0; slot < piece_slots; slot++) {
    uint8_t* const at = pieces + size_t{8} * slot + 4;
    const uint32_t id = load(at);
    if (id == NO_TOKEN) continue;
    size_t bytes = 0;
    const uint8_t* text = spelling(v, id, &bytes);
    ids.clear();
    encoder.merge_word(text, bytes);
    const bool whole = ids.size() == 1 && ids[0] == id;
    store(at, id | (whole ? WHOLE : 0) | (is_added[id] ? ADDED : 0));
  }
  store64(head + AT_CHECKSUM, checksum(head + AT_SOURCE, size - AT_SOURCE));
  return true;
}

}  // namespace

bool build_vocabulary(const VocabularyParts& parts, std::vector<uint8_t>* block) noexcept {
  try {
    return build(parts, block);
  } catch (...) {
    return false;
  }
}

bool open_vocabulary(const uint8_t* block, size_t bytes, Vocabulary* v) noexcept {
  if (bytes < HEADER_BYTES || std::memcmp(block, MAGIC, sizeof MAGIC) != 0 ||
      load(block + AT_VERSION) != VOCABULARY_VERSION || load(block + AT_ORDER) != ORDER ||
      !little_endian() || load64(block + AT_SIZE) != bytes)
    return false;
  const uint32_t tokens = load(block + AT_TOKENS), merge_slots = load(block + AT_MERGE_SLOTS),
                 piece_slots = load(block + AT_PIECE_SLOTS), markers = load(block + AT_MARKERS),
                 byte_count = load(block + AT_BYTES), flags = load(block + AT_FLAGS);
  for (uint32_t slots : {merge_slots, piece_slots})
    if (slots == 0 || slots > MOST_SLOTS || (slots & (slots - 1)) != 0) return false;
  if (tokens == 0 || tokens > MOST_TOKENS || markers > tokens) return false;
  // No sum below passes 2^32 by much: 64 bits hold it.
  const uint64_t size = HEADER_BYTES + uint64_t{16} * merge_slots + uint64_t{8} * piece_slots +
                        uint64_t{4} * (tokens + uint64_t{1} + markers) + byte_count;
  if (size != bytes) return false;
  v->header = block;
  v->merges = block + HEADER_BYTES;
  v->pieces = v->merges + size_t{16} * merge_slots;
  v->offsets = v->pieces + size_t{8} * piece_slots;
  v->markers = v->offsets + size_t{4} * (tokens + 1);
  v->bytes = v->markers + size_t{4} * markers;
  v->tokens = tokens;
  v->merge_mask = merge_slots - 1;
  v->piece_mask = piece_slots - 1;
  v->marker_count = markers;
  v->byte_count = byte_count;
  v->longest = load(block + AT_LONGEST);
  v->lines = flags & LINES;
  v->has_added = flags & HAS_ADDED;
  return true;
}

bool verify_vocabulary(const uint8_t* block, size_t bytes, const uint8_t* source) noexcept {
  Vocabulary v;
  return open_vocabulary(block, bytes, &v) && std::memcmp(block + AT_SOURCE, source, 32) == 0 &&
         load64(block + AT_CHECKSUM) == checksum(block + AT_SOURCE, bytes - AT_SOURCE);
}

bool encode(const Vocabulary& v, const uint8_t* text, size_t bytes,
            std::vector<uint32_t>* ids) noexcept {
  try {
    Encoder(v, ids).text(text, bytes);
    return true;
  } catch (...) {
    return false;
  }
}

bool decode(const Vocabulary& v, const uint32_t* ids, size_t count,
            std::vector<uint8_t>* out) noexcept {
  try {
    for (size_t i = 0; i < count; i++) {
      size_t bytes = 0;
      const uint8_t* text = spelling(v, ids[i], &bytes);
      if (!text) return false;
      const int byte = byte_of(text, bytes, true);
      if (byte >= 0) {
        out->push_back(static_cast<uint8_t>(byte));
        continue;
      }
      for (size_t k = 0; k < bytes;)
        if (bytes - k >= 3 && std::memcmp(text + k, SPACE, 3) == 0) {
          out->push_back(' ');
          k += 3;
        } else {
          out->push_back(text[k++]);
        }
    }
    return true;
  } catch (...) {
    return false;
  }
}

const uint8_t* spelling(const Vocabulary& v, uint32_t id, size_t* bytes) noexcept {
  if (id >= v.tokens) return nullptr;
  const uint32_t from = load(v.offsets + size_t{4} * id), to = load(v.offsets + size_t{4} * id + 4);
  if (from > to || to > v.byte_count) return nullptr;
  *bytes = to - from;
  return v.bytes + from;
}

uint32_t find_token(const Vocabulary& v, const uint8_t* text, size_t bytes) noexcept {
  const uint32_t value = find_piece(v, text, bytes);
  return value == NO_TOKEN ? NO_TOKEN : value & ID;
}

uint32_t marker(const Vocabulary& v, uint32_t i) noexcept {
  if (i >= v.marker_count) return NO_TOKEN;
  const uint32_t id = load(v.markers + size_t{4} * i);
  return id < v.tokens ? id : NO_TOKEN;
}

}  // namespace gemsmith
