"""Evaluation: every token scored once, with the context it should have; from Python and as a command."""

from __future__ import annotations

import json
import math
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tapeless as tl
from commands import refused, succeeds
from helpers import random_model
from shard_files import write_shard
from tapeless.data.documents import Corpus
from tapeless.data.shards import Shards
from tapeless.data.tokenizers import CharTokenizer, read_tokenizer
from tapeless.errors import ConfigError, DataError, NumericsError
from tapeless.evaluate import Evaluation, Sliding

CONFIG = tl.GPTConfig(vocab_size=27, block_size=8, n_embd=8, n_head=2)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def model():
    """Far from uniform, on letters with BOS = 26."""
    made = random_model(CONFIG)
    made.tokenizer = CharTokenizer(LETTERS, bos=26)
    return made


def nats(model, tokens, first):
    """−log p of token `first` and those after it, given all of `tokens` before each; in float64."""
    logits = model.logits(tokens[:-1])[first - 1 :]
    high = logits.max(axis=1, keepdims=True)
    logsum = high[:, 0] + np.log(np.exp(logits - high).sum(axis=1))
    return logsum - logits[np.arange(len(logits)), tokens[first:]]


def by_hand(model, tokens, size, stride):
    """Hugging Face's sliding window: total nats of all tokens but the first."""
    total, scored, done = 0.0, 0, 0
    for begin in range(0, len(tokens) - 1, stride):
        end = min(begin + size, len(tokens) - 1)
        window = tokens[begin : end + 1]
        losses = nats(model, window, len(window) - (end - done))
        total, scored, done = total + losses.sum(), scored + len(losses), end
        if end == len(tokens) - 1:
            break
    assert scored == len(tokens) - 1
    return total


# ---------------------------------------------------------------- what is scored


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    size=st.integers(1, 12),
    stride=st.integers(1, 12),
    batch=st.integers(1, 5),
)
def test_every_token_is_scored_once(lengths, size, stride, batch):
    stride = min(stride, size)
    bounds = np.append(0, np.cumsum(lengths))
    corpus = Corpus(np.zeros(bounds[-1] + 1, np.int32), np.stack([bounds[:-1], lengths], axis=1), 0, "")
    windows = Sliding(corpus, size, stride)
    times = np.zeros(bounds[-1], int)
    for first in range(0, len(windows), batch):
        spans, fresh = windows.take(np.arange(first, min(first + batch, len(windows))))
        for (begin, length), new in zip(spans, fresh, strict=True):
            document = np.searchsorted(bounds, begin, side="right") - 1
            assert bounds[document] <= begin < begin + length <= bounds[document + 1]
            assert 1 <= new <= length <= size
            # What is scored sees a whole window, as far as the document reaches back.
            assert begin + length - new == bounds[document] or length - new >= size - stride
            times[begin + length - new : begin + length] += 1
    assert (times == 1).all()
    assert windows.tokens == len(times)


@pytest.mark.parametrize("stride", [1, 3, 8])
@pytest.mark.parametrize("count", [2, 8, 9, 10, 47])
def test_a_text_by_hand(model, count, stride):
    tokens = np.random.default_rng(count).integers(0, 27, count)
    result = tl.evaluate(model, tokens, stride, batch_size=3)
    assert result.tokens == count - 1
    assert result.loss == pytest.approx(by_hand(model, tokens, 8, stride) / (count - 1), rel=1e-12)
    assert result.perplexity == pytest.approx(math.exp(result.loss))


def test_more_context_is_what_a_stride_gives(model):
    """The first token beyond a block knows of one token before it, or with a stride of 1 of a block."""
    tokens = np.random.default_rng(0).integers(0, 27, 10)
    block = nats(model, tokens[:9], 1).sum()
    alone, seen = nats(model, tokens[8:], 1)[0], nats(model, tokens[1:], 8)[0]
    assert abs(alone - seen) > 1e-3
    assert tl.evaluate(model, tokens).loss * 9 == pytest.approx(block + alone)
    assert tl.evaluate(model, tokens, 1).loss * 9 == pytest.approx(block + seen)


