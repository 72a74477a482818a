"""Which tensor of a checkpoint is which weight of the model, and what each must look like.

The decoder's names and shapes follow from the config alone (shapes.py): no module is built and no
tensor is read here.

A decoder's tensors carry the names of `TextModel`'s state dict under one of five prefixes:
  model.language_model.    released files, files saved by transformers, and those written here
  language_model.model.    the order of transformers before 4.52
  language_model.          the same without its inner module
  model.                   a decoder saved alone
  (none)                   a bare state dict

The towers' tensors carry the names of `Towers`' state dict, with or without `model.` in front.

Known and left aside: the K/V tensors that released E2B and E4B files hold for layers which never
use them, and a stored copy of the tied head.

Source: tensor lists of transformers 5.23 `Gemma4ForConditionalGeneration`.
"""

import re
from collections.abc import Iterable, Mapping

from gemsmith import shapes
from gemsmith.config import PRESETS, DrafterConfig, TextConfig
from gemsmith.errors import WeightsError
from gemsmith.shapes import Shape

WRITTEN_PREFIX = "model.language_model."
PREFIXES = (WRITTEN_PREFIX, "language_model.model.", "language_model.", "model.", "")
TOWERS = ("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio.")
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
PLE_TABLE, LAST_NORM = "embed_tokens_per_layer.weight", "norm.weight"
MAX_NAMED = 8


def module_name(key: str) -> str:
    """The name below the decoder of a checkpoint's tensor: its prefix taken off."""
    return next(key.removeprefix(p) for p in PREFIXES if key.startswith(p))


def written_key(name: str) -> str:
    """The key a decoder's tensor is written under; transformers has the head outside."""
    return name if name == HEAD else WRITTEN_PREFIX + name


def is_tower(key: str) -> bool:
    """Whether the tensor belongs to image or audio input."""
    return key.removeprefix("model.").startswith(TOWERS)


def expected_shapes(config: TextConfig) -> dict[str, Shape]:
    """Every tensor of the decoder, by module name, in the order of the module; [out, in].

    The `layer_scalar`s are among them; a count of trainable weights leaves those out.
    """
    return {tensor.name: tensor.shape for tensor in shapes.decoder(config)}


def unused_shapes(config: TextConfig) -> dict[str, Shape]:
    """Tensors a checkpoint may hold that the decoder never reads: shared layers' K/V, the head."""
    head = {HEAD: (config.vocab_size, config.hidden_size)} if config.tie_word_embeddings else {}
    return head | {tensor.name: tensor.shape for tensor in shapes.shared_kv(config)}


def match(
    found: Mapping[str, Shape], config: TextConfig, where: Mapping[str, str], source: str
) -> dict[str, str]:
    """Give every tensor of the decoder its key in the checkpoint: {module name: key}.

    `found` are the shapes by key, `where` names the file of each key, `source` the checkpoint.
    Every key is accounted for: a weight, a tower's, knowingly unused, or an error.

    Raises:
      WeightsError: tensors missing, in excess, doubled or of another shape; all of them named
        (the first few of each kind), with the likely cause.
    """
    expected, unused = expected_shapes(config), unused_shapes(config)
    chosen: dict[str, str] = {}
    doubled, unexpected, misshapen = [], [], []
    for key, shape in found.items():
        name = module_name(key)
        if is_tower(key):
            continue
        if name in chosen:
            doubled.append(f"{key} and {chosen[name]}")
            continue
        want = expected.get(name) or unused.get(name)
        if want is None:
            unexpected.append(key)
            continue
        chosen[name] = key
        if shape != want:
            misshapen.append(f"{key} is {list(shape)}, expected {list(want)}")
    missing = [written_key(name) for name in expected if name not in chosen]

    parts = []
    if missing:
        whole = len(missing) == len(expected)
        cause = (
            "no tensor of a Gemma 4 decoder is there at all; is this the right folder?"
            if whole
            else _cause_of_missing(missing, unexpected)
        )
        parts.append(f"{_count(missing)} missing:\n  {_some(missing)}\n  {cause}")
    if misshapen:
        parts.append(
            f"{_count(misshapen)} of another shape:\n  {_some(misshapen)}\n"
            f"  {_cause_of_shape(found, chosen, config)}"
        )
    if unexpected:
        files = sorted({where[key] for key in unexpected})
        parts.append(
            f"{_count(unexpected)} in {_some(files, limit=3)} with no place in this model:\n"
            f"  {_some(unexpected)}\n  {_cause_of_unexpected(unexpected, config)}"
        )
    if doubled:
        parts.append(
            f"{_count(doubled)} stored twice:\n  {_some(doubled)}\n"
            "  Two exports were mixed; keep one of them."
        )
    if parts:
        raise WeightsError(f"{source}: " + "\n".join(parts))
    return {name: key for name, key in chosen.items() if name in expected}


