"""The Python interface: `import tapeless as tl`."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import tapeless as tl
from commands import environment, refused
from tapeless.errors import EXTRAS, ConfigError, DataError, RunError, install

QUICK = {"engine": "reference", "steps": 20, "samples": 3, "progress": False}
CONFIG = tl.GPTConfig(vocab_size=27)


@pytest.fixture(scope="module")
def run():
    return tl.train(**QUICK)


@pytest.fixture
def model():
    return tl.GPT(CONFIG, seed=1, engine="reference")


# ---------------------------------------------------------------- names


def test_every_public_name_is_there():
    names: dict[str, object] = {}
    exec("from tapeless import *", names)
    assert set(tl.__all__) <= set(names) & set(dir(tl))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = tl.nonsense


@pytest.mark.parametrize(
    "first", ["tl.GPT", "tl.Run", "tl.train", "import tapeless.train", "from tapeless.presets import presets"]
)
def test_submodules_do_not_take_the_place_of_public_names(first):
    script = f"import tapeless as tl; {first}; assert callable(tl.train); tl.presets['microgpt']"
    subprocess.run([sys.executable, "-c", script], check=True, env=environment())


def test_presets():
    preset = tl.presets["microgpt"]
    assert preset.model.vocab_size is None
    assert preset.model.n_embd == 16
    assert (preset.training.steps, preset.training.lr, preset.training.beta1) == (1000, 0.01, 0.85)
    assert (preset.tokenizer, preset.random) == ("chars", "python")
    assert (tl.presets["esp32gpt"].tokenizer, tl.presets["esp32gpt"].random) == ("letters", "xorshift32")


# ---------------------------------------------------------------- training


def test_train_returns_losses_samples_and_model(run):
    assert run.losses.shape == (20,)
    assert np.isfinite(run.losses).all()
    assert len(run.samples) == 3
    assert all(isinstance(s, str) for s in run.samples)
    assert run.folder is None
    assert run.model.generate(n=2, seed=3) == run.model.generate(n=2, seed=3)


def test_train_without_out_writes_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    tl.train(**QUICK)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_data_and_preset_by_position(tmp_path):
    (tmp_path / "data.txt").write_text("abc\ncab\n")
    run = tl.train(tmp_path / "data.txt", "esp32gpt", **QUICK)
    assert run.model.config.init == "esp32gpt"
    assert run.model.config.vocab_size == 27
    run = tl.train(str(tmp_path / "data.txt"), "microgpt", **QUICK)
    assert run.model.tokenizer.chars == "abc"


def test_settings():
    run = tl.train(set={"n_embd": 8, "n_head": 2, "steps": 9}, **(QUICK | {"steps": 5, "samples": 0}))
    assert run.model.config.n_embd == 8
    assert run.model.config.n_hidden == 32
    assert len(run.losses) == 5
    assert run.samples == []
    run = tl.train(set={"n_embd": np.int64(8), "lr": np.float32(0.5)}, **QUICK)
    assert type(run.model.config.n_embd) is int


def test_the_engine_in_use_by_default_is_compiled(tmp_path):
    run = tl.train(steps=20, samples=2, progress=False, out=tmp_path)
    assert (run.model.engine.name, run.model.engine.dtype) == ("cpu", np.float32)
    reference = tl.train(**QUICK)
    assert np.abs(run.losses - reference.losses).max() < 1e-5
    again = tl.load(tmp_path)
    assert np.array_equal(again.engine.params, run.model.engine.params)
    assert again.generate("an", n=3, seed=5) == run.model.generate("an", n=3, seed=5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": 2.5},
        {"steps": True},
        {"lr": "fast"},
        {"lr": float("nan")},
        {"lr": True},
        {"seed": -1},
        {"seed": "x"},
        {"seed": 2**63},
        {"samples": -1},
        {"samples": 10**12},
        {"temperature": float("inf")},
        {"preset": "microgtp"},
        {"preset": 5},
        {"preset": ""},
        {"data": 5},
        {"data": ""},
        {"data": "nowhere.txt"},
        {"engine": "gpu"},
        {"engine": 5},
        {"engine": ""},
        {"dtype": "int8"},
        {"set": {"n_emb": 3}},
        {"set": {3: 3}},
        {"set": {"n_embd": "16"}},
        {"set": [("n_embd", 16)]},
        {"set": {"batch_size": 2**39}},
        {"log_every": 0},
        {"resume": True},
        {"resume": True, "overwrite": True},
    ],
    ids=str,
)
def test_train_refuses(wrong, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(tl.TapelessError) as error:
        tl.train(**(QUICK | wrong))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- models


def test_parameters_and_gradients_are_live_views(model):
    assert {name: w.shape for name, w in model.params.items()} == {
        "wte": (27, 16), "wpe": (16, 16), "wqkv": (1, 16, 48), "wo": (1, 16, 16),
        "w1": (1, 16, 64), "w2": (1, 64, 16), "head": (16, 27),
    }  # fmt: skip
    assert model.n_params == 4192 == sum(w.size for w in model.params.values())
    before = model.loss([1, 2], [2, 3])
    model.params["wte"][...] *= 2
    model.params["head"][...] = 0
    assert model.loss([1, 2], [2, 3]) == pytest.approx(np.log(27)) != before
    assert np.shares_memory(model.params["wqkv"], model.engine.params)
    grads = model.grads
    model.loss_and_grad([1, 2], [2, 3])
    assert np.abs(grads["head"]).sum() > 0
    assert np.shares_memory(grads["head"], model.engine.grads)
    with pytest.raises(TypeError):
        model.params["wte"] = 0


def test_logits_are_a_copy(model):
    logits = model.logits([1, 2, 3, 4], starts=[0, 1, 4])
    assert logits.shape == (4, 27)
    kept = logits.copy()
    model.logits([5])
    assert np.array_equal(logits, kept)
    assert np.allclose(logits[0], model.logits([1])[0])
    assert np.allclose(logits[1:], model.logits([2, 3, 4]))


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_save_and_load_are_exact(engine, tmp_path, run):
    model = tl.GPT(run.model.config, 7, engine, tokenizer=run.model.tokenizer)
    model.save(tmp_path / "deep" / "model")
    again = tl.load(tmp_path / "deep" / "model", engine)
    assert again.config == model.config
    assert again.tokenizer == model.tokenizer
    assert np.array_equal(again.engine.params, model.engine.params)
    tl.GPT(CONFIG, 7, engine).save(tmp_path / "deep" / "model")
    assert tl.load(tmp_path / "deep" / "model", engine).tokenizer is None


def test_seeds():
    def weights(seed):
        return tl.GPT(CONFIG, seed, "reference").engine.params

    assert np.array_equal(weights(0), weights(np.int64(0)))
    assert not np.array_equal(weights(0), weights(1))
    assert not weights(None).any()


@pytest.mark.parametrize("seed", [-1, 1.5, "x", 2**63, True])
def test_what_is_no_seed(seed):
    with pytest.raises(ConfigError, match="seed must be a whole number"):
        tl.GPT(CONFIG, seed, "reference")


@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_a_model_too_large_is_refused_before_it_is_made(engine):
    with pytest.raises(ConfigError, match="GB of memory"):
        tl.GPT(CONFIG.replace(n_embd=2**22), engine=engine)


def test_a_config_without_vocabulary():
    with pytest.raises(ConfigError, match="vocab_size is not set"):
        tl.GPT(tl.GPTConfig(), engine="reference")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"n_embd": 17}, "n_embd must be divisible by n_head"),
        ({"n_embd": 16.0}, "n_embd must be a whole number"),
        ({"n_embd": True}, "n_embd must be a whole number"),
        ({"n_layer": 0}, "n_layer"),
        ({"block_size": 10**30}, "block_size"),
        ({"n_hidden": -1}, "n_hidden"),
        ({"norm": "rsm"}, "Did you mean 'rms'"),
        ({"norm_eps": float("nan")}, "norm_eps"),
        ({"norm_eps": "x"}, "norm_eps"),
        ({"tied": 1}, "tied must be true or false"),
        ({"norm": "none"}, "norm_attn, norm_mlp are true"),
        ({"norm_bias": True}, "norm_bias needs norm='layer'"),
        ({"n_streams": 2}, "n_streams"),
    ],
    ids=str,
)
def test_configs_name_the_field(wrong, words):
    with pytest.raises(ConfigError, match=words):
        tl.GPTConfig(vocab_size=27, **wrong)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([], []), "tokens must be a non-empty list"),
        (([1.0], [1]), "tokens must be a non-empty list"),
        ((["a"], [1]), "tokens must be a non-empty list"),
        (([[1, 2]], [1]), "tokens must be a non-empty list"),
        (([[1], [2, 3]], [1]), "flat list"),
        ((None, [1]), "tokens"),
        (([27], [1]), "tokens must be between 0 and 26"),
        (([-1], [1]), "tokens must be between 0 and 26"),
        (([1], [27]), "targets must be between 0 and 26"),
        (([1, 2], [1]), "differ in length"),
        (([1] * 17, [1] * 17), "longer than the block, 16"),
        (([1, 2], [1, 2], [0]), "starts"),
        (([1, 2], [1, 2], [0, 1]), "starts must increase from 0"),
        (([1, 2], [1, 2], [1, 2]), "starts must increase from 0"),
        (([1, 2], [1, 2], [0, 0, 2]), "starts must increase from 0"),
        (([1, 2], [1, 2], [0.0, 2.0]), "starts"),
        (([1, 2], [1, 2], [0, [1], 2]), "flat list"),
        (([1, 2], [1, 2], None, [1]), "weights must be 2 numbers"),
        (([1, 2], [1, 2], None, ["a", "b"]), "weights must be 2 numbers"),
        (([1, 2], [1, 2], None, [0, 0]), "not all 0"),
        (([1, 2], [1, 2], None, [1, -1]), "0 or more"),
        (([1, 2], [1, 2], None, [1, np.nan]), "finite"),
        (([1, 2], [1, 2], None, [1, np.inf]), "finite"),
    ],
    ids=str,
)
def test_batches_are_checked(arguments, words, model):
    for call in (model.loss, model.loss_and_grad):
        with pytest.raises(DataError, match=words):
            call(*arguments)


def test_logits_are_checked(model):
    for tokens in ([], [27], [[1], [2, 3]], [1] * 17):
        with pytest.raises(DataError):
            model.logits(tokens)


# ---------------------------------------------------------------- texts


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"n": "3"},
        {"n": 10**9},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": None},
        {"temperature": "hot"},
        {"seed": -1},
        {"seed": None},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_p": "x"},
        {"max_tokens": 0},
        {"max_tokens": 10**9},
    ],
    ids=str,
)
def test_generate_refuses_settings(wrong, run):
    with pytest.raises(ConfigError):
        run.model.generate(**wrong)


@pytest.mark.parametrize("prompt", ["Anna", "é", [27], [-1], [1.5], ["a"], None, 5], ids=str)
def test_generate_refuses_prompts(prompt, run):
    with pytest.raises(DataError):
        run.model.generate(prompt)


def test_generate(run):
    model = run.model
    assert model.generate("an", n=2) == model.generate(model.tokenizer.encode("an"), n=2)
    assert len(set(model.generate("a", n=3, temperature=0))) == 1
    assert model.generate("a", n=3, temperature=0)[0] == model.generate("a", n=1, top_k=1)[0]
    long = "abcdefghijklmnopqrstuvwxyz"  # longer than the block
    assert model.generate(long, n=1, max_tokens=5)[0].startswith(long)
    assert all(len(text) <= 16 for text in model.generate(n=30, temperature=5.0))


def test_load_what_is_not_there(tmp_path):
    with pytest.raises(RunError, match="no run folder"):
        tl.load(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"config\.json"):
        tl.load(tmp_path)


# ---------------------------------------------------------------- what runs tell


def test_losses_come_with_their_steps(run):
    steps, values = run.loss_curve
    assert steps.tolist() == list(range(1, 21))
    assert values is run.losses
    assert [len(column) for column in run.val_curve] == [0, 0]


def test_the_validation_before_the_first_step_is_recorded(tmp_path):
    set_ = {"val_fraction": 0.02, "eval_every": 2, "eval_batches": 20}
    run = tl.train(**QUICK | {"steps": 4, "samples": 0}, out=tmp_path / "run", set=set_)
    assert run.val_curve.steps.tolist() == list(run.val_losses) == [0, 2, 4]
    untrained = tl.GPT(run.model.config, 42, "reference", tokenizer=run.model.tokenizer)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["seed"] == 42
    # The model as it was before the first step: of its first weights, N(0, 0.08²), a nearly uniform guess.
    assert abs(run.val_losses[0] - np.log(27)) < 0.2
    assert untrained.n_params == run.model.n_params
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[0] == {"step": 0, "val_loss": run.val_losses[0]}


def test_what_is_shown_of_results_is_short(run, model):
    for thing, words in (
        (model, ["4,192 parameters", "n_layer=1", "n_embd=16", "vocab_size=27", "reference engine, no tok"]),
        (
            run,
            ["20 steps", "GPT(4,192 parameters", "losses", "mean of the last 20", "3 samples", "folder None"],
        ),
    ):
        shown = repr(thing)
        assert len(shown.splitlines()) <= 5
        assert max(map(len, shown.splitlines())) < 200
        for word in words:
            assert word in shown, shown
    result = tl.gradcheck(model, [26, 4, 12], [4, 12, 26], entries=2)
    assert repr(result).startswith("GradCheck(ok\n  7 tensors, 14 of 4,192 entries: worst relative error ")
    assert "4 directions of each sampled tensor" in repr(result)


def test_a_trained_model_no_longer_reports_to_the_console(tmp_path):
    """It did while it was trained; what is compiled later is its user's own business."""
    code = """
import tapeless as tl
run = tl.train(steps=2, samples=0)
print("trained")
import sys; sys.stderr.flush(); sys.stderr.write("== trained ==\\n")
run.model.loss_and_grad([26, 4], [4, 26])
tl.gradcheck(run.model, [26, 4], [4, 26], entries=1)
run.model.generate(n=1)
"""
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
        env=environment(TAPELESS_CACHE_DIR=str(tmp_path / "cache")),
    ).stderr  # fmt: skip
    before, after = told.split("== trained ==\n")
    assert "Compiling for this model and processor: a few seconds, first run only." in before
    assert after == ""


