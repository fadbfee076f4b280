"""`tapeless bench`: it counts operations rightly, and gives figures only where the reference agrees."""

from __future__ import annotations

import dataclasses
import json
from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tapeless as tl
from commands import refused, succeeds
from helpers import configs
from tapeless.__main__ import run
from tapeless.bench import CASES, TRAINING, bench
from tapeless.bench.cases import GenerationCase, Session, TrainingCase
from tapeless.bench.workload import Differs, compare, text_of
from tapeless.config import GPTConfig
from tapeless.data.documents import read_documents
from tapeless.flops import forward_flops, training_flops
from tapeless.layout import aligned_zeros, parameters
from tapeless.ops import reference
from tapeless.ops.cpu import make_ops, peak, profile

# ---------------------------------------------------------------- operations


def test_microgpt_counted_by_hand():
    config = GPTConfig(vocab_size=27, norm="rms", norm_embed=True)
    # A token: 16·48 for q, k and v, 16·16 for wo, 16·64 and 64·16 in the MLP, 16·27 for the head.
    # Three tokens have 6 causal pairs, each 16 for its score and 16 for its value.
    multiply_adds = 3 * (768 + 256 + 1024 + 1024 + 432) + 6 * (16 + 16)
    assert forward_flops(config, [3]) == 2 * multiply_adds == 21_408
    assert training_flops(config, [3]) == 3 * 21_408


@given(configs(), st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_operations_are_those_of_the_weights_and_the_pairs(config, lengths):
    shapes = {t.name: t.shape for t in parameters(config)}
    weights = [shapes[name] for name in ("wqkv", "wo", "w1", "w2", "wte" if config.tied else "head")]
    pairs = sum(1 for n in lengths for query in range(n) for key in range(n) if key <= query)
    multiply_adds = sum(lengths) * sum(map(prod, weights)) + pairs * config.n_layer * 2 * config.n_embd
    assert forward_flops(config, lengths) == 2 * multiply_adds


def test_the_peak_loop_does_the_work_it_is_credited_with():
    loop, chains, lanes = peak.kernel()
    vectors = aligned_zeros((2 + chains) * lanes * 4).view(np.float32)
    vectors[: 2 * lanes] = 1  # x becomes 1·x + 1: a count of the multiply-adds in every lane
    vectors[2 * lanes :] = first = np.arange(chains * lanes)
    loop(1000, vectors.ctypes.data)
    np.testing.assert_array_equal(vectors[2 * lanes :], first + 1000 * peak.UNROLLED)


def test_the_text_has_shakespeares_vocabulary():
    assert len(set(text_of(read_documents("names")))) == 65


# ---------------------------------------------------------------- figures, or none


@given(st.floats(-4e-5, 4e-5), st.integers(0, 9))
def test_losses_are_compared(error, step):
    losses = np.linspace(3, 2, 10)
    off = losses.copy()
    off[step] *= 1 + error
    if abs(error) < 0.99e-5:
        assert compare(np.stack([losses, off]), losses) == pytest.approx(abs(error), abs=1e-15)
    elif abs(error) > 1.01e-5:
        with pytest.raises(Differs, match="losses differ from the reference"):
            compare(np.stack([losses, off]), losses)


def test_a_loss_that_is_no_number_differs():
    with pytest.raises(Differs):
        compare(np.array([2.0, np.nan]), np.array([2.0, 2.0]))


def test_a_process_prints_one_json_object(tmp_path):
    done = succeeds("bench", "microgpt", "--json", cwd=tmp_path)
    report = json.loads(done.stdout)
    assert {"machine", "date", "versions", "simd", "dtype", "peak_gflops", "cases"} == set(report)
    (case,) = report["cases"]
    assert case["case"] == "microgpt"
    assert case["threads"] == 1
    assert case["loss_difference"] <= 1e-5
    work = TRAINING["microgpt"].workload
    assert case["gflops"] == pytest.approx(work.flops / 10_000 / case["us_per_step"] / 1e3)
    assert case["fraction_of_peak"] == pytest.approx(case["gflops"] / report["peak_gflops"]["1"])
    assert "microgpt" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_table(capsys):
    assert run(["bench", "microgpt"]) == 0
    out = capsys.readouterr().out
    assert "µs a step" in out
    assert [line.split()[:3] for line in out.splitlines() if "document" in line] == [
        ["microgpt", "1", "document"]
    ]


@pytest.fixture
def fresh(monkeypatch):
    """The microgpt case without what it remembers."""
    monkeypatch.setitem(CASES, "microgpt", dataclasses.replace(TRAINING["microgpt"]))


def test_no_figure_where_losses_differ(fresh, monkeypatch, capsys):
    right = reference.relu_forward

    def wrong(v, u, n):
        right(v, u, n)
        v[:n] *= 1.001

    monkeypatch.setattr(reference, "relu_forward", wrong)
    assert run(["bench", "microgpt"]) == 1
    out = capsys.readouterr().out
    assert "microgpt: losses differ from the reference: " in out
    assert "µs a step" not in out
    assert run(["bench", "microgpt", "--json"]) == 1
    (case,) = json.loads(capsys.readouterr().out)["cases"]
    assert set(case) == {"case", "work", "threads", "refused"}


def test_no_figure_where_texts_differ(monkeypatch):
    monkeypatch.setattr(reference, "sample_token", lambda *_: 0)
    (case,) = bench(["generate"], seconds=0)["cases"]
    assert case["refused"].startswith("texts differ from the reference: number 0 is")
    assert "characters_per_second" not in case


@pytest.mark.parametrize(
    "name", ["generate", "warm-start", pytest.param("first-compile", marks=pytest.mark.oracle)]
)
def test_other_cases(name):
    (case,) = bench([name], seconds=0)["cases"]
    assert "refused" not in case, case["refused"]
    assert case["characters_per_second" if name == "generate" else "seconds"] > 0


def test_generating_is_counted_by_the_tokens_that_are_read():
    """BOS and all characters; of a text as long as the context not the last one, which is only drawn."""
    case = GenerationCase(300, 5)
    result = case.measure(Session(0, lambda line: None))
    model = tl.train("names", steps=1000, threads=1, samples=0, progress=False).model
    texts = model.generate("", 300, 0.5, 42)
    assert result["characters_per_text"] == pytest.approx(np.mean([len(text) for text in texts]))
    flops = sum(forward_flops(model.config, [min(1 + len(text), 16)]) for text in texts)
    a_character = flops / sum(map(len, texts))
    assert result["gflops"] * 1e9 / result["characters_per_second"] == pytest.approx(a_character)


def test_what_is_measured_is_measured_three_times_at_least():
    assert Session(0, lambda line: None).repeat(iter(range(9)).__next__) == [0, 1, 2]


def test_the_share_is_of_the_peak_of_as_many_threads(monkeypatch):
    case = TrainingCase("microgpt", "2 documents", 50, 5, {"batch_size": 2}, threads=2)
    monkeypatch.setitem(CASES, "two", case)
    monkeypatch.setitem(TRAINING, "two", case)
    monkeypatch.setattr(peak, "peak_gflops", lambda threads: 100.0 * threads)
    (result,) = bench(["two"], seconds=0)["cases"]
    assert result["threads"] == 2
    assert result["fraction_of_peak"] == pytest.approx(result["gflops"] / 200)


def test_unknown_cases_are_refused(tmp_path):
    assert "Did you mean 'microgpt'?" in refused("bench", "micrgpt", cwd=tmp_path)
    everything = refused("bench", "zzz", cwd=tmp_path)
    assert all(name in everything for name in CASES)
    assert "only training" in refused("bench", "--profile", "generate", cwd=tmp_path)


# ---------------------------------------------------------------- where the time goes


def test_every_op_has_its_family():
    families = {name: profile.family(name) for name in vars(make_ops(GPTConfig()))}
    assert set(families.values()) == set(profile.FAMILIES)
    for op, family in {
        "linear_backward": "products",
        "tied_head_forward": "products",
        "flash_attention_backward": "attention",
        "layernorm_backward": "norms",
        "global_norm": "optimiser",
        "adamw": "optimiser",
        "gelu_forward": "activation",
        "cross_entropy_forward": "softmax and loss",
        "embed_backward": "everything else",
    }.items():
        assert families[op] == family


@pytest.mark.skipif(not profile.has_clock(), reason="this processor has no clock that programs may read")
def test_a_profile_accounts_for_the_whole_step(monkeypatch):
    case = TrainingCase("esp32gpt", "1 document", steps=200, checked=20)  # has no norms
    monkeypatch.setitem(CASES, "esp32gpt", case)
    monkeypatch.setitem(TRAINING, "esp32gpt", case)
    (result,) = bench(["esp32gpt"], profile=True, seconds=0.2)["cases"]
    parts = result["profile"]
    assert tuple(parts) == profile.FAMILIES
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1)
    step = sum(part["us"] for part in parts.values())
    assert all(part["us"] == pytest.approx(part["share"] * step) for part in parts.values())
    assert parts["norms"]["share"] == 0 < parts["products"]["share"] < 1