def match_towers(
    found: Mapping[str, Shape], expected: Mapping[str, Shape], source: str
) -> dict[str, str]:
    """Give every tensor of the towers, `expected` by module name, its key in the checkpoint.

    Raises:
      WeightsError: tensors missing, in excess or of another shape, named as in `match`.
    """
    chosen = {key.removeprefix("model."): key for key in found if is_tower(key)}
    missing = ["model." + name for name in expected if name not in chosen]
    excess = [key for name, key in chosen.items() if name not in expected]
    misshapen = [
        f"{key} is {list(found[key])}, expected {list(expected[name])}"
        for name, key in chosen.items()
        if name in expected and found[key] != expected[name]
    ]
    parts = []
    if len(missing) == len(expected) > 0:
        parts.append(
            "the checkpoint has no image or audio input, though config.json describes one; it was "
            "saved without. Fetch the original to use images or sound."
        )
    elif missing:
        parts.append(
            f"{_count(missing)} missing:\n  {_some(missing)}\n  The download or export is "
            "incomplete, or config.json is another model's; fetch it anew."
        )
    if misshapen:
        parts.append(
            f"{_count(misshapen)} of another shape:\n  {_some(misshapen)}\n"
            "  config.json belongs to another model, or the file to another export; fetch both."
        )
    if excess:
        parts.append(
            f"{_count(excess)} of the towers with no place in this model:\n  {_some(excess)}\n"
            "  vision_config or audio_config of config.json is another model's."
        )
    if parts:
        raise WeightsError(f"{source}: " + "\n".join(parts))
    return chosen


def match_drafter(
    found: Mapping[str, Shape], config: DrafterConfig, source: str
) -> tuple[dict[str, str], str | None]:
    """Give every tensor of a drafter its key in its checkpoint, the same name: {name: key}.

    Second: the key of a stored copy of the head, which is tied to `model.embed_tokens.weight`.

    Raises:
      WeightsError: tensors missing, in excess or of another shape, named as in `match`.
    """
    expected = {tensor.name: tensor.shape for tensor in shapes.drafter(config)}
    head = {HEAD: expected["model." + EMBEDDING]}
    known = expected | head
    missing = [name for name in expected if name not in found]
    excess = [key for key in found if key not in known]
    misshapen = [
        f"{key} is {list(found[key])}, expected {list(shape)}"
        for key, shape in known.items()
        if key in found and found[key] != shape
    ]
    parts = []
    if missing:
        cause = (
            "no tensor of a Gemma 4 drafter is there at all; is this the right folder?"
            if len(missing) == len(expected)
            else "Perhaps use_ordered_embeddings of config.json should be false."
            if all(name.startswith("masked_embedding.") for name in missing)
            else "The download or export is incomplete, or config.json is another drafter's; "
            "fetch it anew."
        )
        parts.append(f"{_count(missing)} missing:\n  {_some(missing)}\n  {cause}")
    if misshapen:
        parts.append(
            f"{_count(misshapen)} of another shape:\n  {_some(misshapen)}\n"
            "  config.json is that of another size's drafter; fetch both anew."
        )
    if excess:
        cause = (
            "A drafter has no keys and values of its own; this is another kind of model."
            if any(re.search(r"\.self_attn\.[kv]_", key) for key in excess)
            else "Perhaps use_ordered_embeddings of config.json should be true."
            if all(key.startswith("masked_embedding.") for key in excess)
            else "A quantized drafter is not read; start from the bfloat16 one of the same size."
        )
        parts.append(
            f"{_count(excess)} with no place in this drafter:\n  {_some(excess)}\n  {cause}"
        )
    if parts:
        raise WeightsError(f"{source}: " + "\n".join(parts))
    return {name: name for name in expected}, HEAD if HEAD in found else None


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"