def test_shorter_windows(model):
    tokens = np.random.default_rng(1).integers(0, 27, 30)
    result = tl.evaluate(model, tokens, block_size=5)
    assert result.loss == pytest.approx(by_hand(model, tokens, 5, 5) / 29, rel=1e-12)


def test_documents_are_scored_from_their_beginning(model, tmp_path):
    """From BOS before each to BOS after it, also where one is longer than the block."""
    names = ["emma", "a", "maximilianalexander", "zoe"]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    total, count = 0.0, 0
    for name in names:
        tokens = np.array([26, *model.tokenizer.encode(name), 26])
        total, count = total + by_hand(model, tokens, 8, 8), count + len(name) + 1
    result = tl.evaluate(model, tmp_path / "names.txt", batch_size=2)
    assert (result.tokens, result.bytes, result.characters) == (count, count, count)
    assert result.loss == pytest.approx(total / count, rel=1e-12)


def test_shards_are_texts_of_their_own(model, tmp_path):
    rng = np.random.default_rng(2)
    first, second = rng.integers(0, 27, 20), rng.integers(0, 27, 11)
    write_shard(tmp_path / "t_val_000001.bin", first.tolist())
    write_shard(tmp_path / "t_val_000002.bin", second.tolist())
    write_shard(tmp_path / "t_train.bin", [0] * 50)
    right = by_hand(model, first, 8, 4) + by_hand(model, second, 8, 4)
    assert tl.evaluate(model, tmp_path, 4).loss == pytest.approx(right / 29, rel=1e-12)
    # A file is that file, also where another one lies beside it to validate on.
    alone = tl.evaluate(model, tmp_path / "t_train.bin")
    assert alone.loss == pytest.approx(by_hand(model, np.zeros(50, int), 8, 8) / 49, rel=1e-12)


def test_memory_does_not_grow_with_the_data():
    """Windows are found by their number: of 10¹⁰ tokens as quickly as of ten."""
    shards = Shards.__new__(Shards)
    shards.pieces = np.array([0, 10**10, 10**10 + 5, 2 * 10**10])
    windows = Sliding(shards, 1024, 512)
    spans, fresh = windows.take(np.array([0, 1, len(windows) - 1]))
    assert spans[:2].tolist() == [[0, 1024], [512, 1024]]
    assert fresh[:2].tolist() == [1024, 512]
    assert spans[2].sum() == 2 * 10**10 - 1


# ---------------------------------------------------------------- bits


def test_bits_are_of_the_text(tmp_path):
    text = "aéb愛a😀\n" * 9
    tokenizer = CharTokenizer.from_text([text])
    model = tl.GPT(CONFIG.replace(vocab_size=tokenizer.vocab_size), None, "reference", tokenizer=tokenizer)
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    result = tl.evaluate(model, tmp_path / "t.txt")
    # All weights are zero: every token costs log₂ V bits. The first one is given.
    bits = math.log2(tokenizer.vocab_size) * (len(text) - 1)
    assert result.bits_per_character == pytest.approx(bits / (len(text) - 1))
    assert result.bits_per_byte == pytest.approx(bits / (len(text.encode()) - 1))


def test_bytes_of_bpe_tokens(tmp_path):
    """Whatever the tokens, together they are the text's bytes and characters, but for the first one's."""
    pytest.importorskip("tokenizers")
    text = "Who’s there? 愛 — nay, answer me: stand, and unfold yourself.\n" * 20
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    succeeds("tokenize", "t.txt", "--train-bpe", "300", "--val-fraction", "0", "--out", "d", cwd=tmp_path)
    tokenizer = read_tokenizer(tmp_path / "d")
    config = CONFIG.replace(vocab_size=tokenizer.vocab_size)
    model = tl.GPT(config, None, "reference", tokenizer=tokenizer)
    ids = tokenizer.encode(text)
    assert len(ids) < len(text) / 1.2
    first = tokenizer.token_bytes()[ids[0]]
    result = tl.evaluate(model, tmp_path / "t.txt")
    assert result.tokens == len(ids) - 1
    assert (result.bytes, result.characters) == (
        len(text.encode()) - len(first),
        len(text) - len(first.decode()),
    )
    # In the shard a token stands before the text, that is none of it.
    shard = tl.evaluate(model, tmp_path / "d")
    assert (shard.tokens, shard.bytes, shard.characters) == (len(ids), len(text.encode()), len(text))


