"""`gemsmith transcribe`: a recording to text, subtitles or JSON on stdout; progress on stderr."""

import json
from dataclasses import asdict

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gemsmith.cli.console import write
from gemsmith.cli.talk import load
from gemsmith.engine.transcribe import transcribe
from gemsmith.errors import RequestError
from gemsmith.media.transcript import Segment, to_srt


def run(
    recording: str,
    model: str,
    *,
    srt: bool,
    device: str,
    dtype: str,
    kv: str,
    quant: str | None,
    as_json: bool,
) -> None:
    """Transcribe and print.

    Raises:
      RequestError: two output forms at once.
    """
    if srt and as_json:
        raise RequestError("choose one of --srt and --json")
    lm = load(model, device=device, dtype=dtype, kv=kv, quant=quant)
    asides = Console(stderr=True)
    columns = (TextColumn("{task.fields[text]}"), BarColumn())
    with Progress(*columns, TimeRemainingColumn(), console=asides, transient=True) as bar:
        task = bar.add_task("", total=None, text="reading")

        def heard(segment: Segment, whole: float) -> None:
            text = f"{segment.end_s:.0f} of {whole:.0f} s"
            bar.update(task, completed=segment.end_s, total=whole, text=text)

        made = transcribe(lm, recording, heard=heard)
    if as_json:
        segments = [asdict(segment) for segment in made.segments]
        found = {"text": made.text, "segments": segments, "problems": made.problems}
        print(json.dumps(found, ensure_ascii=False))
    else:
        write(Console(), to_srt(made.segments) if srt else f"{made.text}\n")
    for problem in made.problems:
        write(asides, f"{problem}\n", style="red")