def _some(names: Iterable[str], limit: int = MAX_NAMED) -> str:
    """The first of many names, cut short where a hostile file made them long."""
    names = list(names)
    text = ", ".join(n if len(n) <= 200 else n[:197] + "..." for n in names[:limit])
    return text + (f", ... and {len(names) - limit} more" if len(names) > limit else "")


def _cause_of_missing(missing: list[str], unexpected: list[str]) -> str:
    if any("lora_" in key or ".base_layer." in key for key in unexpected):
        return "This is a LoRA adapter; merge it into its base model first."
    if all(".self_attn." in name for name in missing):
        if all(name.endswith("v_proj.weight") for name in missing):
            return "Perhaps attention_k_eq_v of config.json should be true."
        if all("k_proj" in n or "k_norm" in n or "v_proj" in n for n in missing):
            return "Perhaps num_kv_shared_layers of config.json is too small for these weights."
    if all("per_layer" in name for name in missing):
        return "Without per-layer inputs hidden_size_per_layer_input of config.json must be 0."
    return "The download or export is incomplete, or config.json is another model's; fetch it anew."


def _cause_of_unexpected(keys: list[str], config: TextConfig) -> str:
    text = "\n".join(keys)
    if "lora_" in text or ".base_layer." in text:
        return "This is a LoRA adapter; merge it into its base model first."
    quantized = (
        "weight_scale",
        "zero_point",
        "g_idx",
        "_packed",
        "qweight",
        "qzeros",
        ".scales",
        ".absmax",
    )
    if any(mark in text for mark in quantized):
        return (
            "These are quantized in a way that is not read here; start from the bfloat16 "
            "checkpoint of the same model."
        )
    if any(mark in text for mark in ("pre_projection.", "post_projection.", "masked_embedding.")):
        return "This is a drafter (`-assistant`), not a model that runs alone."
    if _depth(keys) > config.num_hidden_layers:
        return (
            f"The weights have {_depth(keys)} layers, config.json "
            f"{config.num_hidden_layers}; one of the two is another model's."
        )
    if any(".experts." in key for key in keys):
        return "Perhaps enable_moe_block of config.json should be true."
    if all(key.endswith("v_proj.weight") for key in keys):
        return "Perhaps attention_k_eq_v of config.json should be false."
    return "They are left over from another model or a training run; save the model alone."


def _cause_of_shape(
    found: Mapping[str, Shape], chosen: Mapping[str, str], config: TextConfig
) -> str:
    depth = _depth(found)
    width = found.get(chosen.get("norm.weight", ""), (0,))[-1:]
    for name, known in PRESETS.items():
        text = known.text_config
        if (text.num_hidden_layers, (text.hidden_size,)) == (depth, width) and text != config:
            return f"The weights look like {name}'s and config.json is another model's."
    return "config.json belongs to another model, or the file to another export; fetch both anew."


def _depth(keys: Iterable[str]) -> int:
    """Layers that the names speak of."""
    found = (re.match(r"layers\.([0-9]{1,8})\.", module_name(key)) for key in keys)
    return max((int(layer[1]) + 1 for layer in found if layer), default=0)
