"""The embedded checkpoint is an ordinary one: Transformers loads it and says the same."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import gemsmith.pocket
from benchmarks import random_checkpoint
from gemsmith.engine.engine import LM
from gemsmith.evals.items import read_items
from gemsmith.text import chat

transformers = pytest.importorskip("transformers")
POCKET = Path(gemsmith.pocket.__path__[0]) / "checkpoint"


@dataclass(frozen=True)
class Reply:
    """Greedy token ids, the end mark included, and their text without it, markers shown."""

    ids: list[int]
    text: str


def greedy(folder: Path, prompts: list[str], max_tokens: int) -> tuple[list[Reply], list[Reply]]:
    """Our replies and Transformers', each through its own tokenizer, in float32."""
    lm = LM.load(folder, device="cpu", dtype="float32", kv="float32")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32
    )
    ours: list[Reply] = []
    theirs: list[Reply] = []
    for prompt in prompts:
        made = lm.complete(prompt, temperature=0, max_tokens=max_tokens)
        ours.append(Reply(list(made.token_ids), made.text))
        asked = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        out = model.generate(
            input_ids=asked,
            attention_mask=torch.ones_like(asked),
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=sorted(lm.end_ids),
            pad_token_id=0,
        )
        ids = out[0, asked.shape[1] :].tolist()
        ended = ids[-1] in lm.end_ids
        theirs.append(Reply(ids, tokenizer.decode(ids[:-1] if ended else ids)))
    return ours, theirs


def test_a_random_checkpoint_gives_the_same_tokens_through_transformers(tmp_path: Path) -> None:
    folder = random_checkpoint.write(random_checkpoint.config_of("tiny-E2B"), tmp_path / "random")
    prompts = [f"<bos><|turn>user\nHello {n}<turn|>\n<|turn>model\n" for n in range(4)]
    ours, theirs = greedy(folder, prompts, 24)
    # Of noise only the ids are compared: bytes that are no UTF-8 may be shown in many ways.
    assert [reply.ids for reply in ours] == [reply.ids for reply in theirs]
    assert len({reply.text for reply in ours}) > 1


@pytest.mark.slow
def test_pocket_says_the_same_through_transformers_on_50_prompts() -> None:
    prompts = [
        chat.render(
            item.messages,
            item.tools,
            variant="edge",
            enable_thinking=item.enable_thinking,
            add_generation_prompt=True,
        )
        for item in read_items(limit=50)
    ]
    ours, theirs = greedy(POCKET, prompts, 64)
    assert ours == theirs
    assert sum(len(reply.ids) > 3 for reply in ours) > 40
