"""Documents and tokenizers: any text in, the same text out."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tapeless as tl
from commands import SMALL, succeeds
from tapeless.data.documents import Corpus, read_documents
from tapeless.data.orders import Drawn, Shuffled
from tapeless.data.texts import Texts
from tapeless.data.tokenizers import CharTokenizer, make_tokenizer, tokenizer_from_dict
from tapeless.errors import DataError
from tapeless.rng import PythonRandom

NAMES = ["emma", "olivia", "ava"]
QUICK = {"engine": "reference", "steps": 3, "samples": 2, "progress": False}


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize(
    "content",
    [
        b"emma\nolivia\nava",
        b"emma\r\nolivia\r\nava\r\n",
        b"emma\rolivia\rava\r",
        b"\xef\xbb\xbfemma\nolivia\nava\n",
        b"\n\n  emma \n\t\nolivia\n ava\t\n\n",
    ],
    ids=["plain", "windows", "old mac", "byte-order mark", "blanks"],
)
def test_lines_become_documents(content, tmp_path):
    (tmp_path / "names.txt").write_bytes(content)
    assert read_documents(tmp_path / "names.txt") == NAMES
    assert read_documents(str(tmp_path / "names.txt")) == NAMES


def test_the_built_in_names():
    names = read_documents("names")
    assert len(names) > 3000
    assert len(set(names)) == len(names)
    assert set("".join(names)) == set("abcdefghijklmnopqrstuvwxyz")


@pytest.mark.parametrize("source", [None, 5, ["emma"], b"names", "a\0b"])
def test_what_is_no_path(source):
    with pytest.raises(DataError):
        read_documents(source)


def test_unicode_trains_and_samples(tmp_path):
    text = "Zoë\nŁucja\nΑθηνά\nМария\n愛子\n👩‍🚀 astro\nשרה\né\n"
    (tmp_path / "names.txt").write_text(text, encoding="utf-8")
    succeeds("train", "names.txt", *SMALL, "--out", "run", cwd=tmp_path)
    chars = json.loads((tmp_path / "run/tokenizer.json").read_text(encoding="utf-8"))["chars"]
    assert chars == "".join(sorted(set(text) - {"\n"}))
    out = succeeds("sample", "run", "--prompt", "愛", "-n", "4", "--engine", "reference", cwd=tmp_path).stdout
    assert len(out.splitlines()) == 4
    assert all(line.startswith("愛") for line in out.splitlines())


@pytest.mark.parametrize("text", ["emma", "a", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "a\na\na"])
@pytest.mark.parametrize("preset", ["microgpt", "esp32gpt"])
def test_the_smallest_data(text, preset, tmp_path):
    (tmp_path / "data.txt").write_text(text)
    if len(text) > 16 and preset == "esp32gpt":  # it leaves out what is too long
        with pytest.raises(DataError, match="every document is longer than the block"):
            tl.train(tmp_path / "data.txt", preset, **QUICK)
        return
    run = tl.train(tmp_path / "data.txt", preset, **QUICK)
    assert np.isfinite(run.losses).all()
    assert set("".join(run.samples)) <= set(
        "a" if preset == "microgpt" and "a" * 3 in text else run.model.tokenizer.chars
    )


# ---------------------------------------------------------------- streams and spans


def test_a_corpus_is_one_stream():
    tokenizer = CharTokenizer.from_documents(["ab", "ccc"])
    corpus = Corpus.from_documents(["ab", "ccc"], tokenizer, block_size=3)
    assert corpus.stream.tolist() == [3, 0, 1, 3, 2, 2, 2, 3]
    assert corpus.spans.tolist() == [[0, 3], [3, 3]]
    assert corpus.n_cut == 1
    longer = Corpus.from_documents(["ab", "ccc"], tokenizer, block_size=4)
    assert longer.spans.tolist() == [[0, 3], [3, 4]]
    assert longer.n_cut == 0
    assert longer.digest == corpus.digest


def test_orders_of_documents():
    documents = ["abc", "de", "f", "abcdef"]
    tokenizer = CharTokenizer.from_documents(documents)
    corpus = Corpus.from_documents(documents, tokenizer, block_size=4)
    shuffled = Shuffled(corpus.spans, PythonRandom(1), 3)
    spans = shuffled.take(0, 4).reshape(-1, 2)
    assert sorted(spans[:4].tolist()) == sorted(corpus.spans.tolist())
    assert np.array_equal(spans[:4], spans[4:8])  # round and round
    assert np.array_equal(shuffled.take(2, 2), shuffled.take(0, 4)[2:])
    drawn = Drawn(corpus, corpus.spans, PythonRandom(1), 3, 4).take(0, 30)
    assert drawn.shape == (30, 3, 2)
    assert corpus.spans[3].tolist() not in drawn.reshape(-1, 2).tolist()  # too long for the block


# ---------------------------------------------------------------- tokenizers

lines = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(st.lists(lines, min_size=1), st.data())
def test_text_survives_the_tokenizer(documents, data):
    tokenizer = CharTokenizer.from_documents(documents)
    assert tokenizer.chars == "".join(sorted(set("".join(documents))))
    assert tokenizer.bos == tokenizer.vocab_size - 1
    document = data.draw(st.sampled_from(documents))
    ids = tokenizer.encode(document)
    assert all(0 <= i < tokenizer.bos for i in ids)
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.bos]) == document
    assert tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict()))) == tokenizer


def test_letters():
    tokenizer = make_tokenizer("letters", [])
    assert (tokenizer.bos, tokenizer.vocab_size) == (0, 27)
    assert tokenizer.encode("Az-é b") == [1, 26, 2]
    assert tokenizer.decode([0, 1, 26]) == "az"


def test_an_unknown_character_is_named():
    tokenizer = CharTokenizer.from_documents(["abc"])
    with pytest.raises(DataError, match=r"does not know the character 'x'\. It knows: abc"):
        tokenizer.encode("abx")


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        {},
        {"type": "bpe"},
        {"type": "char", "chars": "aa", "bos": 0, "fold": False},
        {"type": "char", "chars": "ab", "bos": 3, "fold": False},
        {"type": "char", "chars": "ab", "bos": -1, "fold": False},
        {"type": "char", "chars": 5, "bos": 0, "fold": False},
        {"type": "char", "chars": "ab", "bos": "0", "fold": False},
    ],
)
def test_what_is_no_tokenizer(content):
    with pytest.raises(DataError):
        tokenizer_from_dict(content)


def test_an_unknown_kind_of_tokenizer():
    with pytest.raises(DataError, match="Did you mean 'letters'"):
        make_tokenizer("leters", [])


def test_utf16_is_named(tmp_path):
    (tmp_path / "t.txt").write_text("emma\n", encoding="utf-16")
    with pytest.raises(DataError, match=r"t\.txt is not UTF-8 text \(it is UTF-16: save it as UTF-8\)"):
        read_documents(tmp_path / "t.txt")
    with pytest.raises(DataError, match="it is UTF-16: save it as UTF-8"):
        list(Texts([tmp_path / "t.txt"], 0, False).blocks())
