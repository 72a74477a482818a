"""Does it fit, and how fast will it be: a model, a format, a context and a number of users on a
machine. Needs no torch and no weights.

Memory is exact where allocation is (sizing.py): weights and K/V. Workspace and runtime are
estimates and stand apart. Speed is a roofline: a step takes as long as reading what it reads, or as
computing what it computes, whichever is longer. No program reaches it; the share that gemsmith
reached where it was measured (calibration.json) gives the expected speed and its error bar. On
another kind of processor the same share is a guess and called so; where none was measured at all,
as on GPUs, only the bound is given.

  forward   `plan`: one combination on one machine
  inverse   `search`: every combination that fits, the best first

Users are sequences in one batch, each with a context of its own: weights are read once a step for
all, K/V for each.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from gemsmith import hardware, probe, sizing, work
from gemsmith.config import PRESETS, Gemma4Config
from gemsmith.devices import Device, device_of
from gemsmith.errors import CapacityError, ConfigError
from gemsmith.sizing import Memory, Place

GIB = 1 << 30
USABLE = {"gpu": 0.94, "unified": 0.85, "cpu": 0.85, "phone": 0.5}
"""The part of a named device's memory that a program is taken to get; the rest is the system's, the
driver's, or error correction's. Assumed, not measured; `--memory` says it exactly."""
SPELLINGS = {
    "32": "float32", "fp32": "float32", "f32": "float32",
    "16": "bfloat16", "bf16": "bfloat16",
    "8": "int8", "4": "int4", "2": "int2",
}  # fmt: skip
"""Other names of formats."""
SEARCHED = ("bfloat16", "int8", "int4", "int2", "mobile")
GROUPED = ("int4", "int2")
"""Formats with a scale for each group of inputs."""
TRAINED_FOR = ("int2", "mobile")
"""Formats that are good only from weights trained for them."""
PROMPT = 512
"""Tokens of the prompt whose time to the first token is predicted."""
MOST_USERS, MOST_CONTEXT = 4096, 1 << 24

Record = dict[str, Any]
"""Of calibration.json."""


@dataclass(frozen=True, slots=True)
class Target:
    """A machine that a model is to run on."""

    name: str
    place: Place
    memory: int
    """Bytes that a program can have."""
    bandwidth: float | None = None
    """Bytes a second; None: not known."""
    rates: Mapping[str, float | None] = field(default_factory=dict)
    """Operations a second by what is multiplied, as `probe.Rates` names it."""
    about: str = ""
    """Where the figures come from."""
    arch: str | None = None
    """Kind of processor, as in `hardware.arch`; None: not known, or a GPU."""
    multiplies_bfloat16: bool = False
    """Whether it is a CPU known to have units for that."""


@dataclass(frozen=True, slots=True)
class Range:
    """An expected figure with what the calibration leaves open."""

    low: float
    mid: float
    high: float


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second of one user, all users together, and the time to the first token.

    Bounds are what the machine allows; expected is None where nothing was measured on such.
    """

    decode_bound: float | None
    """Tokens a second of one user."""
    attention_bound: float | None
    """Seconds of a step that are reading of K/V."""
    decode: Range | None
    prefill_bound: float | None
    ttft_bound: float | None
    """Seconds."""
    last_bound: float | None
    """Seconds of it that are reading of what only the prompt's last token needs."""
    ttft: Range | None
    limit: str
    """memory bandwidth, or computing: what a step of decoding waits for."""
    guess: str | None = None
    """Why decode and ttft are guesses; None: their shares were measured on such a processor, or
    there are none."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One combination on one machine."""

    model: str
    format: str
    kv: str
    context: int
    users: int
    target: Target
    memory: Memory
    largest_context: int
    """Of each user, within the model's own; 0: the weights alone do not fit."""
    limit: str
    """What keeps the context from being longer."""
    speed: Speed

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.target.memory

    @property
    def missing(self) -> int:
        """Bytes that it lacks."""
        return max(0, self.memory.total - self.target.memory)


# -- machines -------------------------------------------------------------------------------------


