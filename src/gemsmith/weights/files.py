"""Which files of a checkpoint hold its weights, and that they agree with its index.

The same rules for a folder (tensors.py reads it) and for a hub repository whose headers alone are
read (gemsmith/headers.py). No file of weights is opened here, and torch is not needed.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from gemsmith.errors import WeightsError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20

T = TypeVar("T")


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The weight files of a folder, in order, and its index: {key: file name}, empty if single.

    Raises:
      WeightsError: there are none, or what there is is no safetensors; the index is damaged, leads
        elsewhere, or names files that are missing.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        raise WeightsError(
            f"{folder} has both {SINGLE} and {INDEX}; one is left over from an earlier save, "
            "remove it"
        )
    if single.is_file():
        return [single], {}
    if index.is_file():
        return _indexed_files(folder, index)
    if not folder.is_dir():
        raise WeightsError(f"{folder} is not a folder; give the folder that holds {SINGLE}")
    present = sorted(path.name for path in folder.iterdir() if path.is_file())
    for name in present:
        if re.search(r"\.(bin|pt|pth|ckpt|pkl)(\.index\.json)?$", name):
            raise WeightsError(
                f"{folder}: {name} is a pickle file, and reading one runs the code in it; "
                "gemsmith reads safetensors only. Ask for, or convert to, the safetensors files."
            )
        if name.endswith(".gguf"):
            raise WeightsError(
                f"{folder}: {name} is a GGUF file; this version reads safetensors folders"
            )
        if name.startswith("adapter_"):
            raise WeightsError(
                f"{folder}: {name} belongs to an adapter; merge it into its base model first"
            )
    others = [name for name in present if name.endswith(".safetensors")]
    hint = f" There is {', '.join(others[:3])}; is its index missing?" if others else ""
    raise WeightsError(f"{folder} has neither {SINGLE} nor {INDEX}.{hint}")


def _indexed_files(folder: Path, index: Path) -> tuple[list[Path], dict[str, str]]:
    """The shards an index names, each in the folder itself, and the index."""
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise WeightsError(f"{index}: larger than {MAX_INDEX_BYTES >> 20} MiB; not an index")
        mapping = read_index(index.read_bytes(), str(index))
    except OSError as error:
        raise WeightsError(f"{index}: cannot be read ({error.strerror})") from None
    names = sorted(set(mapping.values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        more = f", ... and {len(absent) - 8} more" if len(absent) > 8 else ""
        raise WeightsError(
            f"{folder}: {len(absent)} of {len(names)} files are missing: "
            f"{', '.join(absent[:8])}{more}; the download is incomplete, run it again"
        )
    return [folder / name for name in names], mapping


def read_index(text: bytes, where: str) -> dict[str, str]:
    """The index in these bytes: {key: file name}, every name plain. `where` is for errors.

    Raises:
      WeightsError: not JSON, no index, or a name that leads out of the folder.
    """
    try:
        data = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{where}: not valid JSON ({error}); fetch it anew") from None
    mapping = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(mapping, dict) or not mapping:
        raise WeightsError(f"{where}: no weight_map of tensor names to files; fetch it anew")
    for name in mapping.values():
        plain = isinstance(name, str) and re.fullmatch(r"[\w.-]{1,200}\.safetensors", name)
        if not plain:
            raise WeightsError(
                f"{where}: names the file {short(name)!r}; only .safetensors files in the same "
                "folder are read"
            )
    return mapping


def joined(
    parts: Iterable[tuple[str, Mapping[str, T]]], index: Mapping[str, str], where: str
) -> dict[str, T]:
    """The tensors of all files together, by key; `parts` are the files' names and tensors.

    Raises:
      WeightsError: a tensor is in two files, or not where the index has it.
    """
    stored: dict[str, T] = {}
    holder: dict[str, str] = {}
    for file, tensors in parts:
        for key, tensor in tensors.items():
            if key in stored:
                raise WeightsError(
                    f"{where}: {short(key)} is in both {holder[key]} and {file}; "
                    "files of two exports were mixed, fetch the folder anew"
                )
            stored[key], holder[key] = tensor, file
    lies = [key for key, name in index.items() if holder.get(key) != name]
    if lies:
        more = f" and {len(lies) - 1} more" if len(lies) > 1 else ""
        raise WeightsError(
            f"{where}: {INDEX} says that {index[lies[0]]} holds {short(lies[0])}{more}, which it "
            "does not; files of two exports were mixed, fetch the folder anew"
        )
    return stored


def short(text: object) -> str:
    """Text of whatever length, for an error."""
    text = str(text)
    return text if len(text) <= 200 else text[:197] + "..."
