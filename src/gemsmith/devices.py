"""Machines by name: memory, bandwidth and peak rates, each with where the figures were read.

For questions about a machine that is not this one (`gemsmith fit --device`, `gemsmith choose`);
this one is asked itself, see hardware.py.

Figures are those of the makers, or worked out from them as the source says: what a chip does at
best, which no program reaches. Rates are of dense matrices; the twice as high ones with sparsity
are in no use here. None: no source was found, or the chip has no such units. Memory is given as
sold; of chips' memory a GB is 2^30 bytes, and system or driver take a part of it.

Legend: GB/s is 10^9 bytes a second, TFLOPS and TOPS 10^12 operations, 2 a multiply-add.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from gemsmith.errors import ConfigError

Kind = Literal["cpu", "gpu", "phone", "unified"]


@dataclass(frozen=True, slots=True)
class Device:
    """A machine or an accelerator as it is sold."""

    name: str
    memory_gb: float
    bandwidth_gbs: float
    """Of the memory that holds the weights."""
    bf16_tflops: float | None
    int8_tops: float | None
    kind: Kind
    """unified: one memory for processor and graphics. cpu, phone: the same, with less of either."""
    source: str
    arch: str = "arm64"
    """Kind of its processor, as in `hardware.arch`; of no meaning for a gpu."""

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gb * (1 << 30))


_RPI = "4267 MT/s x 32 bit (circuitdigest.com/news/the-new-raspberry-pi-5-is-here-faster-than-ever)"
_RTX_30 = "stillwater-sc/KPU-Simulator docs/external-knowledge/rtx_30_series_specs_table.md"
_T4_A100 = "hmc-tech.com/gpu/nvidia-a800-40gb-vs-nvidia-t4 (the A800's chip is the A100's)"
_A100 = "sysrqmts.com/gpus/compare/nvidia-a100-sxm4-40-gb-vs-nvidia-tesla-t4"
_H100 = "glennklockwood.com/garden/processors/h100 (rates) and NVIDIA's H100 table at "
_M4 = "Ars Technica's table of the M4 family, copied at theverysoon.com/category/mac-mini"

DEVICES: dict[str, Device] = {
    # -- boards
    "raspberry-pi-5-8gb": Device("Raspberry Pi 5 8 GB", 8, 17.1, None, None, "cpu", _RPI),
    "raspberry-pi-5-16gb": Device("Raspberry Pi 5 16 GB", 16, 17.1, None, None, "cpu", _RPI),
    "jetson-orin-nano-8gb": Device(
        "Jetson Orin Nano 8 GB", 8, 68, None, None, "unified",
        "github.com/hokwangchoi/jetson-orin-nano-benchmarks; a later power mode lifts the clock",
    ),
    # -- telephones
    "iphone-17-pro": Device(
        "iPhone 17 Pro", 12, 75.8, None, None, "phone",
        "inews.zoombangla.com/a19-pro-vs-a19-specs: 9600 MT/s (third party; Apple publishes none)",
    ),
    "snapdragon-8-gen-3-12gb": Device(
        "Telephone with Snapdragon 8 Gen 3, 12 GB", 12, 76.8, None, None, "phone",
        "gist.github.com/EwoutH/754fa40ad9ddc93d55084fc46569c759: 4 x 16 bit at 4800 MHz",
    ),
    "galaxy-s26-ultra-12gb": Device(
        "Galaxy S26 Ultra 12 GB (Snapdragon 8 Elite Gen 5)", 12, 84.8, None, None, "phone",
        "5300 MHz (lowyat.net/2025/366994/qualcomm-snapdragon-8-elite-gen-5) x 64 bit as in its "
        "forerunners, x 2; memory: techtimes.com/articles/312743",
    ),
    # -- graphics cards
    "rtx-3060-12gb": Device("GeForce RTX 3060 12 GB", 12, 360, None, 102, "gpu", _RTX_30),
    "rtx-3090": Device("GeForce RTX 3090", 24, 936, None, 285, "gpu", _RTX_30),
    "rtx-4090": Device(
        "GeForce RTX 4090", 24, 1008, 165, 661, "gpu",
        "waredb.com/processor/nvidia-geforce-rtx-4090",
    ),
    "rtx-5090": Device(
        "GeForce RTX 5090", 32, 1792, None, None, "gpu",
        "huggingface.co/blog/exolabs/the-dgx-spark-handbook",
    ),
    # -- accelerators of data centres
    "t4": Device(
        "NVIDIA T4", 16, 320, None, 130, "gpu",
        f"{_A100} and {_T4_A100}; it has no bfloat16 (float16: 65 TFLOPS)",
    ),
    "l40s": Device(
        "NVIDIA L40S", 48, 864, 362, None, "gpu",
        "NVIDIA's table copied at mullet.se/product.html?product_id=355414, int8 left blank there",
    ),
    "a100-40gb": Device(
        "NVIDIA A100 SXM 40 GB", 40, 1555, 312, 624, "gpu", f"{_A100}; rates {_T4_A100}"
    ),
    "a100-80gb": Device(
        "NVIDIA A100 SXM 80 GB", 80, 2039, 312, 624, "gpu",
        f"1593 MHz x 5120 bit x 2 (gist.github.com/gengwg/3520df2ebf8872e5ee4818367e3a4122); "
        f"rates {_T4_A100}",
    ),
    "h100-80gb": Device(
        "NVIDIA H100 SXM 80 GB", 80, 3350, 989, 1979, "gpu",
        _H100 + "archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html",
    ),
    "h200": Device(
        "NVIDIA H200 SXM", 141, 4800, 989, None, "gpu",
        "huggingface.co/datasets/devidasmishra/ai-inference-hardware-economics-2026",
    ),
    # -- one memory for everything
    "dgx-spark": Device(
        "NVIDIA DGX Spark", 128, 273, None, None, "unified",
        "ai-infrastructure.net/dgx-spark, after docs.nvidia.com; only sparse FP4 is published",
    ),
    "m4-16gb": Device("Apple M4 16 GB", 16, 120, None, None, "unified", _M4),
    "m4-24gb": Device("Apple M4 24 GB", 24, 120, None, None, "unified", _M4),
    "m4-pro-24gb": Device("Apple M4 Pro 24 GB", 24, 273, None, None, "unified", _M4),
    "m4-pro-48gb": Device("Apple M4 Pro 48 GB", 48, 273, None, None, "unified", _M4),
    "m4-max-128gb": Device(
        "Apple M4 Max 128 GB", 128, 546, None, None, "unified",
        "macrumors.com/2024/10/30/apple-announces-m4-max-chip",
    ),
}  # fmt: skip


def device_of(name: str) -> Device:
    """The device of this name; case, spaces and underscores do not matter.

    Raises:
      ConfigError: there is none in the table, with near matches and the way round it.
    """
    key = "-".join(name.lower().replace("_", " ").replace("-", " ").split())
    if key in DEVICES:
        return DEVICES[key]
    parts = key.split("-")
    near = [k for k in DEVICES if key and all(part in k.split("-") for part in parts)]
    near = near or get_close_matches(key[:60], DEVICES, n=3, cutoff=0.5)
    shown = name if len(name) <= 60 else name[:57] + "..."
    hint = f"Did you mean {' or '.join(near[:4])}?" if near else f"Known are {', '.join(DEVICES)}."
    raise ConfigError(f"no device {shown!r}. {hint} Or give its memory in GB instead.")
