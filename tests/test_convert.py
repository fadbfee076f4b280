"""`tapeless convert` and what else opens models, from outside: what they print, replace and refuse."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import golden
import hub
import tapeless as tl
from commands import bound_by_permissions, contents, environment, refused, succeeds, without_privileges
from tapeless.convert import convert
from tapeless.data.tokenizers import CharTokenizer, read_tokenizer
from tapeless.errors import RunError

FILES = golden.FILES
MODEL = FILES / "llmc_v3.bin"


@pytest.fixture
def here(tmp_path):
    """A folder with the golden model in every format."""
    for name in ("llmc_v3.bin", "llmc_v5.bin", "llmc_state.bin"):
        shutil.copy(FILES / name, tmp_path / name)
    shutil.copytree(FILES / "huggingface", tmp_path / "hf")
    return tmp_path


# ---------------------------------------------------------------- what it does


def test_what_it_says(here):
    told = succeeds("convert", "llmc_v5.bin", "out", cwd=here)
    assert told.stdout == ""
    assert told.stderr.splitlines() == [
        "llmc_v5.bin: llm.c, version 5, bfloat16, 1,896 parameters",
        "Saved in out, a Hugging Face folder of float32.",
    ]
    told = succeeds("convert", "out", "run", "--to", "run", cwd=here).stderr
    assert told.splitlines()[0] == "out: Hugging Face, float32, 1,896 parameters"
    assert json.loads((here / "run/config.json").read_text())["tapeless"] == tl.__version__
    assert succeeds("convert", "run", "again.bin", cwd=here).stderr.startswith(
        "run: a run of tapeless, float32"
    )
    assert (here / "again.bin").read_bytes() == (here / "llmc_v3.bin").read_bytes()


@pytest.mark.parametrize("bias", [False, True])
def test_biases_that_are_added_are_told(bias, here):
    config = tl.presets["gpt2"].model.replace(vocab_size=11, block_size=8, n_layer=1, n_head=2, n_embd=8)
    tl.GPT(config.replace(bias=bias), 0, "reference").save(here / "run")
    told = succeeds("convert", "run", "out", cwd=here).stderr
    assert ("It has no biases: a Hugging Face folder gets biases of zero.\n" in told) == (not bias)
    biases = tl.load(here / "out", "reference").params["bqkv"]
    assert biases.shape == (1, 24)
    assert not biases.any()


@pytest.mark.parametrize("target", ["out.bin", "out", "out.gguf", "state.bin"])
def test_nothing_is_replaced_by_accident(target, here):
    extra = ["--state", "--batch-size", "1"] if target == "state.bin" else []
    succeeds("convert", "llmc_v3.bin", target, *extra, cwd=here)
    before = contents(here)
    error = refused("convert", "hf", target, *extra, cwd=here)
    assert "already exists: replace it with --overwrite" in error
    assert contents(here) == before
    succeeds("convert", "hf", target, *extra, "--overwrite", cwd=here)
    assert (here / "out.bin").exists() == (target == "out.bin")


def test_a_model_of_shards_is_replaced_whole(tmp_path):
    golden.huggingface(tmp_path / "hf", shards=3)
    (tmp_path / "hf/README.md").write_text("mine")
    succeeds("convert", MODEL, "hf", "--overwrite", cwd=tmp_path)
    assert set(contents(tmp_path / "hf")) == {"config.json", "model.safetensors", "README.md"}
    np.testing.assert_array_equal(
        tl.load(tmp_path / "hf", "reference").params["wte"], golden.weights()["wte.weight"]
    )


@pytest.mark.parametrize("target", ["llmc_v3.bin", "hf"])
def test_a_model_may_take_its_own_place(target, here):
    succeeds("convert", target, target, "--dtype", "bf16", "--overwrite", cwd=here)
    assert tl.load(here / target, "reference").n_params == 1896
    assert (here / "llmc_v3.bin").read_bytes() == golden.llmc_model(5 if target == "llmc_v3.bin" else 3)
    assert (here / "hf/vocab.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["llmc_v3.bin", "out.bin", "--dtype", "f16"], "dtype cannot be 'f16'"),
        (["llmc_v3.bin", "out", "--to", "llama"], "to cannot be 'llama'"),
        (["llmc_v3.bin", "out.bin", "--to", "run"], "is the format of a folder"),
        (["llmc_v3.bin", "out", "--to", "run", "--dtype", "bf16"], "keeps its weights in float32"),
        (["llmc_v3.bin", ""], "DST is empty"),
        (["llmc_v3.bin", "out.safetensors"], "give a .bin or .gguf file, or a folder"),
        (["llmc_v3.bin", "hf/config.json/out"], "config.json"),
        (["llmc_v3.bin", "llmc_v5.bin/out.bin", "--overwrite"], "llmc_v5.bin"),
        (["llmc_v3.bin", "folder.bin", "--overwrite"], "is a folder; expected the name of a file"),
        (["llmc_v3.bin", "file", "--overwrite"], "is a file; expected a folder"),
    ],
)
def test_impossible_requests(arguments, words, here):
    (here / "folder.bin").mkdir()
    (here / "file").write_text("")
    before = contents(here)
    assert words in refused("convert", *arguments, cwd=here)
    assert contents(here) == before


# ---------------------------------------------------------------- tokenizers


def tokenizer(folder: Path, kind: str) -> None:
    """The golden tokenizer in a folder, as GPT-2's two files of either name, or in one file."""
    golden.tokenizer(folder)
    if kind == "encoder.json":
        (folder / "vocab.json").rename(folder / "encoder.json")
        (folder / "merges.txt").rename(folder / "vocab.bpe")
    elif kind == "tokenizer.json":
        content = read_tokenizer(folder).to_dict()
        (folder / "tokenizer.json").write_text(json.dumps(content))
        (folder / "vocab.json").unlink()
        (folder / "merges.txt").unlink()