def test_bits_do_not_depend_on_how_a_text_is_stored(tmp_path):
    """Four names of 4, 6, 3 and 3 letters, one of them of two bytes, each with a line end: 20 characters,
    21 bytes. As lines of a file, in Python, and in shards but for the last line end, which is not in them."""
    names = ["emma", "olivia", "ava", "zoë"]
    text = "\n".join(names) + "\n"
    tokenizer = CharTokenizer.from_documents(names)
    model = random_model(CONFIG.replace(vocab_size=tokenizer.vocab_size))
    model.tokenizer = tokenizer
    results = {}
    for name, content in {
        "lf": text.encode(),
        "crlf": text.replace("\n", "\r\n").encode(),
        "bom": b"\xef\xbb\xbf" + text.encode(),
        "open": text.rstrip().encode(),
        "blank": b"\n" + text.replace("\n", "\n\n").encode(),
    }.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
        results[name] = tl.evaluate(model, tmp_path / f"{name}.txt")
    results["Python"] = tl.evaluate(model, names)
    assert len(set(results.values())) == 1
    whole = results["lf"]
    assert (whole.tokens, whole.bytes, whole.characters) == (20, 21, 20)
    options = ("--tokenizer", "chars", "--lines", "--val-fraction", "0", "--out", "shards")
    succeeds("tokenize", "crlf.txt", *options, cwd=tmp_path)
    shard = tl.evaluate(model, tmp_path / "shards")
    assert (shard.tokens, shard.bytes, shard.characters) == (19, 20, 19)
    tokens = tl.evaluate(model, tokenizer.encode("emma"))
    assert (tokens.tokens, tokens.bytes) == (3, 3)


def test_a_text_held_out_has_the_bytes_of_the_text(tmp_path):
    """Whole texts have no line end where documents have one: what ends it is no text."""
    pytest.importorskip("tokenizers")
    text = "To be, or not to be: that is the question.\n" * 40
    (tmp_path / "t.txt").write_text(text)
    tokenizer = tl.Tokenizer.train(text, 300)
    given = {"val_fraction": 0.25, "order": "sequence", "block_size": 8, "n_embd": 8}
    tl.train(
        tmp_path / "t.txt", tokenizer=tokenizer, set=given, steps=2, samples=0, engine="reference",
        out=tmp_path / "run", progress=False,
    )  # fmt: skip
    shown = json.loads(succeeds("eval", "run", "--json", "--engine", "reference", cwd=tmp_path).stdout)
    held = text[int(len(text) * 0.75) :]
    bits = shown["loss"] * shown["tokens"] / math.log(2)
    assert shown["tokens"] == len(tokenizer.encode(held)) + 1
    assert shown["bits_per_byte"] == pytest.approx(bits / len(held))


