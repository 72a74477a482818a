"""Trains pocket's vocabulary: 4,096 entries, the special tokens of Gemma 4 at their own low ids.

Byte-pair encoding with byte fallback over text whose spaces are U+2581, without a dummy prefix.
Unlike Gemma's, a word never holds its leading space (a few function words excepted) and digits
stand alone: a name is then the same tokens in a request, after a quote marker and in JSON, so a
small model can copy it.

Ids: 0-106 as in Gemma 4 (gaps are <unusedN>), 107-362 the bytes, then characters and merges, and
the seven media markers at the very top in Gemma 4's order.

Run: python -m recipes.pocket.tokenizer FOLDER
"""

import argparse
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from recipes.pocket.generator import conversations
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from gemsmith.text import chat

VOCAB_SIZE = 4096
SPECIALS = {
    0: "<pad>",
    1: "<eos>",
    2: "<bos>",
    3: "<unk>",
    4: "<mask>",
    46: "<|tool>",
    47: "<tool|>",
    48: "<|tool_call>",
    49: "<tool_call|>",
    50: "<|tool_response>",
    51: "<tool_response|>",
    52: '<|"|>',
    98: "<|think|>",
    100: "<|channel>",
    101: "<channel|>",
    105: "<|turn>",
    106: "<turn|>",
}
FIRST_BYTE = 107
MEDIA = ("<|image>", "<|audio>", "<|image|>", "<|audio|>", "<image|>", "<audio|>", "<|video|>")
GLUED = (
    "the|a|of|in|on|at|to|for|and|is|with|from|my|me|you|that|this|can|please|what|by|not|do|are|"
    "one|name|date|number|city|time|file"
)
"""Words that take their leading space along: they rarely begin a value."""


def pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    pattern = f"▁(?:{GLUED})(?![A-Za-z0-9_./-])|▁|[A-Za-z]+|[0-9]|\\n+|[^A-Za-z0-9▁\\n]+"
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def train(texts: Iterable[str]) -> Tokenizer:
    """A tokenizer learned from rendered conversations."""
    markers = re.compile("|".join(re.escape(t) for t in (*SPECIALS.values(), *MEDIA)))
    learned = Tokenizer(BPE())
    learned.normalizer = normalizers.Replace(" ", "▁")
    learned.pre_tokenizer = pre_tokenizer()
    room = VOCAB_SIZE - FIRST_BYTE - 256 - len(MEDIA)
    trainer = BpeTrainer(
        vocab_size=room,
        initial_alphabet=[chr(c) for c in range(33, 127)] + ["▁", "\n"],
        show_progress=False,
    )
    learned.train_from_iterator((p for t in texts for p in markers.split(t) if p), trainer)
    model = json.loads(learned.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    if len(pieces) != room:
        raise ValueError(f"{len(pieces)} entries learned but {room} needed; give more text")

    vocab = {SPECIALS.get(i, f"<unused{i}>"): i for i in range(FIRST_BYTE)}
    vocab |= {f"<0x{byte:02X}>": FIRST_BYTE + byte for byte in range(256)}
    for piece in (*pieces, *MEDIA):
        vocab[piece] = len(vocab)
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(
        BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t in (*SPECIALS.values(), *MEDIA)]
    )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def sample_texts(count: int) -> Iterator[str]:
    """Rendered training conversations."""
    for talk in conversations("train", 0, 0, count):
        yield chat.render(
            talk.messages, talk.tools, variant="edge", enable_thinking=talk.enable_thinking
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--conversations", type=int, default=12_000)
    options = parser.parse_args()
    save(train(sample_texts(options.conversations)), options.folder)
    print(f"wrote {options.folder}/tokenizer.json")