@pytest.mark.parametrize("kind", ["vocab.json", "encoder.json", "tokenizer.json"])
@pytest.mark.parametrize("source", ["model.bin", "hf"])
def test_a_tokenizer_comes_along(source, kind, tmp_path):
    """Through every format that has a place for one, texts are the same."""
    golden.huggingface(tmp_path / "hf")
    shutil.copy(MODEL, tmp_path / "model.bin")
    tokenizer(tmp_path / "hf" if source == "hf" else tmp_path, kind)
    expected = tl.load(tmp_path / source, "reference", dtype="float32").generate("ab a", n=2)
    for target, to in (("a", "hf"), ("b", "run"), ("c", "hf"), ("d", "run")):
        convert(tmp_path / source, tmp_path / target, to)
        source = target
        assert tl.load(tmp_path / source, "reference", dtype="float32").generate("ab a", n=2) == expected
    # The longest text, as transformers calls it, is the model's.
    about = json.loads((tmp_path / "c/tokenizer_config.json").read_text())
    assert about["model_max_length"] == tl.load(tmp_path / "c", "reference").config.block_size < 1024
    assert (tmp_path / "b/tokenizer.json").read_bytes() == (tmp_path / "d/tokenizer.json").read_bytes()
    convert(tmp_path / "a", tmp_path / "a.gguf")
    convert(tmp_path / "d", tmp_path / "d.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "d.gguf").read_bytes()
    assert b"tokenizer.ggml.tokens" in (tmp_path / "a.gguf").read_bytes()
    convert(tmp_path / "d", tmp_path / "model.bin", overwrite=True)
    assert (tmp_path / "model.bin").read_bytes() == WHOLE


@pytest.fixture
def run_of_characters(tmp_path):
    """The golden model as a run whose eleven tokens are ten letters and BOS."""
    model = tl.load(MODEL, "reference", dtype="float32")
    model.tokenizer = CharTokenizer("abcdefghij", bos=10)
    model.save(tmp_path / "run")
    return tmp_path


def test_a_tokenizer_that_has_no_place_is_told(run_of_characters):
    here = run_of_characters
    told = succeeds("convert", "run", "hf", cwd=here).stderr
    assert "The tokenizer of run is no BPE, so a Hugging Face folder has no place for it." in told
    assert set(contents(here / "hf")) == {"config.json", "model.safetensors"}
    assert "No BPE tokenizer comes with run" in succeeds("convert", "run", "model.gguf", cwd=here).stderr
    (here / "else").mkdir()
    told = succeeds("convert", "run", "else/model.bin", cwd=here).stderr
    assert "An llm.c file holds no tokenizer: that in run stays there." in told
    shutil.copy(here / "run/tokenizer.json", here / "else")  # as that line makes one do
    texts = tl.load(here / "run", "reference", dtype="float32").generate("ab", n=3)
    assert tl.load(here / "else/model.bin", "reference", dtype="float32").generate("ab", n=3) == texts
    assert "tokenizer" not in succeeds("convert", "else/model.bin", "else/b.bin", cwd=here).stderr
    succeeds("convert", "run", "copy", "--to", "run", cwd=here)
    assert contents(here / "copy") == contents(here / "run")


@pytest.mark.parametrize("target", ["out", "out.gguf", "run"])
def test_a_tokenizer_of_another_model_is_refused(target, here):
    vocab = json.loads((here / "hf/vocab.json").read_text()) | {"more": 11}
    (here / "hf/vocab.json").write_text(json.dumps(vocab))
    before = contents(here)
    to = ["--to", "run"] if target == "run" else []
    error = refused("convert", "hf", target, *to, cwd=here)
    assert "hf/vocab.json has 12 tokens but the model of hf has 11" in error
    assert error.removeprefix("error: ") in refused("sample", "hf", cwd=here)
    assert contents(here) == before
    succeeds("convert", "hf", "out.bin", cwd=here)  # which has no place for one


ENDS = ("bos_token_id", "eos_token_id")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"bos_token_id": 3, "eos_token_id": [4, 5]}, [3, [4, 5]]),
        ({"eos_token_id": None}, [10, None]),
        ({}, [10, 10]),  # the tokenizer's
    ],
)
def test_the_ends_of_a_text_are_kept(said, expected, here):
    (here / "hf/config.json").write_text(json.dumps(golden.CONFIG | said))
    succeeds("convert", "hf", "out", cwd=here)
    about = json.loads((here / "out/config.json").read_text())
    assert [about[name] for name in ENDS] == expected


