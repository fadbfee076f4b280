"""Models with more rows than their tokenizer has tokens: padded vocabularies, as of nanoGPT's 50,304 rows."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import golden
import oracle
import tapeless as tl
from commands import refused, succeeds
from helpers import random_model
from shard_files import write_shard
from tapeless.convert import convert
from tapeless.data.tokenizers import CharTokenizer, is_padded
from tapeless.errors import ConfigError, DataError

GPT2 = tl.presets["gpt2"].model
ROWS, TOKENS = 16, 11
LETTERS = CharTokenizer("abcdefghij", bos=10)


@pytest.fixture
def padded(tmp_path):
    """A Hugging Face folder of 16 rows, of which the last five would be drawn first; its tokenizer has 11."""
    config = GPT2.replace(vocab_size=ROWS, block_size=8, n_layer=1, n_head=2, n_embd=8)
    model = random_model(config, dtype="float32")
    model.params["normf_b"][...] = 1
    model.params["wte"][TOKENS:] = 2  # so the last hidden state, which has a mean of 1, gives 16 and more
    model.save(tmp_path / "bare")
    convert(tmp_path / "bare", tmp_path / "hf")
    golden.tokenizer(tmp_path / "hf")
    return tmp_path


def test_it_loads_wherever_it_lies(padded):
    convert(padded / "hf", padded / "run", "run")
    convert(padded / "run", padded / "back")
    convert(padded / "hf", padded / "model.bin")
    golden.tokenizer(padded)  # beside the file
    for name in ("hf", "run", "back", "model.bin"):
        model = tl.load(padded / name, "reference")
        assert (model.config.vocab, model.tokenizer.vocab_size) == (ROWS, TOKENS)


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_no_row_beyond_the_tokenizer_is_drawn(engine, padded):
    model = tl.load(padded / "hf", engine)
    model.eos_token_id = []
    assert int(np.argmax(model.logits([10, 0])[-1])) >= TOKENS  # or the test would prove nothing
    for options in ({"temperature": 0}, {"temperature": 1}, {"top_k": 3}, {"top_p": 0.5}):
        texts = model.generate("ab", n=20, max_tokens=6, **options)
        assert all(len(text) > 2 for text in texts)
        assert "".join(texts).replace(golden.EOT, "").strip("abcdefg ") == ""
    tokens = {"eos_token_id": [], "temperature": 0, "n": 1, "max_tokens": 1}
    best = int(np.argmax(model.logits([10, 0, 1])[-1][:TOKENS]))
    assert model.generate([0, 1], **tokens) == [model.tokenizer.decode([0, 1, best])]
    model.tokenizer = None  # then all rows are tokens
    assert max(map(int, model.generate([10, 0], **tokens)[0].split())) >= TOKENS


def test_evaluating_keeps_the_whole_softmax(padded):
    model = tl.load(padded / "hf", "reference")
    (padded / "text.txt").write_text("ab ab cab")
    tokens = np.array(model.tokenizer.encode("ab ab cab"))
    expected = oracle.loss(dict(model.params), model.config, tokens[:-1], tokens[1:], [0, len(tokens) - 1])
    assert tl.evaluate(model, padded / "text.txt").loss == pytest.approx(float(expected), rel=1e-9)
    result = tl.evaluate(model, np.array([0, 15, 1]))  # rows that stand for no text
    assert (result.tokens, result.bytes) == (2, 1)


def test_more_tokens_than_rows_are_refused(padded):
    vocab = json.loads((padded / "hf/vocab.json").read_text())
    (padded / "hf/vocab.json").write_text(json.dumps(vocab | {f"x{i}": 11 + i for i in range(6)}))
    error = refused("sample", "hf", cwd=padded)
    assert "hf/vocab.json has 17 tokens but the model of hf has 16" in error
    with pytest.raises(ConfigError, match="the tokenizer has 11 tokens, but the model only 10"):
        tl.GPT(GPT2.replace(vocab_size=10, n_embd=12, n_layer=1), None, "reference", tokenizer=LETTERS)
    convert(padded / "bare", padded / "run", "run")
    (padded / "run/tokenizer.json").write_text(json.dumps(CharTokenizer("abcdefghijklmnop", 16).to_dict()))
    assert "tokenizer.json has 17 tokens but the model of run" in refused("sample", "run", cwd=padded)
    (padded / "run/tokenizer.json").unlink()
    tl.GPT(GPT2.replace(vocab_size=ROWS, n_embd=12, n_layer=1), 0, "reference", tokenizer=LETTERS).save(
        padded / "run"
    )
    assert tl.load(padded / "run", "reference").tokenizer == LETTERS
    (padded / "run/tokenizer.json").write_text(json.dumps(CharTokenizer("abcdefghi", 9).to_dict()))
    assert "tokenizer.json has 10 tokens but" in refused("sample", "run", cwd=padded)  # one is gone


def test_training_goes_on_in_all_rows(padded):
    """From a text and from shards, with ids beyond the tokenizer's as well; resumed; and with as many rows as
    one likes."""
    (padded / "rows").mkdir()
    write_shard(padded / "rows/t_train.bin", [0, 1, ROWS - 1] * 10)
    (padded / "text.txt").write_text("ab cab " * 20)
    options = {"engine": "reference", "samples": 2, "progress": False, "set": {"window": 4}}
    for data, out in (("text.txt", "a"), ("data", "b"), ("rows", "c")):
        if data == "data":
            succeeds("tokenize", "text.txt", "--tokenizer", "hf", "--out", "data", cwd=padded)
        trained = tl.train(padded / data, pretrained=padded / "hf", steps=1, out=padded / out, **options)
        assert trained.model.config.vocab == ROWS
        assert trained.model.tokenizer.vocab_size == TOKENS
        again = tl.train(resume=True, out=padded / out, steps=2, **options)
        assert again.model.params["wte"].shape == (ROWS, 8)
    fresh = tl.train("names", steps=1, engine="reference", samples=3, progress=False, set={"vocab_size": 64})
    assert fresh.model.params["wte"].shape[0] == 64
    assert fresh.model.tokenizer.vocab_size == 27
    with pytest.raises(ConfigError, match="vocab_size is 20, but the tokenizer of names has 27 tokens"):
        tl.train("names", steps=1, engine="reference", progress=False, set={"vocab_size": 20})


def test_shards_beside_another_tokenizer_are_refused(padded):
    """The model's own decides; of a model without one, only the number of rows is known."""
    (padded / "data").mkdir()
    write_shard(padded / "data/t_train.bin", [0, 1, 2, 3] * 10)
    golden.tokenizer(padded / "data")
    (padded / "hf2").mkdir()
    shutil.copytree(padded / "hf", padded / "hf2", dirs_exist_ok=True)
    (padded / "hf2/merges.txt").write_text("#version: 0.2\na b\n")
    vocab = json.loads((padded / "hf2/vocab.json").read_text())
    vocab["bb"] = vocab.pop("Ġab")
    (padded / "hf2/vocab.json").write_text(json.dumps(vocab))
    options = {"engine": "reference", "steps": 1, "samples": 0, "progress": False, "set": {"window": 4}}
    with pytest.raises(ConfigError, match="is another tokenizer"):
        tl.train(padded / "data", pretrained=padded / "hf2", **options)
    tl.train(padded / "data", pretrained=padded / "bare", **options)
    vocab = {chr(0x61 + i): i for i in range(17)}
    (padded / "data/vocab.json").write_text(json.dumps(vocab))
    (padded / "data/merges.txt").write_text("")
    with pytest.raises(ConfigError, match="is another tokenizer"):
        tl.train(padded / "data", pretrained=padded / "bare", **options)


@given(st.integers(1, 200_000), st.sampled_from([1, 8, 64, 128]))
def test_what_is_padded(tokens, multiple):
    rows = -(-tokens // multiple) * multiple
    assert is_padded(rows, tokens)
    assert not is_padded(rows, rows + 1)
    assert not is_padded(rows + 129 + rows // 50, tokens)


def test_known_ones():
    assert is_padded(50304, 50257)
    assert is_padded(151936, 151669)  # Qwen 2.5
    assert not is_padded(50257, 262)
    assert not is_padded(51000, 50257)


def test_a_prompt_may_have_any_row(padded):
    model = tl.load(padded / "hf", "reference")
    assert model.generate([0, 15], n=1, max_tokens=1)[0].startswith("a")
    with pytest.raises(DataError, match="tokens from 0 to 15"):
        model.generate([0, 16])
