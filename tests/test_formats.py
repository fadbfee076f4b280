"""Models in files of other programs: golden files, and round trips that keep every bit."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import golden
import tapeless as tl
from commands import contents, environment
from helpers import random_model
from tapeless.convert import convert
from tapeless.errors import ConfigError, RunError
from tapeless.io.checkpoints import open_model
from tapeless.layout import n_params

FILES = golden.FILES
GPT2 = tl.presets["gpt2"].model
SMALL = GPT2.replace(vocab_size=37, block_size=10, n_layer=2, n_head=2, n_embd=6)
MODELS = ["llmc_v1.bin", "llmc_v3.bin", "llmc_v5.bin", "huggingface", "huggingface_bf16"]


def same(model, params):
    assert set(model.params) == set(params)
    for name, value in params.items():
        np.testing.assert_array_equal(model.params[name], value, err_msg=name)


# ---------------------------------------------------------------- golden files


def test_the_golden_files_are_those_of_their_script(tmp_path, monkeypatch):
    monkeypatch.setattr(golden, "FILES", tmp_path)
    golden.main()
    here, there = contents(tmp_path), contents(FILES)
    assert here.keys() == there.keys()
    for name in here:
        if name.startswith("llmc_state"):  # its sums may be rounded otherwise elsewhere
            begin = 1024 + 8 * golden.B * golden.S
            assert here[name][:begin] == there[name][:begin]
            np.testing.assert_allclose(
                *(np.frombuffer(f[name][begin:], "<f4") for f in (here, there)), 1e-5, 1e-6
            )
        elif name != "gpt2.gguf":  # another version of the package may write it otherwise
            assert here[name] == there[name], name


@pytest.mark.parametrize("name", MODELS)
def test_golden_models(name):
    model = tl.load(FILES / name, "reference")
    sizes = model.config.replace(init="gpt2")
    V, T, L, H, C = golden.V, golden.T, golden.L, golden.H, golden.C
    assert sizes == GPT2.replace(vocab_size=V, block_size=T, n_layer=L, n_head=H, n_embd=C)
    same(model, golden.ours(golden.weights()))


def test_the_golden_tokenizer(tmp_path):
    """Beside a model of llm.c, it turns its tokens into text; and it is that of the golden folder."""
    shutil.copy(FILES / "llmc_v3.bin", tmp_path)
    shutil.copy(FILES / "llmc_tokenizer.bin", tmp_path / "gpt2_tokenizer.bin")
    tokenizer = tl.load(tmp_path / "llmc_v3.bin", "reference").tokenizer
    assert tokenizer.decode([8, 9, 7, 2, 10]) == f"ab ab c{golden.EOT}"
    other = tl.load(FILES / "huggingface", "reference").tokenizer
    assert tokenizer.token_bytes() == other.token_bytes()
    assert tokenizer.bos == other.bos == 10
    convert(tmp_path / "llmc_v3.bin", tmp_path / "run", "run")
    assert tl.load(tmp_path / "run", "reference").tokenizer == tokenizer


@pytest.mark.parametrize("source", MODELS)
def test_llmc_files_are_written_as_the_golden_ones(source, tmp_path):
    for version, dtype in ((3, "f32"), (5, "bf16")):
        convert(FILES / source, tmp_path / "model.bin", dtype=dtype, overwrite=True)
        assert (tmp_path / "model.bin").read_bytes() == golden.llmc_model(version)


def test_a_folder_of_one_llmc_file_is_that_model(tmp_path):
    (tmp_path / "model.bin").write_bytes(golden.llmc_model(3))
    (tmp_path / "state.bin").write_bytes((FILES / "llmc_state.bin").read_bytes())
    same(tl.load(tmp_path, "reference"), golden.ours(golden.weights()))


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_kind_of_hugging_face_folder(prefix, dtype, shards, tmp_path):
    golden.huggingface(tmp_path, dtype, prefix, shards, extras=True)
    same(tl.load(tmp_path, "reference"), golden.ours(golden.weights()))


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_hugging_face_folders_are_written_as_transformers_does(dtype, tmp_path):
    convert(FILES / "llmc_v3.bin", tmp_path / "hf", dtype=dtype)
    content = (tmp_path / "hf/model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert length % 8 == 0
    number = golden.bfloat16 if dtype == "bf16" else golden.float32
    expected = golden.huggingface_tensors()
    assert set(header) == {f"transformer.{name}" for name in expected}
    for name, about in header.items():
        first, end = about["data_offsets"]
        value = expected[name.removeprefix("transformer.")]
        assert about["shape"] == list(value.shape)
        assert content[8 + length :][first:end] == number(value), name
    if dtype == "f32":
        assert load_file(tmp_path / "hf/model.safetensors").keys() == header.keys()
    about = json.loads((tmp_path / "hf/config.json").read_text())
    assert golden.CONFIG.items() <= about.items()
    assert about["torch_dtype"] == {"f32": "float32", "bf16": "bfloat16"}[dtype]


# ---------------------------------------------------------------- round trips


@st.composite
def sizes(draw):
    n_head = draw(st.integers(1, 3))
    return GPT2.replace(
        vocab_size=draw(st.one_of(st.integers(2, 40), st.sampled_from([127, 128, 129]))),
        block_size=draw(st.integers(1, 9)),
        n_layer=draw(st.integers(1, 3)),
        n_head=n_head,
        n_embd=n_head * draw(st.integers(1, 4)),
    )


@settings(max_examples=15)
@given(config=sizes(), seed=st.integers(0, 99))
def test_round_trips_keep_every_bit(config, seed, tmp_path_factory):
    """run → llm.c → Hugging Face → run → Hugging Face → llm.c, and the parameters as they were."""
    here = tmp_path_factory.mktemp("trip")
    model = random_model(config, dtype="float32", seed=seed)
    model.save(here / "run")
    steps = [("a.bin", None), ("b", "hf"), ("c", "run"), ("d", "hf"), ("e.bin", None)]
    source = "run"
    for target, to in steps:
        convert(here / source, here / target, to)
        source = target
    same(tl.load(here / source, "reference", dtype="float32"), dict(model.params))
    assert contents(here / "b") == contents(here / "d")
    assert (here / "a.bin").read_bytes() == (here / "e.bin").read_bytes()
    assert load_file(here / "c/model.safetensors").keys() == dict(model.params).keys()
    for name, value in load_file(here / "c/model.safetensors").items():
        assert value.tobytes() == model.params[name].tobytes()


@settings(max_examples=10)
@given(config=sizes(), seed=st.integers(0, 99))
def test_bfloat16_rounds_to_the_nearest_once(config, seed, tmp_path_factory):
    here = tmp_path_factory.mktemp("trip")
    model = random_model(config, dtype="float32", seed=seed)
    model.save(here / "run")
    convert(here / "run", here / "a.bin", dtype="bf16")
    convert(here / "a.bin", here / "b", dtype="bf16")
    convert(here / "b", here / "c.bin", dtype="bf16")
    assert (here / "a.bin").read_bytes() == (here / "c.bin").read_bytes()
    for name, value in tl.load(here / "b", "reference", dtype="float32").params.items():
        assert not (np.ascontiguousarray(value).view(np.uint32) & 0xFFFF).any()
        # Eight bits of significand: at most half a unit of the last one.
        assert (np.abs(value - model.params[name]) <= np.abs(model.params[name]) * 2.0**-8).all()


def test_any_run_becomes_a_run(tmp_path):
    config = tl.presets["flashmicrogpt"].model.replace(vocab_size=9)
    model = tl.GPT(config, 3, "reference", dtype="float32")
    model.save(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "run")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_model_without_biases_gets_zeros(tmp_path):
    config = tl.presets["shakespeare-char"].model.replace(vocab_size=13, block_size=8, n_layer=2, n_embd=8)
    model = random_model(config, dtype="float32")
    model.save(tmp_path / "run")
    told = []
    convert(tmp_path / "run", tmp_path / "model.bin", say=told.append)
    assert "biases of zero" in told[1]
    other = tl.load(tmp_path / "model.bin", "reference", dtype="float32")
    assert not other.params["bqkv"].any()
    tokens = [1, 5, 12, 0]
    np.testing.assert_allclose(other.logits(tokens), model.logits(tokens), rtol=1e-6, atol=1e-6)


def test_tokenizer_files_come_along(tmp_path):
    convert(FILES / "huggingface", tmp_path / "copy")
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "copy" / name).read_bytes() == (FILES / "huggingface" / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"activation": "relu"}, "activation='relu'"),
        ({"norm": "rms", "norm_bias": False}, "norm='rms'"),
        ({"norm_embed": True}, "norm_embed=True"),
        ({"residual": "mhc"}, "residual='mhc'"),
    ],
)
@pytest.mark.parametrize("target", ["model.bin", "folder", "model.gguf"])
def test_other_architectures_are_refused(change, word, target, tmp_path):
    tl.GPT(SMALL.replace(**change), 0, "reference").save(tmp_path / "run")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="not GPT-2's architecture") as error:
        convert(tmp_path / "run", tmp_path / target)
    assert word in str(error.value)
    assert contents(tmp_path) == before


def test_what_llmc_has_no_place_for(tmp_path):
    tl.GPT(SMALL.replace(n_hidden=7), 0, "reference").save(tmp_path / "run")
    with pytest.raises(ConfigError, match="n_hidden=7"):
        convert(tmp_path / "run", tmp_path / "model.bin")
    convert(tmp_path / "run", tmp_path / "hf")
    assert tl.load(tmp_path / "hf", "reference").config.n_hidden == 7


# ---------------------------------------------------------------- memory, changes meanwhile

MEASURE = r"""
import re, sys
import tapeless as tl
from pathlib import Path
from tapeless.convert import convert

