"""Several threads on one step: the same numbers but for rounding, and bit for bit again each time."""

import concurrent.futures
import hashlib
import inspect
import itertools
import json
import os
import shutil
import threading
from functools import partial
from queue import SimpleQueue

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tapeless as tl
from commands import refused, signals, succeeds, tapeless
from helpers import PRESETS, lengths_of, random_batch, random_model
from tapeless import team
from tapeless.config import GPTConfig
from tapeless.errors import ConfigError, RunError
from tapeless.layout import cut_segments, decay_segments, memory

MICROGPT = PRESETS["microgpt"]
# Sizes that no number of threads divides, tensors that decay and others that do not. (No biases: that of
# keys has no effect, so its gradient is rounding, which Adam would make full steps of.)
ODD = GPTConfig(
    vocab_size=19,
    block_size=5,
    n_layer=2,
    n_head=3,
    n_embd=21,
    n_hidden=37,
    norm="layer",
    norm_gain=True,
    norm_bias=True,
    norm_final=True,
    activation="gelu",
    attention="flash",
    tied=True,
)


MHC = PRESETS["flashmicrogpt"]


def engine_of(threads, config=ODD, **constants):
    """An engine with random weights, and these constants of the optimiser."""
    engine = tl.GPT(config, None, "reference" if threads == 0 else "cpu", threads=threads or None).engine
    engine.params[:] = random_model(config, "reference").engine.params
    names = ("beta1", "beta2", "eps", "weight_decay", "momentum", "grad_clip")
    values = {"beta1": 0.85, "beta2": 0.99, "eps": 1e-8} | constants
    engine.optimiser.constants[:] = [values.get(name, 0.0) for name in names]
    return engine


def training_data(config, steps, documents, seed=0):
    rng = np.random.default_rng(seed)
    stream = rng.integers(0, config.vocab, 500, dtype=np.int32)
    lengths = rng.integers(1, config.block_size + 1, (steps, documents))
    spans = np.stack([rng.integers(0, 480, (steps, documents)), lengths], axis=2)
    return stream, spans, np.linspace(0.01, 0.001, steps)


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


# ---------------------------------------------------------------- how many


def test_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(team, "processors", lambda: 4)
    large = tl.presets["shakespeare-char"].model.replace(vocab_size=65)
    assert team.team_size(large, 12, None) == 4
    assert team.team_size(large, 3, None) == 4
    assert team.team_size(MICROGPT, 16, None) == 1  # not worth it
    assert team.team_size(MICROGPT, 16, 3) == 3  # unless asked for
    assert team.team_size(MICROGPT, 0, None) == 1
    assert [team.decoding_team(c, None) for c in (MICROGPT, tl.presets["gpt2"].model)] == [1, 4]
    assert team.decoding_team(MICROGPT, 3) == 3


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2", True, 10**9])
def test_wrong_numbers_of_threads_are_refused(wrong):
    for make in (
        lambda: tl.GPT(MICROGPT, threads=wrong),
        lambda: tl.train(threads=wrong, steps=1, progress=False),
    ):
        with pytest.raises(ConfigError, match="threads"):
            make()


def test_the_reference_has_one_thread():
    assert tl.GPT(MICROGPT, engine="reference", threads=1).engine.team(16) == 1
    with pytest.raises(ConfigError, match="threads"):
        tl.GPT(MICROGPT, engine="reference", threads=2)


