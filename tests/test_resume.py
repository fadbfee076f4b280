"""Interrupted and resumed: the same run, digit for digit, whatever is trained on whatever, however."""

from __future__ import annotations

import json
import random
import re
import shutil
from itertools import combinations, product

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tapeless as tl
from commands import refused, succeeds
from shard_files import write_shard
from test_runs import StopAt

STEPS, STOPS = 12, (1, 5, 11)
# What may be chosen of each; every pair of choices occurs.
CHOICES = {
    "preset": [
        "microgpt", "esp32gpt", "esp32gpt-rms", "flashmicrogpt", "transformerlm", "gpt2", "shakespeare-char"
    ],
    "data": ["shuffle", "draw", "windows", "sequence", "shards-windows", "shards-sequence", "shards-llmc"],
    "optimiser": ["sgd", "adam", "adamw"],
    "schedule": ["constant", "linear", "cosine"],
    "batch": [(1, 1), (2, 1), (2, 3)],  # size, accumulation
    "engine": ["cpu", "reference"],
    "also": ["nothing", "evaluates", "watches", "clips"],
}  # fmt: skip


def possible(row):
    """Long texts have no documents, and GPT-2's tokenizer would be fetched."""
    preset, data = tl.presets[row[0]], row[1]
    if data in ("shuffle", "draw") and not preset.training.of_documents:
        return False
    return preset.tokenizer != "gpt2" or data.startswith("shards")


def pairs(row):
    return {(a, row[a], b, row[b]) for a, b in combinations(range(len(row)), 2)}


def combination_sets():
    """Few combinations in which every pair of choices occurs, and some of the others at random."""
    names, chance = list(CHOICES), random.Random(1)
    every = list(filter(possible, product(*CHOICES.values())))
    wanted = set().union(*map(pairs, every))
    chosen = []
    while wanted:
        # Of some at random the one with most new pairs.
        rows = ((len(wanted & pairs(row)), row) for row in chance.sample(every, 200))
        row = max(rows, key=lambda found: found[0])[1]
        wanted -= pairs(row)
        chosen.append(row)
    more = [row for row in chance.sample(every, 20) if row not in chosen]
    return [dict(zip(names, row, strict=True)) for row in (*chosen, *more)], len(chosen)


SETS, PAIRWISE = combination_sets()
USUAL = 8  # of them, in `make test`; of which two are compiled


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    chance = random.Random(2)
    words = ["".join(chance.choices("abcde", k=chance.randrange(2, 12))) for _ in range(90)]
    (folder / "lines.txt").write_text("\n".join(words))
    (folder / "text.txt").write_text("a " + " ".join(words) + "\n")
    for k in range(3):
        write_shard(folder / f"part_{k}.bin", np.random.default_rng(k).integers(0, 27, 300 + 50 * k))
    return folder


def options(chosen, texts):
    kind = chosen["data"]
    order = kind.removeprefix("shards-")
    size, accumulate = chosen["batch"]
    preset = tl.presets[chosen["preset"]]
    settings = {
        "order": order, "optimiser": chosen["optimiser"], "schedule": chosen["schedule"], "steps": STEPS,
        "warmup_steps": 2, "batch_size": size, "block_size": 8, "n_embd": 16, "n_head": 2, "lr": 0.01,
        "min_lr": 0.001, "weight_decay": 0.0, "momentum": 0.0, "grad_clip": 0.0, "eval_every": 0,
        "samples": 2, "val_fraction": 0.0, "max_tokens": 6,
    }  # fmt: skip
    if preset.model.n_layer > 1:
        settings["n_layer"] = 2
    if accumulate > 1 and order not in ("shuffle", "draw"):
        settings["total_batch_tokens"] = size * accumulate * 8
    settings |= {"sgd": {"momentum": 0.9}, "adamw": {"weight_decay": 0.1}}.get(chosen["optimiser"], {})
    if chosen["also"] == "evaluates":
        settings |= {"eval_every": 3, "sample_every": 4}
        settings |= {} if kind.startswith("shards") else {"val_fraction": 0.2}
    settings |= {"watches": {"bad_steps": "skip", "spike": 1.2}, "clips": {"grad_clip": 0.1}}.get(
        chosen["also"], {}
    )
    if kind.startswith("shards"):
        data, settings["vocab_size"] = texts / "part_*.bin", 27
    else:
        data = texts / ("lines.txt" if order in ("shuffle", "draw") else "text.txt")
    more = (
        {"val": texts / "part_2.bin"} if chosen["also"] == "evaluates" and kind.startswith("shards") else {}
    )
    if preset.training.of_documents and order not in ("shuffle", "draw") and not kind.startswith("shards"):
        settings |= {"block_size": 2}  # windows of a stream of documents
    return {"data": data, "preset": chosen["preset"], "engine": chosen["engine"], "set": settings, **more}


