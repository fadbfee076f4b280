"""Orders of windows: llm.c's data loader, transcribed from its rule, reads the same tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tapeless as tl
from shard_files import write_shard
from tapeless.data.documents import Corpus
from tapeless.data.orders import Llmc, make_order
from tapeless.data.shards import Shards
from tapeless.data.tokenizers import CharTokenizer
from tapeless.errors import DataError, Notice
from tapeless.rng import PythonRandom


def mt19937(seed):
    """The 32-bit numbers of MT19937 as its authors' init_genrand seeds it, and torch after them."""
    state = [seed]
    for j in range(1, 624):
        state.append((1812433253 * (state[-1] ^ state[-1] >> 30) + j) & 0xFFFFFFFF)
    while True:
        for k in range(624):
            y = (state[k] & 0x80000000) | (state[(k + 1) % 624] & 0x7FFFFFFF)
            state[k] = state[(k + 397) % 624] ^ (y >> 1) ^ (0x9908B0DF if y & 1 else 0)
        for word in state:
            y = word ^ word >> 11
            y ^= y << 7 & 0x9D2C5680
            y ^= y << 15 & 0xEFC60000
            yield y ^ y >> 18


def permute(items, numbers):
    for i in range(len(items) - 1, 0, -1):
        j = next(numbers) % (i + 1)
        items[i], items[j] = items[j], items[i]