@given(st.integers(0, 200), st.integers(1, 70))
def test_shares_and_parts_cover_everything_once(size, threads):
    for bounds in (team.shares(size, threads), team.parts(size, threads)):
        assert len(bounds) == threads
        assert [i for begin, end in bounds for i in range(begin, end)] == list(range(size))
    assert max(end - begin for begin, end in team.shares(size, threads)) == -(-size // threads)
    assert all(begin % 16 == 0 or begin == size for begin, _ in team.parts(size, threads))


@given(st.integers(1, 9))
def test_segments_of_parts_are_those_of_the_whole(threads):
    segments = decay_segments(ODD)
    size = segments[-1, 1]
    whole, cut = np.zeros(size, int), np.zeros(size, int)
    for first, end, decays in segments:
        whole[first:end] = 1 + decays
    for begin, stop in team.parts(size, threads):
        for first, end, decays in cut_segments(segments, begin, stop):
            cut[begin:stop][first:end] += 1 + decays
    assert np.array_equal(cut, whole)


# ---------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("threads", [2, 3, 8])
@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_training_agrees_with_one_thread_and_the_reference(optimiser, clip, threads):
    """Sums over documents are rounded in another order: 1e-6 in the first loss; then Adam, which divides
    gradients by their own size, makes of a rounding what it makes of float32's beside float64's."""
    constants = {"grad_clip": clip, "weight_decay": 0.1} if optimiser == "adamw" else {"grad_clip": clip}
    constants |= {"momentum": 0.9} if optimiser == "sgd" else {}
    engines = [engine_of(k, **constants) for k in (threads, 1, 0)]
    data = training_data(ODD, 50, documents=7)
    several, one, exact = (engine.train(*data, optimiser).losses for engine in engines)
    assert abs(several[0] / one[0] - 1) <= 1e-6
    np.testing.assert_allclose(several, one, rtol=0, atol=1e-4)
    np.testing.assert_allclose(several, exact, rtol=0, atol=1e-4)
    for other in engines[1:]:
        assert relative(engines[0].params, other.params) <= 1e-4
        assert relative(engines[0].grads, other.grads) <= 1e-3  # of the last step, at weights 1e-4 apart


@pytest.mark.parametrize("config", [ODD, MICROGPT, MHC], ids=["odd", "microgpt", "mhc"])
@settings(max_examples=40)
@given(st.data(), st.integers(1, 12), st.integers(0, 9999), st.booleans())
def test_gradients_and_logits_agree_with_the_reference(config, data, threads, seed, weighted):
    """For documents of which each thread gets some, and for few, of which each gets a part."""
    batch = random_batch(config, data.draw(lengths_of(config, 9)), seed, weighted)
    engine = engines_by_threads(config, threads)
    exact = engines_by_threads(config, 0)
    assert abs(engine.loss_and_grad(*batch) - exact.loss_and_grad(*batch)) <= 1e-5
    assert abs(engine.loss(*batch) - exact.loss(*batch)) <= 1e-5
    noise = 5e-7 * np.linalg.norm(exact.engine.grads)
    for name, g in engine.grads.items():
        apart = np.linalg.norm(g - exact.grads[name])
        assert apart <= 1e-4 * np.linalg.norm(exact.grads[name]) + noise, name
    logits = engine.logits(batch.tokens, batch.starts)
    np.testing.assert_allclose(logits, exact.logits(batch.tokens, batch.starts), rtol=0, atol=1e-4)


_models: dict[tuple[GPTConfig, int], tl.GPT] = {}


def engines_by_threads(config, threads):
    """One model for each number of threads (0 is the reference), all with the same weights: buffers
    keep what an earlier, larger batch left in them, which must not count."""
    if (config, threads) not in _models:
        model = tl.GPT(config, None, "cpu" if threads else "reference", threads=threads or None)
        model.engine.params[:] = random_model(config, "reference").engine.params
        _models[config, threads] = model
    return _models[config, threads]


def test_gradients_stay_the_views_they_were():
    """Batches that are larger than those before them leave `model.grads` where it is."""
    model = tl.GPT(ODD, 0, threads=4)
    grads = model.grads["wqkv"]
    model.loss_and_grad(*random_batch(ODD, [5], 0))
    first = grads.copy()
    model.loss_and_grad(*random_batch(ODD, [5, 5, 5, 5], 1))
    assert not np.array_equal(grads, first)
    assert np.shares_memory(grads, model.engine.grads)
    model.loss_and_grad(*random_batch(ODD, [5], 0))
    assert np.array_equal(grads, first)


def test_batches_of_changing_size():
    """The number of documents may change from call to call, and with it how threads share them."""
    engine, exact = engine_of(4), engine_of(0)
    for documents in (1, 6, 2, 1, 3):
        data = training_data(ODD, 5, documents, seed=documents)
        np.testing.assert_allclose(engine.train(*data).losses, exact.train(*data).losses, rtol=0, atol=1e-4)
    assert relative(engine.params, exact.params) <= 1e-4
    assert np.allclose(engine.optimiser.powers, exact.optimiser.powers, rtol=1e-12)


def test_steps_of_several_batches():
    """The gradient of a step is that of all its batches together, by tokens."""
    stream, spans, lrs = training_data(ODD, 12, documents=6)
    for threads in (0, 1, 3):
        whole, parted = engine_of(threads, grad_clip=0.5), engine_of(threads, grad_clip=0.5)
        losses = whole.train(stream, spans, lrs).losses
        np.testing.assert_allclose(
            parted.train(stream, spans.reshape(12, 3, 2, 2), lrs).losses, losses, rtol=1e-5
        )
        assert relative(parted.params, whole.params) <= 1e-4


@pytest.mark.parametrize("config", [ODD, MICROGPT, MHC], ids=["odd", "microgpt", "mhc"])
def test_threads_generate_the_same_together(config):
    texts = []
    for threads in (1, 2, 5):
        engine = tl.GPT(config, None, threads=threads).engine
        engine.params[:] = random_model(config, "reference").engine.params
        uniforms = np.random.default_rng(0).random(400)
        rows, used = engine.generate([1, 2], 10, 40, uniforms, eos=[0], top_k=7)
        texts.append(([row.tolist() for row in rows], used))
    assert texts[0] == texts[1] == texts[2]


# ---------------------------------------------------------------- bit for bit


@pytest.mark.parametrize("pieces", [(), (1, 2, 30)], ids=len)
@pytest.mark.parametrize("threads", [2, 5])
def test_training_repeats_bit_for_bit(threads, pieces):
    stream, spans, lrs = training_data(ODD, 40, documents=6)
    results = []
    for cuts in ([0, 40], [0, *pieces, 40]):
        engine = engine_of(threads, grad_clip=0.5)
        bounds = itertools.pairwise(cuts)
        losses = [engine.train(stream, spans[a:b], lrs[a:b]).losses for a, b in bounds]
        results.append(np.concatenate(losses).tobytes() + engine.params.tobytes())
    assert results[0] == results[1]


TRAIN = """
import hashlib, tapeless as tl
run = tl.train("names", steps=60, batch_size=7, threads=3, samples=3, progress=False)
print(hashlib.sha256(run.losses.tobytes() + run.model.engine.params.tobytes()).hexdigest(), run.samples)
"""


def train_names(threads=3, **options):
    return tl.train("names", steps=60, batch_size=7, threads=threads, samples=3, progress=False, **options)


def digest(run):
    return hashlib.sha256(run.losses.tobytes() + run.model.engine.params.tobytes()).hexdigest()


def test_two_processes_train_alike(child):
    run = train_names()
    assert child(TRAIN) == f"{digest(run)} {run.samples}"
    np.testing.assert_allclose(run.losses, train_names(1).losses, rtol=0, atol=1e-4)


def test_runs_in_several_python_threads_do_not_disturb_each_other():
    alone = [digest(train_names(k)) for k in (1, 2, 3)]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda k: digest(train_names(k)), (1, 2, 3)))
    assert together == alone


