"""What gemsmith must reach on two cores, what it reached, and why not where it did not.

Judged from records alone, never typed: what was not measured says so. A requirement holds for the
model it names, and for ratios between programs both figures come from one run. A cause is printed
where a requirement falls short; what in it is no record's figure, docs/log.md has measured.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]
OURS, MOBILE = "gemsmith int4", "gemsmith mobile"
SCHEMAS = 10_000
LLAMA, TRANSFORMERS = "llama.cpp Q4_0", "Transformers bf16"
SERVERS = ("gemsmith serve", "llama-server")
ROWS = (
    "two fifths of the processor time are products on the matrix unit, the rest unpacking, "
    "attention, gated units, norms and rounding (docs/log.md)"
)
CAUSES = {
    ("pocket", "1", "tokens_per_s"): "a token's pass takes under a millisecond; the rest is Python "
    "around it",
    ("pocket", "1", "later_turns_s"): "most of a prompt of so small a model is no product: "
    "attention, norms, rounding, and Python around the pass",
    ("pocket", "32", "later_turns_s"): "the engine's thread is never idle: prompts share its steps "
    "with replies, and who is answered sooner asks sooner",
    ("E2B", "1", "later_turns_s"): "20 new tokens are one pass, which reads all weights as at "
    "llama-server",
}
"""Of shortfalls beside llama-server, by model, clients and figure."""
GROWING = "attention over the context takes the difference"
UNKNOWN = "cause not measured"


@dataclass(frozen=True, slots=True)
class Must:
    """One requirement and how it stands."""

    text: str
    needed: float
    unit: str
    at_most: bool
    measured: float | None
    why: str = ""
    """What to know beside the figure, or why nothing was measured."""
    cause: str = ""
    """What a shortfall comes from."""

    @property
    def passed(self) -> bool:
        if self.measured is None:
            return False
        return self.measured <= self.needed if self.at_most else self.measured >= self.needed

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return f"not measured: {self.why}"
        if self.passed:
            return "pass" + (f" ({self.why})" if self.why else "")
        said = "; ".join(filter(None, (self.why, self.cause))) or UNKNOWN
        if not self.needed:
            return f"{self.measured:g} too many: {said}"
        gap = abs(self.measured - self.needed) / self.needed
        return f"{gap:.0%} {'over' if self.at_most else 'short'}: {said}"

    @property
    def cells(self) -> tuple[str, str, str, str]:
        sign = "<=" if self.at_most else ">="
        found = "-" if self.measured is None else _number(self.measured, self.unit)
        return self.text, f"{sign} {_number(self.needed, self.unit)}", found, self.verdict


def musts(records: Iterable[Record]) -> list[Must]:
    """Every requirement, judged from the latest of the records given (in their order)."""
    latest: dict[tuple[str, str, str], Record] = {}
    for record in records:
        latest[record["name"], record["model"], record.get("dtype", "")] = record
    e2b = latest.get(("peers", "E2B", "4-bit"))
    return [
        *_decoding(e2b, latest.get(("kernels", "any", "low-bit"))),
        *_prefill(e2b),
        *_alone(latest),
        *_large(latest),
        _grammar(latest),
        _probes(latest),
        *_serving(latest),
        *_soak(latest),
    ]


def _decoding(peers: Record | None, kernels: Record | None) -> Iterator[Must]:
    for name, needed in ((OURS, 1.4), (MOBILE, 2.2)):
        yield _ratio(peers, "decode 128", name, LLAMA, needed, why=_reading)
        share, why = None, _absent(peers, name, "decode 128")
        ceiling = peers and peers["gb_s_measured"]
        if not why and peers and ceiling:
            speed = _speed(peers, name, "decode 128") or 0.0
            share = speed * peers["programs"][name]["bytes_per_token"] / 1e9 / ceiling
            why = "" if share >= 0.85 else f"of {ceiling:.1f} GB/s"
        cause = _streaming(kernels, name)
        yield Must(f"decode, {name}, weights read", 0.85, "%", False, share, why, cause)
        yield _within(peers, name)
    yield _ratio(peers, "8 streams", OURS, LLAMA, 2.0)


def _streaming(kernels: Record | None, name: str) -> str:
    """Why a token's weights are not read as fast as memory gives them."""
    cause = "a token has some 3 ms of attention, norms and rounding, and 2 of Python and torch"
    if not kernels:
        return cause
    ours = "int4-g32s x1" if "int4-g32s x1" in kernels["runs"] else "int4-g32 x1"  # of before
    kinds = (ours,) if name == OURS else ("int2 x1", "int4 x1", "int8 x1")
    runs = [kernels["runs"][kind] for kind in kinds]
    share = sum(run["median"] / run["ceiling"] for run in runs) / len(runs)
    return f"products alone read at {share:.0%} (benchmarks.kernels); {cause}"