def this_machine(device: str = "auto", memory: int | None = None) -> Target:
    """The machine this runs on: its NVIDIA device where it has one and `device` is not "cpu".

    memory: bytes that a program can have; None: what is free now.

    Raises:
      ConfigError: "gpu" was asked for, and none is found; the memory is not known.
    """
    gpus = hardware.nvidia_gpus() if device != "cpu" else []
    if gpus:
        gpu = gpus[0]
        known = _known(gpu.name)
        return Target(
            f"{gpu.name}, here",
            "gpu",
            memory or gpu.free_bytes,
            known.bandwidth_gbs * 1e9 if known else None,
            _named_rates(known) if known else {},
            f"{'as said' if memory else 'free now'}; rates: {known.source if known else 'unknown'}",
        )
    if device == "gpu":
        raise ConfigError("device 'gpu': nvidia-smi finds none here; use cpu, or a device by name")
    machine, measured = hardware.machine(), probe.rates()
    found = memory or machine.available_bytes or machine.memory_bytes
    if found is None:
        raise ConfigError("the memory of this machine cannot be read; say it with --memory 16GB")
    about = "as said" if memory else "available now"
    about += f"; {measured.cores} cores read {measured.bandwidth / 1e9:.1f} GB/s"
    about += ", measured while other programs ran" if measured.busy else ", measured"
    return Target(
        "this machine",
        "cpu",
        found,
        measured.bandwidth,
        measured.operations,
        about,
        hardware.arch(),
        machine.multiplies_bfloat16,
    )


def named(name: str) -> Target:
    """A device of the table.

    Raises:
      ConfigError: there is none of this name, with near matches.
    """
    device = device_of(name)
    memory = int(device.memory_bytes * USABLE[device.kind])
    place: Place = "gpu" if device.kind == "gpu" else "cpu"
    about = f"{device.source}; {USABLE[device.kind]:.0%} of {device.memory_gb:g} GB taken as free"
    rates = _named_rates(device)
    arch = None if place == "gpu" else device.arch
    return Target(device.name, place, memory, device.bandwidth_gbs * 1e9, rates, about, arch)


def _named_rates(device: Device) -> dict[str, float | None]:
    """On a GPU weights of few bits become bfloat16 before they are multiplied."""
    wide = device.bf16_tflops and device.bf16_tflops * 1e12
    low = device.int8_tops and device.int8_tops * 1e12
    if device.kind == "gpu":
        low = wide
    return {"float32": wide, "bfloat16": wide, "rows": low, "groups": low}


def _known(name: str) -> Device | None:
    """The table's entry of a GPU as its driver calls it."""
    words = re.sub(r"(nvidia|geforce|tesla|pcie|sxm\d?|-)", " ", name.lower()).split()
    for size in range(len(words), 0, -1):
        try:
            return device_of("-".join(words[:size]))
        except ConfigError:
            continue
    return None


def size_of(text: str) -> int:
    """Bytes of "12GB", "512M", "1.5 TiB". As memory chips are sold, a GB is 2^30.

    Raises:
      ConfigError: it is no size.
    """
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([kmgt]?)i?b?\s*", text.lower())
    size = int(float(found[1]) * 1024 ** " kmgt".index(found[2] or " ")) if found else 0
    if size < 1:
        raise ConfigError(f"memory {text[:40]!r}: write a size, such as 12GB, 512MB or 1.5TB")
    return size


def tokens_of(text: str) -> int:
    """Tokens of "32K", "8192", "1M"; K is 1024.

    Raises:
      ConfigError: it is no number of tokens.
    """
    found = re.fullmatch(r"\s*(\d{1,9})\s*([km]?)\s*", text.lower())
    tokens = int(found[1]) * 1024 ** " km".index(found[2] or " ") if found else 0
    if not 1 <= tokens <= MOST_CONTEXT:
        raise ConfigError(f"context {text[:40]!r}: write tokens, such as 8192, 32K or 128K")
    return tokens


def format_of(text: str) -> str:
    """A format by one of its names.

    Raises:
      ConfigError: there is none of this name.
    """
    name = SPELLINGS.get(text.lower(), text.lower())
    if name not in sizing.FORMATS:
        known = ", ".join(sizing.FORMATS)
        raise ConfigError(f"format {text[:40]!r}: must be one of {known}, or 32, 16, 8, 4, 2")
    return name


# -- forward --------------------------------------------------------------------------------------