def loader(shards, B, T, shuffle):
    """Inputs and targets [B][T] of llm.c's data loader, one batch after the other, for ever."""
    numbers = mt19937(42)
    turns = list(range(len(shards)))
    while True:
        if shuffle:
            permute(turns, numbers)
        for turn in turns:
            tokens = shards[turn]
            samples = list(range((len(tokens) - 1) // (B * T)))
            if shuffle:
                permute(samples, numbers)
            for sample in samples:
                buffer = tokens[sample * B * T :][: B * T + 1]
                rows = [buffer[b * T : (b + 1) * T + 1] for b in range(B)]
                yield [row[:-1] for row in rows], [row[1:] for row in rows]


def batches(data, spans):
    """What training reads for spans [K, B, 2]."""
    stream, spans = data.take(spans)
    for step in spans:
        rows = [stream[start : start + length + 1].tolist() for start, length in step]
        yield [row[:-1] for row in rows], [row[1:] for row in rows]


def test_the_generator_gives_torchs_numbers():
    published = [4053805790, 2173880614, 380293709, 1237255315, 2986595568]  # by llm.c's rand.h, seed 137
    numbers = mt19937(137)
    assert [next(numbers) for _ in range(5)] == published
    same, drawn = mt19937(42), np.random.RandomState(42).randint(0, 2**32, 2000, np.uint32)
    assert drawn.tolist() == [next(same) for _ in range(2000)]


@pytest.mark.oracle
def test_the_generator_is_torchs():
    import torch

    torch.manual_seed(42)
    numbers = mt19937(42)
    assert torch.randint(0, 10**6, [2000]).tolist() == [next(numbers) % 10**6 for _ in range(2000)]


@given(
    sizes=st.lists(st.integers(5, 90), min_size=1, max_size=4),
    B=st.integers(1, 3),
    T=st.integers(1, 4),
    chunks=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    kind=st.sampled_from(["sequence", "llmc"]),
)
@pytest.mark.filterwarnings("ignore::tapeless.errors.Notice")  # some have no batch
def test_batches_are_those_of_llmc(tmp_path_factory, sizes, B, T, chunks, kind):
    folder = tmp_path_factory.mktemp("shards")
    parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    data = Shards([write_shard(folder / f"{i}.bin", p.tolist()) for i, p in enumerate(parts)], 1000)
    if all(size <= B * T for size in sizes):
        with pytest.raises(DataError, match=f"needs {B * T + 1}"):
            make_order(kind, data, PythonRandom(0), B, T)
        return
    order = make_order(kind, data, PythonRandom(0), B, T)
    assert order.longest == T
    theirs = loader([p.tolist() for p in parts], B, T, shuffle=kind == "llmc")
    step = 0
    for steps in chunks:
        spans = order.take(step, steps)
        assert spans.shape == (steps, B, 2)
        assert list(batches(data, spans)) == [next(theirs) for _ in range(steps)]
        step += steps


@pytest.mark.parametrize("kind", ["sequence", "llmc"])
def test_any_step_can_be_asked_for(kind, tmp_path):
    paths = [write_shard(tmp_path / f"{i}.bin", range(size)) for i, size in enumerate((100, 37, 64))]
    data = Shards(paths, 100)
    all_spans = make_order(kind, data, PythonRandom(0), 2, 4).take(0, 200)
    order = make_order(kind, data, PythonRandom(0), 2, 4)
    for step, steps in ((150, 3), (0, 1), (1, 60), (20, 5), (199, 1), (24, 24)):
        assert np.array_equal(order.take(step, steps), all_spans[step : step + steps])


def test_a_long_permutation(tmp_path, monkeypatch):
    """Numbers are drawn many at once, and those of shards that are skipped not used: the same order."""
    monkeypatch.setattr("tapeless.data.orders.DRAWS", 7)
    data = Shards([write_shard(tmp_path / f"{i}.bin", range(100)) for i in range(3)], 100)
    few = Llmc(data, 1, 2)
    monkeypatch.setattr("tapeless.data.orders.DRAWS", 1000)
    assert np.array_equal(few.take(1000, 99), Llmc(data, 1, 2).take(1000, 99))


@pytest.mark.parametrize("kind", ["sequence", "llmc", "windows"])
def test_a_text_in_memory_is_read_like_a_shard(kind, tmp_path):
    text = "to be or not to be, that is the question"
    tokenizer = CharTokenizer.from_text([text])
    corpus = Corpus.from_documents([text], tokenizer, 4)
    shards = Shards([write_shard(tmp_path / "a.bin", tokenizer.encode(text))], 100)
    spans, same = (make_order(kind, data, PythonRandom(3), 2, 4).take(0, 9) for data in (corpus, shards))
    assert np.array_equal(spans, same)
    assert list(batches(corpus, spans)) == list(batches(shards, spans))


def test_training_takes_what_shards_give(tmp_path):
    text = "to be or not to be, that is the question; whether it is nobler"
    tokenizer = CharTokenizer.from_text([text])
    corpus = Corpus.from_documents([text], tokenizer, 4)
    shards = Shards([write_shard(tmp_path / "a.bin", tokenizer.encode(text))], tokenizer.vocab_size)
    losses = []
    for data in (corpus, shards):
        config = tl.GPTConfig(vocab_size=tokenizer.vocab_size, block_size=4, n_embd=8, n_head=2)
        model = tl.GPT(config, engine="reference")
        model.engine.optimiser.constants[:] = 0.9, 0.99, 1e-8, 0, 0, 0
        stream, spans = data.take(make_order("llmc", data, PythonRandom(0), 2, 4).take(0, 6))
        losses.append(model.engine.train(stream, spans, np.full(6, 0.01)).losses.tolist())
    assert losses[0] == losses[1]
    assert np.isfinite(losses).all()


def test_windows_at_random_places_lie_in_one_shard(tmp_path):
    sizes = (30, 9, 21)
    data = Shards([write_shard(tmp_path / f"{i}.bin", range(size)) for i, size in enumerate(sizes)], 100)
    spans = make_order("windows", data, PythonRandom(0), 5, 8).take(0, 200).reshape(-1, 2)
    piece = np.searchsorted(data.pieces, spans[:, 0], side="right") - 1
    assert (spans[:, 1] == 8).all()
    assert (spans.sum(1) < data.pieces[piece + 1]).all()  # the last target, too
    assert len(np.unique(spans[:, 0])) == sum(size - 8 for size in sizes)  # every place is found


def test_a_shard_shorter_than_a_window(tmp_path):
    paths = [write_shard(tmp_path / f"{i}.bin", range(size)) for i, size in enumerate((50, 8))]
    data = Shards(paths, 100)
    for kind in ("windows", "sequence", "llmc"):
        with pytest.raises(DataError, match=r"1\.bin has 8 tokens; windows of 8 need one more"):
            make_order(kind, data, PythonRandom(0), 1, 8)
        with pytest.raises(DataError, match=r"0\.bin has 50 tokens; windows of 60 need one more"):
            make_order(kind, data, PythonRandom(0), 1, 60)
    for kind in ("sequence", "llmc"):  # a shard of a window, but not of a batch, is left out
        with pytest.warns(Notice, match=r"1\.bin is not read: it has fewer than the 22 tokens of a batch"):
            spans = make_order(kind, data, PythonRandom(0), 3, 7).take(0, 4)
        assert (spans[..., 0] < 50).all()
        with pytest.raises(DataError, match=r"0\.bin has 50 tokens; a batch of 8 windows of 7 needs 57"):
            make_order(kind, data, PythonRandom(0), 8, 7)


@pytest.mark.parametrize("kind", ["shuffle", "draw"])
def test_shards_have_no_documents(kind, tmp_path):
    data = Shards([write_shard(tmp_path / "a.bin", range(50))], 100)
    with pytest.raises(DataError, match="order=windows, sequence or llmc"):
        make_order(kind, data, PythonRandom(0), 1, 8)


@pytest.mark.parametrize("kind", ["sequence", "llmc"])
def test_a_shard_without_a_batch_is_said(kind, tmp_path):
    paths = [write_shard(tmp_path / f"{i}.bin", [1] * size) for i, size in enumerate((50, 16, 17, 30))]
    data = Shards(paths, 10)
    with pytest.warns(Notice, match=r"1\.bin is not read: it has fewer than the 17 tokens of a batch"):
        make_order(kind, data, PythonRandom(0), 2, 8)
    with pytest.warns(Notice, match=r"1\.bin and 1 more is not read: it has fewer than the 25 tokens"):
        make_order(kind, data, PythonRandom(0), 3, 8)
