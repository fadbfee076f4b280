"""Token shards: every layout, any spans, files that are damaged, folders with several data sets."""

from __future__ import annotations

import io
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shard_files import read_shard, write_shard
from tapeless.data.files import find_tokens, is_tokens
from tapeless.data.shards import Shards, ShardWriter
from tapeless.errors import DataError, Notice

KINDS = ("uint16", "uint32", "int32")


def everything(shards):
    """All tokens of each piece, taken as one span: its last token is a target."""
    spans = np.stack([shards.pieces[:-1], np.diff(shards.pieces) - 1], axis=1)
    stream, there = shards.take(spans)
    assert stream.dtype == np.int32
    return [stream[start : start + length + 1].tolist() for start, length in there]


# ---------------------------------------------------------------- reading and writing


@pytest.mark.parametrize("kind", KINDS)
def test_each_layout(kind, tmp_path):
    tokens = [5, 0, 65535 if kind == "uint16" else 70000, 3]
    shards = Shards([write_shard(tmp_path / "a.bin", tokens, kind)], 100_000)
    assert everything(shards) == [tokens]
    assert shards.pieces.tolist() == [0, 4]


def test_llmc_shards_of_uint32_have_version_7_and_1_is_read_too(tmp_path):
    path = write_shard(tmp_path / "a.bin", [1, 2, 3], "uint32")
    assert struct.unpack("<2i", path.read_bytes()[:8]) == (20240801, 7)
    with open(path, "r+b") as file:
        file.seek(4)
        file.write(struct.pack("<i", 1))
    assert everything(Shards([path], 10)) == [[1, 2, 3]]


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i4", "<i8", "<u8", ">u2", ">i8", "u1", "i2"])
def test_arrays_that_numpy_saved(dtype, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 120, 500)
    np.save(tmp_path / "a.npy", tokens.astype(dtype))
    assert is_tokens(tmp_path / "a.npy")
    assert everything(Shards([tmp_path / "a.npy"], 120)) == [tokens.tolist()]


def headerless(path, dtype, vocab_size, count=2000, seed=0):
    """Ids that NumPy wrote by `tofile`, among them the largest."""
    tokens = np.random.default_rng(seed).integers(0, vocab_size, count)
    tokens[-1] = vocab_size - 1
    tokens.astype(dtype).tofile(path)
    return tokens


@pytest.mark.parametrize("vocab_size", [65, 50257])
@pytest.mark.parametrize("dtype", ["uint16", "int32", "uint32", "int64", "uint64"])
def test_without_a_header_the_content_tells(dtype, vocab_size, tmp_path):
    tokens = headerless(tmp_path / "train.bin", dtype, vocab_size)
    read_as = {"uint32": "int32", "uint64": "int64"}.get(dtype, dtype)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        shards = Shards([tmp_path / "train.bin"], vocab_size)
    assert everything(shards) == [tokens.tolist()]
    told = f"train.bin has no header: its tokens are read as {read_as}. If they are something else, give"
    told = f"{tmp_path}/{told} token_dtype."
    assert [str(note.message) for note in said] == [told] * (read_as != "int32")


@given(
    st.sampled_from(["uint16", "uint32", "int32", "int64"]),
    st.integers(2, 200_000),
    st.integers(1, 400),
    st.integers(0, 9),
)
def test_without_a_header_nothing_is_misread(tmp_path_factory, dtype, vocab_size, count, seed):
    """Read as what it is, or refused with a line that names the option; with that, read."""
    path = tmp_path_factory.mktemp("headerless") / "train.bin"
    tokens = headerless(path, dtype, min(vocab_size, 2**16) if dtype == "uint16" else vocab_size, count, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        try:
            assert everything(Shards([path], vocab_size)) == [tokens.tolist()]
        except DataError as error:
            assert "token_dtype" in str(error)  # noqa: PT017
        assert everything(Shards([path], vocab_size, dtype)) == [tokens.tolist()]


def test_a_given_token_dtype_is_held_to_the_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(13))
    with pytest.raises(DataError, match="13 bytes, not a multiple of 4: its tokens are not uint32"):
        Shards([path], 10, "uint32")
    np.array([1, 2, 70, 3], "<u2").tofile(path)
    with pytest.raises(DataError, match="read as uint16 has 70 at position 2; expected ids below 10"):
        Shards([path], 10, "uint16")
    write_shard(path, [1, 2, 3], "uint32")
    assert everything(Shards([path], 10, "uint32")) == [[1, 2, 3]]
    with pytest.raises(DataError, match=r"the header of .* says that its tokens are uint32, not int64"):
        Shards([path], 10, "int64")


