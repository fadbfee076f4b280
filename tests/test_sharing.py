"""One model used by many threads, copied, pickled, forked: each answer is the one that a call gives alone."""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import os
import pickle
import random
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

import tapeless as tl
from helpers import PRESETS, random_batch
from tapeless.data.bpe import train_bpe
from tapeless.data.tokenizers import CharTokenizer
from tapeless.errors import DataError
from tapeless.generate import generate
from tapeless.init import generator

LETTERS = CharTokenizer.from_documents(["abcdefghijklmnopqrstuvwxyz"])
BPE = train_bpe(["ab ab"], 257)
CONFIG = PRESETS["gpt2"].replace(vocab_size=27, block_size=32, n_embd=24, n_head=3, n_layer=2)


def a_model(threads=None, engine="cpu", config=CONFIG):
    return tl.GPT(config, 0, engine, threads=threads, tokenizer=LETTERS)


def calls_of(model, scratch):
    """Calls of every kind, each of which must always return the same."""

    def gradients(batch):
        with model.lock:
            loss = model.loss_and_grad(*batch)
            return loss, model.engine.grads.tobytes()

    def saved(path):
        model.save(path)
        return (path / "model.safetensors").read_bytes()

    calls = []
    for seed, lengths in enumerate(([3], [32, 1, 7], [5] * 4, [20, 2] * 4)):
        batch = random_batch(CONFIG, lengths, seed)
        calls += [
            lambda batch=batch: model.loss(*batch),
            lambda batch=batch: gradients(batch),
            lambda batch=batch: model.logits(batch.tokens, batch.starts).tobytes(),
            lambda seed=seed: model.generate("ab"[: seed % 3], n=1 + seed, seed=seed, max_tokens=40),
            lambda seed=seed: tl.evaluate(model, np.arange(50 + seed) % 27, stride=9).loss,
            lambda batch=batch: copy.deepcopy(model).loss(*batch),
        ]
    here = itertools.count()
    return [*calls, lambda: saved(scratch / f"{next(here)}")]


def disagreements(model, callers, each, scratch):
    """How many of `callers` × `each` calls by as many threads return something else than alone."""
    calls = calls_of(model, scratch)
    alone = [call() for call in calls]
    ready = threading.Barrier(callers)

    def caller(seed):
        draws = random.Random(seed)
        ready.wait()
        chosen = [draws.randrange(len(calls)) for _ in range(each)]
        return sum(calls[i]() != alone[i] for i in chosen)

    with ThreadPoolExecutor(callers) as pool:
        return sum(pool.map(caller, range(callers)))


@pytest.mark.parametrize(("engine", "threads"), [("cpu", 1), ("cpu", 2), ("reference", None)])
def test_every_answer_is_the_one_given_alone(engine, threads, tmp_path):
    assert disagreements(a_model(threads, engine), 16, 12, tmp_path) == 0


@pytest.mark.oracle
@pytest.mark.parametrize("threads", [1, 2])
def test_every_answer_is_the_one_given_alone_for_long(threads, tmp_path):
    assert disagreements(a_model(threads), 16, 1000, tmp_path) == 0


def test_a_web_application(tmp_path):
    """One loaded model behind a server that has a thread for each request."""
    a_model().save(tmp_path / "model")
    model = tl.load(tmp_path / "model", threads=2)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            text = "\n".join(model.generate(self.path[1:], n=3, seed=len(self.path), max_tokens=50))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    prompts = ["abcdefghijklmnop"[:k] for k in range(16)]
    alone = ["\n".join(model.generate(p, n=3, seed=1 + len(p), max_tokens=50)) for p in prompts]
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def asked(prompt):
            with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/{prompt}") as answer:
                return answer.read().decode()

        with ThreadPoolExecutor(16) as pool:
            for _ in range(3):
                assert list(pool.map(asked, prompts)) == alone
        server.shutdown()


def test_whoever_reads_texts_slowly_keeps_nobody_waiting():
    model = a_model()
    batch = random_batch(CONFIG, [5], 0)
    alone = model.loss(*batch)
    texts = generate(model, "a", 3, 0.8, generator(CONFIG, 0), max_tokens=20)
    first = next(texts)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(model.loss, *batch).result() == alone
    assert [first, *texts] == model.generate("a", n=3, seed=0, max_tokens=20)


def test_the_lock_keeps_gradients_together():
    """While one thread holds the lock, another one's gradients do not replace its own."""
    model, batches = a_model(1), [random_batch(CONFIG, [k], k) for k in (4, 9)]
    with ThreadPoolExecutor(1) as pool:
        with model.lock:
            loss = model.loss_and_grad(*batches[0])
            own = model.engine.grads.copy()
            other = pool.submit(model.loss_and_grad, *batches[1])
            assert model.loss_and_grad(*batches[0]) == loss  # the same thread may call on
            assert not other.done()
            assert np.array_equal(model.engine.grads, own)
        other.result()
    assert not np.array_equal(model.engine.grads, own)


def test_a_call_that_fails_leaves_the_model_to_others():
    model, batch = a_model(2), random_batch(CONFIG, [5, 5], 0)
    with ThreadPoolExecutor(1) as pool, pytest.raises(DataError):
        pool.submit(model.loss, [99], [0]).result()
    assert model.loss(*batch) == model.loss(*batch)