def test_the_ends_of_a_text_are_those_of_the_tokenizer(run_of_characters):
    here = run_of_characters
    succeeds("convert", "run", "hf", cwd=here)
    about = json.loads((here / "hf/config.json").read_text())
    assert [about[name] for name in ENDS] == [10, 10]
    (here / "run/tokenizer.json").unlink()
    succeeds("convert", "run", "hf", "--overwrite", cwd=here)
    about = json.loads((here / "hf/config.json").read_text())
    assert [about[name] for name in ENDS] == [None, None]


# ---------------------------------------------------------------- bad input


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


def spoilt(number: int, value: int, version: int = 3) -> bytes:
    """A model file with one number of its header changed."""
    content = bytearray(golden.llmc_model(version))
    content[4 * number : 4 * number + 4] = value.to_bytes(4, "little", signed=True)
    return bytes(content)


def not_finite(value: float) -> bytes:
    content = golden.llmc_model(3)
    return content[:1100] + np.array(value, "<f4").tobytes() + content[1104:]


def config(**changes):
    def write(folder: Path) -> None:
        golden.huggingface(folder)
        (folder / "config.json").write_text(json.dumps(golden.CONFIG | changes))

    return write


def tensors(change):
    def write(folder: Path) -> None:
        golden.huggingface(folder)
        named = golden.huggingface_tensors()
        change(named)
        (folder / "model.safetensors").write_bytes(golden.safetensors(named, "F32"))

    return write


