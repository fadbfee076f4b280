"""Blocks of a text must not show in its tokens: random tokenizers and texts against the library itself."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shard_files import read_shard
from tapeless.data import seams, texts
from tapeless.data import tokenize as tokenize_module
from tapeless.data.bpe import BPETokenizer, library, train_bpe
from tapeless.data.seams import cuts, obstacle
from tapeless.data.table import TableTokenizer
from tapeless.data.texts import Cuts, Texts
from tapeless.data.tokenizers import CharTokenizer
from tapeless.data.workers import encode

tokenizers = pytest.importorskip("tokenizers", reason="needs the tokenizers library")

GPT2, *OTHERS = sorted(seams.WORDS, key=len)
BYTES = {"type": "ByteLevel", "trim_offsets": True}


def byte_level(add_prefix_space=False, use_regex=True):
    return BYTES | {"add_prefix_space": add_prefix_space, "use_regex": use_regex}


def split(pattern, behavior="Isolated", invert=False):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


def sequence(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)}


SAFE = [
    byte_level(),
    *(sequence(split(pattern), byte_level(use_regex=False)) for pattern in (GPT2, *OTHERS)),
    sequence(split(OTHERS[0]), byte_level()),
    sequence({"type": "Digits", "individual_digits": True}, byte_level()),
    sequence({"type": "Digits", "individual_digits": False}, split(OTHERS[0]), byte_level(use_regex=False)),
]
UNSAFE = [
    byte_level(add_prefix_space=True),
    byte_level(use_regex=False),
    sequence({"type": "Punctuation", "behavior": "Isolated"}, byte_level()),
    sequence(split(r"\n\S"), byte_level(use_regex=False)),
    sequence(split(GPT2, "MergedWithNext"), byte_level(use_regex=False)),
    sequence(split(r"[a-z]+\n"), byte_level()),
]
NORMAL = [None, *({"type": name} for name in ("NFC", "NFD", "Lowercase"))]
OTHER_NORMAL = [
    {"type": "Strip", "strip_left": True, "strip_right": True},
    {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": "_"}]},
]
ADDED = ["<|endoftext|>", "cat", "a", "é", "the\n", "a b", "b ", "\ne"]


@st.composite
def descriptions(draw):
    """A tokenizer.json without its model."""
    added = []
    for content in draw(st.lists(st.sampled_from(ADDED), max_size=2, unique=True)):
        flags = {
            name: draw(st.integers(0, 3)) == 0 for name in ("single_word", "lstrip", "rstrip", "normalized")
        }
        added.append({"content": content, "special": False} | flags)
    return (
        draw(st.sampled_from([*NORMAL, *NORMAL, *OTHER_NORMAL])),
        draw(st.sampled_from([*SAFE, *UNSAFE])),
        added,
    )


def made(normalizer, pre_tokenizer, added, text):
    """Merges as far as the pre-tokenizer allows, learned of the text itself."""
    lib = library()
    about = json.loads(lib.Tokenizer(lib.models.BPE()).to_str())
    about |= {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "decoder": byte_level()}
    made = lib.Tokenizer.from_str(json.dumps(about))
    trainer = lib.trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=lib.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([text * 3], trainer)
    for token in added:
        flags = {name: value for name, value in token.items() if name != "content"}
        made.add_tokens([lib.AddedToken(token["content"], **flags)])
    return made


LETTERS = ["a", "b", "e", "É", "I", "é", "e\u0301", "\u0301", "愛", "½", "1", "22", ".", "'s", "_", "ﬁ", "Σ"]
WORDS = st.sampled_from(
    [*LETTERS, "the", "cat", " ", " ", " ", "\n", "\n", "  ", "\n\n", "\t", "\u00a0", "\x1c"]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("seams")


class Silent:
    def begin(self, what, total): ...
    def advance(self, n): ...
    def finish(self): ...


@given(descriptions(), st.lists(WORDS, min_size=5, max_size=60).map("".join), st.integers(1, 12))
@example((None, byte_level(), []), "a b\nc d", 1)
@example((None, byte_level(add_prefix_space=True), []), "the\ncat\nthe\n", 4)
def test_blocks_do_not_show_in_the_tokens(folder, description, text, block):
    text = text if text.strip() else "a b"
    theirs = made(*description, text)
    (folder / "t.json").write_text(theirs.to_str(), "utf-8")
    (folder / "t.txt").write_text(text, "utf-8", newline="\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "BLOCK", block)
        tokenize_module.tokenize(
            [folder / "t.txt"], folder, tokenizer=str(folder / "t.json"), val_fraction=0, overwrite=True,
            processes=1, progress=Silent(),
        )  # fmt: skip
    _, ids = read_shard(folder / "t_train.bin")
    bos = theirs.token_to_id("<|endoftext|>")
    assert ids == [bos] * (bos is not None) + theirs.encode(text, add_special_tokens=False).ids


@given(st.sampled_from(NORMAL), st.sampled_from(SAFE), st.lists(WORDS, max_size=60).map("".join))
def test_each_seam_is_one(normalizer, pre_tokenizer, text):
    """Where tokenizers are known, the text may be cut at any seam, whatever the blocks."""
    theirs = made(normalizer, pre_tokenizer, [], text or "a")
    assert not obstacle(json.loads(theirs.to_str()))
    whole = theirs.encode(text).ids
    for seam in texts.SEAM.finditer(text):
        at = seam.start()
        assert theirs.encode(text[:at]).ids + theirs.encode(text[at:]).ids == whole


def test_what_forbids_to_cut():
    def reason(normalizer=None, pre_tokenizer=SAFE[0], **token):
        token = {"content": "x", "lstrip": False, "rstrip": False} | token
        return obstacle({"added_tokens": [token], "normalizer": normalizer, "pre_tokenizer": pre_tokenizer})

    assert reason() == ""
    assert [reason(pre_tokenizer=each) for each in UNSAFE] == [
        "add_prefix_space", "words without ends", "Punctuation", "Split", "Split", "Split",
    ]  # fmt: skip
    assert [reason(each) for each in OTHER_NORMAL] == ["Strip", "Prepend"]
    assert reason(content="a b") == "the added token 'a b'"
    assert reason(rstrip=True) == reason(lstrip=True) == "the added token 'x'"
    assert cuts(CharTokenizer("ab", None)) == (Cuts.ANYWHERE, "")
    assert cuts(CharTokenizer.letters()) == (Cuts.SEAMS, "")
    assert cuts(train_bpe(["a b"], 257)) == (Cuts.SEAMS, "")
    assert cuts(TableTokenizer((b"a",), None)) == (Cuts.SEAMS, "")


def test_a_text_without_seams_is_not_cut(tmp_path):
    """Three blocks of letters, where a cut would divide merges."""
    (tmp_path / "t.txt").write_text("ab" * texts.BLOCK + "\n" + "c d" * texts.BLOCK)
    sizes = [len(block.text) for block in Texts([tmp_path / "t.txt"], 0, False).blocks()]
    assert sizes[0] == 2 * texts.BLOCK + 1 or sizes[0] > 2 * texts.BLOCK
    assert len(sizes) > 2  # but cut where it can be
    anywhere = [len(b.text) for b in Texts([tmp_path / "t.txt"], 0, False).blocks(cuts=Cuts.ANYWHERE)]
    assert max(anywhere) <= 2 * texts.BLOCK
    [whole] = Texts([tmp_path / "t.txt"], 0, False).blocks(cuts=Cuts.NOWHERE)
    assert whole.text == (tmp_path / "t.txt").read_text()


def test_a_whole_text_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_module, "WORTHWHILE", 10)
    theirs = made(None, UNSAFE[0], [], "the cat")
    (tmp_path / "t.json").write_text(theirs.to_str())
    (tmp_path / "t.txt").write_text("the cat sat")
    with pytest.warns(
        UserWarning, match=re.escape("(add_prefix_space) the tokens of a text depend on all of it")
    ):
        tokenize_module.tokenize(
            [tmp_path / "t.txt"], tmp_path, tokenizer=str(tmp_path / "t.json"), progress=Silent()
        )
    tokenizer = BPETokenizer(json.loads(theirs.to_str()))
    assert encode(tokenizer, "the", True, False).tolist() == theirs.encode("the").ids
