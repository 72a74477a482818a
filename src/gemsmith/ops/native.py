"""The C++ extension `gemsmith._native`: whether it is there, how it runs, what may be passed to it.

It sees addresses alone, so whatever calls it checks every tensor first (`check`). Products are in
cpu.py, what stands between them in rows.py, attention in cpu_attention.py, decoder layers in
cpu_layers.py; no other module of `ops` calls it.
"""

from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from gemsmith import hardware
from gemsmith.errors import WeightsError

LINE = 64
"""Bytes that the kernels read at a time."""


@cache
def extension() -> ModuleType | None:
    """None where no C++ compiler was found when gemsmith was installed."""
    try:
        return import_module("gemsmith._native")
    except ImportError:
        return None


def available() -> bool:
    """Whether the extension is there."""
    return extension() is not None


def isa() -> str:
    """The instruction set in use: one of `isas()`."""
    native = extension()
    return native.isa() if native else "torch"


def isas() -> tuple[str, ...]:
    """What this CPU and this build can use, slowest first; "torch" alone without the extension."""
    native = extension()
    return tuple(native.isas()) if native else ("torch",)


def force_isa(name: str | None) -> None:
    """Use one instruction set from now on, in every thread; None: the fastest. For tests.

    Raises:
      ValueError: it is not one of `isas()`.
    """
    native = extension()
    forced = native.force_isa(name or "") if native else name in (None, "torch")
    if not forced:
        raise ValueError(f"instruction set {name!r} cannot be used here; {', '.join(isas())} can")


@cache
def _cores() -> int:
    machine = hardware.machine()
    return max(1, min(machine.cores, int(machine.cpu_limit or machine.cores)))


_own_threads: int | None = None


def threads() -> int:
    """Threads a product may use: torch's number, but no more than the cores granted."""
    return min(_own_threads or torch.get_num_threads(), _cores())


def leave_torch_one_thread() -> None:
    """Have torch compute on one thread from now on, the extension on as many as torch has now.

    For a small model: torch's threads wait for each other at every operation, however little work
    it is, and stand still where one has to share its core. The extension's take what work there is.
    """
    global _own_threads
    _own_threads = _own_threads or torch.get_num_threads()
    torch.set_num_threads(1)


def ready() -> ModuleType | None:
    """The extension, told how many threads it may use now."""
    native = extension()
    if native:
        native.set_threads(threads())
    return native


def advise_hugepages(tensor: Tensor) -> bool:
    """Ask for 2 MiB pages behind a large tensor, before it is written: weights stream about a tenth
    faster from them. False where that cannot be (another system than Linux, memory too small)."""
    native = extension()
    return bool(native and native.advise_hugepages(tensor.data_ptr(), tensor.nbytes))


def read_memory(tensor: Tensor) -> int:
    """Read a tensor's whole 64-byte lines with all threads, and return the sum of their 64-bit
    words modulo 2^64: what no product can do faster. Needs the extension.

    Raises:
      WeightsError: it is not contiguous on the CPU.
    """
    check(tensor, "memory", tensor.dtype, tuple(tensor.shape))
    native = ready()
    if native is None:
        raise RuntimeError("gemsmith._native is not built, and torch cannot read memory that fast")
    return native.read_memory(tensor.data_ptr(), tensor.nbytes)


def checksum(tensor: Tensor) -> int:
    """64 bits that any change of the tensor's bytes changes, all but surely; no defence against
    malice. Needs the extension; the bytes must be a multiple of 64.

    Raises:
      WeightsError: it is not contiguous on the CPU, or of another size.
    """
    check(tensor, "memory", tensor.dtype, tuple(tensor.shape))
    native = ready()
    if native is None or tensor.nbytes % LINE:
        raise WeightsError(f"no checksum of {tensor.nbytes} bytes: lines of {LINE} are summed")
    return native.checksum(tensor.data_ptr(), tensor.nbytes)


def check(tensor: Tensor, name: str, dtype: torch.dtype, shape: tuple[int | None, ...]) -> None:
    """The extension sees addresses alone, so nothing wrong may pass; None in shape: any size."""
    fits = tensor.shape == shape or (
        len(shape) == tensor.ndim
        and all(want in (None, size) for want, size in zip(shape, tensor.shape, strict=True))
    )
    if fits and tensor.dtype == dtype and tensor.is_cpu and tensor.is_contiguous():
        if tensor.requires_grad and torch.is_grad_enabled():
            raise WeightsError(
                f"{name} asks for a gradient, and low-bit products give none; "
                "use torch.no_grad(), or weights of 16 bits"
            )
        return
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    raise WeightsError(
        f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        f"{'' if tensor.is_contiguous() else ', not contiguous'}; "
        f"it must be contiguous {dtype} [{wanted}] on cpu"
    )
