"""What a Hugging Face folder says is what is loaded, or it is refused; and conversions keep it.

The losses here are transformers' own (5.24, float64), computed once on these very files.
"""

from __future__ import annotations

import json
import re
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import golden
import tapeless as tl
from commands import contents, refused, succeeds
from tapeless.convert import convert
from tapeless.errors import ConfigError, Notice, RunError
from tapeless.io import tensors as io_tensors
from tapeless.io.checkpoints import open_model

V, C = golden.V, golden.C
HEAD = ((np.arange(V * C) * 57 % 251 - 125) / 64).astype(np.float32).reshape(V, C)
WTE = golden.weights()["wte.weight"]
TIED, UNTIED, HEAD_ONLY = 9.436183291067042, 11.116465485880173, 11.240137444653534
FOUR_HEADS, COARSE_EPS = 8.920393949191423, 9.425613056806858
KEY = "tie_word_embeddings"


def folder(path, *, rename=lambda name: f"transformer.{name}", without=(), head=None, **config):
    """The golden model with another config, where ... leaves an entry out, and other tensors."""
    golden.huggingface(path)
    tensors = {
        rename(name): value for name, value in golden.huggingface_tensors().items() if name not in without
    }
    if head is not None:
        tensors[rename("lm_head.weight").replace("transformer.lm", "lm")] = head
    (path / "model.safetensors").write_bytes(golden.safetensors(tensors, "F32"))
    content = {name: value for name, value in (golden.CONFIG | config).items() if value is not ...}
    (path / "config.json").write_text(json.dumps(content))
    return path


def load(path, **more) -> tl.GPT:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        return tl.load(path, "reference", **more)


def loss(path) -> float:
    """In float64, of the batch of the golden debug state."""
    tokens, targets = golden.batch()
    starts = range(0, tokens.size + 1, golden.S)
    return load(path).loss(tokens.ravel(), targets.ravel(), starts)


def close(value):
    return pytest.approx(value, abs=1e-11)


# ---------------------------------------------------------------- the head


def test_the_command_evaluates_with_the_head_of_the_file(tmp_path):
    folder(tmp_path / "hf", head=HEAD)
    golden.tokenizer(tmp_path / "hf")
    (tmp_path / "t.txt").write_text("abad")
    told = succeeds("eval", "hf", "t.txt", "--engine", "reference", cwd=tmp_path)
    assert re.search(r"^loss +10\.1807$", told.stdout, re.MULTILINE)  # transformers: 10.180704
    notes = [line for line in told.stderr.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert "lm_head.weight differs from wte.weight" in notes[0]


@pytest.mark.parametrize("ties", [..., True, False])
def test_a_head_that_differs_is_the_head(ties, tmp_path):
    folder(tmp_path / "hf", head=HEAD, **{KEY: ties})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = tl.load(tmp_path / "hf", "reference")
    assert [w.category for w in told] == ([] if ties is False else [Notice])
    assert loss(tmp_path / "hf") == close(UNTIED)
    np.testing.assert_array_equal(model.params["head"], HEAD.T)
    np.testing.assert_array_equal(model.params["wte"], WTE)
    assert model.n_params == 1896 + V * C


@pytest.mark.parametrize(("ties", "tied"), [(..., True), (True, True), (False, False)])
def test_a_head_that_is_the_embedding(ties, tied, tmp_path):
    folder(tmp_path / "hf", head=WTE, **{KEY: ties})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = tl.load(tmp_path / "hf", "reference")
    assert loss(tmp_path / "hf") == close(TIED)
    assert model.config.tied == tied  # trained further, two tensors part
    assert model.n_params == 1896 + (0 if tied else V * C)


def test_one_tensor_under_its_other_name(tmp_path):
    """safetensors keeps one of the names that a shared tensor has."""
    assert loss(folder(tmp_path / "hf", head=HEAD, without=["wte.weight"])) == close(HEAD_ONLY)
    assert tl.load(tmp_path / "hf", "reference").config.tied


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({KEY: False}, "no tensor 'lm_head.weight': its files do not match config.json, which says"),
        ({KEY: False, "head": HEAD, "without": ["wte.weight"]}, "has no tensor 'wte.weight'"),
        ({"without": ["wte.weight"]}, "has no tensor 'wte.weight'"),
        ({"head": HEAD[:-1]}, r"lm_head.weight is \[10, 8\], but config.json says \[11, 8\]"),
        ({KEY: None, "head": HEAD}, "tie_word_embeddings is None; expected true or false"),
        ({KEY: "false", "head": HEAD}, "tie_word_embeddings is 'false'"),
    ],
)
def test_heads_that_do_not_fit(changes, words, tmp_path):
    folder(tmp_path / "hf", **changes)
    with pytest.raises(RunError, match=words):
        tl.load(tmp_path / "hf", "reference")