@pytest.mark.parametrize("bad", [2**32 + 5, -(2**32) + 5, -1, 2**62])
def test_ids_of_64_bits_are_not_cut(bad, tmp_path):
    """Cut to 32 bits, some would be valid ones."""
    tokens = np.ones(100_000, np.int64)
    tokens[90_000] = bad
    np.save(tmp_path / "a.npy", tokens)
    with pytest.raises(DataError, match=f"has the token {bad} at position 90,000"):
        Shards([tmp_path / "a.npy"], 10).take(np.array([[80_000, 15_000]]))


@pytest.mark.parametrize(("vocab_size", "kind"), [(65536, "uint16"), (65537, "uint32")])
def test_what_is_written(vocab_size, kind, tmp_path):
    writer = ShardWriter(tmp_path / "a.bin", vocab_size)
    writer.write(np.array([1, vocab_size - 1], np.int32))
    writer.write(np.array([], np.int32))
    writer.write(np.array([7], np.int64))
    with pytest.raises(DataError):  # it is no shard before it is complete
        Shards([tmp_path / "a.bin"], vocab_size)
    writer.close()
    assert read_shard(tmp_path / "a.bin") == (kind, [1, vocab_size - 1, 7])


@st.composite
def shards_and_spans(draw):
    """Pieces of tokens that number themselves, and spans [K, B, 2] each inside one of them."""
    sizes = draw(st.lists(st.integers(2, 40), min_size=1, max_size=4))
    begins = np.cumsum([0, *sizes])
    count, batch = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    spans = []
    for _ in range(count * batch):
        k = draw(st.integers(0, len(sizes) - 1))
        start = draw(st.integers(0, sizes[k] - 2))
        spans.append((begins[k] + start, draw(st.integers(1, sizes[k] - 1 - start))))
    if draw(st.booleans()):  # end to end, as windows in sequence are
        length = max(1, (sizes[0] - 1) // (count * batch))
        spans = [(min(i * length, sizes[0] - 1 - length), length) for i in range(count * batch)]
    return sizes, draw(st.sampled_from(KINDS)), np.array(spans).reshape(count, batch, 2)


@given(shards_and_spans())
def test_any_spans_are_taken_as_they_are(tmp_path_factory, example):
    sizes, kind, spans = example
    folder = tmp_path_factory.mktemp("shards")
    all_tokens = np.arange(sum(sizes)) * 7 % 1000
    parts = np.split(all_tokens, np.cumsum(sizes)[:-1])
    paths = [write_shard(folder / f"{i}.bin", part.tolist(), kind) for i, part in enumerate(parts)]
    before = spans.copy()
    stream, there = Shards(paths, 1000).take(spans)
    assert np.array_equal(spans, before)
    assert there.shape == spans.shape
    assert len(stream) <= (spans[..., 1] + 1).sum()  # no more than is asked for
    for (start, length), (new, same) in zip(spans.reshape(-1, 2), there.reshape(-1, 2), strict=True):
        assert same == length
        assert np.array_equal(stream[new : new + length + 1], all_tokens[start : start + length + 1])


def test_windows_end_to_end_are_read_once(tmp_path):
    shards = Shards([write_shard(tmp_path / "a.bin", range(100))], 100)
    stream, spans = shards.take(np.array([[[0, 10], [10, 10]], [[20, 10], [50, 10]]]))
    assert stream.tolist() == [*range(31), *range(50, 61)]
    assert spans.tolist() == [[[0, 10], [10, 10]], [[20, 10], [31, 10]]]


def test_the_digest_is_the_data(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    tokens = list(range(100)) * 300
    digests = {}
    for what, folder, name, content, kind in (
        ("same", tmp_path, "a", tokens, "uint16"),
        ("moved", tmp_path / "elsewhere", "a", tokens, "uint16"),
        ("name", tmp_path, "b", tokens, "uint16"),
        ("kind", tmp_path / "elsewhere", "a", tokens, "uint32"),
        ("shorter", tmp_path, "a", tokens[:-1], "uint16"),
        ("first", tmp_path, "a", [1, *tokens[1:]], "uint16"),
        ("middle", tmp_path, "a", [*tokens[:15000], 7, *tokens[15001:]], "uint16"),
        ("last", tmp_path, "a", [*tokens[:-1], 1], "uint16"),
    ):
        digests[what] = Shards([write_shard(folder / f"{name}.bin", content, kind)], 100).digest
    assert digests["moved"] == digests["same"]
    assert len(set(digests.values())) == len(digests) - 1


GROWTH = """
import resource
import numpy as np
from pathlib import Path
from tapeless.data.orders import make_order
from tapeless.data.shards import Shards
from tapeless.rng import NumpyRandom

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
shards = Shards([Path({path!r})], 50257)
orders = [make_order(kind, shards, NumpyRandom(0), 4, 1024) for kind in ("sequence", "windows")]
for order in orders:
    shards.take(order.take(0, 64))
before = peak()
for order in orders:
    for step in range(0, 500_000, 10_000):
        stream, spans = shards.take(order.take(step, 64))
        assert len(stream) >= 64 * 4096 and stream.max() == 0
print(peak() - before)
"""


@pytest.mark.skipif(os.name != "posix", reason="measures memory as Unix does")
def test_a_large_file_takes_no_memory(child, tmp_path):
    path = tmp_path / "huge.bin"
    path.write_bytes(struct.pack("<256i", 20240520, 1, 2**31 - 1, *[0] * 253))
    os.truncate(path, 1024 + 2 * (2**31 - 1))  # a hole of 4 GB, which costs nothing
    assert int(child(GROWTH.format(path=str(path)))) < 10_000  # KiB; 52 MB are taken in all


# ---------------------------------------------------------------- what is no token file


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


GOOD = struct.pack("<256i", 20240520, 1, 3, *[0] * 253) + struct.pack("<3H", 1, 2, 3)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (GOOD[:-1], ["truncated", "1,029 bytes", "counts 3 tokens", "1,030"]),
        (GOOD[:1024], ["truncated", "1,024 bytes"]),
        (GOOD[:900], ["truncated", "900 bytes", "header alone has 1024"]),
        (GOOD[:4], ["truncated"]),
        (GOOD + b"\0", ["too long", "1,031 bytes", "1,030"]),
        (GOOD[:4] + struct.pack("<i", 2) + GOOD[8:], ["version 2", "expected 1"]),
        (struct.pack("<2i", 20240801, 2) + GOOD[8:], ["version 2", "expected 7 or 1"]),
        (GOOD[:8] + struct.pack("<i", 0) + GOOD[12:1024], ["no tokens"]),
        (GOOD[:8] + struct.pack("<i", -5) + GOOD[12:], ["no tokens", "-5"]),
        (GOOD[:8] + struct.pack("<i", 2**31 - 1) + GOOD[12:], ["truncated", "2,147,483,647"]),
        (
            struct.pack("<i", 20240521) + GOOD[4:],
            ["no header of llm.c or NumPy", "55433 at position 0 as uint16", "expected ids below 50,257"],
        ),
        (struct.pack("<i", 20240326) + GOOD[4:], ["an llm.c model", "expected token ids"]),
        (struct.pack("<i", 20240327) + GOOD[4:], ["debug state"]),
        (struct.pack("<i", 20240328) + GOOD[4:], ["tokenizer"]),
        (b"", ["is empty"]),
        (b"\1\0\0", ["3 bytes are not a whole number of tokens"]),
        (struct.pack("<3i", 1, 2, 3) + b"\0", ["13 bytes are not a whole number of tokens"]),
        (struct.pack("<4i", 1, 2, 50257, 3), ["50257 at position 2 as int32", "expected ids below 50,257"]),
        (struct.pack("<4i", 1, 2, -1, 3), ["-1 at position 2 as int32", "65535 at position 4 as uint16"]),
        (np.array([1, 2, -1, 3]).tobytes(), ["-1 at position 2 as int64"]),
        (np.linspace(-1, 1, 90).astype("f4").tobytes(), ["as uint16", "as int32", "as int64"]),
        (np.arange(90).astype("<u2").tobytes()[:-1], ["179 bytes are not a whole number of tokens"]),
        # Too little to be sure of it.
        (struct.pack("<6H", 1, 2, 3, 4, 5, 6), ["probably uint16, as nanoGPT's are", "token_dtype='uint16'"]),
        (struct.pack("<4q", 1, 2, 3, 4), ["int64 or int32", "token_dtype='int64'"]),
        (bytes(800), ["int64 or int32"]),
        (np.array([7, 0] * 500, "<i4").tobytes(), ["int64 or int32"]),
        (b"It is a text, this file. " * 9, ["looks like text", "tapeless tokenize"]),
        (b"A line of a text\r\n\fand another one\r\n" * 9, ["looks like text"]),
        (b'{"a": ["' + "é".encode() * 2**18 + b'"]}', ["looks like text"]),
        (npy(np.arange(6).reshape(2, 3)), ["an array of int64 of shape [2, 3]", "one dimension"]),
        (npy(np.array([1.0, 2.0])), ["an array of float64 of shape [2]"]),
        (npy(np.array([True, False])), ["an array of bool"]),
        (npy(np.array(["a", "b"])), ["an array of <U1"]),
        (npy(np.array([], np.int32)), ["no tokens", "counts 0"]),
        (npy(np.arange(9, dtype="u2"))[:-1], ["truncated", "145 bytes", "9 tokens", "146"]),
        (npy(np.arange(9, dtype="u2")) + b"\0", ["too long", "147 bytes"]),
        (npy(np.arange(9)).replace(b"'descr'", b"'other'"), ["damaged", ".npy"]),
        (b"\x93NUMPY\1\0\xff\xff" + b"(" * 65535, ["damaged", ".npy"]),
        (b"\x93NUMPY\7\0" + bytes(99), ["version 7.0 of NumPy's format"]),
        (b"PK\3\4" + bytes(99), ["a zip archive, such as .npz", "np.save"]),
    ],
)
def test_what_is_no_shard(content, words, tmp_path):
    path = tmp_path / "data.bin"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        Shards([path], 50257)
    for word in (str(path), *words):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_no_file_or_folder_in_its_place(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.bin is no file"):
        Shards([tmp_path / "nowhere.bin"], 10)
    with pytest.raises(DataError, match="is a folder"):
        Shards([tmp_path], 10)


@pytest.mark.parametrize(
    ("kind", "bad"),
    [("uint16", 999), ("uint32", 999), ("uint32", 4_000_000_000), ("int32", 999), ("int32", -2)],
)
def test_a_token_beyond_the_vocabulary_is_found_when_it_is_taken(kind, bad, tmp_path):
    good = write_shard(tmp_path / "good.bin", [1] * 50, kind)
    tokens = [1] * 100_000
    tokens[90_000] = bad
    shards = Shards([good, write_shard(tmp_path / "bad.bin", tokens, kind)], 999)
    shards.take(np.array([[0, 40], [50, 80_000]]))
    with pytest.raises(DataError) as error:
        shards.take(np.array([[[0, 10], [50 + 89_990, 10]], [[50 + 95_000, 10], [20, 10]]]))
    assert f"bad.bin has the token {bad} at position 90,000; the vocabulary has 999 tokens" in str(
        error.value
    )


def test_a_file_that_shrinks_or_goes_while_it_is_used(tmp_path):
    path = write_shard(tmp_path / "a.bin", [1] * 5000)
    shards = Shards([path], 10)
    os.truncate(path, 2000)
    with pytest.raises(DataError, match="has become shorter"):
        shards.take(np.array([[0, 4000]]))
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        shards.take(np.array([[0, 4000]]))


# ---------------------------------------------------------------- finding files


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Folders as llm.c's users have them; in the present folder, so that messages are short."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "one/deep/stories_train.bin",
        "one/deep/stories_val.bin",
        "one/deep/gpt2_tokenizer.bin",
        "two/a/shakespeare_train.bin",
        "two/a/shakespeare_val.bin",
        "two/b/fineweb_train_000001.bin",
        "two/b/fineweb_train_000002.bin",
        "two/b/fineweb_val_000000.bin",
        "two/.hidden/secret_train.bin",
        "nano/train.bin",
        "nano/val.bin",
        "plain/10.bin",
        "plain/9.bin",
        "both/x_train.bin",
        "both/x_train_000001.bin",
        "trained/x_train.bin",
        "validated/x_val.bin",
        "models/gpt2_124M.bin",
        "empty/readme.txt",
    ):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_shard(path, [1, 2, 3])
    for path in (Path("models/gpt2_124M.bin"), Path("plain/model.bin")):
        path.write_bytes(struct.pack("<2i", 20240326, 3))


