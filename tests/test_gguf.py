"""GGUF files, read back with the package that llama.cpp's own tools use."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import golden
import tapeless as tl
from commands import environment, refused, succeeds
from tapeless.convert import convert

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
FILES = golden.FILES


def read(path):
    """Metadata, and tensors as float32."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {}
    for tensor in reader.tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert data.shape == tuple(int(n) for n in tensor.shape[::-1])  # ggml counts from the last axis
        tensors[tensor.name] = data
    return fields, tensors, {t.name: t.tensor_type.name for t in reader.tensors}


@pytest.mark.parametrize("source", ["llmc_v1.bin", "llmc_v5.bin", "huggingface"])
def test_the_tensors_are_those_of_the_golden_file(source, tmp_path):
    convert(FILES / source, tmp_path / "model.gguf")
    _, expected, _ = read(FILES / "gpt2.gguf")
    fields, tensors, kinds = read(tmp_path / "model.gguf")
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)
    assert set(kinds.values()) == {"F32"}
    assert fields["general.architecture"] == "gpt2"
    assert fields["gpt2.context_length"] == golden.T
    assert fields["gpt2.embedding_length"] == golden.C
    assert fields["gpt2.feed_forward_length"] == 4 * golden.C
    assert fields["gpt2.block_count"] == golden.L
    assert fields["gpt2.attention.head_count"] == golden.H
    assert fields["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    assert fields["gpt2.vocab_size"] == golden.V
    assert fields["general.file_type"] == 0


def test_the_names_are_those_of_the_package(tmp_path):
    convert(FILES / "huggingface", tmp_path / "model.gguf")
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, golden.L)
    names = {mapping.get_name(name, (".weight", ".bias")) for name in golden.huggingface_tensors()}
    assert set(read(tmp_path / "model.gguf")[1]) == names


def test_bfloat16_is_for_matrices(tmp_path):
    convert(FILES / "llmc_v3.bin", tmp_path / "model.gguf", dtype="bf16")
    fields, tensors, kinds = read(tmp_path / "model.gguf")
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16
    for name, value in read(FILES / "gpt2.gguf")[1].items():
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)
    matrices = {"token_embd", "attn_qkv", "attn_output", "ffn_up", "ffn_down"}
    for name, kind in kinds.items():
        is_matrix = name.endswith(".weight") and name.split(".")[-2] in matrices
        assert kind == ("BF16" if is_matrix else "F32"), name


def test_odd_sizes_are_aligned(tmp_path):
    config = tl.presets["gpt2"].model.replace(vocab_size=7, block_size=3, n_layer=2, n_head=1, n_embd=5)
    model = tl.GPT(config, 0, "reference", dtype="float32")
    model.save(tmp_path / "run")
    for dtype in ("f32", "bf16"):
        convert(tmp_path / "run", tmp_path / "model.gguf", dtype=dtype, overwrite=True)
        _, tensors, _ = read(tmp_path / "model.gguf")
        for l in range(2):
            np.testing.assert_array_equal(tensors[f"blk.{l}.ffn_norm.weight"], model.params["norm2_w"][l])
            expected = model.params["w2"][l].T
            np.testing.assert_allclose(tensors[f"blk.{l}.ffn_down.weight"], expected, rtol=2**-8)


# ---------------------------------------------------------------- tokenizers

TOKENS = [*"abcdefg", "Ġ", "ab", "Ġab", golden.EOT]
MERGES = ["a b", "Ġ ab"]


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def added(i, content):
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    return {"id": i, "content": content, "special": True} | flags


def tokenizer_json(folder, **changes):
    """The same tokenizer as one file."""
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    content = {
        "added_tokens": [added(10, golden.EOT)],
        "pre_tokenizer": BYTE_LEVEL,
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(TOKENS[:10])}, "merges": MERGES},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content | changes))


@pytest.fixture
def hf(tmp_path):
    return shutil.copytree(FILES / "huggingface", tmp_path / "hf")