def quiet(source, target, *more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        convert(source, target, *more)


def test_the_head_is_kept_by_every_conversion_that_can(tmp_path):
    folder(tmp_path / "hf", head=HEAD)
    quiet(tmp_path / "hf", tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "run", "run")
    convert(tmp_path / "run", tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    for name in ("a", "b"):
        about = json.loads((tmp_path / name / "config.json").read_text())
        assert about[KEY] is False
        tensors = load_file(tmp_path / name / "model.safetensors")
        np.testing.assert_array_equal(tensors["lm_head.weight"], HEAD)
        np.testing.assert_array_equal(tensors["transformer.wte.weight"], WTE)
    np.testing.assert_array_equal(load_file(tmp_path / "run/model.safetensors")["head"], HEAD.T)
    for name in ("a", "run", "b"):
        assert loss(tmp_path / name) == close(UNTIED)


def test_the_head_is_llama_cpps_output(tmp_path):
    """Its gpt2 takes output.weight where a file has one, and else the token embedding."""
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    folder(tmp_path / "hf", head=HEAD)
    for dtype in ("f32", "bf16"):
        quiet(tmp_path / "hf", tmp_path / f"{dtype}.gguf", None, dtype)
        tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / f"{dtype}.gguf").tensors}
        head = tensors["output.weight"]
        assert [int(n) for n in head.shape] == [C, V]
        np.testing.assert_array_equal(gguf.quants.dequantize(head.data, head.tensor_type), HEAD)
        assert head.tensor_type.name == tensors["token_embd.weight"].tensor_type.name
        embedding = tensors["token_embd.weight"]
        np.testing.assert_array_equal(gguf.quants.dequantize(embedding.data, embedding.tensor_type), WTE)


def test_llmcs_format_has_no_place_for_a_head(tmp_path):
    folder(tmp_path / "hf", head=HEAD, **{KEY: False})
    before = contents(tmp_path)
    for arguments in (("out.bin",), ("state.bin", "--state")):
        error = refused("convert", "hf", *arguments, cwd=tmp_path)
        assert "llm.c's format has no place for the head of hf, lm_head.weight" in error
    assert contents(tmp_path) == before


@settings(max_examples=30)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 30),
    wide=st.sampled_from([4, 64, 1000, 10**6]),
    block=st.sampled_from([4, 100]),
)
def test_a_matrix_is_transposed_in_blocks(rows, columns, wide, block, tmp_path_factory):
    path = tmp_path_factory.mktemp("matrix") / "m"
    matrix = np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)
    path.write_bytes(matrix.tobytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io_tensors, "COLUMNS", wide)
        patch.setattr(io_tensors, "BLOCK", block)
        part = io_tensors.transpose(io_tensors.Stored(path, 0, matrix.dtype, matrix.shape))
        blocks = list(part.blocks())
        back = list(io_tensors.transpose(part).blocks())
    np.testing.assert_array_equal(np.concatenate(blocks), matrix.T)
    np.testing.assert_array_equal(np.concatenate(back), matrix)
    assert part.shape == matrix.T.shape
    assert max(b.nbytes for b in blocks) <= max(wide, 4 * rows)


# ---------------------------------------------------------------- config.json

ALIASES = {
    "n_positions": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
}


@pytest.mark.parametrize("name", ALIASES)
def test_other_names_of_settings(name, tmp_path):
    value, other = golden.CONFIG[name], ALIASES[name]
    assert loss(folder(tmp_path / "a", **{name: ..., other: value})) == close(TIED)
    assert loss(folder(tmp_path / "b", **{other: value})) == close(TIED)
    folder(tmp_path / "c", **{other: 2 * value})
    with pytest.raises(RunError, match=f"says {name} {value} and {other} {2 * value}, two names of one"):
        tl.load(tmp_path / "c", "reference")


def test_the_number_of_heads_is_the_one_that_is_said(tmp_path):
    """No shape tells it: with GPT-2's default of 12 there is another loss, or an error."""
    assert loss(folder(tmp_path / "hf", n_head=..., num_attention_heads=4)) == close(FOUR_HEADS)


SAME = ["gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh", "gelu_accurate"]


@pytest.mark.parametrize("name", SAME)
def test_names_of_the_same_activation(name, tmp_path):
    assert loss(folder(tmp_path / "hf", activation_function=name, hidden_act=name)) == close(TIED)