def test_workers_are_used_again():
    train_names(3)
    before = threading.active_count()
    for _ in range(3):
        train_names(3)
    assert threading.active_count() == before


# ---------------------------------------------------------------- runs


def test_a_run_records_its_threads_and_goes_on_with_them(tmp_path):
    whole = train_names(2, out=tmp_path / "whole")
    tl.train(
        "names", steps=25, batch_size=7, threads=2, samples=0, lr=0.01,
        set={"schedule": "constant"}, out=tmp_path / "half", progress=False,
    )  # fmt: skip
    config = tmp_path / "half" / "config.json"
    assert json.loads(config.read_text())["threads"] == 2
    on = tl.train(out=tmp_path / "half", steps=60, resume=True, progress=False)
    assert on.model.engine.team(7) == 2
    straight = tl.train(
        "names", steps=60, batch_size=7, threads=2, samples=0, lr=0.01,
        set={"schedule": "constant"}, progress=False,
    )  # fmt: skip
    assert on.model.engine.params.tobytes() == straight.model.engine.params.tobytes()
    assert on.losses.tobytes() == straight.losses[25:].tobytes()
    assert whole.model.engine.team(7) == 2


def test_a_resumed_run_may_change_its_threads(tmp_path):
    train_names(2, out=tmp_path)
    config = tmp_path / "config.json"
    tl.train(out=tmp_path, steps=70, resume=True, threads=3, samples=0, progress=False)
    assert json.loads(config.read_text())["threads"] == 3
    tl.train(out=tmp_path, steps=80, resume=True, engine="cpu", samples=0, progress=False)
    assert json.loads(config.read_text())["threads"] == 3
    tl.train(out=tmp_path, steps=90, resume=True, engine="reference", samples=0, progress=False)
    assert json.loads(config.read_text())["threads"] == 1


