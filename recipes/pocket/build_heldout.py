"""Writes the held-out set: prompts with what must come next, from values never seen in training.

One JSON object per line, gzip, stable order; the format is in README.md.

Run: python -m recipes.pocket.build_heldout TOKENIZER_FOLDER src/gemsmith/pocket/heldout.jsonl.gz
"""

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.pocket import talk
from recipes.pocket.generator import Conversation, tool_conversation
from recipes.pocket.tasks import Check
from recipes.pocket.words import Draw

from gemsmith.text import chat
from gemsmith.text.tokenizer import Tokenizer

SEED = 7_000_003
MAX_PROMPT = 960
WINDOW = 128
"""Sliding window of the pocket model; a needle lies at least four of them before the question."""
STYLES = {"seen": 0.35, "replaced": 0.30, "mixed": 0.10, "invented": 0.25}
"""Its own: what training sees more of must not change what is held out."""
COUNTS = {
    "tool_seen_domain": 250,
    "tool_unseen_schema": 250,
    "no_tool": 150,
    "thinking_arithmetic": 150,
    "needle_4x": 100,
    "parallel": 80,
    "chained": 80,
    "tool_answer": 60,
    "json": 60,
    "direct_arithmetic": 60,
}


def item(category: str, number: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """One held-out item; candidates that are too long (or a needle too near) are passed over."""
    for attempt in range(1000):
        d = Draw("heldout", f"{SEED}/{category}/{number}/{attempt}")
        made = _candidate(category, d)
        if made is None:
            continue
        conversation, check = made
        prompt = conversation.messages[: check.upto]
        text = chat.render(
            prompt,
            conversation.tools,
            variant="edge",
            enable_thinking=conversation.enable_thinking,
            add_generation_prompt=True,
        )
        if len(tokenizer.encode(text)) > MAX_PROMPT:
            continue
        if category == "needle_4x":
            after = text.split(check.expected["fact"], 1)[1]
            if len(tokenizer.encode(after)) < 4 * WINDOW:
                continue
        return {
            "id": f"{category}-{number:04}",
            "category": category,
            "messages": prompt,
            "tools": conversation.tools,
            "enable_thinking": conversation.enable_thinking,
            "expected": {k: v for k, v in check.expected.items() if k != "fact"},
        }
    raise RuntimeError(f"no candidate for {category} {number} in 1000 attempts")


def _candidate(category: str, d: Draw) -> tuple[Conversation, Check] | None:
    plain = {
        "thinking_arithmetic": talk.thinking_arithmetic,
        "json": talk.json_answer,
        "direct_arithmetic": talk.direct_arithmetic,
        "needle_4x": lambda d: talk.needle(d, d.pick((620, 680))),
    }
    if category in plain:
        messages, checks = plain[category](d)
        thinking = category == "thinking_arithmetic"
        first = checks[0]
        return Conversation(category, messages, None, thinking), first
    step = {"tool_seen_domain": "single", "tool_unseen_schema": "single", "tool_answer": "single"}
    style = d.weighted(STYLES)
    if category == "tool_seen_domain":
        style = "seen"
    elif category == "tool_unseen_schema":
        style = d.weighted({"replaced": 0.7, "invented": 0.3})
    steps = [step.get(category, category)]
    if d.chance(0.25):
        steps.insert(0, "single")
    made = tool_conversation(d, steps, style)
    if made.enable_thinking and len(steps) > 1:
        return None
    found = [c for c in made.checks if c.category == category]
    return (made, d.pick(found) if category == "chained" else found[-1]) if found else None


def items(tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """All items, no prompt twice."""
    for category, count in COUNTS.items():
        seen: set[str] = set()
        number = 0
        while len(seen) < count:
            made = item(category, number, tokenizer)
            number += 1
            prompt = json.dumps([made["messages"], made["tools"]])
            if prompt not in seen:
                seen.add(prompt)
                yield made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    lines = [
        json.dumps(i, ensure_ascii=False) + "\n" for i in items(Tokenizer.load(options.tokenizer))
    ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    print(f"wrote {len(lines)} items, {options.out.stat().st_size / 1024:.0f} KiB")