def two_files(folder: Path) -> None:
    for name in ("a.bin", "b.bin"):
        write(folder / name, golden.llmc_model(3))


def run_and_file(folder: Path) -> None:
    tl.load(MODEL, "reference").save(folder)
    write(folder / "a.bin", golden.llmc_model(3))


def beside(name: str, content: bytes = b"", remove: str = ""):
    """A Hugging Face folder with a file more, or less."""

    def make(folder: Path) -> None:
        golden.huggingface(folder)
        (folder / name).write_bytes(content)
        if remove:
            (folder / remove).unlink()

    return make


def index(content):
    def make(folder: Path) -> None:
        golden.huggingface(folder, shards=2)
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return make


def cut(folder: Path, size: int = 5000) -> None:
    golden.huggingface(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])


WHOLE = golden.llmc_model(3)
BAD = {
    "nothing there": (lambda p: None, "no run folder or model 'bad'"),
    "empty": (lambda p: write(p, b""), "bad is empty; expected a run folder"),
    "wrong magic": (
        lambda p: write(p, spoilt(0, 20240325)),
        "begins with 20240325; expected a run folder",
    ),
    "a debug state": (lambda p: shutil.copy(FILES / "llmc_state.bin", p), "is a debug state of llm.c"),
    "a shard": (lambda p: write(p, spoilt(0, 20240520)), "holds tokens; expected"),
    "a gguf file": (
        lambda p: shutil.copy(FILES / "gpt2.gguf", p),
        "which tapeless can only write",
    ),
    "a pickle": (lambda p: write(p, b"PK\3\4rest"), "PyTorch's: save the model as safetensors"),
    "unknown version": (
        lambda p: write(p, spoilt(1, 2)),
        "version 2; the versions known are 1, 3, 5",
    ),
    "header cut": (lambda p: write(p, WHOLE[:1000]), "truncated: 1,000 bytes, where llm.c's header alone"),
    "truncated": (lambda p: write(p, WHOLE[:-4]), f"truncated: {len(WHOLE) - 4:,} bytes, but its model"),
    "too long": (lambda p: write(p, WHOLE + b"\0"), f"too long: {len(WHOLE) + 1:,} bytes"),
    "bfloat16 truncated": (lambda p: write(p, golden.llmc_model(5)[:-2]), "truncated"),
    "sizes do not match": (lambda p: write(p, spoilt(4, 3)), "3 layers"),
    "absurd size": (lambda p: write(p, spoilt(3, 2**24)), "padded to 128"),
    "absurd sizes": (lambda p: write(p, spoilt(6, 2**21)), "truncated"),
    "negative size": (lambda p: write(p, spoilt(4, -1)), "n_layer must be a whole number from 1"),
    "no such heads": (lambda p: write(p, spoilt(5, 3)), "n_embd must be divisible by n_head"),
    "NaN": (lambda p: write(p, not_finite(np.nan)), "bad: wte holds NaN; expected finite weights"),
    "infinity": (lambda p: write(p, not_finite(np.inf)), "bad: wte holds an infinite number"),
    "NaN in a folder": (
        tensors(lambda t: t.update({"h.1.mlp.c_fc.bias": np.full(32, np.nan, np.float32)})),
        "bad: b1 holds NaN",
    ),
    "empty folder": (lambda p: p.mkdir(), "has no config.json, nor a model file of llm.c"),
    "two files": (two_files, "bad holds 2 models: name one of them, e.g. bad/a.bin"),
    "a file in a run": (run_and_file, "holds two models, that of config.json and a.bin"),
    "a file in a folder": (beside("a.bin", WHOLE), "holds two models, that of config.json and a.bin"),
    "shards and a whole": (
        beside("model.safetensors.index.json", b"{}"),
        "holds two models, model.safetensors and that of model.safetensors.index.json",
    ),
    "no weights": (beside("x", remove="model.safetensors"), "bad has no model.safetensors"),
    "pickled weights": (
        beside("pytorch_model.bin", remove="model.safetensors"),
        "Save pytorch_model.bin again as safetensors",
    ),
    "config no JSON": (beside("config.json", b"{"), "config.json is damaged: it is not JSON"),
    "config of nothing": (beside("config.json", b"{}"), "describes neither a run nor GPT-2"),
    "another model": (config(model_type="llama"), "a model of type 'llama'; expected 'gpt2'"),
    "another activation": (config(activation_function="gelu"), "activation_function is 'gelu'; only GPT-2's"),
    "another scale": (config(scale_attn_weights=False), "scale_attn_weights is False"),
    "a scale by layer": (config(scale_attn_by_inverse_layer_idx=True), "inverse_layer_idx is True"),
    "no head of its own": (
        config(tie_word_embeddings=False),
        "has no tensor 'lm_head.weight': its files do not match config.json, which says "
        "tie_word_embeddings false",
    ),
    "a width that is text": (config(n_embd="8"), "n_embd must be a whole number"),
    "another width": (config(n_embd=16), "wte.weight is [11, 8], but config.json says [11, 16]"),
    "a layer missing": (config(n_layer=3), "has no tensor 'h.2.ln_1.weight'"),
    "a layer too many": (config(n_layer=1), "config.json has n_layer 1, but its weights have 2 layers"),
    "a tensor too many": (
        tensors(lambda t: t.update({"h.1.adapter": np.zeros(3, np.float32)})),
        "'h.1.adapter' that is no part of GPT-2",
    ),
    "a tensor missing": (tensors(lambda t: t.pop("ln_f.bias")), "has no tensor 'ln_f.bias'"),
    "weights truncated": (cut, "model.safetensors is damaged or truncated"),
    "weights empty": (lambda p: cut(p, 0), "model.safetensors is damaged or truncated"),
    "weights too long": (
        beside("model.safetensors", golden.safetensors(golden.huggingface_tensors(), "F32") + b"\0"),
        "model.safetensors is damaged",
    ),
    "a shard missing": (
        index({"weight_map": {"wte.weight": "none.safetensors"}}),
        "none.safetensors: No such",
    ),
    "a shard elsewhere": (index({"weight_map": {"wte.weight": "../x"}}), "index.json is damaged"),
    "an index of nothing": (index([]), "index.json is damaged"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_models(case, tmp_path):
    """Every way in refuses it: from Python, and by the real command."""
    make, words = BAD[case]
    make(tmp_path / "bad")
    before = contents(tmp_path)
    error = refused("convert", "bad", "out.bin", cwd=tmp_path)
    assert words in error
    assert contents(tmp_path) == before
    with pytest.raises(tl.TapelessError) as raised:
        tl.load(tmp_path / "bad", "reference")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("target", ["out.bin", "out", "out.gguf", "state.bin"])
@pytest.mark.skipif(os.name == "nt", reason="limits the size of files")
def test_a_disk_that_is_full(target, here):
    """Nothing takes the place of what was there, and nothing is left beside it."""
    import resource

    extra = ["--state"] if target == "state.bin" else []
    succeeds("convert", "llmc_v3.bin", target, *extra, cwd=here)
    before = contents(here)
    error = refused(
        "convert", "llmc_v3.bin", target, *extra, "--overwrite", cwd=here,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )  # fmt: skip
    assert error == f"error: cannot write {target}: File too large."
    assert contents(here) == before


@pytest.mark.parametrize("target", ["out.bin", "out", "out.gguf"])
def test_a_source_that_shrinks_meanwhile(target, tmp_path):
    """It is named, not what is written."""
    golden.huggingface(tmp_path / "hf")
    before = set(contents(tmp_path))
    file = tmp_path / "hf/model.safetensors"
    with pytest.raises(RunError, match=r"hf/model\.safetensors has changed since it was opened"):
        convert(tmp_path / "hf", tmp_path / target, say=lambda line: os.truncate(file, 5000))
    assert set(contents(tmp_path)) == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_pipe_is_not_waited_for(name, here):
    (here / "hf" / name.removesuffix(".index.json")).unlink()
    os.mkfifo(here / "hf" / name)
    assert f"cannot read hf/{name}: it is no regular file" in refused("convert", "hf", "out.bin", cwd=here)


@bound_by_permissions
def test_without_permission(here):
    (here / "llmc_v3.bin").chmod(0)
    assert "Permission denied" in refused(
        "convert", "llmc_v3.bin", "out.bin", cwd=here, preexec_fn=without_privileges
    )


# ---------------------------------------------------------------- the hub

FAKE = """
class {error}(Exception):
    pass

def snapshot_download(name, allow_patterns):
    assert "model.safetensors" in allow_patterns
    if name == "gpt2":
        return {folder!r}
    raise {error}("far away\\nand long")
"""


def with_hub(tmp_path, error="LocalEntryNotFoundError", content=FAKE):
    """An environment where `huggingface_hub` is a module of ours."""
    (tmp_path / "fake").mkdir()
    source = content.format(error=error, folder=str(FILES / "huggingface"))
    (tmp_path / "fake/huggingface_hub.py").write_text(source)
    package = str(Path(tl.__file__).parents[1])
    return environment(PYTHONPATH=os.pathsep.join([str(tmp_path / "fake"), package]))


def test_a_name_on_the_hub(tmp_path):
    told = succeeds("convert", "gpt2", "out.bin", cwd=tmp_path, env=with_hub(tmp_path)).stderr
    assert "1,896 parameters" in told
    assert (tmp_path / "out.bin").read_bytes() == WHOLE


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("LocalEntryNotFoundError", "cannot be reached (LocalEntryNotFoundError): check the network"),
        ("RepositoryNotFoundError", "nor a public model of this name"),
    ],
)
def test_a_hub_without_it(error, words, tmp_path):
    told = refused("convert", "someone/model", "out.bin", cwd=tmp_path, env=with_hub(tmp_path, error))
    assert "there is no file or folder 'someone/model'" in told
    assert words in told