# ---------------------------------------------------------------- errors speak the caller's language


def test_errors_name_arguments_as_the_caller_writes_them(tmp_path):
    folder = tmp_path / "run"
    tl.train(**QUICK | {"samples": 0}, out=folder)
    with pytest.raises(RunError) as python:
        tl.train(**QUICK, out=folder)
    assert "go on with resume=True, or replace it with overwrite=True." in str(python.value)
    line = refused("train", "--engine", "reference", "--out", "run", cwd=tmp_path)
    assert "go on with --resume, or replace it with --overwrite." in line
    with pytest.raises(RunError, match="resume=True needs the run's folder: give out"):
        tl.train(**QUICK, resume=True)
    with pytest.raises(ConfigError, match=r"or set=\{'val_fraction': 0.1\} to hold out"):
        tl.train(**QUICK, set={"eval_every": 1})
    line = refused("train", "--engine", "reference", "--eval-every", "1", cwd=tmp_path)
    assert "--val, or --set val_fraction=0.1 to hold out" in line
    with pytest.raises(ConfigError, match="use engine='reference' for float64"):
        tl.GPT(CONFIG, dtype="float64")
    assert "use --engine reference for" in refused("train", "--dtype", "float64", cwd=tmp_path)


def test_the_command_line_leaves_no_trace_in_how_errors_are_spelled(tmp_path):
    from tapeless.__main__ import run as command

    assert command(["train", "--resume", "--overwrite", "--out", str(tmp_path / "run")]) == 2
    with pytest.raises(ConfigError, match="resume=True and overwrite=True cannot be combined"):
        tl.train(resume=True, overwrite=True, out=tmp_path / "run")


def test_no_message_below_the_command_line_names_an_option():
    """They go through `tapeless.errors.argument`."""
    package = Path(tl.__file__).parent
    for path in package.rglob("*.py"):
        if "cli" in path.relative_to(package).parts or path.name in ("__main__.py", "errors.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise):
                words = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
                named = [w for w in words if isinstance(w, str) and re.search(r"(^|\s)--[a-z]", w)]
                assert not named, f"{path.name}:{node.lineno}: {named}"


def test_extras_name_their_libraries():
    """So that the advice is right however tapeless was installed."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    for extra, libraries in EXTRAS.items():
        assert libraries.split() == [re.match(r"[\w-]+", needed)[0] for needed in extras[extra]]
        assert install(extra) == f"pip install {libraries} (the extra {extra!r})"