INTERRUPTED = """
import os, signal, threading
import tapeless as tl

model = tl.GPT(tl.presets["microgpt"].model.replace(vocab_size=27), threads=2)
waiting, go = threading.Event(), threading.Event()

def holder():
    with model.lock:
        held.set()
        waiting.wait()
        # A signal that comes just before the other thread falls asleep is heard with the next one.
        while not go.wait(0.05):
            os.kill(os.getpid(), signal.SIGINT)

def once(*_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt

signal.signal(signal.SIGINT, once)

held = threading.Event()
thread = threading.Thread(target=holder)
thread.start()
held.wait()
try:
    waiting.set()
    model.loss([1, 2], [2, 3])
    print("went on")
except KeyboardInterrupt:
    print("interrupted")
go.set()
thread.join()
assert model.loss([1, 2], [2, 3]) == model.loss([1, 2], [2, 3])
threading.Thread(target=lambda: print(model.lock.acquire())).start()
"""


@pytest.mark.signals
def test_ctrl_c_while_waiting_for_the_model(child):
    assert child(INTERRUPTED).splitlines() == ["interrupted", "True"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("forked", ["another thread holds the lock", "this thread holds it"])
def test_a_forked_process_can_use_the_model(forked, child):
    code = """
import os, threading
import tapeless as tl
model = tl.GPT(tl.presets["microgpt"].model.replace(vocab_size=27), threads=2)
loss = model.loss([1, 2], [2, 3])
held, go = threading.Event(), threading.Event()
def holder():
    with model.lock:
        held.set()
        go.wait()
def fork():
    pid = os.fork()
    if pid == 0:
        with model.lock:
            os._exit(model.loss([1, 2], [2, 3]) != loss)
    return pid
if {another}:
    threading.Thread(target=holder).start()
    held.wait()
    pid = fork()
    go.set()
else:
    with model.lock:
        pid = fork()
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert child(code.replace("{another}", str(forked.startswith("another")))) == "0"


COMPILED = """
import threading
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import tapeless as tl
from tapeless.ops.cpu import native

made, emit = [], native._emit
native._emit = lambda function, name, n: made.append(name) or emit(function, name, n)
config = tl.presets["microgpt"].model.replace(vocab_size=27)
exact = tl.GPT(config, 0, "reference").loss([1, 2, 3], [2, 3, 4])
models, ready = [tl.GPT(config, 0) for _ in range(4)], threading.Barrier(8)
def loss(k):
    ready.wait()
    return models[k % 4].loss([1, 2, 3], [2, 3, 4])
with ThreadPoolExecutor(8) as pool:
    losses = list(pool.map(loss, range(8)))
print(np.ptp(losses), abs(losses[0] - exact) < 1e-6, sorted(made))
"""


def test_programs_are_compiled_once_whoever_asks(child, tmp_path):
    result = child(COMPILED, TAPELESS_CACHE_DIR=tmp_path)
    assert result == "0.0 True ['tapeless_entry', 'tapeless_product']"


# ---------------------------------------------------------------- copies


def trained(model, steps=3):
    """Some steps of Adam, and the losses."""
    engine, rng = model.engine, np.random.default_rng(0)
    engine.optimiser.constants[:] = 0.9, 0.99, 1e-8, 0.1, 0.0, 1.0
    stream = rng.integers(0, 27, 200, dtype=np.int32)
    spans = np.stack([rng.integers(0, 160, (steps, 4)), np.full((steps, 4), 32)], axis=2)
    return engine.train(stream, spans, np.full(steps, 0.01)).losses.tolist()


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "deepcopy of a list": lambda model: copy.deepcopy([model])[0],
}


@pytest.mark.parametrize("engine", ["cpu", "reference"])
@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_is_a_model_of_its_own(kind, engine):
    model = a_model(engine=engine)
    trained(model)  # so that there are gradients and moments to copy
    other = COPIES[kind](model)
    before = model.engine.params.copy()
    assert (other.config, other.engine.dtype) == (model.config, model.engine.dtype)
    assert other.generate("ab", n=3) == model.generate("ab", n=3)
    for mine, theirs in zip(model.engine.state.values(), other.engine.state.values(), strict=True):
        assert np.array_equal(mine, theirs)
        assert not np.shares_memory(mine, theirs)
    assert np.array_equal(model.engine.grads, other.engine.grads)
    losses = trained(other)
    assert np.array_equal(model.engine.params, before)
    assert trained(model) == losses  # the optimiser goes on alike
    assert np.array_equal(model.engine.params, other.engine.params)
    other.params["wte"][:] = 0
    assert model.params["wte"].any()
    assert other.lock is not model.lock


def test_copies_keep_threads_dtype_and_tokenizer():
    for model in (
        tl.GPT(CONFIG, 0, threads=3, tokenizer=LETTERS),
        tl.GPT(CONFIG.replace(vocab_size=BPE.vocab_size), 0, "reference", dtype="float32", tokenizer=BPE),
        tl.GPT(CONFIG, 0),
    ):
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other.engine.threads == model.engine.threads
            assert other.engine.dtype == model.engine.dtype
            assert other.generate(n=1) == model.generate(n=1)


def in_another_process(model):
    return model.generate("ab", n=3), trained(model)


def test_a_model_goes_to_another_process():
    model = a_model(threads=2)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        texts, losses = pool.apply(in_another_process, (model,))
    assert texts == model.generate("ab", n=3)
    assert losses == trained(model)