def plan(
    name: str,
    config: Gemma4Config,
    format: str,
    target: Target,
    *,
    context: int,
    users: int = 1,
    kv: str = "auto",
    prompt: int = PROMPT,
    media: bool = True,
    drafter: bool = False,
    weights: dict[str, int] | None = None,
) -> Plan:
    """What this combination takes and how fast it will be.

    weights: bytes by part, where they are known better than from the format (a checkpoint's own).

    Raises:
      ConfigError: a number out of range, an unknown format or way to store K/V.
    """
    text = config.text_config
    kv = ("int8" if target.place == "cpu" else "bfloat16") if kv == "auto" else kv
    if not 1 <= users <= MOST_USERS:
        raise ConfigError(f"users {users}: must be from 1 to {MOST_USERS}")
    if not 1 <= context <= text.max_position_embeddings:
        raise ConfigError(
            f"context {context}: {name} has 1 to {text.max_position_embeddings} tokens"
        )
    found = sizing.memory(
        config, format, context,
        kv=kv, sequences=users, place=target.place, towers=media, drafter=drafter,
        weights=weights, multiplies_bfloat16=target.multiplies_bfloat16,
    )  # fmt: skip
    fixed = sum(found.weights.values()) + found.runtime
    largest = sizing.largest_context(
        text,
        target.memory - fixed,
        sizing.KV_VALUES[kv],
        users,
        value_bytes=sizing.compute_bytes(format, target.place),
    )
    if largest == text.max_position_embeddings:
        limit = "the model's own context"
    elif largest:
        limit = f"memory for {kv} K/V" + (f" of {users} users" if users > 1 else "")
    else:
        limit = "memory for weights"
    speed = speed_of(
        config, format, target, context, users, kv, min(prompt, context), found.weights
    )
    return Plan(name, format, kv, context, users, target, found, largest, limit, speed)


def speed_of(
    config: Gemma4Config,
    format: str,
    target: Target,
    context: int,
    users: int,
    kv: str,
    prompt: int,
    weights: dict[str, int],
) -> Speed:
    """How fast a combination is: bounds, and what is expected where it was measured on such.

    prompt: tokens before the first reply token. weights: bytes by part, from `sizing.memory`.
    """
    text, scheme = config.text_config, scheme_of(format)
    rate, bandwidth = target.rates.get(scheme), target.bandwidth
    step = attending = every = last = None
    chunk = min(prompt, sizing.CHUNK_TOKENS)
    passes = math.ceil(prompt / chunk)
    limit = "not known"
    if bandwidth:
        attending = users * work.decode_kv_bytes(text, context, sizing.KV_VALUES[kv]) / bandwidth
        step = work.decode_weight_bytes(text, weights, users) / bandwidth + attending
        limit = "memory bandwidth"
        computing = users * work.decode_flops(text, context) / rate if rate else 0.0
        if computing > step:
            step, limit = computing, "computing"
        if rate:
            # Attention multiplies floats, whatever the weights are.
            products, scores = work.prompt_flops(text, prompt)
            working = products / rate + scores / (target.rates.get("float32") or rate)
            read, read_last = work.prompt_weight_bytes(text, weights, chunk)
            every = max(working, passes * read / bandwidth)
            last = read_last / bandwidth
    ttft = None if every is None or last is None else every + last
    kinds = format, "float" if format in sizing.FLOATS else scheme
    decoding, prefilling = (_record(target, kinds, what) for what in ("decode", "prefill"))
    used = [record for record, bound in ((decoding, step), (prefilling, ttft)) if bound]
    owned, layers = text.first_kv_shared_layer, text.num_hidden_layers
    return Speed(
        decode_bound=1 / step if step else None,
        attention_bound=attending,
        decode=_rates(_expected_step(step, decoding, layers, attending or 0.0)),
        prefill_bound=prompt / ttft if ttft else None,
        ttft_bound=ttft,
        last_bound=last,
        ttft=_sum(
            _expected_prompt(every, prefilling, decoding, owned * prompt, owned * passes),
            _expected_step(last, decoding, layers - owned),
        ),
        limit=limit,
        guess=_guess(target, used),
    )


def scheme_of(format: str) -> str:
    """What is multiplied in a format, as `probe.Rates` names it: floats, or weights of few bits
    with a scale a row, or with one for each group of inputs."""
    return format if format in sizing.FLOATS else "groups" if format in GROUPED else "rows"


def _record(target: Target, kinds: tuple[str, str], what: str) -> Record | None:
    """What was measured of a format, or of its kind, at such a place: on the target's processor if
    it was, else on another; None where it was not."""
    for kind in kinds:
        asked = (target.place, kind, what)
        found = [r for r in calibration() if (r["place"], r["kind"], r["what"]) == asked]
        if found:
            return next((r for r in found if r["arch"] == target.arch), found[0])
    return None


def _expected_step(
    bound: float | None, record: Record | None, layers: int, attending: float = 0.0
) -> Range | None:
    """Seconds that a token is expected to take where `bound` are the least; None where nothing was
    measured.

    layers: how many it runs through. attending: seconds of the bound that are reading of K/V.
    """
    if not bound or record is None:
        return None
    fixed = layers * record["layer_seconds"] + attending / record["kv_share"]
    return _shared(bound - attending, record, fixed)


def _expected_prompt(
    bound: float | None, record: Record | None, token: Record | None, rows: int, layers: int
) -> Range | None:
    """Likewise of all of a prompt's tokens. token: the record of one; rows: how many run through
    layers, in all; layers: how many its passes do."""
    if not bound or record is None or token is None:
        return None
    fixed = rows * record["row_seconds"] + layers * token["layer_seconds"]
    return _shared(bound, record, fixed)


