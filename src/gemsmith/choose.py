"""Which Gemma 4 for a job on a machine: rules, each with its reason, over facts with a source.

    1. What the architecture must have: ears, and room for the context. A model without is out.
    2. What the machine must hold: weights at some format, and K/V of all users at the context.
    3. What the machine must do: tokens a second, time to the first, where its rates are known.
    4. What the job needs: published scores of its kind of work, and floors under them.
    5. Of those left the one with the best mean of these scores, in its most exact format.

Formats go from exact to small, K/V likewise; a format is taken only where the one before it does
not fit or is too slow. What no source gives is None, is said to be unknown, and never counts as
met or as missed. Privacy is no rule: all of these run where their weights are, and send nothing.

Not a measurement: published scores are of the released weights, on others' tasks.
`gemsmith choose --measure` asks your own.

Sources: Google's model cards for the scores (read in public copies of the tables); fit.py for
memory and speed. ASSUMED_SHARE is neither.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from gemsmith import fit, sizing
from gemsmith.config import PRESETS, Gemma4Config, TextConfig
from gemsmith.errors import ConfigError
from gemsmith.fit import MOST_CONTEXT, MOST_USERS, Speed, Target, gib
from gemsmith.sizing import Memory

CARD = "Gemma 4 model card (ai.google.dev/gemma/docs/core/model_card_4)"
CARD_12B = (
    "Gemma 4 12B model card (huggingface.co/google/gemma-4-12B-it; its scores of sound are marked "
    "with an asterisk, whose note was not at hand)"
)


# -- facts ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One published test. Scores by size; a size that is not there has no published score."""

    title: str
    of: str
    """What it is a test of."""
    scores: Mapping[str, float]
    unit: str = "%"
    lower_is_better: bool = False

    def merit(self, size: str) -> float | None:
        """0 to 100, more is better; None if there is no score."""
        score = self.scores.get(size)
        return score if score is None or not self.lower_is_better else 100 * (1 - score)

    def source(self, size: str) -> str:
        return CARD_12B if size == "12B" else CARD


def _sizes(*scores: float) -> dict[str, float]:
    return dict(zip(PRESETS, scores, strict=True))


BENCHMARKS: dict[str, Benchmark] = {
    "mmlu-pro": Benchmark("MMLU Pro", "knowledge", _sizes(60.0, 69.4, 77.2, 82.6, 85.2)),
    "gpqa": Benchmark("GPQA Diamond", "science", _sizes(43.4, 58.6, 78.8, 82.3, 84.3)),
    "livecodebench": Benchmark("LiveCodeBench v6", "code", _sizes(44.0, 52.0, 72.0, 77.1, 80.0)),
    "tau2": Benchmark("Tau2, mean of 3", "tool use", _sizes(24.5, 42.2, 69.0, 68.2, 76.9)),
    "mmmlu": Benchmark("MMMLU", "languages", _sizes(67.4, 76.6, 83.4, 86.3, 88.4)),
    "mmmu-pro": Benchmark("MMMU Pro", "pictures", _sizes(44.2, 52.6, 69.1, 73.8, 76.9)),
    "omnidocbench": Benchmark(
        "OmniDocBench 1.5", "documents", _sizes(0.290, 0.181, 0.164, 0.149, 0.131),
        "edit distance", lower_is_better=True,
    ),
    "fleurs": Benchmark(
        "FLEURS", "speech", {"E2B": 0.09, "E4B": 0.08, "12B": 0.069}, "error rate",
        lower_is_better=True,
    ),
    "covost": Benchmark(
        "CoVoST", "spoken translation", {"E2B": 33.47, "E4B": 35.54, "12B": 38.5}, "points"
    ),
    "mrcr": Benchmark(
        "MRCR v2, 8 needles, 128K", "long context", _sizes(19.1, 25.4, 43.4, 44.1, 66.4)
    ),
}  # fmt: skip
"""By the name a floor is given by."""

TASKS = {
    "general": "mmlu-pro",
    "science": "gpqa",
    "code": "livecodebench",
    "agents": "tau2",
    "languages": "mmmlu",
}
"""Kind of work -> the benchmark that stands for it."""
LONG = 65_536
"""Tokens of context from which a benchmark of long contexts counts too."""
IMAGES = {"none": 0, "coarse": 140, "normal": 280, "fine": 1120}
"""Detail of pictures -> soft tokens each may cost."""
VIDEO_TOKENS = 32 * 70
"""Of the shortest video one would show: 32 frames at 70 soft tokens."""
AUDIO_TOKENS = 750
"""Of 30 s of sound, 25 soft tokens a second."""

