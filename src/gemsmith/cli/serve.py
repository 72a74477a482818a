"""`gemsmith serve`: a model over HTTP. What was loaded, what fits and where it is go to stdout; a
line of JSON a request to stderr."""

import gc
import json
import logging
import os
import signal
import socket
import sys
import time
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemsmith import __version__
from gemsmith.errors import ConfigError
from gemsmith.sizing import KVPlan

if TYPE_CHECKING:  # the rest is imported once the port is ours
    from gemsmith.engine.engine import LM

KEYS = "GEMSMITH_API_KEYS"
LOCAL = ("localhost", "127.0.0.1", "[::1]")
"""Names of this machine for itself."""
DRAIN_S = 30
"""What requests have to end once the server is told to stop."""


def run(
    model: str,
    *,
    host: str,
    port: int,
    api_key_file: Path | None,
    name: str | None,
    max_model_len: int | None,
    max_num_seqs: int,
    timeout_s: float,
    max_body_mib: int,
    remote_media: bool,
    allow_origin: list[str],
    allow_host: list[str],
    prefix_cache: Path | None,
    prefix_cache_size: str,
    **loading: Any,
) -> None:
    """Serve until SIGINT or SIGTERM, then let what runs come to its end.

    loading: options of `gemsmith.load`.

    Raises:
      ConfigError: the extra is not installed, the port is taken, bad settings or keys.
    """
    require_extra()
    from gemsmith.cache.stored import private_folder
    from gemsmith.cli.quantize import parse_bytes
    from gemsmith.server.limits import Keys, Limits, host_of

    # Everything that can be wrong is found before a model is loaded.
    keys = Keys.read(api_key_file, os.environ.get(KEYS))
    if timeout_s <= 0 or max_body_mib < 1:
        raise ConfigError("--timeout and --max-body-mib must be more than 0")
    limits = Limits(body_bytes=max_body_mib << 20, request_s=timeout_s, remote_media=remote_media)
    if bad := next((name for name in allow_host if not host_of(name)), None):
        raise ConfigError(
            f"--allow-host {bad!r}: give a name or an address alone, such as gpu.example.org or "
            "[fd00::7]"
        )
    prefix_bytes = parse_bytes(prefix_cache_size, "--prefix-cache-size")
    if prefix_cache is not None:
        private_folder(prefix_cache)
    listening = listen(host, port)
    try:
        import uvicorn

        from gemsmith.cli.talk import load
        from gemsmith.engine.async_engine import AsyncEngine
        from gemsmith.engine.batching import EngineConfig
        from gemsmith.server.app import create_app
        from gemsmith.server.service import Service

        local = ip_address(listening.getsockname()[0]).is_loopback
        named = f"[{host}]" if ":" in host else host
        hosts = [*LOCAL, named, *allow_host] if local or allow_host else []
        config = EngineConfig(
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            prefix_folder=prefix_cache,
            prefix_bytes=prefix_bytes,
        )
        lm = load(model, **loading)
        engine = AsyncEngine(lm, config)
        service = Service(lm, engine, limits=limits, name=name)
        app = create_app(service, keys=keys, origins=allow_origin, hosts=hosts, version=__version__)
        _log_to_stderr()
        url = f"http://{named}:{listening.getsockname()[1]}"
        print(welcome(lm, engine.plan, service.name, url, keys=len(keys)), flush=True)
        if not local and not keys:
            print(
                f"note: {host} can be reached from elsewhere and no API key is asked for; see "
                "--api-key-file",
                file=sys.stderr,
            )
        settings = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=DRAIN_S,
        )
        # What is loaded stays: nobody waits while the collector looks through it once more.
        gc.collect()
        gc.freeze()
        # uvicorn handles the signal, and raises it again once all is done: that is no failure.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            uvicorn.Server(settings).run(sockets=[listening])
        finally:
            engine.close()
    finally:
        listening.close()


def require_extra() -> None:
    """Raises:
    ConfigError: what the server is made of is not installed.
    """
    if missing := [
        lib for lib in ("fastapi", "uvicorn", "prometheus_client") if not find_spec(lib)
    ]:
        raise ConfigError(
            f"the server needs {', '.join(missing)}: install gemsmith with its extra, "
            "pip install 'gemsmith[serve]'"
        )


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
      ConfigError: the port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(2048)
    except (OSError, OverflowError) as error:
        made.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {getattr(error, 'strerror', None) or error}; "
            "stop what is there, or choose another --port (0 finds a free one) or --host"
        ) from None
    return made


def welcome(lm: "LM", plan: KVPlan, name: str, url: str, *, keys: int) -> str:
    """What is told once the server is up."""
    at_once = max(1, plan.full_tokens // plan.max_model_len) if plan.full_blocks else None
    whole = plan.max_num_seqs if at_once is None else min(at_once, plan.max_num_seqs)
    body = {"model": name, "messages": [{"role": "user", "content": "Hello!"}]}
    header = ' -H "Authorization: Bearer $KEY"' if keys else ""
    curl = f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{header} \\"
    return "\n".join(
        [
            f"{lm.name}: {_mib(lm.memory()['weights'])} of weights, on {lm.device}",
            f"K/V: {_mib(plan.nbytes)} as {str(lm.kv).removeprefix('torch.')}; up to "
            f"{plan.max_num_seqs} requests at a time, each of up to {plan.max_model_len} tokens "
            f"({lm.config.text_config.max_position_embeddings} is the model's limit)",
            f"     {plan.full_tokens} tokens of all requests together; {whole} of the longest fit "
            "at once, more wait",
            f"keys: {keys} known" if keys else f"keys: none asked for; see {KEYS}",
            f"{name} is served at {url} (OpenAI: {url}/v1; Anthropic: {url}); open that in a "
            "browser to chat, or, for example",
            curl,
            f"    -d '{json.dumps(body)}'",
        ]
    )


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 1 << 30 else f"{nbytes / 2**20:.1f} MiB"


def _log_to_stderr() -> None:
    for name, formatter in (
        ("gemsmith.server", logging.Formatter("%(message)s")),  # they are JSON already
        ("gemsmith.cache", _Json()),
    ):
        log = logging.getLogger(name)
        log.setLevel(logging.INFO)
        handler = logging.StreamHandler()
        handler.setFormatter(formatter)
        log.addHandler(handler)
        log.propagate = False


class _Json(logging.Formatter):
    """A message as a line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        told = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        return json.dumps({"time": told, record.levelname.lower(): record.getMessage()})