def found(source):
    name, train, val = find_tokens(source)
    return name, " ".join(map(str, train)), " ".join(map(str, val))


FINEWEB = (
    "fineweb",
    "two/b/fineweb_train_000001.bin two/b/fineweb_train_000002.bin",
    "two/b/fineweb_val_000000.bin",
)
STORIES = ("stories", "one/deep/stories_train.bin", "one/deep/stories_val.bin")


@pytest.mark.parametrize(
    ("source", "files"),
    [
        ("one", STORIES),
        ("one/deep", STORIES),
        ("one/stories", STORIES),
        ("one/deep/stories_train.bin", ("stories_train", *STORIES[1:])),
        ("one/deep/stories_val.bin", ("stories_val", STORIES[2], "")),
        ("two/fineweb", FINEWEB),
        ("two/b", FINEWEB),
        ("two/b/*.bin", ("*.bin", *FINEWEB[1:])),
        ("two/b/fineweb_train_*.bin", ("fineweb_train_*.bin", *FINEWEB[1:])),
        ("two/b/fineweb_train_000002.bin", ("fineweb_train_000002", FINEWEB[1].split()[1], FINEWEB[2])),
        (
            "two/**/*_train*.bin",
            (
                "*_train*.bin",
                f"two/a/shakespeare_train.bin {FINEWEB[1]}",
                f"two/a/shakespeare_val.bin {FINEWEB[2]}",
            ),
        ),
        ("nano", ("nano", "nano/train.bin", "nano/val.bin")),
        ("plain", ("plain", "plain/10.bin plain/9.bin", "")),
        ("trained", ("x", "trained/x_train.bin", "")),
    ],
)
def test_token_files_are_found(tree, source, files):
    assert found(source) == files
    assert found(Path(source)) == files
    assert is_tokens(source)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("two", ["two means 2 data sets. Choose one: two/a, two/b."]),
        (".", [". means 6 data sets", "both, nano, one/deep, trained, two/a and 1 more"]),
        ("both", ["x_train.bin", "x_train_000001.bin", "by a glob"]),
        ("validated", ["only has files to validate on", "x_val.bin", "NAME_train.bin"]),
        ("validated/*.bin", ["only matches files to validate on"]),
        ("models", ["models has no token files", "*.bin"]),
        ("empty", ["empty has no token files"]),
        ("one/tales", ["no token files 'one/tales'", "FOLDER/NAME"]),
        ("nowhere/*.bin", ["no token files 'nowhere/*.bin'"]),
        ("nowhere.bin", ["no token files"]),
    ],
)
def test_what_cannot_be_found(tree, source, words):
    with pytest.raises(DataError) as error:
        find_tokens(source)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("names", "name", "train", "val"),
    [
        ("fineweb-train-1.bin fineweb-val-0.bin", "fineweb", "fineweb-train-1.bin", "fineweb-val-0.bin"),
        (
            "edufineweb_train_000001.npy edufineweb_train_000002.npy edufineweb_val_000000.npy",
            "edufineweb", "edufineweb_train_000001.npy edufineweb_train_000002.npy",
            "edufineweb_val_000000.npy",
        ),
        (
            "train-00000-of-00002.bin train-00001-of-00002.bin validation-00000-of-00001.bin",
            "new", "train-00000-of-00002.bin train-00001-of-00002.bin", "validation-00000-of-00001.bin",
        ),
        ("tiny.train.bin tiny.valid.bin", "tiny", "tiny.train.bin", "tiny.valid.bin"),
        ("train.npy val.npy test.npy", "new", "train.npy", "val.npy"),
        (
            "training_shard_0.npy training_shard_1.npy validation_shard_0.npy",
            "new", "training_shard_0.npy training_shard_1.npy", "validation_shard_0.npy",
        ),
        ("1.bin 2.bin my-val.bin valley.bin", "new", "1.bin 2.bin valley.bin", "my-val.bin"),
        ("test.bin", "new", "test.bin", ""),
    ],
)  # fmt: skip
def test_the_names_of_other_programs(names, name, train, val, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("new").mkdir()
    for each in names.split():
        write_shard(Path("new") / each, [1, 2, 3])
    expected = [" ".join(f"new/{each}" for each in some.split()) for some in (train, val)]
    assert found("new") == (name, *expected)
    if "test.npy" in names:
        with pytest.raises(DataError, match=r"new/test\.npy: the name says that this is not to train on"):
            found("new/*")
    else:
        assert list(found("new/*")[1:]) == expected
    first = train.split()[0]
    if "_train" in first or "-train" in first or first.startswith("train."):
        assert found(f"new/{first}")[2] == expected[1]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            "1.bin 2.bin test_1.bin",
            ["new/test_1.bin: the name says that this is not", "by a glob"],
        ),
        ("x_train.bin x-train.bin", ["or twice", "new/x-train.bin, new/x_train.bin"]),
        ("x_train_1.bin x_train_1.npy", ["or twice"]),
        ("trainid.bin validation_0.bin", None),
    ],
)
def test_names_that_do_not_settle_what_to_train_on(names, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("new").mkdir()
    for each in names.split():
        write_shard(Path("new") / each, [1, 2, 3])
    if words is None:
        assert found("new") == ("new", "new/trainid.bin", "new/validation_0.bin")
        return
    with pytest.raises(DataError) as error:
        find_tokens("new")
    assert all(word in str(error.value) for word in words), error.value


def test_several_sets_in_one_folder_are_chosen_by_name(tree):
    write_shard(Path("two/a/other_train.bin"), [1])
    with pytest.raises(DataError, match=r"Choose one: two/a/other, two/a/shakespeare, two/b\."):
        find_tokens("two")
    assert found("two/other") == ("other", "two/a/other_train.bin", "")
    write_shard(Path("two/b/other_train.bin"), [1])
    with pytest.raises(DataError, match=r"2 data sets called other\. Choose one: two/a/other, two/b/other\."):
        find_tokens("two/other")
    assert found("two/b/other") == ("other", "two/b/other_train.bin", "")


def test_pairs_in_different_folders(tree):
    """Chosen by name, wherever they lie below the folder; what is beside goes before."""
    for path in ("parts/train/x_train.bin", "parts/val/x_val.bin", "parts/val/y_val.bin"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_shard(Path(path), [1, 2, 3])
    assert found("parts") == ("x", "parts/train/x_train.bin", "parts/val/x_val.bin")
    assert found("parts/x") == found("parts")
    assert found("parts/train") == ("x", "parts/train/x_train.bin", "")
    write_shard(Path("parts/train/z_train.bin"), [1])
    with pytest.raises(DataError, match=r"Choose one: parts/x, parts/train/z\."):
        find_tokens("parts")
    assert found("parts/x")[2] == "parts/val/x_val.bin"
    Path("parts/more").mkdir()
    write_shard(Path("parts/more/x_val.bin"), [1])
    with pytest.raises(DataError, match="several") as error:
        find_tokens("parts/x")
    assert "parts/train/x_train.bin: parts/more/x_val.bin, parts/val/x_val.bin. Choose one" in str(
        error.value
    )
    write_shard(Path("parts/train/x_val.bin"), [1])
    assert found("parts/x") == ("x", "parts/train/x_train.bin", "parts/train/x_val.bin")


def test_links_in_circles(tree):
    Path("one/back").symlink_to(Path("one").resolve())
    Path("linked").mkdir()
    Path("linked/there").symlink_to(Path("one/deep").resolve())
    assert found("one") == STORIES
    assert found("linked")[0] == "stories"


def test_texts_are_not_tokens(tree):
    Path("text.txt").write_text("emma\nolivia\n")
    Path("odd").write_text("a")
    write_shard(Path("shard"), [1, 2, 3])
    assert not is_tokens("text.txt")
    assert not is_tokens("odd")
    assert not is_tokens("names")
    assert not is_tokens("nowhere.txt")
    assert is_tokens("shard")