def test_runs_from_before_there_were_threads_can_be_resumed(tmp_path):
    train_names(2, out=tmp_path)
    config = tmp_path / "config.json"
    saved = json.loads(config.read_text())
    del saved["threads"]
    shutil.rmtree(tmp_path / "checkpoints")  # these, too, are younger
    config.write_text(json.dumps(saved))
    assert tl.train(out=tmp_path, steps=70, resume=True, samples=0, progress=False).model.engine.team(7) == 1
    shutil.rmtree(tmp_path / "checkpoints")
    for wrong in (0, "two", 2.5):
        config.write_text(json.dumps(saved | {"threads": wrong}))
        with pytest.raises(RunError, match="does not describe a training run"):
            tl.train(out=tmp_path, steps=80, resume=True, samples=0, progress=False)


def test_the_command(tmp_path):
    train = ("train", "--steps", 5, "--batch-size", 4, "--samples", 1, "--out")
    result = succeeds(*train, tmp_path / "run", "--threads", 2, cwd=tmp_path)
    assert "2 threads, float32)" in result.stderr
    assert "1 thread, float32)" in succeeds(*train, tmp_path / "other", cwd=tmp_path).stderr
    assert "threads" in refused(*train, tmp_path / "third", "--threads", 0, cwd=tmp_path)
    assert not (tmp_path / "third").exists()


def test_the_command_refuses_what_is_no_number(tmp_path):
    result = tapeless("train", "--threads", "x", cwd=tmp_path)
    assert result.returncode == 2
    assert "--threads" in result.stderr
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_budget_is_what_is_allocated(threads):
    engine = tl.GPT(ODD, threads=threads).engine
    engine.train(*training_data(ODD, 1, documents=8))
    engine.reserve(8 * ODD.block_size, 8, threads)
    plans = memory(ODD, "float32", 8 * ODD.block_size, 8, threads, "mv")
    groups = {"activations": engine.a, "activation gradients": engine.d, "batch": engine.batch}
    for name, group in groups.items():
        assert sum(view.nbytes for view in group) == sum(plans.pop(name).sizes().values())
    assert {plan.nbytes for plan in plans.values()} == {engine.params.nbytes}
    assert len(plans) == len((engine.params, engine.grads, engine.optimiser.m, engine.optimiser.v))


# ---------------------------------------------------------------- starting and ending


@pytest.mark.signals
def test_tasks_run_at_the_same_time_and_are_waited_for():
    barrier, seen = threading.Barrier(5), []

    def task():
        barrier.wait()  # passes only if all five are here
        seen.append(threading.get_ident())

    for _ in range(3):
        team.run_together([task] * 5)
    assert len(seen) == 15
    assert len(set(seen)) == 5


