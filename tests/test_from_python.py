"""Data, tokenizers and models put together in Python: texts, tokens, `tl.Tokenizer`; and what is no path."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import tapeless as tl
from commands import contents, refused, succeeds
from shard_files import write_shard
from tapeless.errors import ConfigError, DataError, Notice, RunError

NAMES = ["emma", "olivia", "ava", "isabella", "sophia", "mia", "zoë", "lily", "amelia", "ella", "eva"]
REFERENCE = {"engine": "reference", "steps": 6, "samples": 1, "progress": False}
WINDOWS = {"order": "sequence", "block_size": 8}


# ---------------------------------------------------------------- data


def test_a_list_of_texts_is_a_file_of_them(tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    of_file = tl.train(tmp_path / "names.txt", set={"val_fraction": 0.2}, **REFERENCE)
    of_list = tl.train(NAMES, set={"val_fraction": 0.2}, **REFERENCE)
    assert of_list.losses.tolist() == of_file.losses.tolist()
    assert of_list.val_losses == of_file.val_losses
    assert of_list.samples == of_file.samples
    assert tl.train(tuple(NAMES), **REFERENCE).losses.tolist() != of_file.losses.tolist()  # nothing held out


def test_a_text_is_a_file_of_it(tmp_path):
    text = "\n".join(NAMES) * 9
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    given = {"preset": "shakespeare-char", "set": {"n_layer": 1, "n_embd": 8, "block_size": 8}} | REFERENCE
    of_file, of_list = tl.train(tmp_path / "t.txt", **given), tl.train([text], **given)
    assert of_list.losses.tolist() == of_file.losses.tolist()
    assert of_list.val_losses == of_file.val_losses
    # Several have a token between them.
    given["set"] |= {"val_fraction": 0, "eval_every": 0}
    assert tl.train([text, "ab"], **given).model.tokenizer.bos == len(set(text) | {"b"})


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda ids: np.array(ids, "u2")])
def test_tokens_are_a_shard_of_them(kind, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 20, 200).tolist()
    shard = write_shard(tmp_path / "t.bin", tokens)
    given = {"set": {"vocab_size": 20} | WINDOWS} | REFERENCE
    of_tokens = tl.train(kind(tokens), **given)
    assert of_tokens.losses.tolist() == tl.train(shard, **given).losses.tolist()
    assert of_tokens.model.tokenizer is None
    held = tl.train(kind(tokens), val=kind(tokens[:50]), **given)
    assert held.val_losses[6] == pytest.approx(tl.evaluate(held.model, tokens[:50], block_size=8).loss)


def test_the_end_of_tokens_is_held_out():
    tokens = [*range(20)] * 10
    run = tl.train(tokens, set={"vocab_size": 20, "val_fraction": 0.25} | WINDOWS, **REFERENCE)
    assert run.val_losses[6] == pytest.approx(tl.evaluate(run.model, tokens[150:]).loss)


def test_such_a_run_goes_on_with_the_same_data(tmp_path):
    constant = {"schedule": "constant"}  # in the number of steps, too
    given = {"val": NAMES[:4], "out": tmp_path / "run", "set": constant} | REFERENCE
    whole = tl.train(NAMES, **given | {"out": None, "steps": 9})
    tl.train(NAMES, **given)
    about = json.loads((tmp_path / "run/config.json").read_text())
    assert (about["data"], about["val"]) == ("data from Python", "data from Python")
    again = {"resume": True, "steps": 9} | {name: given[name] for name in ("out", "samples", "progress")}
    before = contents(tmp_path / "run")
    for data, val in ((None, NAMES[:4]), (NAMES, None)):
        with pytest.raises(RunError, match="data given in Python, which a run does not keep: give it"):
            tl.train(data, val=val, **again)
    with pytest.raises(RunError, match=r"the list of 10 texts is not the data that .*run was trained on"):
        tl.train(NAMES[1:], val=NAMES[:4], **again)
    with pytest.raises(RunError, match="the list of 3 texts is not the data"):
        tl.train(NAMES, val=NAMES[:3], **again)
    assert contents(tmp_path / "run") == before
    line = refused("train", "--resume", "--out", "run", "--steps", 9, cwd=tmp_path)
    assert "run was trained on data given in Python" in line
    assert "data given in Python" in refused("eval", "run", cwd=tmp_path)
    run = tl.train(NAMES, val=NAMES[:4], **again)
    assert run.losses.tolist() == whole.losses[6:].tolist()
    assert np.array_equal(run.model.engine.params, whole.model.engine.params)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "data is empty"),
        (np.array([], int), "data is empty"),
        ("", "data is empty"),
        (["", "  "], "has no text in it"),
        (
            ["a", 1],
            "must be a path, a built-in set, a list of texts, or a list or array of token ids, not list",
        ),
        ([[1, 2], [3]], "not list"),
        ([0.5], "not list"),
        ([True, False], "not list"),
        (np.zeros((2, 2), int), "not ndarray"),
        (b"names", "not bytes"),
        ({"a": 1}, "not dict"),
        ({"a", "b"}, "not set"),
        (5, "not int"),
        ("a\0b", "data is not a path"),
        ([1, 20, 3], "the array of 3 tokens has 20 at position 1; the vocabulary has 20 tokens"),
        ([1, -1], "has -1 at position 1"),
        ([1, 2**32 + 1], "has 4294967297 at position 1"),
    ],
)
def test_what_is_no_data(data, words):
    with pytest.raises(DataError, match=words):
        tl.train(data, set={"vocab_size": 20, "order": "sequence", "block_size": 2}, **REFERENCE)


def test_tokens_need_a_vocabulary():
    with pytest.raises(ConfigError, match=r"the array of 40 tokens has no tokenizer.*vocab_size=50257"):
        tl.train([1, 2] * 20, **REFERENCE)


def test_texts_to_evaluate_on(tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(NAMES), encoding="utf-8")
    model = tl.train(NAMES, **REFERENCE).model
    of_file, of_list = tl.evaluate(model, tmp_path / "names.txt"), tl.evaluate(model, NAMES)
    assert of_list == of_file
    assert of_list.bytes == sum(len(name.encode()) + 1 for name in NAMES)
    # Without documents each text is one of its own, whose first token nothing predicts.
    each = [tl.evaluate(model, [name], lines=False) for name in NAMES]
    together = tl.evaluate(model, NAMES, lines=False)
    assert together.tokens == sum(one.tokens for one in each) == sum(len(name) - 1 for name in NAMES)
    assert together.loss == pytest.approx(sum(one.loss * one.tokens for one in each) / together.tokens)


# ---------------------------------------------------------------- tokenizers


def test_characters():
    documents = tl.Tokenizer.characters(["ab", "ba c"])
    assert (documents.vocab_size, documents.bos) == (5, 4)
    assert documents.encode("ab c") == [1, 2, 0, 3]
    assert documents.decode([1, 2, 4]) == "ab"
    text = tl.Tokenizer.characters("ab\n")
    assert (text.vocab_size, text.bos, text.start) == (3, None, 0)
    assert isinstance(text, tl.Tokenizer)
    with pytest.raises(DataError, match="a text or a list of texts"):
        tl.Tokenizer.characters([1])
    with pytest.raises(TypeError):
        tl.Tokenizer()


def test_a_trained_bpe_is_the_librarys(tmp_path):
    lib = pytest.importorskip("tokenizers", reason="needs the tokenizers library")
    tokenizer = tl.Tokenizer.train(["the cat sat on the mat"] * 5, 270)
    tokenizer.save(tmp_path / "t.json")
    theirs = lib.Tokenizer.from_file(str(tmp_path / "t.json"))
    assert theirs.get_vocab_size() == tokenizer.vocab_size
    assert tokenizer.encode("the mat\n") == theirs.encode("the mat\n").ids
    assert tokenizer.decode(tokenizer.encode("zoë")) == "zoë"
    assert repr(tokenizer) == f"BPETokenizer({tokenizer.vocab_size} tokens)"
    tokenizer.save(tmp_path)
    for place in (tmp_path, tmp_path / "t.json", str(tmp_path / "tokenizer.json")):
        assert tl.Tokenizer.load(place) == tokenizer
    assert {path.name for path in tmp_path.iterdir()} == {"t.json", "tokenizer.json"}
    with pytest.raises(ConfigError, match="vocab_size must be a whole number from 257"):
        tl.Tokenizer.train("abc", 256)


def test_what_cannot_be_loaded_or_saved(tmp_path):
    with pytest.raises(DataError, match="no tokenizer 'nowhere': give a file, a folder or gpt2"):
        tl.Tokenizer.load("nowhere")
    with pytest.raises(ConfigError, match="path is empty"):
        tl.Tokenizer.load("")
    with pytest.raises(RunError, match=r"cannot write .*nowhere"):
        tl.Tokenizer.characters("a").save(tmp_path / "nowhere/t.json")


def test_a_tokenizer_to_train_with(tmp_path):
    pytest.importorskip("tokenizers", reason="needs the tokenizers library")
    tokenizer = tl.Tokenizer.train(NAMES, 265)
    run = tl.train(NAMES, tokenizer=tokenizer, out=tmp_path / "run", **REFERENCE)
    assert run.model.config.vocab_size == tokenizer.vocab_size
    assert tl.load(tmp_path / "run").tokenizer == tokenizer
    tl.train(NAMES, out=tmp_path / "run", resume=True, steps=8, samples=1, progress=False)
    with pytest.raises(ConfigError, match="leave tokenizer out"):
        tl.train(NAMES, out=tmp_path / "run", resume=True, steps=9, tokenizer=tokenizer, progress=False)
    with pytest.raises(ConfigError, match="has its own tokenizer"):
        tl.train(NAMES, pretrained=tmp_path / "run", tokenizer=tokenizer, progress=False)
    # Tokens get their vocabulary of it, and texts come back.
    tokens = [token for name in NAMES for token in tokenizer.encode(name)] * 3
    run = tl.train(tokens, tokenizer=tokenizer, set=WINDOWS, **REFERENCE)
    assert run.model.config.vocab_size == tokenizer.vocab_size
    assert not run.samples[0].replace(" ", "").isdecimal()


def test_a_model_takes_a_tokenizer(tmp_path):
    model = tl.GPT(tl.GPTConfig(vocab_size=5), 0, "reference")
    assert model.tokenizer is None
    model.tokenizer = tl.Tokenizer.characters(["abc", "d"])
    assert set(model.generate(n=1, seed=1)[0]) <= set("abcd")
    model.save(tmp_path)
    assert tl.load(tmp_path).tokenizer == model.tokenizer
    with pytest.raises(ConfigError, match="the tokenizer has 9 tokens, but the model only 5"):
        model.tokenizer = tl.Tokenizer.characters("abcdefghi")
    with pytest.raises(ConfigError, match=r"must be a tl\.Tokenizer or None, not str"):
        model.tokenizer = "gpt2"
    assert model.tokenizer.vocab_size == 5
    model.tokenizer = None
    assert model.generate([1], n=1, max_tokens=2)[0].startswith("1 ")


# ---------------------------------------------------------------- paths and names


@pytest.mark.parametrize("name", ["out", "pretrained"])
def test_an_empty_path_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"{name} is empty"):
        tl.train("names", **{name: ""}, **REFERENCE)
    with pytest.raises(DataError, match="val is empty"):
        tl.train("names", val="", **REFERENCE)
    with pytest.raises(ConfigError, match="no preset is called ''"):
        tl.train("names", preset="", **REFERENCE)
    model = tl.GPT(tl.GPTConfig(vocab_size=5), 0, "reference")
    for refuse in (lambda: tl.load(""), lambda: model.save("")):
        with pytest.raises(ConfigError, match="is empty"):
            refuse()
    with pytest.raises(ConfigError, match="out must be a path, not 5"):
        tl.train("names", out=5, **REFERENCE)
    assert not list(tmp_path.iterdir())


def test_what_lies_here_goes_before_what_is_built_in(tmp_path, monkeypatch):
    (tmp_path / "names").write_text("\n".join(NAMES), encoding="utf-8")
    told = succeeds(
        "train", "names", "--engine", "reference", "--steps", 2, "--out", "o", cwd=tmp_path
    ).stderr
    assert "note: names is the file here, not the built-in set" in told
    assert "11 documents" in told
    assert json.loads((tmp_path / "o/config.json").read_text())["data"] == str(tmp_path / "names")
    # What was trained on the built-in names goes on with them.
    (tmp_path / "names").rename(tmp_path / "other")
    succeeds("train", "names", "--engine", "reference", "--steps", 2, "--out", "b", cwd=tmp_path)
    (tmp_path / "other").rename(tmp_path / "names")
    told = succeeds("train", "--resume", "--steps", 3, "--out", "b", cwd=tmp_path).stderr
    assert "5,163 documents" in told
    assert "5,163 documents" in succeeds("train", "--engine", "reference", "--steps", 1, cwd=tmp_path).stderr
    # So tokens in a folder of that name are what is trained on.
    (tmp_path / "names").unlink()
    succeeds("tokenize", "other", "--tokenizer", "chars", "--lines", "--out", "names", cwd=_text(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.warns(Notice, match="names is the folder here"):
        assert tl.train("names", set={"block_size": 4}, **REFERENCE).model.config.vocab_size == 13


def _text(folder: Path) -> Path:
    """The names without ë: 12 letters."""
    (folder / "other").write_text("\n".join(name for name in NAMES if name.isascii()))
    return folder