REFUSED = {
    "activation_function": ["gelu", "gelu_python", "gelu_10", "quick_gelu", "relu", None],
    "hidden_act": ["relu"],
    "scale_attn_weights": [False, None],
    "scale_attn_by_inverse_layer_idx": [True],
    "add_cross_attention": [True],
    "is_causal": [False],
    "per_layer_config": [{"0": {"n_head": 1}}],
    "pruned_heads": [{"0": [0]}],
    "quantization_config": [{"quant_method": "bitsandbytes"}],
    "n_head": ["2", 2.5, True, None, 10**30],
    "vocab_size": [None],
    "n_inner": [0, "32"],
    "layer_norm_epsilon": [1e-50, "1e-5", None],
    "layer_norm_eps": [1e-3],
    "num_heads": [4],
    "intermediate_size": [31],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in REFUSED for value in REFUSED[name]])
def test_settings_that_change_the_numbers_are_refused(name, value, tmp_path):
    folder(tmp_path / "hf", **{name: value})
    with pytest.raises(RunError, match=r"config\.json"):
        tl.load(tmp_path / "hf", "reference")


IGNORED = {
    "resid_pdrop": 0.3, "embd_pdrop": 0.2, "attn_pdrop": 0.0, "initializer_range": 0.5, "use_cache": False,
    "reorder_and_upcast_attn": True, "summary_type": "mean", "summary_first_dropout": 0.3, "pad_token_id": 3,
    "task_specific_params": {"text-generation": {"max_length": 50}}, "layer_norm_eps": 1e-5,
}  # fmt: skip


def test_settings_that_change_nothing_are_kept_in_a_copy(tmp_path):
    folder(tmp_path / "hf", layer_norm_epsilon=0.1, **IGNORED | {"layer_norm_eps": 0.1})
    assert loss(tmp_path / "hf") == close(COARSE_EPS)
    convert(tmp_path / "hf", tmp_path / "copy")
    about = json.loads((tmp_path / "copy/config.json").read_text())
    assert about["layer_norm_epsilon"] == 0.1
    assert (IGNORED | {"layer_norm_eps": 0.1}).items() <= about.items()
    assert loss(tmp_path / "copy") == close(COARSE_EPS)


def test_the_names_in_a_copy_are_gpt2s_own(tmp_path):
    renamed = {ALIASES[name]: golden.CONFIG[name] for name in ALIASES}
    folder(tmp_path / "hf", **dict.fromkeys(ALIASES, ...), **renamed)
    convert(tmp_path / "hf", tmp_path / "copy")
    about = json.loads((tmp_path / "copy/config.json").read_text())
    assert golden.CONFIG.items() <= about.items()
    assert not set(ALIASES.values()) & about.keys()


def test_an_adapter_beside_the_model_is_not_left_out(tmp_path):
    folder(tmp_path / "hf")
    (tmp_path / "hf/adapter_config.json").write_text("{}")
    assert "hf holds an adapter" in refused("convert", "hf", "out.bin", cwd=tmp_path)


def test_a_key_twice(tmp_path):
    folder(tmp_path / "hf")
    text = json.dumps(golden.CONFIG).replace('"n_head": 2', '"n_head": 2, "n_head": 4')
    (tmp_path / "hf/config.json").write_text(text)
    with pytest.raises(RunError, match=r"config.json has 'n_head' twice"):
        tl.load(tmp_path / "hf", "reference")


# ---------------------------------------------------------------- names, shards, byte-order marks


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.transformer.{name}",
        lambda name: f"module.transformer.{name}",
        lambda name: f"model.{name}",
        lambda name: f"module._orig_mod.transformer.{name}",
        lambda name: f"transformer.{name}".replace("mlp.", "_orig_mod.mlp."),
        lambda name: f"_fsdp_wrapped_module.model.{name}".replace("h.1", "h.1._checkpoint_wrapped_module"),
    ],
)  # fmt: skip
def test_names_of_wrapped_models(rename, tmp_path):
    assert loss(folder(tmp_path / "hf", rename=rename, head=HEAD, **{KEY: False})) == close(UNTIED)


def test_a_name_with_and_without_its_prefix(tmp_path):
    folder(tmp_path / "hf")
    tensors = {**load_file(tmp_path / "hf/model.safetensors"), "wte.weight": 2 * WTE}
    save_file(tensors, tmp_path / "hf/model.safetensors")
    with pytest.raises(RunError, match=r"the tensor 'wte\.weight' twice"):
        tl.load(tmp_path / "hf", "reference")


