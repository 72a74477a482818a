"""What a checkpoint says of itself: its config and each tensor's type, shape and bytes.

Of a folder, or of a hub repository over the network: a file of weights begins with a header, and
only that is asked for (HTTP ranges), some hundred kilobytes of gigabytes. No weight is read and
torch is not imported. What is in the local cache already is not looked for there unless offline.

Whoever made the file wrote the header. It is read with bounded memory, and whatever in it is not
as the format says, lies about sizes, overlaps or leaves holes is one WeightsError.

A GGUF file is described by its own header (weights/gguf.py), which is 16 MiB where it has Gemma's
vocabulary in it. gemsmith knows what such a file takes; it does not run it.

What it is not: a check that the tensors are those of the config's model (weights/names.py does
that).

A file of safetensors: 8 bytes, the header's length n, little endian; n bytes of JSON, {name:
{dtype, shape, data_offsets: [begin, end]}}, offsets from the end of the header; then the data,
without gaps. Source: the safetensors format description.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gemsmith.config import MAX_CONFIG_BYTES, Gemma4Config
from gemsmith.errors import ConfigError, HubError, WeightsError
from gemsmith.weights import gguf, hub
from gemsmith.weights.files import INDEX, SINGLE, joined, read_index, short, weight_files

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip
MAX_HEADER_BYTES = 8 << 20
"""Of one file. Released files have 0.3 MiB; 26B-A4B with every expert's codes, scales and shape
apart would have 5. As Python objects ten times as much."""
MAX_ALL_BYTES = 32 << 20
"""Of all files of a checkpoint together."""
MAX_REMOTE_INDEX_BYTES, MAX_REMOTE_FILES = 8 << 20, 256
MAX_DIMENSIONS, MAX_DIMENSION = 8, 1 << 40
GGUF, SPLIT = ".gguf", r"(.*)-([0-9]{5})-of-([0-9]{5})(\.gguf)"
FIRST_BYTES = 512 << 10
"""Asked for at once: in released files the length and the whole header."""
TIMEOUT_S = 20.0
PIECE = 64 << 10

Read = Callable[[int, int], bytes]
"""Bytes [start, stop) of a file."""


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor as the file describes it."""

    dtype: str
    """The format's name, such as BF16."""
    shape: tuple[int, ...]
    nbytes: int
    """In the file."""