@pytest.mark.parametrize("kind", ["two files", "one file", "merges as pairs"])
def test_the_tokenizer_goes_into_the_file(kind, hf):
    if kind == "one file":
        tokenizer_json(hf)
    elif kind == "merges as pairs":
        vocab = {t: i for i, t in enumerate(TOKENS[:10])}
        tokenizer_json(
            hf, model={"type": "BPE", "vocab": vocab, "merges": [merge.split() for merge in MERGES]}
        )
    told = []
    convert(hf, hf.parent / "model.gguf", say=told.append)
    assert not any("No BPE" in line for line in told)
    fields, _, _ = read(hf.parent / "model.gguf")
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.tokens"] == TOKENS
    assert fields["tokenizer.ggml.merges"] == MERGES
    assert fields["tokenizer.ggml.token_type"] == [1] * 10 + [3]
    assert fields["tokenizer.ggml.bos_token_id"] == fields["tokenizer.ggml.eos_token_id"] == 10


def test_every_token_is_of_its_kind(hf):
    """Normal, control, user-defined; two that look like fillers; and rows beyond the tokenizer."""
    vocab = {t: i for i, t in enumerate([*TOKENS[:9], "[PAD10]"])}
    plain = added(8, "ab") | {"special": False}
    tokenizer_json(
        hf, model={"type": "BPE", "vocab": vocab, "merges": MERGES[:1]}, added_tokens=[plain, added(0, "a")]
    )
    convert(hf, hf.parent / "model.gguf")
    fields, _, _ = read(hf.parent / "model.gguf")
    assert fields["tokenizer.ggml.tokens"] == [*vocab, "[PAD10]_"]
    normal, control, user_defined, unused = 1, 3, 4, 5
    expected = [control, *[normal] * 7, user_defined, normal, unused]
    assert fields["tokenizer.ggml.token_type"] == expected
    assert fields["tokenizer.ggml.eos_token_id"] == 10  # none is named: a row that is never generated


def test_several_ends(hf):
    about = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(about | {"bos_token_id": 3, "eos_token_id": [10, 4, 5, 6]}))
    told = []
    convert(hf, hf.parent / "model.gguf", say=told.append)
    fields, _, _ = read(hf.parent / "model.gguf")
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "eot", "eom")]
    assert [fields[key] for key in keys] == [3, 10, 4, 5]
    assert "A GGUF file has room for 3 tokens that end a text: 6 is left out." in told
    (hf / "vocab.json").unlink()
    told = []
    convert(hf, hf.parent / "other.gguf", say=told.append)
    assert any("no place for bos_token_id 3, eos_token_id [10, 4, 5, 6]" in line for line in told)


DIGITS = {"type": "Digits", "individual_digits": True}
LLAMA3 = (  # as in the tokenizer.json of Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
LLAMA3S = {"type": "Sequence", "pretokenizers": [SPLIT, BYTE_LEVEL | {"use_regex": False}]}


@pytest.mark.parametrize(
    ("change", "pre"),
    [
        ({"pre_tokenizer": BYTE_LEVEL}, "gpt-2"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]}}, "smollm"),
        # llama.cpp's "llama-bpe" takes words of the vocabulary whole, "smaug-bpe" merges them.
        ({"pre_tokenizer": LLAMA3S, "ignore_merges": True}, "llama-bpe"),
        ({"pre_tokenizer": LLAMA3S}, "smaug-bpe"),
        ({"normalizer": {"type": "NFC"}}, "gpt-2"),
        ({"normalizer": {"type": "Lowercase"}}, "it changes texts first (Lowercase)"),
        ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, "puts a space before a text"),
        ({"pre_tokenizer": BYTE_LEVEL | {"use_regex": False}}, "splits texts into words by a rule"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, BYTE_LEVEL]}},
            "splits texts into words by a rule that llama.cpp does not have",
        ),
        ({"ignore_merges": True}, "splits texts into words by a rule that llama.cpp does not have"),
        ({"unk_token": "a"}, "a token for unknown bytes, 'a'"),
        ({"added_tokens": [added(10, golden.EOT) | {"lstrip": True}]}, "has lstrip, which GGUF cannot say"),
        ({"added_tokens": [added(10, golden.EOT) | {"single_word": True}]}, "has single_word, which GGUF"),
        ({"added_tokens": [added(10, "ab")]}, ""),
    ],
)  # fmt: skip
def test_the_pretokenizer_is_llama_cpps_or_refused(change, pre, hf):
    model = {"type": "BPE", "vocab": {t: i for i, t in enumerate(TOKENS[:10])}, "merges": MERGES}
    model |= {name: change.pop(name) for name in ("ignore_merges", "unk_token") if name in change}
    tokenizer_json(hf, model=model, **change)
    target = hf.parent / "model.gguf"
    if " " not in pre and pre:
        told = []
        convert(hf, target, say=told.append)
        assert read(target)[0]["tokenizer.ggml.pre"] == pre
        assert any("NFC" in line for line in told) == ("normalizer" in change)
        return
    with pytest.raises(tl.TapelessError) as error:
        convert(hf, target)
    assert pre in str(error.value)
    assert not target.exists()