def _within(peers: Record | None, name: str) -> Must:
    """Speed at 8192 over speed at 128."""
    why = _absent(peers, name, "decode 8192")
    share = None
    if peers and not why:
        share = (_speed(peers, name, "decode 8192") or 0) / (_speed(peers, name, "decode 128") or 1)
    return Must(f"decode at 8192 over 128, {name}", 0.8, "%", False, share, why, GROWING)


def _prefill(peers: Record | None) -> Iterator[Must]:
    amx = any(isa.startswith("amx") for isa in peers["machine"]["isa"]) if peers else False
    for tokens in (512, 2048):
        task = f"prefill {tokens}"
        for theirs, needed in ((TRANSFORMERS, 2.5), (LLAMA, 15.0 if amx else 4.0)):
            unit = "bfloat16 has the unit too; " if theirs == TRANSFORMERS else ""
            cause = unit + ROWS if amx else ""
            yield _ratio(peers, task, OURS, theirs, needed, cause=cause)
    why, kept = _absent(peers, OURS, "prefill 8192"), None
    if peers and not why:
        kept = (_speed(peers, OURS, "prefill 8192") or 0) / (
            _speed(peers, OURS, "prefill 2048") or 1
        )
        theirs = _speed(peers, LLAMA, "prefill 8192"), _speed(peers, LLAMA, "prefill 2048")
        why = f"llama.cpp keeps {theirs[0] / theirs[1]:.0%}" if theirs[0] and theirs[1] else ""
    text = "prefill of 8192 over 2048 tokens, gemsmith int4"
    yield Must(text, 0.5, "%", False, kept, why, GROWING)


def _alone(latest: Mapping[tuple[str, str, str], Record]) -> Iterator[Must]:
    for dtype, most in (("4-bit", 1.7), ("mobile", 1.25)):
        decode = latest.get(("decode", "E2B", dtype))
        why = (
            "" if decode else f"run python -m benchmarks.decode --bits {dtype.removesuffix('-bit')}"
        )
        passes = decode["passes_seconds"] if decode else {}
        for rows, times in (("4", 1.4), ("8", 2.0)):
            found = passes[rows]["median"] / passes["1"]["median"] if passes else None
            text = f"a pass of {rows} tokens over one, {dtype}"
            cause = "computing, not reading, takes longer"
            yield Must(text, times, "x", True, found, why, cause)
        found = decode["first_token_seconds"]["median"] if decode else None
        yield Must(f"start to first token, {dtype}", 2.5, "s", True, found, why)
        memory = latest.get(("memory", "E2B", dtype))
        why = (
            "" if memory else f"run python -m benchmarks.memory --bits {dtype.removesuffix('-bit')}"
        )
        if memory:
            why = f"{memory['floor'] / 1e9:.2f} GB of it are weights"
            if memory.get("page_cache") is not None:
                why += f"; {memory['page_cache'] / 1e9:.2f} GB more in the page cache"
        found = memory["peak"] / 1e9 if memory else None
        yield Must(f"peak memory, 256 tokens, {dtype}", most, "GB", True, found, why)


def _large(latest: Mapping[tuple[str, str, str], Record]) -> Iterator[Must]:
    peers = latest.get(("peers", "26B-A4B", "4-bit"))
    yield _ratio(peers, "decode 128", OURS, LLAMA, 1.4, of="26B-A4B", why=_reading)
    why, peak = _absent(peers, OURS, "decode 128"), None
    if peers and not why:
        peak = peers["programs"][OURS]["peak"]["decode 128"] / 1e9
    yield Must("peak memory, 26B-A4B int4", 16.0, "GB", True, peak, why)


def _grammar(latest: Mapping[tuple[str, str, str], Record]) -> Must:
    found = latest.get(("grammar", "pocket", "4-bit"))
    why, measured = "run python -m benchmarks.grammar", None
    if found:
        measured, why = found["in_a_row"], ""
        if measured < SCHEMAS:
            why = "a call or reply is wrong" if found["failures"] else "no more were asked"
    text = "random schemas on end, calls that all parse and fit, no empty reply"
    return Must(text, SCHEMAS, "schemas", False, measured, why)


def _probes(latest: Mapping[tuple[str, str, str], Record]) -> Must:
    found = latest.get(("conformance", "pocket", "bfloat16"))
    text = "probes that fail at gemsmith serve"
    if not found or not found["complete"]:
        why = "run python -m benchmarks.conformance"
        return Must(text, 0, "probes", True, None, why)
    failed = found["programs"][SERVERS[0]]["failed"]
    return Must(text, 0, "probes", True, len(failed), ", ".join(failed))