def case_of_each():
    compiled = 0
    for i, chosen in enumerate(SETS):
        compiled += chosen["engine"] == "cpu"
        marks = [pytest.mark.oracle] if i >= USUAL or (chosen["engine"] == "cpu" and compiled > 1) else []
        yield pytest.param(chosen, id="-".join(map(str, chosen.values())), marks=marks)


@pytest.mark.parametrize("chosen", [*case_of_each()])
def test_every_kind_of_run_goes_on_exactly(chosen, texts, tmp_path, monkeypatch):
    import importlib

    given = options(chosen, texts)
    monkeypatch.setattr(importlib.import_module("tapeless.train"), "CHUNK_SECONDS", 0.0)
    whole = tl.train(out=tmp_path / "whole", progress=False, **given)
    losses = []
    for stop in STOPS:
        again = (
            {"out": tmp_path / "parts", "resume": True} if losses else {"out": tmp_path / "parts", **given}
        )
        with pytest.raises(tl.Interrupted) as stopped:
            tl.train(progress=Stopping(stop), **again)
        losses.append(stopped.value.run.losses)
    last = tl.train(out=tmp_path / "parts", resume=True, progress=False)
    parts = np.concatenate([*losses, last.losses])
    assert np.array_equal(parts, whole.losses, equal_nan=True)
    assert last.samples == whole.samples
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


class Stopping(StopAt):
    def evaluated(self, step, loss, best): ...
    def sampled(self, step, texts): ...


def files(folder):
    """What a run leaves, but for the numbers of its checkpoints: interrupted runs saved more often."""
    found = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and "checkpoints" not in parts and path.name != ".lock":
            found["/".join(parts)] = path.read_bytes()
    return found


def test_every_pair_of_choices_occurs():
    chosen = [tuple(row.values()) for row in SETS[:PAIRWISE]]
    every = filter(possible, product(*CHOICES.values()))
    assert set().union(*map(pairs, chosen)) == set().union(*map(pairs, every))


@pytest.mark.parametrize("preset", ["microgpt", "esp32gpt"])
def test_looking_on_changes_nothing(preset, texts, tmp_path, monkeypatch):
    """Logging, validating, sampling and saving, and the command itself."""
    given = {"preset": preset, "steps": 40, "samples": 3, "seed": 3, "set": {"val_fraction": 0.2}}
    plain = tl.train(texts / "lines.txt", progress=False, **given)
    options = ("--preset", preset, "--steps", 40, "--samples", 3, "--seed", 3, "--set", "val_fraction=0.2")
    looking = ("--eval-every", 3, "--sample-every", 4, "--log-every", 7, "--keep", 5, "--out", "run")
    said = succeeds("train", texts / "lines.txt", *options, *looking, cwd=tmp_path).stdout
    assert said.split() == plain.samples
    state = load_file(tmp_path / "run/state.safetensors")
    for name, array in plain.model.engine.state.items():
        assert np.array_equal(state[name], array), name
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(row["loss"] == plain.losses[row["step"] - 1] for row in rows if row["step"])


# ---------------------------------------------------------------- changes