def _shared(bound: float, record: Record, fixed: float) -> Range:
    return Range(*(bound / share + fixed for share in reversed(record["share"])))


def _sum(one: Range | None, other: Range | None) -> Range | None:
    if one is None or other is None:
        return None
    return Range(one.low + other.low, one.mid + other.mid, one.high + other.high)


def _guess(target: Target, used: Iterable[Record | None]) -> str | None:
    for record in used:
        if record and record["arch"] != target.arch:
            here = target.arch or "another processor"
            return (
                f"the shares were measured on {record['arch']}, on {here} none were; there, in a "
                "checkout, `python -m benchmarks.fit --calibrate` measures them"
            )
    return None


def _rates(seconds: Range | None) -> Range | None:
    return seconds and Range(1 / seconds.high, 1 / seconds.mid, 1 / seconds.low)


@cache
def calibration() -> tuple[Record, ...]:
    """Records of `benchmarks.fit`: place, arch (as `hardware.arch` has it), kind (a format, or
    float, rows, groups), what (decode, prefill), share of the bound as [least, usual, most],
    source. Of decode kv_share of the part that is reading of K/V, and layer_seconds that each layer
    takes besides; of prefill row_seconds that a token takes besides in each layer that owns K/V,
    for norms, rounding and all else that is not multiplied; a pass of a prompt takes layer_seconds
    in these layers as a token does. The other layers take a prompt's last token as they do one that
    is generated."""
    path = resources.files("gemsmith") / "calibration.json"
    return tuple(json.loads(path.read_text(encoding="utf-8")))


# -- inverse --------------------------------------------------------------------------------------


def search(
    target: Target,
    *,
    context: int,
    users: int = 1,
    kv: str | None = None,
    formats: Iterable[str] = SEARCHED,
    models: Mapping[str, Gemma4Config] = PRESETS,
    prompt: int = PROMPT,
    media: bool = True,
) -> list[Plan]:
    """Every combination of model, format and way to store K/V that fits, the best first. mobile is
    tried for the sizes of which Google publishes it, those with per-layer inputs.

    Best: formats that any weights may be rounded to before those that need weights trained for
    them; the larger model; more bits; K/V as the model computes them before int8. What suits a task
    is another question, see `gemsmith choose`.

    Raises:
      CapacityError: nothing fits; the closest three, and what each lacks.
      ConfigError: as `plan`; no model has so long a context.
    """
    longest = max(c.text_config.max_position_embeddings for c in models.values())
    if context > longest:
        raise ConfigError(f"context {context}: the longest of any model is {longest} tokens")
    ways = ("bfloat16", "int8") if kv in (None, "auto") else (kv,)
    plans = [
        plan(
            name, config, format, target,
            context=context, users=users, kv=way, prompt=prompt, media=media,
        )
        for name, config in models.items()
        for format in formats
        for way in ways
        if context <= config.text_config.max_position_embeddings
        and (format != "mobile" or config.text_config.hidden_size_per_layer_input)
    ]  # fmt: skip
    fitting = [found for found in plans if found.fits]
    if not fitting:
        raise CapacityError(_nothing(plans, target, context, users))
    return sorted(fitting, key=_rank)


def _rank(found: Plan) -> tuple[bool, int, int, int]:
    config = PRESETS.get(found.model)
    size = sizing.text_parameters(config.text_config) if config else 0
    bits = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4, "mobile": 3, "int2": 2}
    return (
        found.format in TRAINED_FOR,
        -size,
        -bits[found.format],
        -sizing.KV_VALUES[found.kv],
    )


def _nothing(plans: list[Plan], target: Target, context: int, users: int) -> str:
    lines = []
    for found in sorted(plans, key=lambda p: (p.missing, *_rank(p)))[:3]:
        room = f"; {found.largest_context} tokens would fit" if found.largest_context else ""
        lines.append(
            f"{found.model} {found.format} with {found.kv} K/V needs "
            f"{gib(found.memory.total)}, {gib(found.missing)} more{room}"
        )
    several = f"{users} users with " if users > 1 else ""
    return (
        f"nothing fits {gib(target.memory)} ({target.name}) for {several}{context} tokens of "
        "context; closest:\n  " + "\n  ".join(lines) + "\nUse a shorter context, fewer users, or "
        "more memory."
    )


def gib(size: int) -> str:
    """GiB of 2^30 bytes, or MiB where they are few."""
    return f"{size / GIB:.2f} GiB" if size >= GIB // 10 else f"{size / (1 << 20):.1f} MiB"