def test_the_same_tensor_in_two_shards(tmp_path):
    golden.huggingface(tmp_path / "hf", shards=2)
    first, second = sorted((tmp_path / "hf").glob("model-*"))
    save_file(load_file(second) | {"transformer.wte.weight": 2 * WTE}, second)
    assert "transformer.wte.weight" in load_file(first)
    with pytest.raises(RunError, match=r"the tensor 'wte\.weight' twice"):
        tl.load(tmp_path / "hf", "reference")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda homes: homes.pop("transformer.ln_f.bias"),
            "'transformer.ln_f.bias' is in none, but it is in model-0000",
        ),
        (lambda homes: homes.update(x=homes["transformer.ln_f.bias"]), ", but it is in none."),
        (
            lambda homes: homes.update({"transformer.wpe.weight": homes["transformer.wte.weight"]}),
            "but it is in model-00002-of-00002.safetensors",
        ),
        (lambda homes: homes.update({"transformer.wpe.weight": 3}), "is damaged: expected weight_map"),
    ],
)
def test_an_index_that_does_not_match_its_files(change, words, tmp_path):
    golden.huggingface(tmp_path / "hf", shards=2)
    path = tmp_path / "hf/model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    with pytest.raises(RunError, match=re.escape(words)):
        tl.load(tmp_path / "hf", "reference")


@pytest.mark.parametrize("metadata", [..., {}, {"total_size": 1}, {"total_size": 10**30}, "x"])
def test_what_an_index_says_of_its_size_is_not_needed(metadata, tmp_path):
    """Many that are out there are wrong; nothing goes by it."""
    golden.huggingface(tmp_path / "hf", shards=3)
    path = tmp_path / "hf/model.safetensors.index.json"
    index = json.loads(path.read_text())
    index = {"weight_map": index["weight_map"]} | ({} if metadata is ... else {"metadata": metadata})
    path.write_text(json.dumps(index))
    assert loss(tmp_path / "hf") == close(TIED)


@pytest.mark.parametrize("shards", [1, 2])
def test_byte_order_marks(shards, tmp_path):
    golden.huggingface(tmp_path / "hf", shards=shards)
    for path in (tmp_path / "hf").glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert loss(tmp_path / "hf") == close(TIED)


# ---------------------------------------------------------------- numbers that do not fit


def wide(path, name, value, dtype=np.float64):
    """The golden model in float64, with one number more."""
    folder(path)
    tensors = {n: t.astype(dtype) for n, t in load_file(path / "model.safetensors").items()}
    tensors[name].flat[5] = value
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.1.attn.c_proj.weight"])
def test_numbers_beyond_float32(name, tmp_path):
    wide(tmp_path / "hf", name, -1e300)
    assert tl.load(tmp_path / "hf", "reference").n_params == 1896  # in float64 they fit
    before = contents(tmp_path)
    with pytest.raises(RunError, match=r"holds -1e\+300, which does not fit in float32"):
        tl.load(tmp_path / "hf", "reference", dtype="float32")
    for target in ("out.bin", "out", "out.gguf"):
        if target == "out.gguf":
            pytest.importorskip("gguf", reason="the extra gguf is not installed")
        with pytest.raises(RunError, match="does not fit in float32"):
            convert(tmp_path / "hf", tmp_path / target)
    with pytest.raises(RunError, match="does not fit in float32"):
        convert(tmp_path / "hf", tmp_path / "out", "run")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("target", ["out.bin", "out"])
def test_numbers_beyond_bfloat16(target, tmp_path):
    """The largest of float32 is rounded up, to infinity."""
    wide(tmp_path / "hf", "transformer.wte.weight", np.finfo(np.float32).max, np.float32)
    assert np.isfinite(tl.load(tmp_path / "hf", "reference", dtype="float32").params["wte"]).all()
    with pytest.raises(RunError, match=r"holds 3\.402\d+e\+38, which does not fit in bfloat16"):
        convert(tmp_path / "hf", tmp_path / target, dtype="bf16")
    assert not (tmp_path / target).exists()


def test_rounding_of_float64_is_said(tmp_path):
    wide(tmp_path / "hf", "transformer.wte.weight", 0.1)
    told = succeeds("convert", "hf", "out.bin", cwd=tmp_path).stderr.splitlines()
    assert told[:2] == [
        "hf: Hugging Face, float64, 1,896 parameters",
        "Its numbers of float64 are rounded to float32.",
    ]
    np.testing.assert_array_equal(
        tl.load(tmp_path / "out.bin", "reference").params["wte"].flat[5], np.float64(np.float32(0.1))
    )


def test_what_is_read_is_what_the_files_hold(tmp_path):
    """One file in two kinds of number: both are named."""
    folder(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"].astype(np.float16)
    save_file(tensors, tmp_path / "hf/model.safetensors")
    assert open_model(tmp_path / "hf").dtypes == ["float16", "float32"]
    assert loss(tmp_path / "hf") == close(TIED)  # multiples of 1/64 that float16 holds


def test_other_architectures_still_are_refused_with_a_head_of_their_own(tmp_path):
    tl.GPT(tl.presets["microgpt"].model.replace(vocab_size=5), 0, "reference").save(tmp_path / "run")
    with pytest.raises(ConfigError, match="not GPT-2's architecture"):
        convert(tmp_path / "run", tmp_path / "hf")
