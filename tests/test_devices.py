"""Machines by name: figures that can be, near matches where a name is not known."""

import math

import pytest

from gemsmith.devices import DEVICES, device_of
from gemsmith.errors import ConfigError


@pytest.mark.parametrize("key", DEVICES)
def test_a_device_has_figures_that_can_be_and_a_source(key: str):
    device = DEVICES[key]
    assert 4 <= device.memory_gb <= 192
    assert 10 <= device.bandwidth_gbs <= 10_000
    for rate in (device.bf16_tflops, device.int8_tops):
        assert rate is None or (math.isfinite(rate) and rate > 0)
    if device.bf16_tflops and device.int8_tops:
        # Tensor units multiply int8 twice as fast as bfloat16, or four times on GeForce cards.
        assert 1.9 < device.int8_tops / device.bf16_tflops < 4.1
    assert device.kind in ("cpu", "gpu", "phone", "unified")
    assert "." in device.source, "names a page"
    assert device_of(key) is device


@pytest.mark.parametrize("name", ["RTX 4090", "rtx_4090", " Rtx-4090 "])
def test_spellings_of_a_name_are_one(name: str):
    assert device_of(name) is DEVICES["rtx-4090"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a100", "no device 'a100'. Did you mean a100-40gb or a100-80gb? Or give its memory"),
        ("rtx-4080", "Did you mean rtx-4090"),
        ("raspberry pi 5", "Did you mean raspberry-pi-5-8gb or raspberry-pi-5-16gb?"),
        ("", "Known are raspberry-pi-5-8gb, "),
        ("q" * 5000, "no device 'qqq"),
    ],
)
def test_an_unknown_name_gets_near_matches(name: str, message: str):
    with pytest.raises(ConfigError) as caught:
        device_of(name)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 600


def test_memory_is_counted_in_chips():
    assert DEVICES["rtx-4090"].memory_bytes == 24 * 2**30