@pytest.fixture
def run(texts, tmp_path):
    options = ("--engine", "reference", "--steps", 5, "--samples", 0, "--out", "run")
    succeeds("train", texts / "lines.txt", *options, cwd=tmp_path)
    return tmp_path / "run"


def resume(*arguments, run):
    return ("train", "--resume", "--out", "run", *arguments), {"cwd": run.parent}


def test_what_may_change_is_told_and_recorded(run):
    arguments, where = resume("--steps", 8, "--lr", 0.005, run=run)
    told = succeeds(*arguments, **where).stderr
    assert "Going on from step 5. Changed: steps 5 → 8, lr 0.01 → 0.005.\n" in told
    arguments, where = resume("--steps", 9, run=run)
    succeeds(*arguments, "--set", "val_fraction=0", **where)
    changes = json.loads((run / "config.json").read_text())["changes"]
    assert changes == [{"step": 5, "steps": [5, 8], "lr": [0.01, 0.005]}, {"step": 8, "steps": [8, 9]}]


def test_what_may_not_change_is_refused_with_the_difference(run, texts):
    (run.parent / "other.txt").write_text((texts / "lines.txt").read_text().replace("a", "b"))
    (run.parent / "more.txt").write_text((texts / "lines.txt").read_text() + "\nxyz")
    before = files(run)
    for change, message in (
        (["--set", "n_embd=32"], "run has another model: n_embd 16 is not 32, n_hidden 64 is not 128"),
        (["--seed", "1"], "run was started with seed 42, not 1"),
        (["--set", "order=draw"], "run was trained with order=shuffle: it cannot go on with draw"),
        (["--set", "optimiser=sgd"], "run was trained with optimiser=adam: it cannot go on with sgd"),
        (["--preset", "esp32gpt"], "run was started with preset microgpt, not esp32gpt"),
        (
            ["other.txt"],
            r"other.txt is not the data .* \(90 documents\): it has 90 documents, and the checksum",
        ),
        (
            ["more.txt"],
            r"more.txt is not the data .* \(90 documents\): it has 91 documents, and the checksum",
        ),
    ):
        arguments, where = resume("--steps", 8, *change, run=run)
        assert re.search(message, refused(*arguments, **where))
    assert files(run) == before


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("engine", ["cpu", "reference"])
def test_a_run_by_sgd_keeps_no_more_moments_than_it_has(engine, momentum, texts, tmp_path):
    """A run of an older version has two of any optimiser, zero where they are not used."""

    def train(steps, **more):
        return tl.train(
            texts / "lines.txt", steps=steps, samples=0, progress=False, engine=engine, **more
        ).model.engine.params

    chosen = {"optimiser": "sgd", "momentum": momentum, "lr": 0.1, "schedule": "constant"}
    straight = train(6, set=chosen)
    train(3, set=chosen, out=tmp_path)
    path = tmp_path / "state.safetensors"
    state = load_file(path)
    assert state.keys() & {"m", "v"} == ({"m"} if momentum else set())
    unused = np.zeros_like(state["params"])
    save_file({"m": unused, "v": unused} | state, path)
    shutil.rmtree(tmp_path / "checkpoints")  # they have checksums
    assert np.array_equal(train(6, out=tmp_path, resume=True), straight)


def test_momentum_may_begin_when_a_run_goes_on(texts, tmp_path):
    """It begins from zero, as in PyTorch: by hand, m = g and then μm + g."""
    common = {"samples": 0, "progress": False, "engine": "reference", "out": tmp_path}
    options = {"optimiser": "sgd", "lr": 0.1, "schedule": "constant"}
    tl.train(texts / "lines.txt", steps=2, set=options, **common)
    engine = tl.train(steps=4, resume=True, set={"momentum": 0.5}, **common).model.engine
    assert engine.state["m"].any()
    saved = load_file(tmp_path / "state.safetensors")
    assert np.array_equal(saved["m"], engine.state["m"])
    tl.train(steps=5, resume=True, set={"momentum": 0}, **common)
    assert "m" not in load_file(tmp_path / "state.safetensors")
