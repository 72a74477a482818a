"""Conversations about short films: shapes shown one after another, and when.

`generate(split, seed, index)` is a pure function, as in generator.py. A film is an animated PNG,
which is a video to `gemsmith.media.video`, without loss: two to four frames, one shape in each, no
color and no shape twice. Held out is what pictures.py holds out.

Not claimed: motion, sound, cuts within a frame, more than four frames.
"""

import io

from PIL import Image
from recipes.pocket import pictures
from recipes.pocket.generator import Conversation
from recipes.pocket.pictures import Thing
from recipes.pocket.tasks import Check
from recipes.pocket.words import Draw, Split

BUDGET = 70
"""Soft tokens of a frame, at most."""
FIRST = ("What comes first?", "What is shown first?")
LAST = ("What comes last?", "What is shown last?")
WHEN = ("When is the {} shown?", "When does the {} come?")
COLOR = ("What color is the {}?", "Which color is the {}?")
ALL = ("What happens in the video?", "What do you see?", "Describe the video.")


def generate(split: Split, seed: int, index: int) -> Conversation:
    """One film and one to three questions."""
    d = Draw(split, f"film/{split}/{seed}/{index}")
    frames, things = reel(d, d.between(2, 4))
    seconds = d.between(1, 3)
    asked = d.some(list(_questions(d, things, seconds)), d.between(1, 3))
    part = {"type": "video", "video": animation(frames, seconds), "frames": len(frames)}
    messages = []
    checks = []
    for i, (question, reply, value) in enumerate(asked):
        text = {"type": "text", "text": question}
        messages.append({"role": "user", "content": [part, text] if i == 0 else question})
        checks.append(Check(len(messages), "film", {"type": "answer", "value": value}))
        messages.append({"role": "assistant", "content": reply})
    return Conversation("film", messages, None, False, tuple(checks))


def reel(
    d: Draw, count: int, size: tuple[int, int] | None = None
) -> tuple[list[Image.Image], list[Thing]]:
    """Frames of one size, the first one's if none is given, with one shape each; all differ in
    color and in shape."""
    made: list[tuple[Image.Image, Thing]] = []
    while len(made) < count:
        image, [thing] = pictures._scene(d, lambda: [(None, None)], 0.2)
        others = [t for _, t in made]
        if thing.color in [t.color for t in others] or thing.name in [t.name for t in others]:
            continue
        size = size or image.size
        if image.size == size:
            made.append((image, thing))
    return [image for image, _ in made], [thing for _, thing in made]


def animation(frames: list[Image.Image], seconds: int) -> bytes:
    """An animated PNG that shows each frame for so many seconds."""
    file = io.BytesIO()
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:], duration=1000 * seconds)
    return file.getvalue()


def _questions(d: Draw, things: list[Thing], seconds: int) -> list[tuple[str, str, str]]:
    """Questions, replies, and what must stand in the reply;."""
    one, other = d.some(things, 2)
    at = f"00:{things.index(other) * seconds:02}"
    end = d.pick((True, False))
    named = things[-1 if end else 0].label
    order = "; then ".join(f"{article(t)} {t.label}" for t in things)
    return [
        (d.pick(COLOR).format(one.name), f"The {one.name} is {one.color}.", one.color),
        (d.pick(WHEN).format(other.label), f"At {at}.", at),
        (d.pick(LAST if end else FIRST), f"The {named}.", named),
        (d.pick(ALL), f"{order[0].upper()}{order[1:]}.", order.split(" ", 1)[1]),
    ]


def article(thing: Thing) -> str:
    return "an" if thing.color[0] == "o" else "a"