def peak():
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])

WORK
before = peak()
WORK
print(peak() - before)
"""
LARGE = GPT2.replace(vocab_size=40_000, block_size=64, n_layer=2, n_head=4, n_embd=512)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model of 107 MB, most of it in one tensor, in every format, and a small one."""
    here = tmp_path_factory.mktemp("large")
    for folder, config in (("small", SMALL), ("large", LARGE)):
        model = tl.GPT(config, None, "reference", dtype="float32")
        model.params["wte"][...] = 0.5
        model.save(here / folder / "run")
        convert(here / folder / "run", here / folder / "model.bin")
        convert(here / folder / "run", here / folder / "bf16.bin", dtype="bf16")
        convert(here / folder / "run", here / folder / "hf")
    return here


def peak(work: str, source: str, here) -> float:
    """How much more memory something takes for the large model than for the small one, as a share of
    the large one's parameters: resident memory, mapped pages of files and all."""
    code = MEASURE.replace("WORK", f"({work})(Path('small/{source}'))", 1)
    code = code.replace("WORK", f"({work})(Path('large/{source}'))")
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=here, env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout) / (4 * n_params(LARGE))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("source", ["run", "model.bin", "bf16.bin", "hf"])
def test_loading_takes_little_more_than_the_parameters(source, large):
    assert 0.9 < peak("tl.load", source, large) < 1.3


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("source", "target"), [("run", "a.bin"), ("model.bin", "a"), ("hf", "a.gguf")])
def test_converting_takes_little(source, target, large):
    work = f"lambda source: convert(source, Path('{target}'), overwrite=True)"
    assert peak(work, source, large) < 0.3


def test_a_file_that_becomes_shorter_is_told(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(golden.llmc_model(3))
    model = tl.GPT(open_model(path).config, None, "reference")
    checkpoint = open_model(path)
    blocks = checkpoint.blocks("w2")  # a view of what was read, whatever becomes of the file
    first = next(blocks)
    os.truncate(path, 2000)
    np.testing.assert_array_equal(first, golden.ours(golden.weights())["w2"])
    with pytest.raises(RunError, match=r"model.bin has changed since it was opened: it is shorter\."):
        checkpoint.read_into(model.params)