@dataclass(frozen=True, slots=True)
class Headers:
    """A checkpoint without its weights."""

    config: Gemma4Config
    tensors: dict[str, TensorHeader]
    """By the names the files use; of GGUF, where it is known, by that of a checkpoint."""
    gguf: bool = False
    """Whether it is GGUF, which is described here and not run."""
    inputs: str | None = None
    """The GGUF file of image and sound input beside the model's; its tensors are here, too, by the
    names that it has."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: the files without their headers."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read_headers(
    source: str | Path, *, revision: str | None = None, offline: bool | None = None
) -> Headers:
    """Config and tensors of a folder, of "pocket", or of a hub repository at `revision`; also of a
    GGUF file: by its path, by owner/name/FILE.gguf, or as the only model in a folder or repository,
    where the first file of image and sound input (mmproj) belongs to it.

    `offline` None asks the environment; offline, a repository is read from the local cache.

    Raises:
      HubError: no such folder, file or repository, or the hub cannot be reached.
      ConfigError: config.json, or the metadata of GGUF, are missing or wrong.
      WeightsError: no weights that are known here, or a header that cannot be true, with its file.
    """
    if str(source).lower().endswith(GGUF):
        return _of_gguf(str(source), revision, hub.is_offline() if offline is None else offline)
    place = hub.place(source, revision=revision)
    if isinstance(place, str) and (hub.is_offline() if offline is None else offline):
        place = hub.resolve(place, revision=revision, offline=True)
    if isinstance(place, Path):
        return _of_folder(place)
    with hub.explained(place, revision):
        return _of_repository(_Repository(place, revision))


def _of_folder(folder: Path) -> Headers:
    if not (folder / SINGLE).is_file() and not (folder / INDEX).is_file():
        names = [path.name for path in folder.glob("*.[gG][gG][uU][fF]")]
        if names:
            model, inputs = _model_of(names, str(folder))
            return _of_gguf_file(folder / model, inputs)
    config = Gemma4Config.load(folder)
    files, index = weight_files(folder)

    def parts() -> Iterator[tuple[str, dict[str, TensorHeader]]]:
        budget = MAX_ALL_BYTES
        for path in files:
            try:
                with path.open("rb") as file:
                    size = path.stat().st_size
                    tensors, used = parse_file(_reader(file), size, str(path), budget)
            except OSError as error:
                raise WeightsError(f"{path}: cannot be read ({error.strerror})") from None
            budget -= used
            yield path.name, tensors

    return Headers(config, joined(parts(), index, str(folder)))


def _reader(file: BinaryIO) -> Read:
    def read(start: int, stop: int) -> bytes:
        file.seek(start)
        return file.read(stop - start)

    return read


def parse_file(
    read: Read, size: int, where: str, budget: int = MAX_ALL_BYTES
) -> tuple[dict[str, TensorHeader], int]:
    """The tensors of one safetensors file of `size` bytes, and how many of them the header has.

    `budget`: what is left for headers, of all files. `where` names the file in errors.

    Raises:
      WeightsError: the header is too long, cut short, or not true.
    """
    first = read(0, min(size, 8))
    if len(first) < 8:
        raise WeightsError(f"{where}: {size} bytes are no safetensors file; fetch it anew")
    length = int.from_bytes(first, "little")
    most = min(MAX_HEADER_BYTES, budget)
    if length > size - 8:
        raise WeightsError(
            f"{where}: says that its header has {length} bytes, but the file has {size}; it is cut "
            "short or no safetensors file, fetch it anew"
        )
    if length > most:
        raise WeightsError(
            f"{where}: a header of {length} bytes; of one file at most {MAX_HEADER_BYTES >> 20} "
            f"MiB are read, of all {MAX_ALL_BYTES >> 20}. No Gemma 4 checkpoint needs that"
        )
    text = read(8, 8 + length)
    if len(text) < length:
        raise WeightsError(f"{where}: ends within its header; fetch it anew")
    return parse_header(text, size - 8 - length, where), length


def parse_header(text: bytes, data_bytes: int, where: str) -> dict[str, TensorHeader]:
    """The tensors that a header describes, in the order in which they lie.

    data_bytes: what the file holds after the header; all of it must be described, none twice.

    Raises:
      WeightsError: not JSON, or not true; the tensor is named.
    """
    try:
        data = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise WeightsError(
            f"{where}: its header is not valid JSON ({short(error)}); fetch it anew"
        ) from None
    if not isinstance(data, dict):
        raise WeightsError(f"{where}: its header is a {type(data).__name__}, not an object")
    data.pop("__metadata__", None)
    found = [(*_entry(value, f"{where}: {short(key)}"), key) for key, value in data.items()]
    found.sort(key=lambda entry: entry[:2])
    reached = 0
    for begin, end, _, key in found:
        if begin != reached:
            what = "overlaps what" if begin < reached else "leaves a hole behind what"
            raise WeightsError(
                f"{where}: {short(key)} begins at byte {begin} and {what} ends at {reached}; fetch "
                "the file anew"
            )
        reached = end
    if reached != data_bytes:
        raise WeightsError(
            f"{where}: its header describes {reached} bytes of tensors, the file has {data_bytes}; "
            "it is cut short or damaged, fetch it anew"
        )
    return {key: tensor for _, _, tensor, key in found}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name is there twice")
    return made


def _entry(value: Any, where: str) -> tuple[int, int, TensorHeader]:
    """Where a tensor begins and ends, and what it is."""
    if not isinstance(value, dict):
        raise WeightsError(f"{where}: described by a {type(value).__name__}, not an object")
    dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise WeightsError(f"{where}: dtype {short(dtype)!r} is none of {', '.join(BITS)}")
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_DIMENSIONS
        or not all(type(n) is int and 0 <= n <= MAX_DIMENSION for n in shape)
    ):
        raise WeightsError(
            f"{where}: shape {short(shape)} is not a list of at most {MAX_DIMENSIONS} sizes"
        )
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(n) is int and n >= 0 for n in offsets)
    ):
        raise WeightsError(f"{where}: data_offsets {short(offsets)} are not [begin, end]")
    begin, end = offsets
    bits = math.prod(shape) * BITS[dtype]
    if (end - begin) * 8 != bits:
        raise WeightsError(
            f"{where}: {dtype} {shape} has {short(bits // 8)} bytes, but its data_offsets "
            f"{short(offsets)} hold {short(end - begin)}; fetch the file anew"
        )
    return begin, end, TensorHeader(dtype, tuple(shape), end - begin)


# -- GGUF -------------------------------------------------------------------------------------


def _of_gguf(name: str, revision: str | None, offline: bool) -> Headers:
    """Of one file, here or as owner/name/FILE.gguf."""
    path = Path(name).expanduser()
    try:
        here = path.is_file()
    except (OSError, ValueError):
        here = False
    if here:
        return _of_gguf_file(path)
    found = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)/([\w-][\w./-]*)", name)
    if found is None or ".." in name:
        raise HubError(f"no file {short(name)!r}; give one that is here, or owner/name/FILE.gguf")
    repo, file = found.groups()
    if not offline:
        with hub.explained(repo, revision):
            return _gguf_of_repository(_Repository(repo, revision), file)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(repo, file, revision=revision)
    if not isinstance(cached, str):
        raise HubError(
            f"{name} is not in the local cache and offline mode is on; connect, or give a file"
        )
    return _of_gguf_file(Path(cached))


def _of_gguf_file(path: Path, inputs: str | None = None) -> Headers:
    def parse(name: str, budget: int) -> gguf.Header:
        try:
            with (path.parent / name).open("rb") as file:
                size = (path.parent / name).stat().st_size
                return gguf.parse(_reader(file), size, str(path.parent / name), budget)
        except OSError as error:
            raise WeightsError(f"{path.parent / name}: cannot be read ({error.strerror})") from None

    return _joined_gguf(path.name, parse, str(path), inputs)


def _joined_gguf(
    name: str, parse: Callable[[str, int], gguf.Header], where: str, inputs: str | None
) -> Headers:
    """The model of one file, or of all files where it was split, and its file of `inputs`."""
    names = [name]
    if split := re.fullmatch(SPLIT, name, re.I):
        count = int(split[3])
        if not 1 <= count <= MAX_REMOTE_FILES:
            raise WeightsError(
                f"{where}: one of {count} files; at most {MAX_REMOTE_FILES} are read"
            )
        names = [f"{split[1]}-{n:05}-of-{split[3]}{split[4]}" for n in range(1, count + 1)]
    first = parse(names[0], gguf.MAX_BYTES)
    said = first.metadata.get("split.count", 1)
    if said not in (0, len(names)):
        raise WeightsError(
            f"{where}: says that it is one of {said} files; all of them are needed, under names "
            "such as NAME-00001-of-00002.gguf"
        )

    def parts() -> Iterator[tuple[str, dict[str, tuple[str, tuple[int, ...], int]]]]:
        budget = gguf.MAX_BYTES - first.nbytes
        yield names[0], first.tensors
        for name in names[1:]:
            found = parse(name, budget)
            budget -= found.nbytes
            yield name, found.tensors

    tensors = joined(parts(), {}, where)
    config = gguf.config_of(gguf.Header(first.metadata, tensors, 0), where)
    ours = {gguf.our_key(name): TensorHeader(*tensor) for name, tensor in tensors.items()}
    if len(ours) != len(tensors):
        raise WeightsError(f"{where}: a tensor is there by two names; fetch the file anew")
    if inputs:
        found = parse(inputs, gguf.MAX_BYTES)
        kind = found.metadata.get("general.architecture")
        if kind != gguf.INPUTS or found.tensors.keys() & ours.keys():
            raise WeightsError(
                f"{short(inputs)} beside {where} is no image and sound input: its architecture is "
                f"{short(kind)!r}, or its tensors are the model's; rename it, or name the model's "
                "own file"
            )
        ours |= {name: TensorHeader(*tensor) for name, tensor in found.tensors.items()}
    return Headers(config, ours, gguf=True, inputs=inputs)


def _model_of(names: Iterable[str], where: str) -> tuple[str, str | None]:
    """The file of the only model among GGUF files, the first of its parts; and the first file of
    image and sound input, of which one is loaded, whatever types they come in.

    Raises:
      WeightsError: there are several models, or none.
    """
    models, inputs = [], None
    for name in sorted(names):
        if not Path(name).name.lower().startswith("mmproj"):
            models.append(name)
        else:
            inputs = inputs or name
    split = [(name, re.fullmatch(SPLIT, name, re.I)) for name in models]
    models = [name for name, part in split if part is None or int(part[2]) == 1]
    if len(models) != 1:
        shown = ", ".join(map(short, models[:8])) + (", ..." if len(models) > 8 else "")
        hint = f"; name one, such as {where}/{short(models[0])}" if models else ""
        raise WeightsError(f"{where} has {len(models)} models in GGUF: {shown or 'none'}{hint}")
    return models[0], inputs


# -- the hub ----------------------------------------------------------------------------------


class _Repository:
    """Files of a hub repository, by ranges."""

    def __init__(self, repo: str, revision: str | None) -> None:
        self.repo, self.revision = repo, revision

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if the repository has no such file. Fixes the commit."""
        from huggingface_hub import constants, errors, get_hf_file_metadata

        try:
            found = get_hf_file_metadata(self._url(name), timeout=TIMEOUT_S)
        except errors.EntryNotFoundError:
            return None
        except errors.HfHubHTTPError:
            raise
        except Exception as error:  # whatever the HTTP library of the day raises
            raise HubError(
                f"the hub ({constants.ENDPOINT}) cannot be reached for the headers of {self.repo} "
                f"({short(error) or type(error).__name__}); connect, or name a folder or a size "
                "such as E2B"
            ) from None
        self.revision = found.commit_hash or self.revision
        if found.size is None:
            raise HubError(f"{self.repo}: the hub does not say how large {name} is; try again")
        return found.size

    def gguf_names(self) -> list[str]:
        """The repository's files of this kind."""
        from huggingface_hub import HfApi, constants

        found = HfApi(endpoint=constants.ENDPOINT).model_info(
            self.repo, revision=self.revision, timeout=TIMEOUT_S
        )
        names = (file.rfilename for file in found.siblings or ())
        return [name for name in names if name.lower().endswith(GGUF)]

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file, at most these, whatever the server sends."""
        from huggingface_hub import utils

        asked = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        headers = utils.build_hf_headers(library_name="gemsmith", headers=asked)
        got = bytearray()
        with _streamed(self._url(name), headers) as (status, pieces):
            if status not in (200, 206):
                raise HubError(f"the hub refused {self.repo}: {name}: status {status}; try again")
            # A server that knows no ranges begins at the beginning.
            skip = start if status == 200 else 0
            for piece in pieces:
                got += piece
                if len(got) >= skip + stop - start:
                    break
        return bytes(got[skip : skip + stop - start])

    def _url(self, name: str) -> str:
        from huggingface_hub import constants, hf_hub_url

        return hf_hub_url(
            self.repo, name, revision=self.revision, endpoint=constants.ENDPOINT.rstrip("/")
        )


@contextmanager
def _streamed(url: str, headers: Mapping[str, str]) -> Iterator[tuple[int, Iterator[bytes]]]:
    """Status and body, piece by piece, by huggingface_hub's own session: httpx, once requests."""
    from huggingface_hub import utils

    session: Any = utils.get_session()
    if hasattr(session, "stream"):
        with session.stream(
            "GET", url, headers=headers, timeout=TIMEOUT_S, follow_redirects=True
        ) as response:
            yield response.status_code, response.iter_bytes(PIECE)
    else:
        with session.get(url, headers=headers, timeout=TIMEOUT_S, stream=True) as response:
            yield response.status_code, response.iter_content(PIECE)


