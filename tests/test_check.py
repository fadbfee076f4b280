"""`tapeless check`, `tapeless budget` and `tl.gradcheck`: a right gradient passes, a wrong one is named."""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import golden
import tapeless as tl
from commands import on_a_terminal, refused, succeeds
from tapeless.__main__ import run
from tapeless.flops import ACCURACY, expected_seconds, training_flops
from tapeless.gradcheck import TOLERANCE, _sample, example, smaller
from tapeless.layout import memory
from tapeless.ops import reference
from tapeless.progress import Counting

SMALL = [f"--set={s}" for s in ("vocab_size=6", "block_size=5", "n_embd=4", "n_head=2", "n_hidden=5")]
LAYERED = [
    f"--set={s}"
    for s in (
        "norm=layer",
        "norm_gain=true",
        "norm_bias=true",
        "norm_final=true",
        "bias=true",
        "activation=gelu",
    )
]
MHC = ["--set=residual=mhc"]
# For each output of each backward op: options of a model that uses it, and the tensors that must be
# named, where the mistake shows in particular ones (a gradient of activations spoils all before it).
OUTPUTS = {
    ("embed_backward", "dwte"): ([], ["wte"]),
    ("embed_backward", "dwpe"): ([], ["wpe"]),
    ("rmsnorm_backward", "dx"): ([], ["wte"]),
    ("rmsnorm_backward", "dw"): (["--set=norm_gain=true"], ["norm1_w", "norm2_w", "norme_w"]),
    ("layernorm_backward", "dx"): (LAYERED, ["wte"]),
    ("layernorm_backward", "dw"): (LAYERED, ["norm1_w", "norm2_w", "norme_w", "normf_w"]),
    ("layernorm_backward", "db"): (LAYERED, ["norm1_b", "norm2_b", "norme_b", "normf_b"]),
    ("linear_backward", "dx"): ([], ["wte", "wqkv", "wo", "w1", "w2"]),
    ("linear_backward", "dw"): ([], ["wqkv", "wo", "w1", "w2", "head"]),
    ("linear_backward", "db"): (LAYERED, ["bqkv", "bo", "b1", "b2"]),
    ("tied_head_backward", "dx"): (["--set=tied=true"], ["wo", "w1", "w2"]),
    ("tied_head_backward", "dwte"): (["--set=tied=true"], ["wte"]),
    ("relu_backward", "du"): ([], ["w1"]),
    ("gelu_backward", "du"): (LAYERED, ["w1", "b1"]),
    ("attention_backward", "dqkv"): ([], ["wqkv"]),
    ("flash_attention_backward", "dqkv"): (["--set=attention=flash", "--set=attention_tile=2"], ["wqkv"]),
    ("sigmoid_matrix_backward", "dmix"): (MHC, ["mix2"]),
    ("sinkhorn_backward", "dmix"): ([*MHC, "--set=n_streams=3"], ["mix2"]),
    ("mhc_expand_backward", "demb"): (MHC, ["wte", "wpe"]),
    ("mhc_mix_backward", "dx"): (MHC, ["wte", "wo"]),
    ("mhc_mix_backward", "dA"): (MHC, ["mix2"]),
    ("mhc_mix_backward", "dalpha"): (MHC, ["alpha1", "alpha2"]),
    ("mhc_distribute_backward", "df"): (MHC, ["wo", "w2"]),
    ("mhc_distribute_backward", "dbeta"): (MHC, ["beta1", "beta2"]),
    ("mhc_contract_backward", "dx"): (MHC, ["w2"]),
    ("mhc_contract_backward", "dcontract"): (MHC, ["contract"]),
    ("cross_entropy_backward", "dlogits"): ([], ["head"]),
}


