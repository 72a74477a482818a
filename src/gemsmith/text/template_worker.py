"""Renders chat templates in a process of its own; started by `template`, never imported.

A template is a program from a stranger. Inside this process it has jinja2's immutable sandbox and a
bounded amount of memory; its time is bounded from outside, by killing the process. Reads one JSON
request a line, answers one JSON line: {"text": ...} or {"error": ...}. An empty
object says that it is ready.
"""

import contextlib
import json
import sys
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_MEMORY_BYTES = 2**30


def limit_memory() -> None:
    """Bound this process's memory where the operating system can."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))


def environment() -> ImmutableSandboxedEnvironment:
    """The sandbox as Transformers sets it up, so that templates find what they expect."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: object) -> NoReturn:
        raise jinja2.TemplateError(str(message))

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    env.filters["tojson"] = tojson
    return env


def answer(templates: dict[str, jinja2.Template], request: dict[str, Any]) -> dict[str, str]:
    """One rendering; every failure is told, none ends the process."""
    source = request["source"]
    try:
        if source not in templates:
            templates[source] = environment().from_string(source)
        pieces: list[str] = []
        size = 0
        for piece in templates[source].generate(**request["values"]):
            size += len(piece)
            if size > request["max_chars"]:
                return {"error": f"it wrote more than {request['max_chars']} characters"}
            pieces.append(piece)
        return {"text": "".join(pieces)}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"[:2000]}
    except MemoryError:
        return {"error": f"it used more than {MAX_MEMORY_BYTES // 2**20} MiB of memory"}
    except RecursionError:
        return {"error": "it calls itself without end"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:2000]}


def main() -> None:
    """Serve requests until the input ends."""
    limit_memory()
    templates: dict[str, jinja2.Template] = {}
    print("{}", flush=True)  # ready: the clock of a rendering starts after this
    for line in sys.stdin:
        print(json.dumps(answer(templates, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
