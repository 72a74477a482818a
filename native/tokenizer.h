// A vocabulary compiled into one block of memory, which is a mapped file as a rule: text to ids by
// byte-pair encoding, and ids back to bytes.
//
// Gemma's byte-pair encoding, as the `tokenizers` library does it: spaces become U+2581; added
// tokens are cut out first, the longest of those that begin leftmost; the rest falls into words,
// which are runs of newlines and what lies between (LINES) or all of it; a word starts as its
// characters, one the vocabulary lacks as its byte tokens; then the adjacent pair of the least rank
// is merged, the leftmost of equals, until no pair merges. What this file does in other ways gives
// the same ids: a word is cut before a U+2581 that no merge can join to the byte before it, and a
// word that is known to end as one token is looked up.
//
// The block, little-endian, written by build_vocabulary and by nothing else:
//   header    HEADER_BYTES, see below
//   merges    merge_slots of {left, right, rank, merged}: open addressing by (left, right)
//   pieces    piece_slots of {tag, id | flags}: open addressing by a hash of the token's bytes
//   offsets   tokens + 1: where each token's bytes begin in the last part
//   markers   ids of special markers
//   bytes     every token's UTF-8, one after the other
// all uint32 but the last. The tables are half empty at least, so that most searches end in the
// line of cache where they begin; a short text touches few pages.
//
// Nothing here throws, and nothing trusts the block: open_vocabulary holds its sizes against the
// block's, and every number found later is checked where it is used, so that a block that was made
// up, or is changed while in use, gives wrong ids at worst.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace gemsmith {

// Also to be raised when the same file would be compiled into something else.
constexpr uint32_t VOCABULARY_VERSION = 1;
constexpr size_t HEADER_BYTES = 4096;
constexpr uint32_t NO_TOKEN = 0xFFFFFFFFu;

// View of a block; valid as long as the block is.
struct Vocabulary {
  const uint8_t *header, *merges, *pieces, *offsets, *markers, *bytes;
  uint32_t tokens, merge_mask, piece_mask, marker_count, byte_count, longest;
  bool lines, has_added;
};

// What a vocabulary is made of. Callers see to it that no token is there twice, nor a pair of merges.
struct VocabularyParts {
  const uint8_t* bytes;
  const uint32_t* offsets;  // [tokens + 1]
  uint32_t tokens;
  const uint32_t* merges;  // [merge_count][3]: left, right, merged; in the order of their ranks
  uint32_t merge_count;
  const uint32_t* markers;
  uint32_t marker_count;
  const uint32_t* added;  // tokens cut out of a text before all else; markers are not among them
  uint32_t added_count;
  bool lines;             // runs of newlines are words of their own
  const uint8_t* source;  // [32] SHA-256 of what this was made from
};

// False where a vocabulary does not fit this form (an id outside it, an empty token, a byte
// token that is missing, an added token of more than 255 bytes, hashes that collide too often), on a big-endian machine, or without memory.
bool build_vocabulary(const VocabularyParts&, std::vector<uint8_t>* block) noexcept;

// Whether the block has this version's form. Reads one page.
bool open_vocabulary(const uint8_t* block, size_t bytes, Vocabulary*) noexcept;
// Whether the block is, to the last bit, one that was built from `source` [32]. Reads all of it.
bool verify_vocabulary(const uint8_t* block, size_t bytes, const uint8_t* source) noexcept;

// Appends the ids of UTF-8 text, in which no marker counts. False: out of memory.
bool encode(const Vocabulary&, const uint8_t* text, size_t bytes, std::vector<uint32_t>*) noexcept;
// Appends the bytes that ids stand for: U+2581 is a space, a byte token its byte. False: an id
// outside the vocabulary, or out of memory.
bool decode(const Vocabulary&, const uint32_t* ids, size_t count, std::vector<uint8_t>*) noexcept;
// The bytes of a token as the vocabulary spells it; null for an id outside.
const uint8_t* spelling(const Vocabulary&, uint32_t id, size_t* bytes) noexcept;
// Id of a token by its spelling; NO_TOKEN where there is none.
uint32_t find_token(const Vocabulary&, const uint8_t* spelling, size_t bytes) noexcept;
// The i-th marker's id, or NO_TOKEN.
uint32_t marker(const Vocabulary&, uint32_t i) noexcept;

}  // namespace gemsmith
