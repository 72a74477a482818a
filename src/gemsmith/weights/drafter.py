"""A drafter's checkpoint folder -> `model.drafter.MTPDrafter`, and back.

The folder is one of its own beside the model's: config.json and safetensors files, read by the
rules of load.py and written by those of save.py. Every key is accounted for before a value is read.
A stored copy of the tied head is left aside once it was seen to be one.

Not read: drafters in few bits, in GGUF, or of another layout than the released ones.

Source: tensor lists of the released `google/gemma-4-*-it-assistant`; transformers 5.23
`Gemma4AssistantForCausalLM`.
"""

from pathlib import Path

import torch

from gemsmith.config import DrafterConfig, TextConfig
from gemsmith.errors import ConfigError, WeightsError
from gemsmith.model.drafter import MTPDrafter, check_target
from gemsmith.shapes import TOKEN_ORDERING, drafter
from gemsmith.weights.load import COMPUTE, check_dtypes, checked_device, compute_dtype, fill_floats
from gemsmith.weights.names import EMBEDDING, match_drafter
from gemsmith.weights.save import Source, check_savable, write_checkpoint
from gemsmith.weights.tensors import read_checkpoint, read_tensor

TABLE = "model." + EMBEDDING
ROWS_COMPARED = 256
WHOLE = 1 << 40
"""Bytes of a file: a drafter always is in one, the largest has under 1 GB."""


def load_drafter(
    folder: str | Path,
    target: TextConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> MTPDrafter:
    """Read the drafter of the model that `target` describes; in evaluation mode, gradients off.

    dtype None keeps the dtype of the stored head (float16 is refused).

    Raises:
      ConfigError: config.json or an option is wrong, or the drafter is another model's.
      WeightsError: a file is missing, damaged or refused, or its tensors are not this drafter's.
      CapacityError: the device has too little memory.
    """
    folder, device = Path(folder), checked_device(device)
    config = DrafterConfig.load(folder)
    try:
        check_target(config, target)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None
    stored = read_checkpoint(folder)
    found = {key: tensor.shape for key, tensor in stored.items()}
    chosen, head = match_drafter(found, config, str(folder))
    ordering = chosen.pop(TOKEN_ORDERING, None)
    if ordering is not None and stored[ordering].dtype not in ("I64", "I32"):
        raise WeightsError(
            f"{folder}: {ordering} is stored as {stored[ordering].dtype}; token ids are I64 or I32"
        )
    check_dtypes(stored, chosen | ({head: head} if head else {}), {}, folder)
    dtype = compute_dtype(dtype, stored[TABLE], folder)
    model = MTPDrafter(config, target, device="meta", dtype=dtype)
    if ordering is not None:
        ids_V = read_tensor(stored[ordering], ordering).long()
        _check_ordering(ids_V, folder)
        assert model.masked_embedding is not None
        model.masked_embedding.register_buffer("token_ordering", ids_V.to(device))
    if head is not None:
        ours, table = (read_tensor(stored[key], key) for key in (head, TABLE))
        step = -(-len(table) // ROWS_COMPARED)
        if not torch.equal(ours[::step], table[::step]):
            raise WeightsError(
                f"{folder}: {head} differs from {TABLE}; a drafter has the two tied. "
                "The head was trained apart and cannot be kept; export with tied embeddings."
            )
    fill_floats(model, stored, chosen, device, dtype)
    return model.eval().requires_grad_(False)


def save_drafter(
    model: MTPDrafter, folder: str | Path, *, dtype: torch.dtype | None = None
) -> list[Path]:
    """Write config.json and the weights into `folder`, made if absent; returns the weight files.

    dtype None keeps each tensor's own.

    Raises:
      ConfigError: dtype is neither bfloat16 nor float32.
      WeightsError: the drafter has no values, or a file cannot be written.
    """
    if dtype is not None and dtype not in COMPUTE:
        raise ConfigError(f"dtype {dtype}: must be torch.bfloat16 or torch.float32")
    state, sources = model.state_dict(), []
    for expected in drafter(model.config):
        tensor = state[expected.name]
        if expected.name != TOKEN_ORDERING or tensor.is_meta:
            check_savable(expected.name, tensor)
        kept = tensor.dtype if expected.name == TOKEN_ORDERING else dtype or tensor.dtype
        sources.append(Source(expected.name, tuple(tensor.shape), kept, tensor))
    return write_checkpoint(sources, model.config.to_dict(), Path(folder), WHOLE)


def _check_ordering(ids_V: torch.Tensor, folder: Path) -> None:
    """Every token must have its centroid, and one alone."""
    if not torch.equal(ids_V.sort().values, torch.arange(len(ids_V))):
        raise WeightsError(
            f"{folder}: {TOKEN_ORDERING} does not name each of the {len(ids_V)} tokens once; "
            "the file is damaged, or the drafter was never trained. Fetch it anew"
        )
