"""The CPU engine on an emulated 64-bit ARM processor, beside this one: run by `make test-arm`."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from test_product import BITS

ROOT = Path(__file__).parents[1]
ARM = ROOT / "build" / "arm64" / "python"
pytestmark = [
    pytest.mark.arm,
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="compares ARM with x86"),
]


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    """Run Python there, all runs with one cache of code, and return what it printed."""
    cache = tmp_path_factory.mktemp("cache")

    def run(*arguments, cwd=ROOT):
        assert ARM.exists(), "there is no emulated processor: make test-arm sets one up"
        variables = os.environ | {"TAPELESS_CACHE_DIR": str(cache), "COLUMNS": "120"}
        done = subprocess.run(
            [ARM, *arguments],
            cwd=cwd, env=variables, capture_output=True, encoding="utf-8", check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout + done.stderr

    run.cache = cache
    return run


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A run on this processor."""
    folder = tmp_path_factory.mktemp("here")
    train = [sys.executable, "-m", "tapeless", "train", "--steps", "100", "--out", "run"]
    subprocess.run(train, cwd=folder, capture_output=True, check=True)
    return folder / "run"


def losses(run):
    return np.array([json.loads(row)["loss"] for row in (run / "metrics.jsonl").read_text().splitlines()])


@pytest.mark.parametrize("threads", [1, 2])
def test_it_trains_and_generates_as_this_processor_does(threads, arm, here, tmp_path):
    options = ("--steps", "100", "--threads", str(threads), "--out", "run")
    said = arm("-m", "tapeless", "train", *options, cwd=tmp_path)
    assert f"cpu engine (NEON, {threads} thread" in said
    run = tmp_path / "run"
    assert len(losses(run)) == 100
    print(f"{threads} threads: losses differ by {np.abs(losses(run) - losses(here)).max():.1e}")
    np.testing.assert_allclose(losses(run), losses(here), rtol=0, atol=1e-6)
    assert (run / "samples.txt").read_text() == (here / "samples.txt").read_text()
    code = next(arm.cache.glob("adamw-*")).read_bytes()
    assert bytes.fromhex("df3f03d5") in code  # isb, where threads wait for each other


@pytest.mark.parametrize("preset", ["microgpt", "flashmicrogpt"])
def test_gradients(preset, arm):
    """Those of the reference by a sample and along random directions; the engine's all."""
    assert "All gradients agree." in arm("-m", "tapeless", "check", preset, "--entries", "10")


def test_products_in_bfloat16_have_the_same_bits(arm, child):
    path, bits, least = arm("-c", BITS).split()
    _, *ours = child(BITS).split()
    assert path == "emulated"
    # ARM takes a number for subnormal that only rounding would make normal.
    assert [bits, float.fromhex(least)] == [ours[0], 0]
    assert float.fromhex(ours[1]) == 2**-126


def test_the_processor_has_a_name(arm):
    """Which /proc/cpuinfo does not tell on ARM."""
    assert (
        arm("-c", "from tapeless.bench import about; print(about()['machine']['processor'])")
        == "neoverse-n1\n"
    )


# Tests that run there as they are.
NUMERIC = ("test_simd.py", "test_attention.py", "test_product.py", "test_bfloat16.py", "test_precision.py")


@pytest.mark.parametrize("tests", [*NUMERIC, "test_bench.py::test_a_profile_accounts_for_the_whole_step"])
def test_numbers(tests, arm):
    print(arm("-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{tests}"))