def test_positions_that_were_never_trained_are_noted(tmp_path):
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 20
    (tmp_path / "t.txt").write_text(text)
    options = ("--engine", "reference", "--samples", "0", "--set", "n_layer=1", "--set", "n_embd=8")
    succeeds(
        "train", "t.txt", "--preset", "shakespeare-char", "--steps", "2", "--block-size", "32", *options,
        "--out", "whole", cwd=tmp_path,
    )  # fmt: skip
    fine = ("--pretrained", "whole", "--block-size", "8", "--steps", "1", "--engine", "reference")
    succeeds("train", "t.txt", *fine, "--samples", "0", "--out", "fine", cwd=tmp_path)
    for run, positions in (("whole", 32), ("fine", 8)):
        assert json.loads((tmp_path / run / "config.json").read_text())["trained_positions"] == positions
        assert tl.load(tmp_path / run).trained_positions == positions
    note = "note: windows of 32 tokens reach beyond the 8 positions that the run trained"
    told = succeeds("eval", "fine", "t.txt", "--engine", "reference", cwd=tmp_path)
    assert note in told.stderr
    assert "--block-size 8 stays within them" in told.stderr
    assert "window              32" in told.stdout
    for arguments in (["fine", "t.txt", "--block-size", "8"], ["whole", "t.txt"]):
        assert "note" not in succeeds("eval", *arguments, "--engine", "reference", cwd=tmp_path).stderr
    # Trained further on longer windows, it knows more of them; on shorter ones no less.
    again = ("--resume", "--out", "fine", "--engine", "reference", "--samples", "0")
    for step, window, positions in ((2, 16, 16), (3, 4, 16)):
        succeeds("train", *again, "--steps", step, "--block-size", window, cwd=tmp_path)
        assert tl.load(tmp_path / "fine").trained_positions == positions
    config = json.loads((tmp_path / "fine/config.json").read_text()) | {"trained_positions": 33}
    (tmp_path / "old").mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / "old" / name).write_bytes((tmp_path / "fine" / name).read_bytes())
    (tmp_path / "old/config.json").write_text(json.dumps(config))
    assert "old/config.json is damaged: trained_positions is 33" in refused(
        "eval", "old", "t.txt", cwd=tmp_path
    )


def test_without_a_tokenizer_there_are_no_bytes():
    result = tl.evaluate(tl.GPT(CONFIG, 0, "reference"), [1, 2, 3])
    assert (result.tokens, result.bits_per_byte, result.bits_per_character) == (2, None, None)


def test_a_hopeless_loss_has_a_perplexity():
    assert Evaluation(1e4, 3).perplexity == math.inf


# ---------------------------------------------------------------- the engines, and mistakes


def test_the_cpu_engine_evaluates_the_same(model):
    tokens = np.random.default_rng(4).integers(0, 27, 101)
    compiled = tl.GPT(CONFIG, None, "cpu")
    compiled.engine.params[:] = model.engine.params
    for stride in (None, 3):
        expected = tl.evaluate(model, tokens, stride).loss
        assert tl.evaluate(compiled, tokens, stride, batch_size=4).loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([1, 2], 9), ConfigError, "stride must be a whole number from 1 to 8"),
        (([1, 2], 0), ConfigError, "stride"),
        (([1],), DataError, "two tokens"),
        (([],), DataError, "data is empty"),
        (([1, 27],), DataError, "27 at position 1; the vocabulary has 27 tokens"),
        (([1, 2**32],), DataError, "4294967296 at position 1"),
        (([[1, 2]],), DataError, "a list or array of token ids, not list"),
        (([0.5, 1.0],), DataError, "a list or array of token ids"),
        ((b"names",), DataError, "not bytes"),
        (("",), DataError, "data is empty"),
        (("nowhere.txt",), DataError, "nowhere.txt"),
    ],
)
def test_what_cannot_be_evaluated(arguments, error, words, model):
    with pytest.raises(error, match=words):
        tl.evaluate(model, *arguments)