def test_no_hub_package(tmp_path):
    env = with_hub(tmp_path, content="raise ImportError")
    assert "pip install huggingface_hub tokenizers (the extra 'hub')" in refused(
        "convert", "gpt2", "out.bin", cwd=tmp_path, env=env
    )


def test_the_real_hub_package_without_network(tmp_path):
    pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")
    env = environment(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert "cannot be reached" in refused("sample", "gpt2", cwd=tmp_path, env=env)


def test_the_real_hub_package_fetches(tmp_path):
    pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")
    with hub.serving("someone/small", FILES / "huggingface") as address:
        env = environment(HF_ENDPOINT=address, HF_HOME=str(tmp_path / "cache"), NO_PROXY="127.0.0.1")
        succeeds("convert", "someone/small", "out.bin", cwd=tmp_path, env=env)
        assert "nor a public model" in refused("sample", "someone/else", cwd=tmp_path, env=env)
    assert (tmp_path / "out.bin").read_bytes() == WHOLE
    env = environment(HF_HOME=str(tmp_path / "cache"), HF_HUB_OFFLINE="1")  # fetched once is there for good
    succeeds("convert", "someone/small", "again.bin", cwd=tmp_path, env=env)


@pytest.mark.parametrize("name", ["nowhere", "runs/gpt2-1", "./gpt2/x", "/gpt2", "a/b/c", "there/gpt2"])
def test_names_that_are_paths_are_not_looked_for_elsewhere(name, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RunError, match="no run folder or model"):
        tl.load(name)
