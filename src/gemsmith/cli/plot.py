"""What `--plot` names: whether a picture can be drawn there."""

from importlib.util import find_spec
from pathlib import Path

from gemsmith.errors import RequestError

SUFFIXES = (".png", ".svg", ".pdf")


def drawable(plot: str) -> Path:
    """The file to draw to.

    Raises:
      RequestError: it cannot be written, or there is nothing to draw with.
    """
    path = Path(plot)
    if path.suffix.lower() not in SUFFIXES:
        raise RequestError(f"--plot {plot}: must end in one of {', '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise RequestError(f"--plot {plot}: there is no folder {path.absolute().parent}")
    if find_spec("matplotlib") is None:
        raise RequestError("--plot needs matplotlib; install gemsmith[train], or leave it out")
    return path