def _of_repository(repository: _Repository) -> Headers:
    where = repository.repo
    single = repository.size(SINGLE) is not None
    index_size = None if single else repository.size(INDEX)
    if not single and index_size is None and (names := repository.gguf_names()):
        return _gguf_of_repository(repository, *_model_of(names, where))
    config = _remote_config(repository)

    def tensors(name: str, budget: int) -> tuple[dict[str, TensorHeader], int]:
        size = repository.size(name)
        if size is None:
            raise WeightsError(f"{where}: {name} is missing, though {INDEX} names it")
        start = repository.read(name, 0, min(size, FIRST_BYTES))

        def read(begin: int, end: int) -> bytes:
            if end <= len(start):
                return start[begin:end]
            return start[begin:] + repository.read(name, max(begin, len(start)), end)

        return parse_file(read, size, f"{where}: {name}", budget)

    if single:
        return Headers(config, tensors(SINGLE, MAX_ALL_BYTES)[0])
    if index_size is None:
        raise WeightsError(
            f"{where} has neither {SINGLE} nor {INDEX}, nor GGUF; pickle files are not read. Name "
            "a repository in safetensors format"
        )
    if index_size > MAX_REMOTE_INDEX_BYTES:
        most = MAX_REMOTE_INDEX_BYTES >> 20
        raise WeightsError(f"{where}: {INDEX} is larger than {most} MiB; not an index")
    index = read_index(repository.read(INDEX, 0, index_size), f"{where}: {INDEX}")
    names = sorted(set(index.values()))
    if len(names) > MAX_REMOTE_FILES:
        raise WeightsError(
            f"{where}: {INDEX} names {len(names)} files; at most {MAX_REMOTE_FILES} are asked for"
        )

    def parts() -> Iterator[tuple[str, dict[str, TensorHeader]]]:
        budget = MAX_ALL_BYTES
        for name in names:
            found, used = tensors(name, budget)
            budget -= used
            yield name, found

    return Headers(config, joined(parts(), index, where))


def _gguf_of_repository(repository: _Repository, name: str, inputs: str | None = None) -> Headers:
    def parse(name: str, budget: int) -> gguf.Header:
        where = f"{repository.repo}: {name}"
        size = repository.size(name)
        if size is None:
            raise WeightsError(f"{where} does not exist; is it the name of a file there?")
        return gguf.parse(
            lambda start, stop: repository.read(name, start, stop), size, where, budget
        )

    return _joined_gguf(name, parse, f"{repository.repo}/{name}", inputs)


def _remote_config(repository: _Repository) -> Gemma4Config:
    where = f"{repository.repo}: config.json"
    size = repository.size("config.json")
    if size is None:
        raise ConfigError(f"{where} does not exist; is it a model repository?")
    if size > MAX_CONFIG_BYTES:
        raise ConfigError(f"{where}: larger than {MAX_CONFIG_BYTES >> 20} MiB; not a config")
    try:
        data = json.loads(repository.read("config.json", 0, size).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid JSON ({short(error)})") from None
    return Gemma4Config.from_dict(data)