def _serving(latest: Mapping[tuple[str, str, str], Record]) -> Iterator[Must]:
    for model, trained in (("pocket", "bfloat16"), ("E2B", "4-bit")):
        under, loops = latest.get(("serve", model, "4-bit")), latest.get(("agent", model, trained))
        for clients in ("1", "8", "32"):
            text = f"{model}, {clients} clients".replace(" 1 clients", " 1 client")
            for figure, what, needed, at_most in (
                ("tokens_per_s", "tokens/s", 2.0, False),
                ("later_turns_s", "time to first token from turn 2 on", 0.3, True),
            ):
                yield _beside(
                    under, "serve", model, f"{text}, {what}", needed, "loads", clients, figure,
                    at_most=at_most, cause=CAUSES.get((model, clients, figure), ""),
                )  # fmt: skip
        what = f"{model}, time of ten tool calls"
        yield _beside(loops, "agent", model, what, 0.5, "seconds", at_most=True)


def _soak(latest: Mapping[tuple[str, str, str], Record]) -> Iterator[Must]:
    soak = latest.get(("soak", "pocket", ""))
    enough = soak is not None and soak["minutes"] >= 60 and soak["clients"] >= 32
    why = "" if enough else "run python -m benchmarks.soak"
    if soak and not enough:
        why = f"{soak['minutes']:g} minutes of {soak['clients']} clients are too little; {why}"
    for what, needed, unit, field in (
        ("errors that are not the client's", 0, "faults", "faults"),
        ("change of resident memory", 0.02, "%", "growth"),
    ):
        found = abs(soak[field]) if soak and enough else None
        yield Must(f"soak of an hour, {what}", needed, unit, True, found, why)


def _beside(
    record: Record | None,
    benchmark: str,
    model: str,
    what: str,
    needed: float,
    *path: str,
    at_most: bool = False,
    cause: str = "",
) -> Must:
    """A ratio of both servers' medians, which stand at `path` of each."""
    text, medians = f"{what}, {SERVERS[0]} over {SERVERS[1]}", []
    for name in SERVERS:
        found: Any = record["programs"][name] if record else {}
        for key in (*path, "median"):
            found = found.get(key, {})
        medians.append(found)
    ours, theirs = medians
    if ours and theirs:
        return Must(text, needed, "x", at_most, ours / theirs, cause=cause)
    missing = record["programs"][SERVERS[1]]["missing"] if record else ""
    run = f"run python -m benchmarks.{benchmark} --model {model}"
    return Must(text, needed, "x", at_most, None, f"{SERVERS[1]}: {missing}" if missing else run)


def _ratio(
    peers: Record | None,
    task: str,
    ours: str,
    theirs: str,
    needed: float,
    *,
    of: str = "",
    why: Callable[[Record, str, str, float], str] = lambda *_: "",
    cause: str = "",
) -> Must:
    text = f"{of} {task}, {ours} over {theirs}".strip()
    missing = _absent(peers, ours, task) or _absent(peers, theirs, task)
    if missing or not peers:
        return Must(text, needed, "x", False, None, missing)
    ratio = (_speed(peers, ours, task) or 0) / (_speed(peers, theirs, task) or 1)
    return Must(text, needed, "x", False, ratio, why(peers, ours, theirs, needed), cause)


def _reading(peers: Record, ours: str, theirs: str, needed: float) -> str:
    """What the machine's reading speed allows, if that is the limit."""
    ceiling = peers["gb_s_measured"]
    if not ceiling:
        return ""
    mine = peers["programs"][ours]["bytes_per_token"]
    speed, their_speed = (_speed(peers, name, "decode 128") or 1 for name in (ours, theirs))
    share = speed * mine / 1e9 / ceiling
    most = ceiling * 1e9 / mine / their_speed
    if speed / their_speed >= needed:
        return ""
    if most < needed:
        return f"at {ceiling:.1f} GB/s {mine / 1e9:.2f} GB a token allow {most:.2f}x at most"
    return f"reads at {share:.0%} of {ceiling:.1f} GB/s; at all of it {most:.2f}x"


def _absent(peers: Record | None, name: str, task: str) -> str:
    """Why there is no such figure; empty if there is one."""
    if peers is None:
        return "run python -m benchmarks.peers"
    program = peers["programs"].get(name)
    if program is None:
        return f"{name} does not run this model"
    if task not in program["speeds"]:
        return f"{name}: {program['missing'] or 'not asked for'}"
    return ""


def _speed(peers: Record, name: str, task: str) -> float | None:
    found = peers["programs"].get(name, {}).get("speeds", {}).get(task)
    return found and found["median"]


def _number(value: float, unit: str) -> str:
    if isinstance(value, int):
        return f"{value} {unit}"
    return f"{value:.0%}" if unit == "%" else f"{value:.2f} {unit}".replace(" x", "x")
