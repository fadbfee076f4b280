"""`tapeless tokenize`: what it writes, whatever the machine; what it refuses; nothing half-written."""

from __future__ import annotations

import os
import re
import resource
import select
import shlex
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pauses
from commands import contents, on_a_terminal, refused, signals, succeeds
from shard_files import read_shard
from tapeless.data import texts as texts_module
from tapeless.data.bpe import train_bpe
from tapeless.data.documents import Corpus, read_documents
from tapeless.data.files import find_tokens
from tapeless.data.texts import Texts
from tapeless.data.tokenizers import CharTokenizer, find_tokenizer, read_tokenizer
from test_bpe import gpt2, gpt2_files

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n" * 20


@pytest.fixture
def text(tmp_path):
    (tmp_path / "play.txt").write_text(TEXT)
    return tmp_path


def tokens(path):
    return read_shard(path)[1]


def train_and_val(folder, name="play"):
    return tokens(folder / f"{name}_train.bin"), tokens(folder / f"{name}_val.bin")


# ---------------------------------------------------------------- what it writes


def test_gpt2s_tokens(text):
    told = succeeds("tokenize", "play.txt", "--tokenizer", gpt2_files(), "--out", "data", cwd=text)
    cut = int(0.9 * len(TEXT))
    train, val = train_and_val(text / "data")
    assert train == [50256, *gpt2().encode(TEXT[:cut])]
    assert val == [50256, *gpt2().encode(TEXT[cut:])]
    assert read_shard(text / "data/play_train.bin")[0] == "uint16"
    assert read_tokenizer(text / "data") == gpt2()
    assert {p.name for p in (text / "data").iterdir()} == {"play_train.bin", "play_val.bin", "tokenizer.json"}
    assert told.stdout.splitlines() == [
        f"data/play_train.bin: {len(train):,} tokens to train on",
        f"data/play_val.bin: {len(val):,} tokens to validate on",
    ]
    for words in (f"{len(TEXT):,} bytes of text", "vocabulary 50,257", "Train with: tapeless train data"):
        assert words in told.stderr
    found = find_tokens(text / "data")
    assert (found.name, len(found.train), len(found.val)) == ("play", 1, 1)
    assert find_tokenizer(text / "data") == text / "data/tokenizer.json"


def test_characters_are_those_of_training_on_the_text(text):
    succeeds("tokenize", "play.txt", "--tokenizer", "chars", "--out", ".", "--val-fraction", 0, cwd=text)
    tokenizer = CharTokenizer.from_text([TEXT])
    assert read_tokenizer(text) == tokenizer
    assert tokens(text / "play_train.bin") == Corpus.from_documents([TEXT], tokenizer, 8).stream.tolist()
    assert not (text / "play_val.bin").exists()


def test_lines_are_documents(tmp_path):
    content = "emma\r\n\n  olivia \nava\n\t\nzoë\nmia"
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbf" + content.encode())
    options = ("--tokenizer", "chars", "--lines", "--out", "all", "--val-fraction")
    succeeds("tokenize", "names.txt", *options, 0, cwd=tmp_path)
    names = read_documents(tmp_path / "names.txt")
    tokenizer = CharTokenizer.from_documents(names)
    stream = Corpus.from_documents(names, tokenizer, 8).stream.tolist()
    assert read_tokenizer(tmp_path / "all") == tokenizer
    assert tokens(tmp_path / "all/names_train.bin") == stream[:-1]  # BOS before each, not after the last
    # A line that the cut falls into is one to train on.
    size = len(content.encode()) + 3
    fraction = (size - (content.encode().index(b"ava") + 3 + 1)) / size
    succeeds("tokenize", "names.txt", *options, fraction, "--overwrite", cwd=tmp_path)
    cut = stream.index(tokenizer.bos, stream.index(tokenizer.bos, stream.index(tokenizer.bos, 1) + 1) + 1)
    assert train_and_val(tmp_path / "all", "names") == (stream[:cut], stream[cut:-1])