FORMATS = ("bfloat16", "int8", "int4")
"""From exact to small. Fewer bits are good only from weights trained for them."""
KV = ("bfloat16", "int8")
ASSUMED_SHARE = 0.5
"""Of a machine's peak rates, what a good engine reaches where fit.py has no measurement: not from a
source. Reports for Gemma 4 range from a third (26B-A4B on one card) to three quarters (dense)."""


# -- questions --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """A job. `ConfigError` where it cannot be meant."""

    task: str = "general"
    audio: bool = False
    video: bool = False
    images: str = "none"
    """A key of IMAGES."""
    context: int = 8192
    """Tokens of one conversation, pictures and reply included."""
    users: int = 1
    """Conversations at once."""
    speed: float | None = None
    """Tokens a second for each user, at least."""
    first: float | None = None
    """Seconds to the first token of a reply to a full context, at most."""
    floors: Mapping[str, float] | None = None
    """Benchmark -> the worst score that will do."""

    def __post_init__(self) -> None:
        for name, value, known in (("task", self.task, TASKS), ("images", self.images, IMAGES)):
            if value not in known:
                raise ConfigError(f"{name} {value!r}: choose {', '.join(known)}")
        for name, value, most in (
            ("context", self.context, MOST_CONTEXT),
            ("users", self.users, MOST_USERS),
        ):
            if not 1 <= value <= most:
                raise ConfigError(f"{name} {value}: must be from 1 to {int(most):,}")
        for name, limit in (("speed", self.speed), ("first", self.first)):
            if limit is not None and not 0 < limit < math.inf:
                raise ConfigError(f"{name} {limit}: must be above 0")
        for name, floor in (self.floors or {}).items():
            if name not in BENCHMARKS:
                raise ConfigError(
                    f"quality {name!r}: no such score; known: {', '.join(BENCHMARKS)}"
                )
            highest = 1 if BENCHMARKS[name].lower_is_better else 100
            if not 0 <= floor <= highest:
                raise ConfigError(f"quality {name}={floor}: must be from 0 to {highest}")
        if self.media_tokens >= self.context:
            raise ConfigError(
                f"context {self.context}: one picture, video and sound of this kind alone cost "
                f"{self.media_tokens} tokens; ask for more"
            )

    @property
    def media_tokens(self) -> int:
        return IMAGES[self.images] + self.video * VIDEO_TOKENS + self.audio * AUDIO_TOKENS

    @property
    def benchmarks(self) -> list[str]:
        """Those whose scores matter for the job, the leading one first."""
        names = [TASKS[self.task]]
        if self.images == "fine":
            names.append("omnidocbench")
        elif self.images != "none" or self.video:
            names.append("mmmu-pro")
        if self.audio:
            names.append("fleurs")
        if self.context >= LONG:
            names.append("mrcr")
        return list(dict.fromkeys([*names, *(self.floors or {})]))


# -- what a combination costs -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Option:
    """A size in a format on the machine, for the job."""

    size: str
    format: str
    kv: str
    memory: Memory
    """At the longest context that it has of the one asked."""
    rates: Speed
    missing: tuple[str, ...]
    """What keeps it from being chosen."""
    gap: tuple[int, float]
    """How far it is from fitting: what no machine can give it (a score short of a floor 1, no ears
    or too short a context 2), then how many times too little the rest is."""
    merit: float | None
    """Mean of the published scores that matter, 0 to 100."""
    unknown: tuple[str, ...]
    """What was asked and cannot be said."""

    @property
    def memory_bytes(self) -> int:
        """Weights in memory, K/V of all users, workspace, runtime."""
        return self.memory.total

    @property
    def speed(self) -> float | None:
        """Tokens a second for each user: measured shares of what the machine allows, or the assumed
        one; None where nothing is known."""
        found = self.rates
        if found.decode is not None:
            return found.decode.mid
        return found.decode_bound and found.decode_bound * ASSUMED_SHARE

    @property
    def first(self) -> float | None:
        """Seconds to the first token of a full context, likewise."""
        found = self.rates
        if found.ttft is not None:
            return found.ttft.mid
        return found.ttft_bound and found.ttft_bound / ASSUMED_SHARE

    @property
    def guess(self) -> str | None:
        """Why `speed` and `first` are guesses; None: they are not, or are not known."""
        found = self.rates
        speed, first = found.decode_bound is None, found.ttft_bound is None
        if (speed or found.decode) and (first or found.ttft):
            return found.guess
        return f"{ASSUMED_SHARE:.0%} of what the machine allows; on such nothing was measured yet"

    def __str__(self) -> str:
        return f"{self.size} {self.format}" + (", K/V in int8" if self.kv == "int8" else "")