@pytest.mark.parametrize("normalized", ["ab", "bcc"])
def test_tokens_that_overlap(normalized, hf):
    """llama.cpp looks for the longest first. The library looks for those that are not normalized first: the
    other way round where that is the shorter one."""
    tokenizers = pytest.importorskip("tokenizers")
    tokens = [added(8, "ab"), added(9, "bcc"), added(10, golden.EOT)]
    for token in tokens:
        if token["content"] == normalized:
            token |= {"special": False, "normalized": True}
    vocab = {t: i for i, t in enumerate(TOKENS[:8])}
    tokenizer_json(hf, model={"type": "BPE", "vocab": vocab, "merges": []}, added_tokens=tokens)
    library = tokenizers.Tokenizer.from_file(str(hf / "tokenizer.json"))
    found = library.encode("abcc").tokens
    if normalized == "ab":
        assert found == ["a", "bcc"]
        convert(hf, hf.parent / "model.gguf")
        return
    assert found == ["ab", "c", "c"]
    with pytest.raises(tl.TapelessError, match=r"its tokens '(ab|bcc)' and '(ab|bcc)' can overlap in a text"):
        convert(hf, hf.parent / "model.gguf")


def test_ids_without_a_token_are_filled(hf):
    vocab = json.loads((hf / "vocab.json").read_text())
    del vocab["g"]
    (hf / "vocab.json").write_text(json.dumps(vocab))
    convert(hf, hf.parent / "model.gguf")
    fields, _, _ = read(hf.parent / "model.gguf")
    assert fields["tokenizer.ggml.tokens"] == [*TOKENS[:6], "[PAD6]", *TOKENS[7:]]
    assert fields["tokenizer.ggml.token_type"] == [1] * 6 + [5, 1, 1, 1, 3]


def test_without_a_tokenizer(tmp_path):
    golden.tokenizer(tmp_path)  # of something else that lies in the same folder
    tokenizer_json(tmp_path, added_tokens=[added(10, golden.EOT), added(11, "<more>")])
    shutil.copy(FILES / "llmc_v3.bin", tmp_path)
    told = succeeds("convert", "llmc_v3.bin", "model.gguf", cwd=tmp_path).stderr
    assert "No BPE tokenizer comes with llmc_v3.bin: llama.cpp will know tokens only by number." in told
    fields, _, _ = read(tmp_path / "model.gguf")
    assert fields["tokenizer.ggml.model"] == "none"
    assert "tokenizer.ggml.tokens" not in fields


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"model": {"type": "Unigram", "vocab": []}},
            "describes a Unigram tokenizer; expected byte-level BPE",
        ),
        ({"added_tokens": [added(10, golden.EOT), added(11, "x")]}, "has 12 tokens but the model of"),
        ({"model": {"type": "BPE"}}, "tokenizer.json cannot be used"),
        ({"added_tokens": 3}, "tokenizer.json cannot be used"),
    ],
)
def test_tokenizers_that_do_not_fit(content, words, hf):
    tokenizer_json(hf, **content)
    with pytest.raises(tl.TapelessError) as error:
        convert(hf, hf.parent / "model.gguf")
    assert words in str(error.value)
    assert not (hf.parent / "model.gguf").exists()


def test_no_package(tmp_path):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/gguf.py").write_text("raise ImportError")
    package = tl.__file__.removesuffix("/tapeless/__init__.py")
    env = environment(PYTHONPATH=f"{tmp_path / 'fake'}:{package}")
    error = refused("convert", FILES / "llmc_v3.bin", "model.gguf", cwd=tmp_path, env=env)
    assert "pip install gguf tokenizers (the extra 'gguf')" in error