def test_several_texts_are_documents(text):
    (text / "b.txt").write_text("To be, or not to be\n")
    (text / "empty.txt").write_text("")
    bpe = text / "bpe.json"
    files = ("play.txt", "empty.txt", "b.txt")
    succeeds("tokenize", *files, "--train-bpe", 300, "--out", "set/mine", cwd=text)
    tokenizer = read_tokenizer(text / "set/mine")
    assert tokenizer.vocab_size == 300
    assert tokenizer == train_bpe([TEXT[: int(0.9 * (len(TEXT) + 20))]], 300)  # not of what is held out
    train, val = train_and_val(text / "set/mine", "mine")
    cut = int(0.9 * (len(TEXT) + 20))
    assert train == [299, *tokenizer.encode(TEXT[:cut])]
    assert val == [299, *tokenizer.encode(TEXT[cut:]), 299, *tokenizer.encode("To be, or not to be\n")]
    (text / "set/mine/tokenizer.json").rename(bpe)
    succeeds("tokenize", *files, "--tokenizer", bpe, "--out", "again/mine", cwd=text)
    assert contents(text / "again/mine") == contents(text / "set/mine") | {
        "tokenizer.json": (text / "again/mine/tokenizer.json").read_bytes()
    }


def test_a_text_with_few_tokens(tmp_path):
    (tmp_path / "few.txt").write_text("ab ab\n" * 9)
    told = succeeds("tokenize", "few.txt", "--train-bpe", 1000, "--out", ".", cwd=tmp_path).stderr
    assert "The text has no more than 259 tokens to give." in told
    assert read_tokenizer(tmp_path).vocab_size == 259