def examine(size: str, format: str, kv: str, needs: Needs, machine: Target) -> Option:
    """Hold one size in one format against the job and the machine."""
    config = PRESETS[size]
    text = config.text_config
    context = min(needs.context, text.max_position_embeddings)
    media = needs.audio or needs.video or needs.images != "none"
    held = sizing.memory(
        config, format, context,
        kv=kv, sequences=needs.users, place=machine.place, towers=media,
        multiplies_bfloat16=machine.multiplies_bfloat16,
    )  # fmt: skip
    rates = fit.speed_of(config, format, machine, context, needs.users, kv, context, held.weights)
    weights, cache, memory = sum(held.weights.values()), held.kv, held.total
    missing: list[str] = []
    unknown: list[str] = []
    never, ratio = 0, 1.0

    if needs.audio and config.audio_config is None:
        missing.append("it cannot hear: of the five, E2B, E4B and 12B can")
        never += 2
    if needs.context > text.max_position_embeddings:
        missing.append(
            f"its context ends at {text.max_position_embeddings:,} tokens, "
            f"{needs.context:,} are asked"
        )
        never += 2
    if memory > machine.memory:
        lack = memory - machine.memory
        missing.append(
            f"{gib(memory)} are needed ({gib(weights)} weights, {gib(cache)} K/V), "
            f"{gib(machine.memory)} are there: {gib(lack)} are missing"
        )
        ratio = max(ratio, memory / max(1, machine.memory))

    option = Option(size, format, kv, held, rates, (), (0, 1.0), None, ())
    speed, first = option.speed, option.first
    about = "~" if option.guess else "about "
    if needs.speed is not None and speed is None:
        unknown.append("its speed here: no bandwidth is known; name a --device")
    elif needs.speed is not None and speed is not None and speed < needs.speed:
        missing.append(
            f"{about}{speed:.3g} tokens a second for each user, {needs.speed:g} are asked"
        )
        ratio = max(ratio, needs.speed / speed)
    if needs.first is not None and first is None:
        unknown.append("its time to the first token here: no rate of the units is known")
    elif needs.first is not None and first is not None and first > needs.first:
        missing.append(
            f"{about}{first:.3g} s to the first token of a full context, {needs.first:g} are asked"
        )
        ratio = max(ratio, first / needs.first)

    for name, floor in (needs.floors or {}).items():
        benchmark = BENCHMARKS[name]
        score = benchmark.scores.get(size)
        if score is None:
            unknown.append(f"its {benchmark.title}: no score is published")
        elif (score > floor) if benchmark.lower_is_better else (score < floor):
            worst = "at most" if benchmark.lower_is_better else "at least"
            missing.append(f"{benchmark.title} {score:g}, {worst} {floor:g} is asked")
            never += 1
            high, low = max(score, floor), max(1e-9, min(score, floor))
            ratio = max(ratio, high / low)
    merits = [BENCHMARKS[name].merit(size) for name in needs.benchmarks]
    known = [merit for merit in merits if merit is not None]
    whole = len(known) == len(merits)
    return replace(
        option,
        missing=tuple(missing),
        gap=(never, ratio),
        merit=sum(known) / len(known) if known and whole else None,
        unknown=tuple(unknown),
    )


# -- the decision -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """One thing changed, and what would then be chosen."""

    what: str
    then: str


@dataclass(frozen=True, slots=True)
class Decision:
    """What to run, and why."""

    needs: Needs
    machine: Target
    options: list[Option]
    """The best of each size, best first; those that are missing something last, closest first."""
    changes: list[Change]

    @property
    def choice(self) -> Option | None:
        return self.options[0] if not self.options[0].missing else None

    @property
    def runner_up(self) -> Option | None:
        left = [option for option in self.options[1:] if not option.missing]
        return left[0] if left else None

    @property
    def closest(self) -> list[Option]:
        """Where nothing will do: the three that come closest."""
        return [] if self.choice else self.options[:3]

    def reasons(self) -> list[str]:
        """Why the choice is the choice; empty where there is none."""
        return list(_reasons(self)) if self.choice else []


