"""Writes a checkpoint folder with random weights at a model's real dimensions.

Speed and memory do not depend on what the weights are, so benchmarks need no download. The folder
looks like a released one: config.json, model.safetensors in bfloat16 with the released names, and a
tokenizer.json that holds the special tokens and the 256 bytes. What it says is noise.

Written piece by piece: memory stays at a few MiB whatever the size of the model. A folder that is
already there, complete and of the same config is kept.

Run: python -m benchmarks.random_checkpoint E2B FOLDER
"""

import argparse
import json
import shutil
import struct
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from gemsmith.config import PRESETS, Gemma4Config, text_only
from gemsmith.errors import CapacityError
from gemsmith.model.text import TextModel
from gemsmith.testing import tiny_config
from gemsmith.text.tokenizer import MARKERS

PREFIX = "model.language_model."
DEVIATION = 0.02
POOL = 4_194_301
"""Random values drawn; a prime, so that no two rows of a matrix are alike."""
FIRST_IDS = {"pad": 0, "eos": 1, "bos": 2, "unk": 3, "turn_open": 105, "turn_close": 106}
FIRST_BYTE = 256


def config_of(size: str) -> Gemma4Config:
    """The decoder of a preset, or with the prefix `tiny-` its few-layer likeness for a dry run."""
    if size.startswith("tiny-"):
        return tiny_config(size.removeprefix("tiny-"), vocab_size=1024)
    return text_only(PRESETS[size])


def write(config: Gemma4Config, folder: Path, *, seed: int = 0) -> Path:
    """Make `folder` a checkpoint of `config` with random weights; returns the folder.

    Raises:
      CapacityError: the disk has no room for it.
    """
    model = TextModel(config.text_config, device="meta", dtype=torch.bfloat16)
    shapes = {PREFIX + name: tensor.shape for name, tensor in model.state_dict().items()}
    header = _header(shapes)
    size = len(header) + 2 * sum(shape.numel() for shape in shapes.values())
    path = folder / "model.safetensors"
    wanted = json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"
    config_path = folder / "config.json"
    kept = path.is_file() and path.stat().st_size == size and config_path.is_file()
    if kept and config_path.read_text(encoding="utf-8") == wanted:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size + (1 << 30):
        raise CapacityError(
            f"{folder}: the checkpoint needs {size / 2**30:.1f} GiB and 1 GiB to spare, "
            f"{free / 2**30:.1f} GiB are free; name another --folder"
        )
    config.save(folder)
    _tokenizer(config.text_config.vocab_size).save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 106]}\n')
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(seed)) * DEVIATION
    noise = pool.bfloat16().view(torch.uint8).numpy().tobytes()
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(header)
        at = 0
        for name, shape in shapes.items():
            left = 2 * shape.numel()
            if "norm" in name or name.endswith("layer_scalar"):
                # Query and key norms shrink scores to about 1, as training does: at 1 their softmax
                # would jump from key to key on a rounding error, and no two runs would agree.
                qk = name.endswith(("q_norm.weight", "k_norm.weight"))
                values = torch.full(shape, shape[0] ** -0.25 if qk else 1.0, dtype=torch.bfloat16)
                file.write(values.view(torch.uint8).numpy().data)
                continue
            while left:
                piece = noise[at : at + left]
                file.write(piece)
                left -= len(piece)
                at = (at + len(piece)) % len(noise)
    part.rename(path)
    return folder


def _header(shapes: dict[str, torch.Size]) -> bytes:
    """The head of a safetensors file: length, then JSON padded to eight bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        stop = start + 2 * shape.numel()
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _tokenizer(vocab_size: int) -> Tokenizer:
    """Special tokens and bytes, so that every text can be read; the other entries are unused."""
    spelled = {id: MARKERS[role] for role, id in FIRST_IDS.items()}
    others = (marker for role, marker in MARKERS.items() if role not in FIRST_IDS)
    spelled |= {200 + n: marker for n, marker in enumerate(others)}
    spelled |= {FIRST_BYTE + byte: f"<0x{byte:02X}>" for byte in range(256)}
    spelled[FIRST_BYTE + 256] = "▁"
    vocab = {spelled.get(id, f"<unused{id}>"): id for id in range(vocab_size)}
    made = Tokenizer(BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    markers = [AddedToken(m, normalized=False, special=True) for m in MARKERS.values()]
    made.add_special_tokens(markers)
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("size", choices=[*PRESETS, *(f"tiny-{size}" for size in PRESETS)])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    print(write(config_of(options.size), options.folder))