def test_more_that_cannot_be_evaluated(model, tmp_path):
    (tmp_path / "t.txt").write_text("Emma\n")
    with pytest.raises(DataError, match=r"t\.txt: .*'E'"):
        tl.evaluate(model, tmp_path / "t.txt")
    with pytest.raises(DataError, match="no tokenizer to read"):
        tl.evaluate(tl.GPT(CONFIG, 0, "reference"), tmp_path / "t.txt")
    with pytest.raises(ConfigError, match="batch_size"):
        tl.evaluate(model, [1, 2], batch_size=0)
    with pytest.raises(ConfigError, match="block_size"):
        tl.evaluate(model, [1, 2], block_size=9)
    spoilt = tl.GPT(CONFIG, 0, "reference")
    spoilt.engine.params[:] = 1e300
    with np.errstate(all="ignore"), pytest.raises(NumericsError, match="not finite, or too large"):
        tl.evaluate(spoilt, [1, 2])


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a part of the names held out."""
    folder = tmp_path_factory.mktemp("evaluated")
    succeeds(
        "train", "--engine", "reference", "--steps", "20", "--samples", "0", "--set", "val_fraction=0.01",
        "--out", "run", cwd=folder,
    )  # fmt: skip
    return folder / "run"


def figures(*arguments, cwd):
    out = succeeds("eval", *arguments, "--engine", "reference", cwd=cwd).stdout
    return dict(line.rsplit(maxsplit=1) for line in out.splitlines())


def test_the_command_prints_figures(run):
    (run.parent / "few.txt").write_text("emma\nolivia\n")
    shown = figures("run", "few.txt", cwd=run.parent)
    measured = ["tokens", "window", "stride"]
    assert list(shown) == ["loss", "perplexity", "bits per byte", "bits per character", *measured]
    assert (shown["window"], shown["stride"]) == ("16", "16")
    expected = tl.evaluate(tl.load(run, "reference"), run.parent / "few.txt")
    assert shown["tokens"] == "12"
    assert shown["loss"] == f"{expected.loss:.4f}"
    assert shown["perplexity"] == f"{expected.perplexity:,.4f}"
    assert float(shown["bits per byte"]) == pytest.approx(expected.loss / math.log(2), abs=1e-4)
    as_json = succeeds(
        "eval", "run", "few.txt", "--json", "--stride", "4", "--engine", "reference", cwd=run.parent
    ).stdout
    assert json.loads(as_json)["loss"] == pytest.approx(expected.loss)  # no name is longer than the block


def test_without_data_it_is_what_was_held_out(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val_loss" in row] == [20]
    shown = figures("run", cwd=run.parent)
    assert shown["loss"] == f"{rows[-1]['val_loss']:.4f}"
    assert 51 < int(shown["tokens"]) < 52 * 16


def test_lines_or_one_text(run):
    (run.parent / "few.txt").write_text("emma\nolivia\n")
    error = refused("eval", "run", "few.txt", "--text", "--engine", "reference", cwd=run.parent)
    assert r"'\n'" in error
    (run.parent / "one.txt").write_text("emmaolivia")
    shown = figures("run", "one.txt", "--text", cwd=run.parent)
    assert shown["tokens"] == "9"  # the first is given, and no BOS ends the text
    assert figures("run", "one.txt", "--lines", cwd=run.parent)["tokens"] == "11"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["nowhere"]),
        (["run", "nowhere.txt"], ["no data file", "nowhere.txt"]),
        (["run", "names", "--stride", "0"], ["stride", "from 1 to 16"]),
        (["run", "names", "--stride", "17"], ["stride", "from 1 to 16"]),
        (["run", "names", "--batch-size", "0"], ["batch_size"]),
        (["run", "names", "--engine", "gpu"], ["gpu"]),
        (["run", "."], ["it is a folder"]),
        ([], ["MODEL", "tapeless eval --help"]),
    ],
)
def test_mistakes_in_evaluating(arguments, words, run):
    error = refused("eval", *arguments, cwd=run.parent)
    assert all(word in error for word in words), error


def test_a_run_without_validation_needs_data(run):
    succeeds("train", "--engine", "reference", "--steps", "1", "--samples", "0", "--out", "o", cwd=run.parent)
    assert "o has no validation data: pass DATA" in refused("eval", "o", cwd=run.parent)
    tl.GPT(CONFIG, 0).save(run.parent / "bare")
    assert "does not describe a training run" in refused("eval", "bare", cwd=run.parent)


@pytest.mark.skipif(os.name == "nt", reason="sparse files")
def test_a_token_beyond_the_vocabulary(run):
    write_shard(run.parent / "bad.bin", [1, 2, 99, 3])
    error = refused("eval", "run", "bad.bin", "--engine", "reference", cwd=run.parent)
    assert "token 99 at position 2" in error