def test_processors_without_a_clock_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(profile.llvm, "get_default_triple", lambda: "riscv64-unknown-linux-gnu")
    assert run(["bench", "--profile"]) == 2
    assert "profiling reads the clock of an x86-64 or 64-bit ARM processor" in capsys.readouterr().err


# ---------------------------------------------------------------- the machine

INTEL = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R) CPU @ 2.20GHz\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"


@pytest.mark.parametrize(
    ("cpuinfo", "llvms", "name"),
    [
        (INTEL, "broadwell", "Intel(R) Xeon(R) CPU @ 2.20GHz"),
        (ARM, "neoverse-v1", "neoverse-v1"),  # Linux tells no name on ARM
        (None, "apple-m1", "apple-m1"),
        (None, "generic", "known to Python"),
    ],
    ids=["x86", "ARM", "no file", "unknown"],
)
def test_the_processors_name(cpuinfo, llvms, name, monkeypatch):
    import tapeless.bench as module

    def read(path, **_):
        if str(path) == "/proc/cpuinfo" and cpuinfo is not None:
            return cpuinfo
        raise FileNotFoundError(path)

    monkeypatch.setattr("pathlib.Path.read_text", read)
    monkeypatch.setattr(module.llvm, "get_host_cpu_name", lambda: llvms)
    monkeypatch.setattr(module.platform, "processor", lambda: "known to Python")
    assert module.about()["machine"]["processor"] == name
