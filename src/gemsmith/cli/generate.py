"""`gemsmith generate`: show or print one reply.

The answer and the calls go to stdout; thoughts, problems and what a video will cost to stderr.
"""

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console

from gemsmith.cli.console import write
from gemsmith.cli.talk import Talker, load
from gemsmith.engine.engine import LM
from gemsmith.engine.request import Generation


def run(
    model: str,
    messages: list[dict[str, Any]],
    asked: dict[str, Any],
    *,
    device: str,
    dtype: str,
    kv: str,
    quant: str | None,
    as_json: bool,
) -> None:
    """Ask and print. A lone text goes in as such, which a base model can go on with too."""
    lm = load(model, device=device, dtype=dtype, kv=kv, quant=quant)
    show_plans(messages, lm, Console(stderr=True))
    text = messages[0]["content"]
    prompt = text if len(messages) == 1 and isinstance(text, str) else messages
    if as_json:
        print(json.dumps(facts(lm.generate(prompt, **asked)), ensure_ascii=False))
        return
    Talker(lm, Console(), Console(stderr=True)).show(lm.stream(prompt, **asked))


def show_plans(messages: list[dict[str, Any]], lm: LM, asides: Console) -> None:
    """What each video will cost, told before the work; it goes on surveyed."""
    for part in messages[-1]["content"]:
        if isinstance(part, dict) and part["type"] == "video":
            from gemsmith.media.video import plan, survey

            name = getattr(part["video"], "name", part["video"])
            part["video"] = survey(part["video"])
            planned = plan(part["video"], sound=lm.config.audio_config is not None)
            write(asides, f"{name}: {planned}\n", style="dim")


def facts(reply: Generation) -> dict[str, Any]:
    """A reply as JSON-ready data."""
    return {
        "text": reply.text,
        "thinking": reply.thinking,
        "tool_calls": [asdict(call) for call in reply.tool_calls],
        "problems": [asdict(problem) for problem in reply.problems],
        "finish_reason": reply.finish_reason.value,
        "usage": asdict(reply.usage),
        "notes": reply.notes,
    }
