"""A model's name -> the folder that holds it: local, embedded, or fetched from the hub.

  ./path, /path, a folder that exists   that folder
  pocket                                the small checkpoint that comes with the package
  owner/name                            a hub repository, through huggingface_hub: fetched once,
                                        resumed where it was cut off, then read from its cache

Only the files gemsmith reads are asked for: JSON, the chat template and safetensors. Pickle files
are never fetched. With GEMSMITH_OFFLINE or HF_HUB_OFFLINE set nothing is asked of the network.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import resources
from pathlib import Path

from gemsmith.config import PRESETS
from gemsmith.errors import GemsmithError, HubError

POCKET = "pocket"
FIDELITY = "fidelity.json"
"""In a folder: how faithful these weights are to others. Worth nothing beside any other weights."""
KNOWN_IDS = tuple(f"google/gemma-4-{size}{kind}" for size in PRESETS for kind in ("", "-it"))
FETCHED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
)


def resolve(
    name: str | Path,
    *,
    revision: str | None = None,
    offline: bool | None = None,
    progress: bool = True,
) -> Path:
    """The folder of a model: see the module's table. May fetch gigabytes.

    `revision` is a branch, tag or commit of a hub repository. `offline` None asks the environment.

    Raises:
      HubError: no such folder, repository or revision, with near matches; a repository that needs
        its terms accepted; no network; nothing gemsmith reads in it.
    """
    found = place(name, revision=revision)
    if isinstance(found, Path):
        return found
    offline = is_offline() if offline is None else offline
    folder = _fetch(found, revision, offline, progress)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        held = sorted(path.name for path in folder.iterdir())
        raise HubError(
            f"{found} holds no config.json with safetensors weights "
            f"({', '.join(held[:8]) or 'no file that gemsmith reads'}); pickle and GGUF files are "
            "not fetched. Name a repository in safetensors format."
        )
    return folder


def place(name: str | Path, *, revision: str | None = None) -> Path | str:
    """The folder of a model that is here, or else the hub id that the name is.

    Raises:
      HubError: neither, with near matches; a revision of a folder.
    """
    text = str(name)
    if text == POCKET:
        return _embedded()
    path = _local(text)
    if path is not None and path.is_dir():
        if revision is not None:
            raise HubError(f"{text} is a local folder; revision {revision!r} is for hub ids only")
        return path
    if path is not None and path.exists():
        raise HubError(
            f"{text} is a file; give the folder that holds config.json and the safetensors files"
        )
    if isinstance(name, Path) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text):
        raise HubError(f"no folder {_shown(repr(text))}. {_near(text)}")
    return text


def is_offline() -> bool:
    """Whether the environment says that nothing may be asked of the network."""
    return any(_on(os.environ.get(v)) for v in ("GEMSMITH_OFFLINE", "HF_HUB_OFFLINE"))


def _fetch(repo: str, revision: str | None, offline: bool, progress: bool) -> Path:
    import huggingface_hub
    from huggingface_hub import utils

    quiet = not progress and not utils.are_progress_bars_disabled()
    if quiet:
        utils.disable_progress_bars()
    try:
        with explained(repo, revision, offline=offline):
            folder = huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(FETCHED),
                local_files_only=offline,
                library_name="gemsmith",
            )
    finally:
        if quiet:
            utils.enable_progress_bars()
    return Path(folder)


@contextmanager
def explained(repo: str, revision: str | None, *, offline: bool = False) -> Iterator[None]:
    """What goes wrong between here and the hub, as one HubError; our own errors pass."""
    from huggingface_hub import errors

    at = f"{repo} at revision {revision}" if revision else repo
    try:
        yield
    except GemsmithError:
        raise
    # In this order: a gated repository is a kind of unknown one, and both are HTTP errors.
    except errors.GatedRepoError:
        raise HubError(
            f"{repo} asks for its terms to be accepted: open its page on the hub, accept them, "
            "then run `hf auth login` here"
        ) from None
    except errors.RepositoryNotFoundError:
        raise HubError(
            f"the hub has no repository {repo}, or it is private. {_near(repo)}"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(
            f"{repo} has no revision {revision!r}; leave it out for the newest, or name a branch, "
            "tag or commit of that repository"
        ) from None
    except errors.LocalEntryNotFoundError:
        reason = "offline mode is on" if offline else "the hub cannot be reached"
        hint = "" if repo in KNOWN_IDS else f" {_near(repo)}"
        raise HubError(
            f"{at} is not in the local cache and {reason}; connect once to fetch it, give a local "
            f"folder, or try {POCKET!r}, which needs no network.{hint}"
        ) from None
    except errors.HFValidationError as error:
        raise HubError(f"{repo} is not a hub id: {_shown(error)}") from None
    except errors.HfHubHTTPError as error:
        raise HubError(
            f"the hub refused {at}: {_shown(error)}; run the command again to resume"
        ) from None
    except Exception as error:  # whatever the HTTP library of the day raises on a cut line
        raise HubError(
            f"fetching {at} failed: {_shown(error)}; run the command again to resume"
        ) from error


def _embedded() -> Path:
    folder = resources.files("gemsmith") / POCKET / "checkpoint"
    if not isinstance(folder, Path) or not (folder / "config.json").is_file():
        raise HubError(
            "this installation carries no embedded checkpoint; install gemsmith from a wheel or a "
            f"full checkout, or name another model such as {KNOWN_IDS[1]}"
        )
    return folder


def _local(text: str) -> Path | None:
    """The text as a path, if the system can make one of it."""
    try:
        path = Path(text).expanduser()
        path.lstat()
    except (OSError, ValueError, RuntimeError):
        return None
    return path if text else None


def _near(text: str) -> str:
    """What the user may have meant: a sibling of a missing folder, or a known id."""
    near: list[str] = []
    if text and len(text) <= 4096:
        path = Path(text)
        try:
            siblings = [str(p) for p in path.parent.iterdir() if p.is_dir()] if path.name else []
        except (OSError, ValueError):
            siblings = []
        near += get_close_matches(str(path), siblings, n=2, cutoff=0.8)
    names = {known.lower(): known for known in KNOWN_IDS}
    names |= {known.removeprefix("google/").lower(): known for known in KNOWN_IDS}
    names |= {size.lower(): f"google/gemma-4-{size}-it" for size in PRESETS}
    near += [names[k] for k in get_close_matches(text[:100].lower(), names, n=3, cutoff=0.8)]
    near = [name for name in dict.fromkeys(near) if name != text]
    if near:
        return f"Did you mean {' or '.join(near[:2])}?"
    return f"Give a folder, {POCKET!r}, or a hub id such as {KNOWN_IDS[1]}."


def _on(value: str | None) -> bool:
    return (value or "").strip().lower() in ("1", "true", "yes", "on")


def _shown(error: object) -> str:
    """The first line of a library's message, of bounded length."""
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return line if len(line) <= 300 else line[:297] + "..."
