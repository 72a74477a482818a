"""Conformance of an OpenAI-compatible endpoint: probes, each a question with one right behaviour.

    with Endpoint(url) as endpoint: report = run(endpoint)

A probe is a function of `evals.probes`: it asks, and returns if all is well, raises `Failed` with
the bytes that show what is wrong, or `Skipped` where it cannot be said, with the reason. Probes ask
about form, never about wit: any model passes behind a server that keeps its word. What this is
not: a measure of the model, or of speed (`evals.measure`, `benchmarks/`).
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from gemsmith.errors import RequestError
from gemsmith.evals.endpoint import Endpoint, Failed, Skipped

GROUPS = {
    "models": "what is served",
    "chat": "the shape of a reply, and what a conversation may hold",
    "usage": "what a request is said to cost",
    "streaming": "a stream says what the whole reply says",
    "tools": "calls: forms, choices, schemas",
    "results": "answers to calls, and histories with them",
    "thinking": "thoughts in their place",
    "json": "answers held to a schema, thinking or not",
    "images": "pictures and what they may cost",
    "audio": "sound, longer than a window too",
    "cache": "a prefix that is known changes nothing",
    "determinism": "the same again, and log-probabilities",
    "stop": "stop strings",
    "limits": "lengths, n, and why a reply ends",
    "errors": "what cannot be served is said so",
    "cancel": "who leaves frees what is held",
}
SHOWN_CHARACTERS = 2000
"""Of a request or an answer, in a report."""
Check = Callable[[Endpoint], None]


@dataclass(frozen=True, slots=True)
class Probe:
    name: str
    group: str
    what: str
    """What holds if it passes, in one line."""
    check: Check


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a probe."""

    name: str
    group: str
    what: str
    status: Literal["pass", "fail", "skip"]
    reason: str = ""
    request: str = ""
    """Of a failure: the last body that was sent."""
    evidence: str = ""
    """Of a failure: the offending bytes; what is no UTF-8 as \\xNN."""
    seconds: float = 0.0


@dataclass(slots=True)
class Report:
    url: str
    model: str
    outcomes: list[Outcome] = field(default_factory=list)
    complete: bool = False

    def count(self, status: str) -> int:
        return sum(each.status == status for each in self.outcomes)

    def to_dict(self) -> dict[str, Any]:
        counts = {status: self.count(status) for status in ("pass", "fail", "skip")}
        head = {"url": self.url, "model": self.model, "complete": self.complete}
        return head | counts | {"probes": [asdict(each) for each in self.outcomes]}


PROBES: list[Probe] = []


def probe(group: str, what: str) -> Callable[[Check], Check]:
    """Make a function a probe, named as it is."""
    assert group in GROUPS, group

    def register(check: Check) -> Check:
        PROBES.append(Probe(check.__name__.replace("_", "-"), group, what, check))
        return check

    return register


def select(only: Sequence[str] = ()) -> list[Probe]:
    """The probes of some groups, or of these names; all without any.

    Raises:
      RequestError: no such group or probe.
    """
    from gemsmith.evals.probes import chat, media, ordinary, thinking, tools  # noqa: F401

    names = {each.name for each in PROBES}
    for word in only:
        if word not in GROUPS and word not in names:
            raise RequestError(f"--only {word}: no such group; these are: {', '.join(GROUPS)}")
    order = list(GROUPS)
    found = [each for each in PROBES if not only or each.group in only or each.name in only]
    return sorted(found, key=lambda each: order.index(each.group))


def run(
    endpoint: Endpoint,
    probes: Sequence[Probe],
    advance: Callable[[Outcome], None] = lambda _: None,
) -> Report:
    """Ask them one after the other. Ctrl-C leaves a report that is not complete."""
    report = Report(endpoint.root, endpoint.model)
    for each in probes:
        try:
            outcome = _ask(endpoint, each)
        except KeyboardInterrupt:
            return report
        report.outcomes.append(outcome)
        advance(outcome)
    report.complete = True
    return report


def _ask(endpoint: Endpoint, probe: Probe) -> Outcome:
    started = time.monotonic()
    endpoint.deadline = started + endpoint.timeout_s
    endpoint.sent = endpoint.last = b""
    about = (probe.name, probe.group, probe.what)
    try:
        probe.check(endpoint)
    except Skipped as reason:
        return Outcome(*about, "skip", str(reason), seconds=time.monotonic() - started)
    except Failed as error:
        reason, evidence = str(error), error.evidence
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        # An answer may be of any shape; what was not looked at for itself ends here.
        reason, evidence = f"an answer of another shape: {type(error).__name__}: {error}", None
    else:
        return Outcome(*about, "pass", seconds=time.monotonic() - started)
    shown = _shown(endpoint.last if evidence is None else evidence)
    return Outcome(*about, "fail", reason, _shown(endpoint.sent), shown, time.monotonic() - started)


def _shown(evidence: Any) -> str:
    if isinstance(evidence, bytes):
        text = evidence.decode("utf-8", "backslashreplace")
    else:
        text = evidence if isinstance(evidence, str) else json.dumps(evidence, ensure_ascii=False)
    half = SHOWN_CHARACTERS // 2
    cut = len(text) - SHOWN_CHARACTERS
    return text if cut <= 0 else f"{text[:half]} [... {cut} characters ...] {text[-half:]}"