def test_a_bpe_of_a_long_text(tmp_path):
    """It is trained in a process of its own."""
    text = TEXT * 1300
    (tmp_path / "play.txt").write_text(text)
    succeeds("tokenize", "play.txt", "--train-bpe", 300, "--val-fraction", 0.5, "--out", ".", cwd=tmp_path)
    assert read_tokenizer(tmp_path) == train_bpe([text[: len(text) // 2]], 300)


def test_spelled_out_ends_are_separators(tmp_path):
    (tmp_path / "tales.txt").write_text("Once.\n<|endoftext|>\nTwice.\n")
    options = ("--tokenizer", gpt2_files(), "--val-fraction", 0, "--out", ".")
    succeeds("tokenize", "tales.txt", *options, cwd=tmp_path)
    assert tokens(tmp_path / "tales_train.bin") == [50256, 7454, 13, 198, 50256, 198, 5080, 501, 13, 198]


def test_a_large_vocabulary_takes_uint32(tmp_path):
    (tmp_path / "all.txt").write_text(
        "".join(map(chr, range(32, 0xD800))) + "".join(map(chr, range(0x10000, 0x15000)))
    )
    succeeds("tokenize", "all.txt", "--tokenizer", "chars", "--val-fraction", 0, "--out", ".", cwd=tmp_path)
    kind, ids = read_shard(tmp_path / "all_train.bin")
    assert kind == "uint32"
    assert sorted(ids) == list(range(read_tokenizer(tmp_path).vocab_size))


@pytest.mark.parametrize(
    ("count", "sizes"),
    [
        (10_000, [10_000]),
        (10_999, [10_999]),
        (11_000, [10_000, 1000]),
        (20_500, [10_000, 10_500]),
        (21_001, [10_000, 10_000, 1001]),
    ],
)
def test_shards_of_a_size(count, sizes, tmp_path):
    letters = np.random.default_rng(0).integers(97, 123, count).astype(np.uint8).tobytes().decode()
    (tmp_path / "x.txt").write_text(letters)
    options = ("--tokenizer", "chars", "--shard-tokens", 10_000, "--val-fraction", 0, "--out", "data")
    succeeds("tokenize", "x.txt", *options, cwd=tmp_path)
    shards = sorted((tmp_path / "data").glob("*.bin"))
    names = ["x_train.bin"] if len(sizes) == 1 else [f"x_train_{i + 1:06d}.bin" for i in range(len(sizes))]
    assert [p.name for p in shards] == names
    parts = [tokens(p) for p in shards]
    assert [len(p) for p in parts] == sizes
    assert "".join(chr(97 + t) for p in parts for t in p) == letters
    assert find_tokens(tmp_path / "data").train == shards


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A text of several blocks."""
    folder = tmp_path_factory.mktemp("large")
    words = np.array([*TEXT.split(), "Zoë", "愛子", "\n", "\n\n"])
    chosen = words[np.random.default_rng(0).integers(0, len(words), 160_000)]
    (folder / "large.txt").write_text(" ".join(chosen), encoding="utf-8")
    return folder


def test_the_number_of_processes_changes_nothing(large):
    options = ("large.txt", "--train-bpe", 400, "--shard-tokens", 50_000)
    for processes in (1, 2, 3):
        succeeds("tokenize", *options, "--processes", processes, "--out", f"by/{processes}", cwd=large)
    one = contents(large / "by/1")
    assert len(one) > 4
    assert contents(large / "by/2") == one
    assert contents(large / "by/3") == one
    # And the blocks do not show in it.
    tokenizer = read_tokenizer(large / "by/1")
    stream = [t for path in sorted((large / "by/1").glob("*_train_*.bin")) for t in tokens(path)]
    written = (large / "large.txt").read_bytes()
    cut = written[: int(0.9 * len(written))].decode(errors="ignore")
    assert stream == [tokenizer.bos, *tokenizer.encode(cut)]


def test_a_bar_on_a_terminal(large):
    told = on_a_terminal("tokenize", "large.txt", "--tokenizer", "chars", "--out", "bar", cwd=large)
    assert re.search(r"tokenizing .*\d/\d+\.\d [kM]B", told)


# ---------------------------------------------------------------- texts in blocks


def divided(contents, held_out, lines):
    """Every document and whether it is held out, by the definition, however the text is stored."""
    texts = [re.sub(rb"\r\n?", b"\n", content.removeprefix(b"\xef\xbb\xbf")) for content in contents]
    ends = [text + b"\n" if lines and text and not text.endswith(b"\n") else text for text in texts]
    cut = int((1 - held_out) * sum(map(len, ends)))
    for text, end in zip(texts, ends, strict=True):
        if lines:
            for line in re.finditer(rb"[^\n]+", text):
                written = line[0].decode()
                if document := written.strip():  # it begins where its first character is complete
                    yield line.start() + len(written[0].encode()) > cut, document
        else:
            inside = text[: max(0, cut)].decode(errors="ignore").encode()  # no part of a character
            for side, part in ((False, inside), (True, text[len(inside) :])):
                if part:
                    yield side, part.decode()
        cut -= len(end)


@given(
    st.lists(st.text(st.sampled_from("a b\n.é愛\t\r"), max_size=60), min_size=1, max_size=3).filter(any),
    st.sampled_from([0, 0.1, 0.3, 0.5, 0.99]),
    st.booleans(),
    st.booleans(),
)
def test_blocks_are_the_text(tmp_path_factory, parts, held_out, lines, marked):
    folder = tmp_path_factory.mktemp("texts")
    paths = [folder / f"{i}.txt" for i in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        path.write_bytes(b"\xef\xbb\xbf" * marked + part.encode())
    contents = [path.read_bytes() for path in paths]
    told: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts_module, "BLOCK", 7)
        source = Texts(paths, held_out, lines)
        blocks = list(source.blocks(told.append))
    assert sum(told) == source.stored == sum(map(len, contents))
    if lines:
        read = [(b.held_out, line.strip()) for b in blocks for line in b.text.split("\n") if line.strip()]
    else:
        read = []
        for block in blocks:
            if block.opens:
                read.append((block.held_out, block.text))
            else:
                assert block.held_out == read[-1][0]
                read[-1] = block.held_out, read[-1][1] + block.text
    assert read == list(divided(contents, held_out, lines))


def test_how_a_text_is_stored_changes_nothing(tmp_path):
    """By hand: 27 bytes of text, of which the first 13 are to train on, however the file has them."""
    text = "ab\ncd\n\nefg\nhij\nkl\nmno\npqrs\n"
    assert len(text) == 27
    stored = {
        "lf": text.encode(),
        "crlf": text.replace("\n", "\r\n").encode(),
        "cr": text.replace("\n", "\r").encode(),
        "bom": b"\xef\xbb\xbf" + text.encode(),
        "both": b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(),
    }
    for name, content in stored.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "t.txt").write_bytes(content)
        options = ("--tokenizer", "chars", "--val-fraction", 0.5, "--out", ".")
        told = succeeds("tokenize", "t.txt", *options, cwd=tmp_path / name).stderr
        assert "27 bytes of text" in told
        letters = read_tokenizer(tmp_path / name)
        train, val = train_and_val(tmp_path / name, "t")
        assert (letters.decode(train), letters.decode(val)) == (text[:13], text[13:])
    # The last line's end is no text where lines are documents.
    for name, content in stored.items():
        for end in (content, content.rstrip(b"\r\n")):
            (tmp_path / name / "t.txt").write_bytes(end)
            options = ("--tokenizer", "chars", "--lines", "--overwrite", "--val-fraction", 0.5, "--out", ".")
            succeeds("tokenize", "t.txt", *options, cwd=tmp_path / name)
            letters = read_tokenizer(tmp_path / name)
            train, val = train_and_val(tmp_path / name, "t")
            assert letters.decode(train) == "abcdefghij"
            assert letters.decode(val) == "klmnopqrs"


@given(st.text(st.sampled_from("a b\n.é愛\t")), st.integers(1, 5))
def test_pieces_are_the_text(text, length):
    parts = list(texts_module.pieces(text, length))
    assert "".join(parts) == text
    assert all(len(part) >= length for part in parts[:-1])
    ends = {seam.start() for seam in texts_module.SEAM.finditer(text)}
    assert {sum(map(len, parts[:i])) for i in range(1, len(parts))} <= ends


STREAMS = """
import resource, sys
from pathlib import Path
from tapeless.data.tokenize import tokenize

class Silent:
    def begin(self, what, total): ...
    def advance(self, n): ...
    def finish(self): ...

folder, peak = Path({folder!r}), lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tokenize([folder / "short.txt"], folder / "short", tokenizer="chars", progress=Silent(), processes=1)
before = peak()
tokenize([folder / "long.txt"], folder / "long", tokenizer="chars", progress=Silent(), processes=1)
print(peak() - before)
"""


def test_a_long_text_takes_no_memory(child, tmp_path):
    for name, times in (("short", 500), ("long", 10_000)):
        (tmp_path / f"{name}.txt").write_text(TEXT * times)
    assert (tmp_path / "long.txt").stat().st_size > 16e6
    assert int(child(STREAMS.format(folder=str(tmp_path)))) < 8000  # KiB


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.txt"], ["no text file 'nowhere.txt'"]),
        (["."], [". is a folder", "*.txt"]),
        (["empty.txt"], ["empty.txt holds no text"]),
        (["binary.txt"], ["binary.txt is not text", "null bytes"]),
        (["latin.txt"], ["latin.txt is not UTF-8 text (byte 300,001)"]),
        (["play.txt", "cut.txt"], ["cut.txt is not UTF-8 text (byte 4)"]),
        (["/dev/null"], ["/dev/null is no regular file"]),
        (["play.txt", "--tokenizer", "char"], ["no tokenizer 'char'", "gpt2 or chars"]),
        (["play.txt", "--tokenizer", "play.txt"], ["play.txt is no tokenizer"]),
        (["play.txt", "--tokenizer", "abc.json"], ["does not know the character 'F'", "abc"]),
        (["play.txt", "--tokenizer", "chars", "--train-bpe", "300"], ["either --tokenizer or --train-bpe"]),
        (["play.txt", "--tokenizer", ""], ["--tokenizer is empty"]),
        (["play.txt", "--train-bpe", "256"], ["train_bpe", "from 257 to"]),
        (["play.txt", "--val-fraction", "1"], ["val_fraction", "below 1"]),
        (["play.txt", "--val-fraction", "-0.1"], ["val_fraction", "at least 0"]),
        (["play.txt", "--val-fraction", "0.99999"], ["no text left to train on"]),
        (["play.txt", "--shard-tokens", "10"], ["shard_tokens", "from 1,000"]),
        (["play.txt", "--processes", "0"], ["processes", "from 1 to"]),
        (["play.txt", "--out", "play.txt"], ["play.txt is a file; expected a folder"]),
        (["play.txt", "--out", "play.txt/deep"], ["play.txt is a file; expected a folder"]),
        (["long.txt", "--lines"], ["long.txt has a line of more than 16,777,216 characters", "--lines"]),
    ],
)
def test_mistakes(arguments, words, text):
    (text / "empty.txt").write_bytes(b"")
    (text / "binary.txt").write_bytes(b"ab\0c")
    (text / "latin.txt").write_bytes(b"\xc3\xa9" * 150_000 + b"a\xe9b")
    (text / "cut.txt").write_bytes(b"abc\n\xc3")
    (text / "abc.json").write_text('{"type": "char", "chars": "abc", "bos": null, "fold": false}')
    if "long.txt" in arguments:
        (text / "long.txt").write_text("ab " * 6_000_000)
    before = contents(text)
    usual = [] if "--tokenizer" in arguments or "--train-bpe" in arguments else ["--tokenizer", "chars"]
    usual += [] if "--out" in arguments else ["--out", "new/data"]
    error = refused("tokenize", *arguments, *usual, cwd=text)
    for word in words:
        assert word in error
    assert contents(text) == before
    assert not (text / "new").exists()


def test_what_is_there_is_not_replaced_by_accident(text):
    options = ("--tokenizer", "chars", "--shard-tokens", 1000)
    succeeds("tokenize", "play.txt", *options, "--out", "data", cwd=text)
    before = contents(text / "data")
    assert len(before) == 4
    assert "--overwrite" in refused("tokenize", "play.txt", *options, "--out", "data", cwd=text)
    (text / "other.txt").write_text("something else")
    error = refused("tokenize", "other.txt", *options, "--out", "data", cwd=text)
    assert "data/tokenizer.json is another tokenizer" in error
    (text / "other.txt").write_text("".join(sorted(set(TEXT))))
    succeeds("tokenize", "other.txt", *options, "--out", "data", "--val-fraction", 0, cwd=text)
    assert contents(text / "data").items() >= before.items()
    # Replaced on request, and what there were more of before is gone.
    succeeds("tokenize", "play.txt", "--tokenizer", "chars", "--out", "data", "--overwrite", cwd=text)
    assert {p.name for p in (text / "data").glob("play*")} == {"play_train.bin", "play_val.bin"}


def test_a_mistake_beside_overwrite_costs_nothing(text):
    succeeds("tokenize", "play.txt", "--tokenizer", "chars", "--out", "data", cwd=text)
    before = contents(text / "data")
    (text / "play.txt").write_bytes(TEXT.encode() * 50 + b"\xff")
    refused("tokenize", "play.txt", "--train-bpe", 300, "--out", "data", "--overwrite", cwd=text)
    assert contents(text / "data") == before


def test_what_other_shards_need_stays(text):
    """--overwrite replaces a text's own shards, not the tokenizer that those of another text need."""
    (text / "other.txt").write_text("".join(sorted(set(TEXT))) * 30)
    for name in ("play.txt", "other.txt"):
        succeeds("tokenize", name, "--tokenizer", "chars", "--out", "data", cwd=text)
    before = contents(text / "data")
    again = ("tokenize", "play.txt", "--out", "data", "--overwrite")
    for options in (["--train-bpe", 300], ["--tokenizer", gpt2_files()]):
        error = refused(*again, *options, cwd=text)
        assert "data/tokenizer.json is another tokenizer, which data/other_train.bin needs" in error
        assert contents(text / "data") == before
    succeeds(*again, "--tokenizer", "chars", cwd=text)
    assert contents(text / "data") == before
    for path in (text / "data").glob("other*"):
        path.unlink()
    succeeds(*again, "--train-bpe", 300, cwd=text)


def test_it_says_how_to_train(text):
    """With this text's shards and no others, however many there are."""
    sizes = [
        word for name in ("n_layer=1", "n_head=2", "n_embd=8", "block_size=8") for word in ("--set", name)
    ]
    train = ("--preset", "gpt2", *sizes, "--steps", 1, "--batch-size", 1, "--samples", 0)
    (text / "other.txt").write_text(TEXT * 3)
    shutil.copy(text / "other.txt", text / "v1.2.txt")
    for name, options, hint in (
        ("play", ["--out", "dov"], "dov"),
        ("other", ["--out", "dov"], "dov/other"),
        ("v1.2", ["--out", "dov"], "dov/v1.2_train.bin"),
        ("other", ["--out", "."], "other_train.bin"),
        ("v1.2", ["--out", "dov", "--overwrite", "--shard-tokens", "2000"], "'dov/v1.2_train_*.bin'"),
    ):
        told = succeeds("tokenize", f"{name}.txt", "--tokenizer", "chars", *options, cwd=text)
        assert told.stderr.splitlines()[-1] == f"Train with: tapeless train {hint}"
        count = sum(int(n.replace(",", "")) for n in re.findall(r"([\d,]+) tokens to train on", told.stdout))
        told = succeeds("train", shlex.split(hint)[0], *train, "--engine", "reference", cwd=text)
        assert f"({count:,} tokens and " in told.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk(processes, large):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    before = contents(large)
    error = refused(
        "tokenize", "large.txt", "--tokenizer", "chars", "--processes", processes, "--out", "full",
        cwd=large, preexec_fn=limited,
    )  # fmt: skip
    assert "cannot write into full: File too large" in error
    assert contents(large) == before
    assert not (large / "full").exists()


# ---------------------------------------------------------------- interruptions


needs_pidfd = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="looks into /proc, waits by pidfd")


def write_long(folder):
    (folder / "long.txt").write_text(TEXT * 3000)  # some twenty blocks


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    write_long(folder)
    return folder


class Worker:
    """A process that the command has started."""

    def __init__(self, pid):
        self.pid, self._handle = pid, os.pidfd_open(pid)

    def has_ended(self):
        return bool(select.select([self._handle], [], [], 0)[0])

    def wait(self):
        select.select([self._handle], [], [])

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        self.wait()


def workers_of(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [Worker(int(c)) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]


@contextmanager
def tokenizing(folder):
    """The command, which stops when some of the text is tokenized, and its two workers."""
    arguments = ("long.txt", "--tokenizer", "chars", "--processes", "2", "--out", "data")
    point = "tapeless.data.shards:ShardWriter.write"
    with pauses.start("tokenize", *arguments, at=[point], cwd=folder) as process:
        process.reached("ShardWriter.write", 3)
        assert (folder / "data/.long.part/long_train_000001.bin").exists()
        workers = workers_of(process)
        assert len(workers) == 2
        yield process, workers


@contextmanager
def training_bpe(folder, point):
    """The command while a tokenizer is made, with its worker: it waits for the tokenizer (`_answer`), or the
    worker does nothing (`train_bpe`)."""
    arguments = ("long.txt", "--train-bpe", "1000", "--out", "data")
    with pauses.start("tokenize", *arguments, at=[f"tapeless.data.workers:{point}"], cwd=folder) as process:
        stop = process.reached(point)
        [worker] = workers_of(process)
        assert stop.pid == (worker if point == "train_bpe" else process).pid
        yield process, worker


def ends_interrupted(process, workers, folder):
    process.send_signal_to_all(signal.SIGINT)
    code, _, errors = process.result()
    assert (code, errors.splitlines()[-1]) == (130, "Interrupted.")
    assert "Traceback" not in errors
    assert {p.name for p in folder.iterdir()} == {"long.txt"}
    assert all(worker.has_ended() for worker in workers)


def ends_without_a_worker(process, worker, folder):
    worker.kill()
    code, _, errors = process.end()
    assert code == 2
    assert "error: a process that tokenizes has died" in errors
    assert "Traceback" not in errors
    assert {p.name for p in folder.iterdir()} == {"long.txt"}


@signals
@needs_pidfd
def test_ctrl_c(long):
    with tokenizing(long) as (process, workers):
        ends_interrupted(process, workers, long)


@signals
@needs_pidfd
@pytest.mark.parametrize("point", ["_answer", "train_bpe"])
def test_ctrl_c_while_a_bpe_is_trained(point, long):
    """Although the worker would never have been done."""
    with training_bpe(long, point) as (process, worker):
        ends_interrupted(process, [worker], long)


@signals
@needs_pidfd
def test_a_process_that_dies_while_a_bpe_is_trained(long):
    with training_bpe(long, "train_bpe") as (process, worker):
        ends_without_a_worker(process, worker, long)


@signals
@needs_pidfd
@pytest.mark.parametrize("change", ["shorter", "longer"])
def test_a_text_that_changes_meanwhile(change, tmp_path):
    write_long(tmp_path)
    size = (tmp_path / "long.txt").stat().st_size
    with tokenizing(tmp_path) as (process, _):
        os.truncate(tmp_path / "long.txt", size // 4 * 3 if change == "shorter" else size + 100)
        code, _, errors = process.end()
    assert code == 2
    assert (
        errors.splitlines()[-1]
        == f"error: long.txt has become {change} than the {size:,} bytes it began with."
    )
    assert {p.name for p in tmp_path.iterdir()} == {"long.txt"}


@signals
@needs_pidfd
def test_a_process_that_dies(long):
    with tokenizing(long) as (process, workers):
        ends_without_a_worker(process, workers[0], long)
        assert all(worker.has_ended() for worker in workers)


@signals
@needs_pidfd
def test_a_killed_command_leaves_nothing_in_the_way(long):
    with tokenizing(long) as (process, workers):
        process.kill()
        for worker in workers:
            worker.wait()
    assert [p.name for p in (long / "data").iterdir()] == [".long.part"]
    (long / "short").mkdir()
    (long / "short/long.txt").write_text(TEXT)
    succeeds("tokenize", "short/long.txt", "--tokenizer", "chars", "--out", "data", cwd=long)
    assert {p.name for p in (long / "data").iterdir()} == {"long_train.bin", "long_val.bin", "tokenizer.json"}