def in_one(place):
    """A mistake in a single row, or a single entry: of those that are not zero the middle one by size."""

    def mistake(d):
        wrong = d.copy()
        rows = wrong.reshape(-1, max(1, wrong.shape[-1]) if place == "row" else 1)
        sizes = np.abs(rows).sum(-1)
        order = np.argsort(sizes)
        if nonzero := np.count_nonzero(sizes):
            rows[order[-1 - (nonzero - 1) // 2]] *= 1.5
        return wrong

    return mistake


MISTAKES = {
    "one row": in_one("row"),
    "one entry": in_one("entry"),
    "sign": lambda d: -d,
    "missing terms": lambda d: d * (np.arange(d.size) % 2 == 0).reshape(d.shape),
    "wrong index": lambda d: np.roll(d, 1, axis=-1),
    "one part in a thousand": lambda d: d * 1.001,
}


def plant(monkeypatch, op, output, mistake):
    """Let `op` get one of its outputs wrong. Outputs that are added to are wrong in what is added."""
    right = getattr(reference, op)
    at = list(inspect.signature(right).parameters).index(output)
    overwritten = output in ("dqkv", "dlogits", "du", "df", "dA", "demb") or (op, output) in (
        ("linear_backward", "dx"),
        ("tied_head_backward", "dx"),
        ("mhc_mix_backward", "dx"),
        ("mhc_contract_backward", "dx"),
    )

    def wrong(*arguments):
        before = 0 if overwritten else arguments[at].copy()
        right(*arguments)
        arguments[at][...] = before + mistake(arguments[at] - before)

    monkeypatch.setattr(reference, op, wrong)


def test_every_output_of_every_backward_op_is_planted():
    """Outputs are the `d…` arguments before the last one, which is the gradient that comes in. Two ops
    differ: the loss has none coming in, and RMSNorm has no bias."""
    outputs = set()
    for op, function in vars(reference).items():
        if op.endswith("_backward"):
            names = [name for name in inspect.signature(function).parameters if name != "docs"]
            gradients = [name for name in names if name.startswith("d")]
            outputs |= {(op, name) for name in (gradients[:-1] or gradients)}
    assert set(OUTPUTS) == outputs - {("rmsnorm_backward", "db")}


USUAL = ("one entry", "one part in a thousand")  # in `make test`; the oracles plant all
ONE_NUMBER = "sigmoid_matrix_backward"  # is its output: nothing can be missing, or in a wrong place


@pytest.mark.parametrize(
    ("op", "output", "mistake"),
    [
        pytest.param(op, output, mistake, marks=() if mistake in USUAL else pytest.mark.oracle)
        for op, output in OUTPUTS
        for mistake in MISTAKES
        if op != ONE_NUMBER or mistake not in ("missing terms", "wrong index")
    ],
)
def test_a_planted_mistake_is_named(op, output, mistake, monkeypatch, capsys):
    options, named = OUTPUTS[op, output]
    plant(monkeypatch, op, output, MISTAKES[mistake])
    code = run(["check", "microgpt", *SMALL, *options, "--engine=reference", "--entries=12"])
    failed = re.search(r"FAILED: ([\w, \n]+)", capsys.readouterr().out)
    assert code == 1
    assert failed
    assert set(re.split(r"[,\s]+", failed[1])) & set(named)


def test_a_failed_check_tells_of_the_same_model(monkeypatch, capsys):
    arguments = ["check", "microgpt", *SMALL, "--engine=reference", "--entries=3"]
    assert run(arguments) == 0
    headline = capsys.readouterr().out.strip().splitlines()[0]
    plant(monkeypatch, "linear_backward", "dw", MISTAKES["sign"])
    assert run(arguments) == 1
    assert re.match(r"microgpt, \d+ parameters: ", headline)
    assert capsys.readouterr().out.strip().splitlines()[0] == headline


@pytest.mark.parametrize(
    "options", [[], LAYERED, MHC, ["--set=tied=true"]], ids=["plain", "layer", "mhc", "tied"]
)
def test_right_gradients_pass(options, capsys):
    assert run(["check", "microgpt", *SMALL, *options, "--engine=reference"]) == 0
    assert "All gradients agree." in capsys.readouterr().out


def test_a_wrong_engine_is_named(monkeypatch):
    """A model whose engine computes something else than the reference fails in that column."""
    config = tl.GPTConfig(vocab_size=5, block_size=4, n_head=2, n_embd=4, n_hidden=3, norm_embed=True)
    model, *batch = example(config, "cpu")
    assert tl.gradcheck(model, *batch).ok
    right = model.engine.gradient

    def wrong():
        loss = right()
        model.grads["wo"][0, 0] *= 1.01
        return loss

    monkeypatch.setattr(model.engine, "gradient", wrong)
    result = tl.gradcheck(model, *batch)
    assert not result.ok
    assert result.failed == ["wo"]


HALF = tl.GPTConfig(
    vocab_size=40, block_size=6, n_layer=3, n_head=2, n_embd=32, n_hidden=48, norm="layer", norm_gain=True,
    norm_bias=True, norm_final=True, bias=True, activation="gelu", precision="bf16",
)  # fmt: skip


def test_bfloat16_passes_and_a_mistake_in_any_tensor_is_named(monkeypatch):
    """The engine is compared with the reference in the same rounding: what is as large as that, shows."""
    model, *batch = example(HALF, "cpu")
    assert tl.gradcheck(model, *batch, entries=1).ok
    right = model.engine.gradient
    # A single entry, or one part in a thousand, is less than rounding to 8 bits.
    mistakes = {name: MISTAKES[name] for name in ("sign", "missing terms", "wrong index")}
    mistakes |= {"a tenth more": lambda d: d * 1.1, "nothing": lambda d: d * 0}
    for tensor in model.params:
        for name, mistake in mistakes.items():

            def wrong(tensor=tensor, mistake=mistake):
                loss = right()
                model.grads[tensor][...] = mistake(model.grads[tensor])
                return loss

            monkeypatch.setattr(model.engine, "gradient", wrong)
            # Finite differences of the reference take the time here, and find nothing in the engine.
            monkeypatch.setattr(sys.modules["tapeless.gradcheck"], "_error", lambda *_: 0.0)
            assert tl.gradcheck(model, *batch, entries=1).failed == [tensor], name


def test_a_wrong_loss_in_bfloat16_is_found(monkeypatch):
    model, *batch = example(HALF, "cpu")
    right = model.engine.gradient
    monkeypatch.setattr(model.engine, "gradient", lambda: 1.002 * right())
    result = tl.gradcheck(model, *batch, entries=1)
    assert not result.loss_ok
    assert not result.failed


@pytest.mark.parametrize("output", ["dx", "dw"])
def test_a_mistake_in_a_backward_op_shows_in_bfloat16_too(output, monkeypatch, capsys):
    plant(monkeypatch, "linear_backward", output, MISTAKES["one part in a thousand"])
    options = ["--engine=reference", "--entries=12", "--set=precision=bf16"]
    assert run(["check", "microgpt", *SMALL, *options]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_the_command_in_bfloat16(capsys):
    assert run(["check", "microgpt", "--set=precision=bf16", "--entries=3"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "is compared with the reference in the same rounding" in out
    assert "FAILED" not in out


def test_certificates(tmp_path, capsys):
    for name in ("check.json", "check.html"):
        code = run(["check", "flashmicrogpt", "--entries=5", "--seed=3", "--report", str(tmp_path / name)])
        assert code == 0
    content = json.loads((tmp_path / "check.json").read_text())
    assert content["about"]["config"]["attention"] == "flash"
    assert content["about"]["seed"] == 3
    assert {"tapeless", "numpy", "python"} <= set(content["about"]["versions"])
    rows = {row["name"]: row for row in content["result"]["rows"]}
    assert (rows["wqkv"]["checked"], rows["wqkv"]["size"]) == (5, 768)
    assert content["result"]["directions"] == 4
    assert 0 < rows["wqkv"]["directional"] <= 1e-7
    assert rows["contract"]["directional"] is None
    assert rows["contract"]["checked"] == 2
    assert all(row["worst"] <= 1e-6 and row["engine"] <= 1e-4 for row in rows.values())
    html = (tmp_path / "check.html").read_text()
    assert "<html>" in html
    for word in ("wqkv", "contract", "numpy", "worst error", "attention_tile", "5 of 768", "directional"):
        assert word in html
    assert run(["check", "--report", str(tmp_path / "check.pdf")]) == 2
    assert run(["check", "--report", str(tmp_path / "no" / "check.json"), "nosuch"]) == 2
    capsys.readouterr()


def test_large_tensors_are_sampled(capsys):
    options = ["--set=n_layer=1", "--set=vocab_size=300", "--set=block_size=8", "--entries=3"]
    assert run(["check", "gpt2", *options, "--set=n_embd=96", "--engine=reference"]) == 0
    out = capsys.readouterr().out
    assert "3 of 28,800" in out
    assert "4 directional derivatives" in out


@pytest.mark.parametrize("seed", range(4))
def test_one_wrong_entry_of_a_large_tensor_is_found_along_directions(seed, monkeypatch):
    """Of 8,192 entries one is wrong by 10⁻⁵ of the norm. One entry of each tensor is checked by itself."""
    config = tl.GPTConfig(vocab_size=5, block_size=4, n_head=2, n_embd=32, n_hidden=256, activation="gelu")
    model, *batch = example(config, "reference", seed)
    at = np.random.default_rng(seed).integers(32 * 256)
    right = reference.linear_backward

    def wrong(dx, dw, *rest):
        before = dw.copy()
        right(dx, dw, *rest)
        if dw.shape == (32, 256):
            dw.flat[at] += 1e-5 * np.linalg.norm(dw - before)

    assert tl.gradcheck(model, *batch, entries=1, seed=seed).ok
    monkeypatch.setattr(reference, "linear_backward", wrong)
    model, *batch = example(config, "reference", seed)
    result = tl.gradcheck(model, *batch, entries=1, seed=seed)
    assert result.failed == ["w1"]
    (row,) = (row for row in result.rows if row.name == "w1")
    assert row.worst <= TOLERANCE or row.checked == row.size  # by itself the entry was not among those
    assert row.directional > 1e-7


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
    entries=st.integers(1, 200),
    seed=st.integers(0, 9),
)
def test_a_sample_visits_all_rows_and_columns_it_can(shape, entries, seed):
    chosen = _sample(shape, entries, np.random.default_rng(seed))
    size, columns = int(np.prod(shape)), shape[-1]
    assert len(set(chosen.tolist())) == len(chosen) == min(entries, size)
    assert 0 <= chosen.min() <= chosen.max() < size
    assert len(set((chosen // columns).tolist())) == min(entries, size // columns)
    assert len(set((chosen % columns).tolist())) == min(entries, columns)


def test_what_is_checked_by_default(capsys):
    """All entries of tensors of up to 1,024; `--all` takes all of any."""
    config = tl.GPTConfig(vocab_size=3, block_size=4, n_head=1, n_embd=8, n_hidden=129, activation="gelu")
    model, *batch = example(config, "reference")
    rows = {row.name: row for row in tl.gradcheck(model, *batch).rows}
    assert (rows["w1"].size, rows["w1"].checked) == (1032, 128)
    assert all(
        row.checked == row.size and row.directional is None for row in rows.values() if row.size < 1025
    )
    seen = []
    result = tl.gradcheck(model, *batch, entries="all", progress=lambda *of: seen.append(of))
    assert all(row.checked == row.size for row in result.rows)
    total = model.n_params
    assert seen == [(i + 1, total) for i in range(total)]
    with pytest.raises(tl.TapelessError, match="'all'"):
        tl.gradcheck(model, *batch, entries="every")
    with pytest.raises(tl.TapelessError, match="entries must be a whole number"):
        tl.gradcheck(model, *batch, entries=0)
    assert run(["check", *SMALL, "--all", "--entries=3"]) == 2
    assert "leave --entries out" in capsys.readouterr().err
    assert run(["check", *SMALL, "--all", "--engine=reference"]) == 0
    assert " of " not in capsys.readouterr().out


def test_large_presets_are_checked_in_smaller_sizes(capsys):
    for name, preset in tl.presets.items():
        config = preset.model.replace(vocab_size=preset.model.vocab_size or 27)
        checked = smaller(config)
        assert tl.GPT(checked, None, "reference").n_params <= 250_000
        sizes = {"n_layer", "n_head", "n_embd", "n_hidden", "block_size", "vocab_size"}
        changed = {k for k, v in checked.to_dict().items() if v != getattr(config, k)}
        assert changed <= sizes, name
        assert not (changed and name in ("microgpt", "transformerlm"))
    options = ["--engine=reference", "--entries=1", "--set=n_layer=1", "--set=n_head=2"]
    assert run(["check", "gpt2-xl", *options]) == 0
    told = capsys.readouterr()
    assert "smaller sizes: vocab_size=64, block_size=32, n_embd=32, n_hidden=128." in told.err
    assert "1 of 2,048" in told.out


def test_a_long_check_tells_how_far_it_is(tmp_path):
    """Elsewhere than on a terminal in plain lines, once a second; on one by a bar."""
    told = Counting("checks")
    with told:
        told._said = -1e9  # as if a second had passed
        told(5, 10)
    result = on_a_terminal("check", "microgpt", *SMALL, "--engine=reference", "--all", cwd=tmp_path)
    assert re.search(r"\d+/\d+ checks", result)


def test_budget(capsys):
    assert run(["budget", "microgpt"]) == 0
    out = capsys.readouterr().out
    assert "4,192 parameters" in out
    assert re.search(r"parameters +16,768 ", out)
    assert run(["budget", "gpt2-xl", "--batch-size", "100000"]) == 1
    assert "Does not fit" in capsys.readouterr().out


def total(*arguments, cwd):
    """The bytes that a budget counts, and what else it says."""
    out = succeeds("budget", *arguments, cwd=cwd).stdout
    return int(re.search(r"total +([\d,]+)", out)[1].replace(",", "")), " ".join(out.split())


def test_the_budget_of_a_model_is_that_of_the_same_sizes(tmp_path):
    """Of each format; and of a run with its own training."""
    files = Path(golden.FILES)
    for model in (files / "llmc_v3.bin", files / "huggingface"):
        config, threads = tl.load(model, "reference").config, ("--threads", "1")
        sizes = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
        same = [f"--set={name}={getattr(config, name)}" for name in sizes]
        given, said = total(model, *threads, cwd=tmp_path)
        assert f"4 × {config.block_size} =" in said  # as it is fine-tuned
        assert given == total("gpt2", *same, *threads, cwd=tmp_path)[0]
        smaller = (*threads, "--batch-size=2", "--recompute")
        given, said = total(model, *smaller, "--block-size=5", cwd=tmp_path)
        assert "2 × 5 = 10 tokens a step" in said
        assert given == total("gpt2", *same, *smaller, "--set=window=5", cwd=tmp_path)[0]
    set_ = {"n_embd": 8, "window": 9}
    tl.train(
        steps=1, batch_size=3, samples=0, progress=False, engine="reference", out=tmp_path / "run", set=set_
    )
    given, said = total("run", cwd=tmp_path)
    assert "3 × 9 = 27 tokens a step" in said
    trained = {"steps": 1, "samples": 0, **set_}
    settings = [f"--set={name}={value}" for name, value in trained.items()]
    assert given == total("microgpt", "--batch-size", "3", *settings, cwd=tmp_path)[0]
    assert "is another model: n_layer" in refused("budget", "run", "--set", "n_layer=2", cwd=tmp_path)
    assert "no run folder or model" in refused("budget", "nowhere", cwd=tmp_path)


@pytest.mark.parametrize(
    ("sizes", "lengths", "threads", "peak", "measured"),
    [
        # docs/performance.md: a processor of 116 GFLOP/s a core, and one of 266.
        (("microgpt", 27, 16), [7], 1, 116, 4.9e-6),
        (("microgpt", 27, 16), [7] * 16, 1, 116, 41.7e-6),
        (("microgpt", 27, 32), [7] * 16, 1, 116, 118.7e-6),
        (("microgpt", 27, 64), [7] * 16, 1, 116, 391.5e-6),
        (("microgpt", 27, 128), [7] * 16, 1, 116, 1365e-6),
        (("shakespeare-char", 65, 128), [64] * 12, 2, 232, 22e-3),
        (("gpt2", 50257, 768), [64] * 4, 2, 232, 1.01),
        (("microgpt", 27, 16), [7], 1, 266, 2.9e-6),
        (("microgpt", 27, 16), [7] * 16, 1, 266, 23e-6),
        (("microgpt", 27, 32), [7] * 16, 1, 266, 59e-6),
        (("microgpt", 27, 64), [7] * 16, 1, 266, 192e-6),
        (("microgpt", 27, 128), [7] * 16, 1, 266, 671e-6),
        (("shakespeare-char", 65, 128), [64] * 12, 2, 528, 10.7e-3),
        (("gpt2", 50257, 768), [64] * 4, 2, 528, 0.54),
    ],
)
def test_the_estimated_time_is_near_the_measured_one(sizes, lengths, threads, peak, measured):
    name, vocab_size, n_embd = sizes
    config = tl.presets[name].model.replace(vocab_size=vocab_size, n_embd=n_embd)
    estimate = expected_seconds(config, lengths, threads, peak)
    assert measured / ACCURACY < estimate < measured * ACCURACY
    again = expected_seconds(config.replace(recompute=True), lengths, threads, peak)
    assert again == pytest.approx(estimate * 4 / 3)


def test_the_budget_tells_the_time_per_step(tmp_path):
    _, said = total("microgpt", "--set", "order=windows", "--set", "total_batch_tokens=64", cwd=tmp_path)
    assert "4 × 1 × 16 = 64 tokens a step" in said
    flops = 4 * training_flops(tl.presets["microgpt"].model.replace(vocab_size=27), [16])
    assert re.search(rf"Time per step: about [\d.]+ .?s\. That is {flops / 1e6:.1f} MFLOP at \d+% ", said)
    assert re.search(r"Fits \([\d.,]+ GB free\)", said)


def test_the_budget_is_what_is_allocated():
    config = tl.presets["microgpt"].model.replace(vocab_size=9, attention="flash", residual="mhc")
    model = tl.GPT(config, engine="reference", dtype="float32")
    model.engine.reserve(48, 3)
    plans = memory(config, "float32", 48, 3, 1, "mv")
    assert plans["parameters"].nbytes == model.engine.params.nbytes
    for name, views in (("activations", model.engine.a), ("activation gradients", model.engine.d)):
        assert sum(view.nbytes for view in views) == sum(plans[name].sizes().values())
        gaps = plans[name].nbytes - sum(plans[name].sizes().values())
        assert 0 <= gaps < 128 * len(views)  # each begins on a line of 128 bytes


def test_flash_memory_grows_linearly_with_the_block():
    """Full attention keeps T numbers for each head and token, flash one."""

    def kept(kind, T):
        config = tl.presets["gpt2"].model.replace(block_size=T, attention=kind)
        return memory(config, "float32", T, 1, 1, "mv")["activations"]

    growth = {}
    for kind in ("flash", "full"):
        small, middle, large = (kept(kind, T).nbytes for T in (512, 1024, 1536))
        growth[kind] = (large - middle) / (middle - small)
    assert growth["flash"] == pytest.approx(1, rel=1e-3)
    assert growth["full"] > 1.2
    sizes = kept("flash", 1024).sizes()
    assert sizes["lse"] == 12 * 1024 * 12 * 4
    assert sizes["probs"] == 0
    assert kept("full", 1024).sizes()["probs"] == 12 * 1024 * 12 * 1024 * 4
