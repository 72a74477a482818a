"""The command `gemsmith`: options in, one worker called, its result printed.

Nothing heavy is imported here: each command imports its worker when it runs. Exit codes: 0 done,
1 a check failed or gemsmith itself did, 2 something the user can put right, 130 Ctrl-C.
"""

import atexit
import gc
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from gemsmith import __version__
from gemsmith.cli.errors import Commands
from gemsmith.cli.eval import evaluation
from gemsmith.cli.options import (
    KV,
    POCKET,
    Budget,
    Device,
    Dtype,
    Json,
    Model,
    Out,
    Quant,
    System,
    Think,
    budget_of,
    report,
)

COLLECT_AFTER = 50_000
"""New objects after which Python looks for lost cycles; at its 700 the hundreds of thousands of
objects of PyTorch's modules are gone through again and again while they load: 0.1 s of a start."""

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Run, size and prove Google's Gemma 4 open models.",
)


def main() -> None:
    """Entry point of the command."""
    gc.set_threshold(COLLECT_AFTER)
    # What is there at the end goes with the process; to look for cycles in it takes 0.4 s.
    atexit.register(gc.freeze)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows a question mark instead of failing.
        stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    app(prog_name="gemsmith")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gemsmith {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run, size and prove Google's Gemma 4 open models."""


@app.command()
def demo(
    quant: Annotated[
        str, typer.Option(help="Bits of its weights: int8, int4, int2, or none.")
    ] = "int4",
    and_serve: Annotated[
        bool, typer.Option("--serve", help="Then serve it, with a chat page; Ctrl-C ends that.")
    ] = False,
) -> None:
    """A guided tour on the built-in model, under a minute long."""
    from gemsmith.cli import tour
    from gemsmith.cli.serve import require_extra

    if and_serve:
        require_extra()
    right = tour.run(quant)
    if and_serve:
        with suppress(KeyboardInterrupt):
            serve(port=0, quant=None if quant == "none" else quant)
    if not right:
        raise typer.Exit(1)


@app.command()
def chat(
    model: Model = POCKET,
    system: System = None,
    think: Think = False,
    tools: Annotated[bool, typer.Option("--tools", help="Begin with the tools on.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    kv: KV = "auto",
    quant: Quant = None,
) -> None:
    """Talk to a model; /help inside lists what else can be done."""
    from gemsmith.cli import chat as worker

    worker.run(
        model,
        device=device,
        dtype=dtype,
        kv=kv,
        quant=quant,
        system=system,
        think=think,
        tools=tools,
    )


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The message; else --file or stdin.")] = None,
    model: Model = POCKET,
    file: Annotated[str | None, typer.Option(help="Read the message from a file.")] = None,
    image: Annotated[list[str] | None, typer.Option(help="Show a picture; repeatable.")] = None,
    audio: Annotated[list[str] | None, typer.Option(help="Play a sound; repeatable.")] = None,
    video: Annotated[list[str] | None, typer.Option(help="Show a video; repeatable.")] = None,
    budget: Budget = None,
    system: System = None,
    think: Think = False,
    tools: Annotated[
        str | None, typer.Option(help="JSON file: a list of tools the model may call.")
    ] = None,
    tool_choice: Annotated[
        str | None, typer.Option(help="auto, required, none, or the tool that must be called.")
    ] = None,
    schema: Annotated[
        str | None, typer.Option(help="JSON schema file: the answer is JSON that fits it.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Only the likeliest up to this sum.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Only this fraction of the best.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 repeats less.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same reply.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of the reply.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this; repeatable.")] = None,
    thinking_budget: Annotated[int | None, typer.Option(help="Most tokens of a thought.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    kv: KV = "auto",
    quant: Quant = None,
    json: Json = False,
) -> None:
    """Answer one message."""
    from gemsmith.cli.prompt import read_messages, read_schema, read_tools, with_media

    messages = read_messages(prompt, file, system)
    messages = with_media(messages, images=image or [], audio=audio or [], videos=video or [])
    declared = read_tools(tools) if tools else None
    chosen = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "seed": seed, "max_tokens": max_tokens,
        "stop": tuple(stop) if stop else None, "thinking_budget": thinking_budget,
    }  # fmt: skip
    sampling = {name: value for name, value in chosen.items() if value is not None}
    asked = {"tools": declared, "enable_thinking": think, **sampling}
    if budget is not None:
        asked["image_budget"] = budget_of(budget)
    if tool_choice is not None:
        asked["tool_choice"] = tool_choice
    if schema is not None:
        asked["response_format"] = {"type": "json_schema", "schema": read_schema(schema)}

    from gemsmith.cli import generate as worker

    worker.run(model, messages, asked, device=device, dtype=dtype, kv=kv, quant=quant, as_json=json)


@app.command()
def detect(
    image: Annotated[str, typer.Argument(help="A picture file.")],
    what: Annotated[str, typer.Argument(help='What to find, such as "red kettle".')],
    model: Model = POCKET,
    out: Out = None,
    budget: Budget = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    kv: KV = "auto",
    quant: Quant = None,
    json: Json = False,
) -> None:
    """Frame what is asked for in a picture: boxes as a table or JSON, drawn on a copy."""
    _places(image, what, model, False, out, budget, device, dtype, kv, quant, json)


@app.command()
def point(
    image: Annotated[str, typer.Argument(help="A picture file.")],
    what: Annotated[str, typer.Argument(help='What to point to, such as "Save button".')],
    model: Model = POCKET,
    out: Out = None,
    budget: Budget = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    kv: KV = "auto",
    quant: Quant = None,
    json: Json = False,
) -> None:
    """Point to what is asked for in a picture, as `detect` frames it."""
    _places(image, what, model, True, out, budget, device, dtype, kv, quant, json)


@app.command()
def transcribe(
    recording: Annotated[str, typer.Argument(help="A sound or video file, of any length.")],
    model: Model = POCKET,
    srt: Annotated[bool, typer.Option("--srt", help="Print subtitles, with times.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    kv: KV = "auto",
    quant: Quant = None,
    json: Json = False,
) -> None:
    """Write down what is said in a recording."""
    from gemsmith.cli import transcribe as worker

    worker.run(
        recording, model, srt=srt, device=device, dtype=dtype, kv=kv, quant=quant, as_json=json
    )


@app.command()
def serve(
    model: Annotated[
        str, typer.Argument(help="pocket (built in), a folder, or a hub id.")
    ] = POCKET,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 finds a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="Keys that clients must send, one a line; or GEMSMITH_API_KEYS=A,B."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; if not given, MODEL.")
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Longest prompt and reply in tokens; if not given, 32768 or what fits."),
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Requests served together.")] = 16,
    timeout: Annotated[float, typer.Option(help="Seconds that one request may take.")] = 600,
    max_body_mib: Annotated[int, typer.Option(help="Largest request.")] = 64,
    remote_media: Annotated[
        bool, typer.Option("--remote-media", help="Fetch media from public http(s) addresses.")
    ] = False,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="A web page's origin that may ask (CORS); * for all. May be repeated."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name other than localhost to be asked under. May be repeated; without it, "
            "a --host that other machines can reach takes any name."
        ),
    ] = None,
    prefix_cache: Annotated[
        Path | None,
        typer.Option(help="Folder in which K/V of conversations outlives the server, for itself."),
    ] = None,
    prefix_cache_size: Annotated[
        str, typer.Option(help="Most of that; the least recently used goes.")
    ] = "2GB",
    device: Device = "auto",
    dtype: Dtype = "auto",
    kv: KV = "auto",
    quant: Quant = None,
    speculation: Annotated[
        str,
        typer.Option(
            help="Guess replies ahead where it saves time: on, off, or auto, where replies stay "
            "the same to the bit (low-bit weights, CPU) or there is a drafter."
        ),
    ] = "auto",
    drafter: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the model's drafter (-assistant), to guess with."),
    ] = None,
) -> None:
    """Serve a model over HTTP: OpenAI's and Anthropic's APIs."""
    from gemsmith.cli import serve as worker

    worker.run(
        model,
        host=host,
        port=port,
        api_key_file=api_key_file,
        name=name,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        timeout_s=timeout,
        max_body_mib=max_body_mib,
        remote_media=remote_media,
        allow_origin=allow_origin or [],
        allow_host=allow_host or [],
        prefix_cache=prefix_cache,
        prefix_cache_size=prefix_cache_size,
        device=device,
        dtype=dtype,
        kv=kv,
        quant=quant,
        speculation=speculation,
        drafter=drafter,
    )


@app.command()
def probe(
    url: Annotated[str, typer.Argument(help="Of the endpoint, such as http://127.0.0.1:8000.")],
    only: Annotated[
        list[str] | None,
        typer.Option(help="A group of probes, such as tools, or one by its name; repeatable."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Which model; if not given, the first of /v1/models.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file with the key to send, if one is asked for.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that one probe may take.")] = 60,
    every: Annotated[bool, typer.Option("--all", help="Name what passed, too.")] = False,
    json: Json = False,
) -> None:
    """Check that an OpenAI-compatible endpoint keeps its word.

    Some 170 probes: tool calls, streams, thoughts, JSON, media, the prefix cache, lengths, errors,
    leaving. What fails is shown with the offending bytes; exit code 1 if anything does.
    """
    from gemsmith.cli import probe as worker

    if not worker.ask(
        url, only=only or [], model=model, api_key_file=api_key_file, timeout_s=timeout,
        every=every, as_json=json,
    ):  # fmt: skip
        raise typer.Exit(1)


def _places(
    image: str,
    what: str,
    model: str,
    point: bool,
    out: str | None,
    budget: str | None,
    device: str,
    dtype: str,
    kv: str,
    quant: str | None,
    as_json: bool,
) -> None:
    from gemsmith.cli import detect as worker

    worker.run(
        image, what, model, point=point, out=out, options={"image_budget": budget_of(budget)},
        device=device, dtype=dtype, kv=kv, quant=quant, as_json=as_json,
    )  # fmt: skip


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(help="A checkpoint of floats: folder, hub id, pocket.")],
    target: Annotated[str, typer.Argument(help="The folder to write; the same again goes on.")],
    bits: Annotated[
        str, typer.Option(help="8, 4, 2, mobile (the mix of Google's), or mixed (as measured).")
    ] = "4",
    budget: Annotated[
        str | None, typer.Option(help="Of mixed: what all weights may take, such as 3.2GB.")
    ] = None,
    group: Annotated[
        int | None, typer.Option(help="Weights to a scale: 32, 64, 128; 32 at 4 and 2 bits.")
    ] = None,
    float_tables: Annotated[
        bool, typer.Option("--float-tables", help="Keep tables as Transformers reads them.")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(help="Calibrate on a JSONL file: an object with messages a line."),
    ] = None,
    json: Json = False,
) -> None:
    """Make a checkpoint of 8, 4 or 2 bits a weight, and say what became of each kind."""
    from gemsmith.cli import quantize as worker

    worker.run(
        source, target, bits=bits, group=group, float_tables=float_tables, as_json=json, data=data,
        budget=budget,
    )  # fmt: skip


@app.command()
def info(
    name: Annotated[str, typer.Argument(help="E2B, E4B, 12B, 26B-A4B, 31B, a checkpoint or GGUF.")],
    json: Json = False,
) -> None:
    """Layers, parameters and memory of a model, from its config alone."""
    from gemsmith.cli import info as worker

    facts = worker.describe(name, worker.config_of(name))
    report(facts, worker.show, json)


@app.command()
def fit(
    name: Annotated[
        str | None,
        typer.Argument(help="E2B ... 31B, a folder, hub id or GGUF; without: whatever fits."),
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option(
            "--quant", "--bits", help="bfloat16, int8, int4, int2 or mobile; or 16, 8, 4, 2."
        ),
    ] = None,
    context: Annotated[
        str | None, typer.Option(help="Tokens of each user, such as 8192 or 32K.")
    ] = None,
    users: Annotated[int, typer.Option(help="Conversations at once.")] = 1,
    device: Annotated[
        str, typer.Option(help="auto or cpu: this machine; or a name, such as rtx-4090.")
    ] = "auto",
    memory: Annotated[str | None, typer.Option(help="What there is of it, such as 12GB.")] = None,
    kv: Annotated[str, typer.Option(help="float32, bfloat16, int8, or auto.")] = "auto",
    prompt: Annotated[int, typer.Option(help="Tokens before the first reply token.")] = 512,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Leave image and sound input out.")
    ] = False,
    drafter: Annotated[
        bool, typer.Option("--drafter", help="Count the published drafter.")
    ] = False,
    plot: Annotated[
        str | None, typer.Option(help="Draw memory by context: .png, .svg or .pdf.")
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Google's memory table beside ours.")
    ] = False,
    json: Json = False,
) -> None:
    """Memory and speed of a model on a machine, before it is downloaded; or all that fits."""
    from gemsmith.cli import fit as worker

    if published:
        rows = worker.published()
        report({"models": rows}, lambda _, console: worker.show_published(rows, console), json)
        return
    worker.run(
        name, quant=quant, context=context, users=users, device=device, memory=memory, kv=kv,
        prompt=prompt, media=not text_only, drafter=drafter, plot=plot, as_json=json,
    )  # fmt: skip


@app.command()
def doctor(
    template: Annotated[
        str | None,
        typer.Option(help="Compare the chat template of this checkpoint with gemsmith's own."),
    ] = None,
    json: Json = False,
) -> None:
    """What this machine offers, and which of it is used."""
    from gemsmith.cli import doctor as worker

    if template is None:
        report(worker.examine(), worker.show, json)
        return
    differences = worker.compare(template)
    report(differences, worker.show_differences, json)
    if differences["differing"]:
        raise typer.Exit(1)


@app.command()
def choose(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="With --measure: pocket, folders; NAME:int4 rounds while loading."),
    ] = None,
    task: Annotated[
        str, typer.Option(help="general, science, code, agents, or languages.")
    ] = "general",
    audio: Annotated[bool, typer.Option("--audio", help="It must hear.")] = False,
    video: Annotated[bool, typer.Option("--video", help="It must watch videos.")] = False,
    images: Annotated[
        str, typer.Option(help="Detail of pictures: none, coarse, normal, or fine (documents).")
    ] = "none",
    context: Annotated[
        str, typer.Option(help="Tokens of one conversation, such as 8192 or 32K.")
    ] = "8192",
    users: Annotated[int, typer.Option(help="Conversations at once.")] = 1,
    speed: Annotated[
        float | None, typer.Option(help="Tokens a second for each user, at least.")
    ] = None,
    first: Annotated[
        float | None, typer.Option(help="Seconds to the first token of a full context, at most.")
    ] = None,
    quality: Annotated[
        list[str] | None,
        typer.Option(help="Worst score that will do: 70, or tau2=60; repeatable."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto or cpu: this machine; or a name, such as rtx-4090.")
    ] = "auto",
    memory: Annotated[str | None, typer.Option(help="What there is of it, such as 12GB.")] = None,
    measure: Annotated[
        str | None, typer.Option(help="Ask the models these tasks instead: a JSONL file.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="With --measure: most tokens of one reply.")
    ] = 512,
    json: Json = False,
) -> None:
    """Which Gemma 4 for a job on a machine, with reasons; or as your own tasks measure it.

    Exit code 1 if none will do, or if a model could not be asked everything.
    """
    from gemsmith.errors import RequestError

    if measure is not None:
        from gemsmith.cli import measure as measurer

        if not measurer.run(measure, models or [], max_tokens=max_tokens, as_json=json):
            raise typer.Exit(1)
        return
    if models:
        raise RequestError(f"{models[0]}: models are measured with --measure TASKS.jsonl")
    from gemsmith.cli import choose as worker

    asked = {
        "task": task, "audio": audio, "video": video, "images": images, "context": context,
        "users": users, "speed": speed, "first": first,
    }  # fmt: skip
    if not worker.run(asked, quality=quality or [], device=device, memory=memory, as_json=json):
        raise typer.Exit(1)


app.add_typer(evaluation, name="eval")


if __name__ == "__main__":
    main()