def test_nothing_begins_if_a_thread_is_refused(monkeypatch):
    monkeypatch.setattr(team, "_idle", [])
    begun, start = [], threading.Thread.start

    def refuse_the_third(self):
        if len(team._idle) == 0 and len(begun) == 0 and threading.active_count() >= limit:
            raise RuntimeError("can't start new thread")
        start(self)

    limit = threading.active_count() + 2
    monkeypatch.setattr(threading.Thread, "start", refuse_the_third)
    with pytest.raises(RuntimeError):
        team.run_together([lambda: begun.append(1)] * 3)
    assert not begun
    assert len(team._idle) == 2  # those that did start wait for the next team


class Waits(SimpleQueue):
    """A queue that tells when the main thread begins to wait for it, by giving itself."""

    begun = SimpleQueue()

    def get(self):
        if threading.current_thread() is threading.main_thread():
            self.begun.put(self)
        return super().get()


INTERRUPTED = f"""
import os, signal, threading
from queue import SimpleQueue
from tapeless import team

{inspect.getsource(Waits)}

team.SimpleQueue = Waits
done, heard = [], threading.Event()

def handler(*_):
    raise RAISED("now")

for number in SIGNALS:
    signal.signal(number, handler)

def first():
    news = Waits.begun.get()  # the main thread waits for the tasks
    for number in SIGNALS:
        os.kill(os.getpid(), number)
    news.put(None)  # a signal that came just before it fell asleep is heard when it wakes up
    Waits.begun.get()  # it was interrupted, and waits again
    heard.set()
    done.append(1)

def second():
    heard.wait()
    done.append(1)

try:
    team.run_together([first, second])
    print("went on")
except RAISED:
    print("interrupted after", len(done))
team.run_together([lambda: done.append(1)] * 2)
print(len(done))
"""


@signals
@pytest.mark.parametrize("raised", ["KeyboardInterrupt", "SystemExit", "TimeoutError"])
@pytest.mark.parametrize("numbers", ["[signal.SIGINT]", "[signal.SIGINT, signal.SIGTERM]"])
def test_what_signals_raise_waits_until_all_are_done(numbers, raised, child):
    """The threads work in the caller's buffers. What two signals raise comes in immediate succession."""
    code = INTERRUPTED.replace("SIGNALS", numbers).replace("RAISED", raised)
    assert child(code).splitlines() == ["interrupted after 2", "4"]


@pytest.mark.signals
def test_an_interrupt_as_they_begin_waits_too(monkeypatch):
    """A signal that comes while the work is handed over is heard right after that."""

    class Interrupted(SimpleQueue):
        def put(self, item):
            super().put(item)
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt

    class Worker(team._Worker):
        def __init__(self):
            threading.Thread.__init__(self, daemon=True)
            self.tasks = Interrupted()
            self.start()

    waits = threading.Event()

    class News(SimpleQueue):
        def get(self):
            waits.set()
            return super().get()

    def task():
        waits.wait()  # until the main thread does, although it was interrupted
        ended.append(1)

    ended = []
    monkeypatch.setattr(team, "_take_workers", lambda count: [Worker() for _ in range(count)])
    monkeypatch.setattr(team, "_idle", [])
    monkeypatch.setattr(team, "SimpleQueue", News)
    with pytest.raises(KeyboardInterrupt):
        team.run_together([task, task])
    assert len(ended) == 2


def test_a_task_that_fails_is_heard_of():
    """And its thread is still there for the next task."""

    def fails():
        raise MemoryError("no room")

    for _ in range(3):
        with pytest.raises(MemoryError, match="no room"):
            team.run_together([fails, lambda: None])
        done = SimpleQueue()
        team.run_together([partial(done.put, 1), partial(done.put, 2)])
        assert {done.get(), done.get()} == {1, 2}


FORKED = """
import os
import tapeless as tl

def losses():
    run = tl.train("names", threads=2, steps=3, batch_size=4, samples=0, progress=False)
    return run.losses.tolist()

mine = losses()
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
    print("both")
else:
    os._exit(losses() != mine)
"""


@pytest.mark.signals
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_has_threads_of_its_own(child):
    assert child(FORKED).strip() == "both"