def decide(needs: Needs, machine: Target) -> Decision:
    """Choose for the job on the machine, and find what would change the answer."""
    options = _ranked(needs, machine)
    return Decision(needs, machine, options, list(_changes(needs, machine, options)))


def _ranked(needs: Needs, machine: Target) -> list[Option]:
    best = [_best_of(size, needs, machine) for size in PRESETS]
    return sorted(best, key=_rank)


def _rank(option: Option) -> tuple[Any, ...]:
    if option.missing:
        return 1, option.gap, option.memory_bytes
    unknown = option.merit is None
    return 0, unknown, -(option.merit or 0), option.memory_bytes


def _best_of(size: str, needs: Needs, machine: Target) -> Option:
    """Of one size the most exact that will do, else what comes closest."""
    tried: list[Option] = []
    for format in FORMATS:
        for kv in KV:
            tried.append(examine(size, format, kv, needs, machine))
            if not tried[-1].missing:
                return tried[-1]
    return min(tried, key=lambda option: (len(option.missing), option.gap))


def _changes(needs: Needs, machine: Target, options: list[Option]) -> Iterator[Change]:
    """Each need dropped or eased, and more memory: where another size would be chosen."""
    now = options[0].size if not options[0].missing else None

    def then(what: str, needs: Needs, machine: Target = machine) -> Iterator[Change]:
        first = _ranked(needs, machine)[0]
        if not first.missing and first.size != now:
            yield Change(what, str(first))

    if needs.audio:
        yield from then("without sound", replace(needs, audio=False))
    else:
        hearing = _fits_media(needs, audio=True)
        if hearing is not None:
            yield from then("if it must hear", hearing)
    if needs.floors:
        yield from then("without the quality floor", replace(needs, floors=None))
    if needs.speed:
        yield from then("without the demand on speed", replace(needs, speed=None))
    if needs.first:
        yield from then("without the demand on the first token", replace(needs, first=None))
    if needs.users > 1:
        yield from then("for one user", replace(needs, users=1))
    for context in (needs.context // 2, needs.context // 4, 8192):
        if needs.media_tokens < context < needs.context:
            found = list(then(f"with a context of {context:,}", replace(needs, context=context)))
            if found:
                yield from found
                break
    longest = max(config.text_config.max_position_embeddings for config in PRESETS.values())
    if needs.context < longest:
        yield from then(f"with a context of {longest:,}", replace(needs, context=longest))
    # More memory: the least with which a size that is better, or any where none will do, fits.
    better: list[tuple[int, Option]] = []
    endless = replace(machine, memory=1 << 62)
    for size in PRESETS:
        for format in FORMATS:
            for kv in KV:
                option = examine(size, format, kv, needs, endless)
                if option.missing or option.memory_bytes <= machine.memory:
                    continue
                if now is None or _rank(option)[:3] < _rank(options[0])[:3]:
                    better.append((option.memory_bytes, option))
    if better:
        memory, option = min(better, key=lambda each: each[0])
        yield Change(f"with {gib(memory)} of memory to use", str(option))


def _fits_media(needs: Needs, *, audio: bool) -> Needs | None:
    try:
        return replace(needs, audio=audio)
    except ConfigError:
        return None


def _reasons(decision: Decision) -> Iterator[str]:
    needs, machine, chosen = decision.needs, decision.machine, decision.choice
    assert chosen is not None, "asked only where there is a choice"
    config = PRESETS[chosen.size]
    text = config.text_config
    names = ", ".join(BENCHMARKS[name].title for name in needs.benchmarks)
    left = sum(not option.missing for option in decision.options)
    if chosen.merit is None:
        yield f"of {left} sizes that will do none has all of these scores published: {names}"
    elif left > 1:
        yield f"of {left} sizes that will do it has the best published scores: {names}"
    else:
        yield f"it is the only size that will do; its published scores: {names}"
    yield (
        f"{gib(chosen.memory_bytes)} of {gib(machine.memory)} with {needs.users} x "
        f"{needs.context:,} tokens; {_format_reason(chosen)}"
    )
    if needs.audio:
        kind = "a tower of its own" if text.hidden_size_per_layer_input else "no tower"
        yield f"it hears, with {kind}; 26B-A4B and 31B do not"
    if needs.images != "none" or needs.video:
        yield _sight_reason(config)
    yield _cache_reason(text, chosen)
    if text.enable_moe_block:
        active, total = sizing.active_parameters(text), sizing.text_parameters(text)
        yield (
            f"a token passes {active / 1e9:.1f} of its {total / 1e9:.1f} billion weights: the "
            "memory of a large model, nearly the speed of a small one"
        )
    if text.hidden_size_per_layer_input:
        table = sizing.parameters(config)["ple_table"]
        yield f"{table / 1e9:.1f} billion of its weights are a table that stays on disk"
    yield _speed_reason(chosen)
    yield from (f"not known: {what}" for what in chosen.unknown)
    if chosen.format != "bfloat16":
        yield (
            f"the scores are of bfloat16; what {chosen.format} costs is not published: measure it "
            "with `gemsmith eval fidelity`"
        )


def _speed_reason(chosen: Option) -> str:
    found = chosen.rates
    if found.decode_bound is None:
        return "how fast it will be is not known: no bandwidth is"
    bound = f"{found.decode_bound:.3g} tokens a second for each user that {found.limit} allows"
    if found.decode is not None and found.guess:
        return f"~{found.decode.mid:.3g} of the {bound}, a guess"
    if found.decode is not None:
        return f"about {found.decode.mid:.3g} of the {bound}, by the share measured on such"
    return f"at most the {bound}; a good engine reaches about half"


def _format_reason(chosen: Option) -> str:
    if chosen.format == "bfloat16":
        return "no rounding is needed"
    wider = FORMATS[FORMATS.index(chosen.format) - 1]
    return f"{wider} would not fit or be too slow"


def _sight_reason(config: Gemma4Config) -> str:
    parts = sizing.parameters(config)
    if config.model_type == "gemma4_unified":
        return "it sees without a tower: patches go straight to the decoder"
    return (
        f"its eyes have {parts['vision'] / 1e6:.0f} million weights (E2B, E4B: 167; 26B, 31B: 570)"
    )


def _cache_reason(text: TextConfig, chosen: Option) -> str:
    growing = [plan for plan in text.layers if plan.owns_kv and plan.window is None]
    count = f"{len(growing)} of {text.num_hidden_layers}"
    words = f"K/V take {gib(chosen.memory.kv)}: {count} layers grow"
    return f"{words} with the context, the others hold {text.sliding_window:,} tokens or none"


def to_dict(decision: Decision) -> dict[str, Any]:
    """For programs."""

    def option(one: Option | None) -> dict[str, Any] | None:
        return one and {
            "size": one.size,
            "model": f"google/gemma-4-{one.size}-it",
            "format": one.format,
            "kv": one.kv,
            "memory_bytes": one.memory_bytes,
            "file_bytes": sum(sizing.weight_bytes(PRESETS[one.size], one.format).values()),
            "tokens_per_s": one.speed,
            "tokens_per_s_at_most": one.rates.decode_bound,
            "first_token_s": one.first,
            "first_token_s_at_least": one.rates.ttft_bound,
            "guess": one.guess,
            "merit": one.merit,
            "missing": list(one.missing),
            "unknown": list(one.unknown),
            "scores": {
                name: {"score": BENCHMARKS[name].scores.get(one.size),
                       "source": BENCHMARKS[name].source(one.size)}
                for name in decision.needs.benchmarks
            },
        }  # fmt: skip

    needs, machine = decision.needs, decision.machine
    return {
        "needs": {
            "task": needs.task, "audio": needs.audio, "video": needs.video,
            "images": needs.images, "context": needs.context, "users": needs.users,
            "speed": needs.speed, "first": needs.first, "quality": dict(needs.floors or {}),
        },
        "machine": {
            "name": machine.name, "memory_bytes": machine.memory, "place": machine.place,
            "about": machine.about,
            "bytes_per_s": machine.bandwidth, "rates": dict(machine.rates),
        },
        "choice": option(decision.choice),
        "reasons": decision.reasons(),
        "runner_up": option(decision.runner_up),
        "closest": [option(one) for one in decision.closest],
        "changes": [{"what": change.what, "then": change.then} for change in decision.changes],
        "options": [option(one) for one in decision.options],
        "assumed_share": ASSUMED_SHARE,
    }  # fmt: skip


Verdict = Literal["choice", "runner-up", "will do", "missing"]


def verdict(decision: Decision, option: Option) -> Verdict:
    """What became of an option."""
    if option.missing:
        return "missing"
    if option is decision.choice:
        return "choice"
    return "runner-up" if option is decision.runner_up else "will do"
