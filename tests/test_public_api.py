"""What `import gemsmith` offers, and what it costs."""

import os
import subprocess
import sys
import textwrap

import pytest

import gemsmith

NAMES = """
    LM Content FinishReason Finished Gemma4Config GemsmithError Generation Problem SamplingParams
    Thinking ToolCall ToolCallEvent ToolProblem Usage __version__ load
"""


def test_the_public_names_are_these():
    assert set(gemsmith.__all__) == set(NAMES.split())


def test_every_public_name_is_there_and_listed():
    for name in gemsmith.__all__:
        assert getattr(gemsmith, name) is not None
        assert name in dir(gemsmith)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'gemsmith' has no attribute 'nothing'"):
        gemsmith.nothing  # noqa: B018


def test_import_loads_no_torch():
    code = "import sys, gemsmith; assert gemsmith.load; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pytorch_keeps_little_of_products_of_ever_new_shapes():
    """By default 0.9 MB of each where the CPU multiplies bfloat16: 270 MB of these."""
    code = """
        import resource
        import gemsmith
        import torch

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        weight = torch.ones(256, 64, dtype=torch.bfloat16)
        for rows in range(32, 332):
            torch.nn.functional.linear(weight[:1].expand(rows, 64), weight)
            before = peak() if rows == 32 else before
        print(peak() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout) < 100 * 1024


def test_what_the_user_says_of_pytorch_s_caches_stays():
    code = "import os, gemsmith; print(*(os.environ[name] for name in gemsmith.PRODUCTS_KEPT))"
    environment = {**os.environ, "LRU_CACHE_CAPACITY": "7"}
    environment.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY", None)
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    )
    assert done.stdout.split() == ["64", "7"]


def test_threads_of_pytorch_do_not_wait_busily_for_long():
    code = """
        import os, time
        import gemsmith
        import torch
        torch.set_num_threads(2)
        large, before = torch.ones(1 << 20), 0
        for round in range(21):
            before = before or round and time.process_time()
            large.neg()
            time.sleep(0.02)
        print(time.process_time() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert float(done.stdout) < 20 * 0.006  # by default 13 ms each, on a machine of two cores
