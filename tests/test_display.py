"""A display that goes away, and whatever else goes wrong between steps: nothing that was done is lost."""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
import warnings
from contextlib import contextmanager, suppress

import numpy as np
import pytest

import tapeless as tl
from commands import COMMAND, LISTENING, environment, listen, succeeds
from tapeless.errors import ConfigError, RunError
from test_runs import contents, losses

training = importlib.import_module("tapeless.train")
full_disks = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="pipes, terminals and signals of POSIX")

# The command, which saves after each chunk of steps: whoever waits for a step need not wait long.
DRIVER = """
import importlib, sys
train = importlib.import_module("tapeless.train")
train.SAVE_SECONDS, train.SAVE_SHARE, train.CHUNK_SECONDS = 0.0, 1e9, 0.002
from tapeless.__main__ import main
main()
"""
ENDLESS = ("--engine", "reference", "--steps", "100000000", "--out", "run")


def driven(*arguments, cwd, **streams):
    command = [sys.executable, "-c", DRIVER, *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, env=environment(TERM="xterm"), **(LISTENING | streams))


def saved_step(folder):
    steps = [int(path.name.split("-step-")[1]) for path in (folder / "checkpoints").glob("[0-9]*")]
    return max(steps, default=0)


def wait_for_more(process, folder):
    """Until steps that were not done yet are saved."""
    before = saved_step(folder)
    while saved_step(folder) <= before:
        assert process.poll() is None


def assert_saved(folder):
    """All steps that were logged are in the newest checkpoint, and the run goes on from there."""
    done = saved_step(folder)
    assert len(losses(folder)) == done > 0
    run = tl.train(out=folder, resume=True, steps=done + 2, samples=0, progress=False)
    assert run.steps == done + 2


# ---------------------------------------------------------------- terminals


@contextmanager
def terminal():
    """Both ends of one; what is shown on it is thrown away."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    try:
        yield ours, theirs
    finally:
        for end in (ours, theirs):
            with suppress(OSError):  # the test has closed it
                os.close(end)


def read_until_saved(process, ours, folder):
    while not saved_step(folder):
        assert process.poll() is None
        os.read(ours, 65536)


@pytest.mark.signals
@pytest.mark.skipif(not hasattr(os, "login_tty"), reason="no os.login_tty")
@pytest.mark.parametrize("ignores", [False, True], ids=["as usual", "as by nohup"])
def test_a_terminal_that_is_closed(ignores, tmp_path):
    """The system sends SIGHUP, and refuses what is written from then on: the run stops and is saved, or
    goes on if it shall not hear of that."""

    def begin():
        os.login_tty(theirs)
        listen()
        if ignores:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with terminal() as (ours, theirs):
        process = driven("train", *ENDLESS, cwd=tmp_path, preexec_fn=begin)
        os.close(theirs)
        read_until_saved(process, ours, tmp_path / "run")
        os.close(ours)
    if ignores:
        for _ in range(5):  # a run that stops saves once more
            wait_for_more(process, tmp_path / "run")
        process.send_signal(signal.SIGTERM)
    assert process.wait() == (143 if ignores else 129)
    assert_saved(tmp_path / "run")


@pytest.mark.signals
def test_a_hangup_stops_a_run_as_ctrl_c_does(tmp_path):
    process = driven("train", *ENDLESS, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not saved_step(tmp_path / "run"):
        assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    told = process.communicate()[1]
    assert process.returncode == 129
    assert f"Stopped after step {saved_step(tmp_path / 'run'):,}; saved." in told
    assert_saved(tmp_path / "run")


# ---------------------------------------------------------------- pipes


@pytest.mark.signals
def test_ctrl_c_when_tee_has_ended_before(tmp_path):
    """`tapeless train … 2>&1 | tee log`: the terminal sends Ctrl-C to both."""
    process = driven("train", *ENDLESS, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    tee = subprocess.Popen(["cat"], stdin=process.stdout, stdout=subprocess.DEVNULL, **LISTENING)
    process.stdout.close()
    while not saved_step(tmp_path / "run"):
        assert process.poll() is None
    tee.send_signal(signal.SIGINT)
    tee.wait()
    wait_for_more(process, tmp_path / "run")
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert_saved(tmp_path / "run")


@pytest.mark.parametrize("both", [True, False], ids=["2>&1 | head -1", "2> (head -1)"])
def test_a_reader_that_has_seen_enough(both, tmp_path):
    """Training ends as it would have; then its texts are of use to nobody."""
    arguments = ("train", "--engine", "reference", "--steps", "300", "--samples", "1", "--out", "run")
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT if both else subprocess.PIPE}
    process = subprocess.Popen([*COMMAND, *arguments], cwd=tmp_path, env=environment(), **streams)
    reader = process.stdout if both else process.stderr
    assert b"microgpt" in reader.readline()
    reader.close()
    shown = b"" if both else process.stdout.read()
    assert process.wait() == (141 if both else 0)
    assert len(losses(tmp_path / "run")) == saved_step(tmp_path / "run") == 300
    texts = (tmp_path / "run/samples.txt").read_text()
    assert texts.count("\n") == 1
    assert shown.decode() == ("" if both else texts)


# ---------------------------------------------------------------- every command


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    (folder / "text.txt").write_text("anna\nbob\ncarl\n" * 50)
    model = tl.presets["gpt2"].model.replace(vocab_size=27, block_size=8, n_layer=1, n_head=2, n_embd=8)
    tl.GPT(model, 0).save(folder / "gpt2")
    options = {"engine": "reference", "steps": 3, "samples": 1, "progress": False}
    tl.train(out=folder / "run", set={"val_fraction": 0.01, "eval_batches": 1}, **options)
    return folder


COMMANDS = {
    "train": ("train", "--engine", "reference", "--steps", "3", "--samples", "2", "--out", "new"),
    "sample": ("sample", "run", "-n", "3", "--engine", "reference"),
    "eval": ("eval", "run", "text.txt", "--engine", "reference"),
    "tokenize": ("tokenize", "text.txt", "--out", "new", "--tokenizer", "chars"),
    "check": ("check", "microgpt", "--engine", "reference", "--entries", "2", "--report", "new/report.html"),
    "convert": ("convert", "gpt2", "new/model.bin"),
    "export": ("export", "microgpt", "--out", "new"),
    "presets": ("presets",),
    "help": ("train", "--help"),
}


def files_of(folder):
    return contents(folder / "new") if (folder / "new").is_dir() else {}


def copied(place, folder):
    folder.mkdir()
    for path in place.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture
def scratch(place, tmp_path):
    return copied(place, tmp_path / "scratch")


def run_into(name, cwd, **streams):
    return subprocess.run([*COMMAND, *COMMANDS[name]], cwd=cwd, env=environment(), check=False, **streams)


@full_disks
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_without_its_reader(name, place, tmp_path):
    """A full disk behind standard error changes nothing. Where nobody reads the output, the exit code is the
    one that a shell reports of other programs, 128 + SIGPIPE, and every file is written."""
    usual = copied(place, tmp_path / "usual")
    printed = succeeds(*COMMANDS[name], cwd=usual).stdout
    with open("/dev/full", "w") as full:
        silent = copied(place, tmp_path / "silent")
        done = run_into(name, silent, stdout=subprocess.PIPE, stderr=full)
    assert (done.returncode, done.stdout.decode()) == (0, printed)
    assert files_of(silent) == files_of(usual)
    reading, writing = os.pipe()
    os.close(reading)
    unread = copied(place, tmp_path / "unread")
    done = run_into(name, unread, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.returncode == (141 if printed else 0)
    assert b"Traceback" not in done.stderr
    assert b"error" not in done.stderr
    assert files_of(unread) == files_of(usual)


@pytest.mark.skipif(os.name != "posix", reason="closes streams by a shell")
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_whose_streams_are_closed(name, place, tmp_path):
    """As on the null device. No file that is opened gets a stream's number, and what is printed with it."""

    def run(closed, folder):
        cwd = copied(place, tmp_path / folder)
        by_a_shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *COMMAND, *COMMANDS[name]]
        done = subprocess.run(by_a_shell, cwd=cwd, env=environment(), capture_output=True, check=False)
        assert b"Traceback" not in done.stderr
        assert done.returncode == 0
        return done.stdout, files_of(cwd)

    printed, files = run("", "usual")
    assert run("<&- >&- 2>&-", "all") == (b"", files)
    if name == "presets":
        assert run("2>&-", "error") == (printed, files)
        assert run(">&-", "output") == (b"", files)


@pytest.mark.skipif(os.name != "posix", reason="closes streams by a shell")
def test_a_refusal_without_streams(tmp_path):
    arguments = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *COMMAND, "train", "nowhere.txt"]
    assert subprocess.run(arguments, cwd=tmp_path, env=environment(), check=False).returncode == 2
    assert contents(tmp_path) == {}


@full_disks
@pytest.mark.parametrize("command", [("train", "nowhere.txt"), ("sample", "nowhere"), ("bench", "nothing")])
def test_a_refusal_that_cannot_be_told(command, tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, *command], cwd=tmp_path, env=environment(), stderr=full, check=False)
    assert done.returncode == 2
    assert contents(tmp_path) == {}


@full_disks
@pytest.mark.parametrize("name", ["sample", "presets"])
def test_output_that_does_not_fit_on_the_disk(name, scratch):
    with open("/dev/full", "w") as full:
        done = run_into(name, scratch, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (2, b"error: output: No space left on device.\n")


# What a signal's handler prints is dropped if it comes in the middle of writing to the same stream. So these
# programs say where they are by os.write, which is done when it is read.
WAITS = """
import os, time
from tapeless.data import tokenize
def wait(*_):
    os.write(2, b"waiting\\n")
    while True:
        time.sleep(0.05)
tokenize._publish = wait
from tapeless.__main__ import main
main()
"""


@pytest.mark.signals
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_command_that_is_stopped_leaves_nothing_half_done(number, code, scratch):
    before = contents(scratch)
    command = [sys.executable, "-c", WAITS, *COMMANDS["tokenize"]]
    process = subprocess.Popen(
        command, cwd=scratch, env=environment(), stderr=subprocess.PIPE, text=True, **LISTENING
    )
    assert process.stderr.readline() == "waiting\n"
    process.send_signal(number)
    assert process.communicate()[1] == "Interrupted.\n"
    assert process.returncode == code
    assert contents(scratch) == before


VALIDATES = """
import os, time
from tapeless.job import Job
def validate(self):
    os.write(2, b"validating\\n")
    while True:
        time.sleep(0.05)
Job.validate = validate
from tapeless.__main__ import main
main()
"""


@pytest.mark.signals
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_second_signal_leaves_out_what_takes_long(number, code, tmp_path):
    arguments = ("--engine", "reference", "--set", "val_fraction=0.1", "--eval-every", "5", "--out", "run")
    command = [sys.executable, "-c", VALIDATES, "train", *arguments]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True, **LISTENING
    )
    while process.stderr.readline() != "validating\n":
        assert process.poll() is None
    process.send_signal(number)
    assert process.stderr.readline() == "Stopping when this is done. Ctrl-C again leaves it out.\n"
    process.send_signal(number)
    assert process.communicate()[1] == "Interrupted.\n"
    assert process.returncode == code
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- what is told


def test_each_line_tells_the_mean_of_its_own_steps(tmp_path):
    """However many steps the engine does at once: it soon does more than there are from line to line."""
    told = succeeds("train", "--steps", "205", "--samples", "0", "--out", "run", cwd=tmp_path).stderr
    rows = losses(tmp_path / "run")
    lines = re.findall(r"^step ([\d,]+)/205: loss ([\d.]+) \(mean of (\d+)\)", told, re.MULTILINE)
    assert [int(step) for step, _, _ in lines] == [*range(21, 205, 21), 205]
    before = 0
    for step, mean, count in lines:
        assert int(count) == int(step) - before
        assert float(mean) == pytest.approx(np.mean(rows[before : int(step)]), abs=6e-5)
        before = int(step)


# ---------------------------------------------------------------- errors between steps

HELD = {"n_embd": 8, "val_fraction": 0.01, "eval_every": 4, "eval_batches": 1, "sample_every": 6}
OPTIONS = {"engine": "reference", "steps": 14, "samples": 2, "set": HELD | {"order": "draw"}}


@pytest.fixture(scope="module")
def whole():
    """The same run, undisturbed."""
    return tl.train(progress=False, **OPTIONS)


class Raises:
    """Progress that raises `error` in the method `name` once step 8 is done."""

    def __init__(self, name, error):
        self.name, self.error, self.step = name, error, 0

    def __getattr__(self, name):
        def tell(*given):
            if name == "update":
                self.step += len(given[0])
            if name == self.name and self.step >= 8:
                raise self.error

        return tell


@pytest.fixture
def step_by_step(monkeypatch):
    """After the first chunk, of one step, as many as there are until something else is to be done."""
    monkeypatch.setattr(training, "CHUNK_SECONDS", 1e9)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("update", ValueError("mine")),
        ("evaluated", OSError(5, "mine")),
        ("sampled", KeyboardInterrupt()),
        ("update", SystemExit(3)),
        ("finish", ValueError("mine")),
    ],
)
def test_what_a_progress_raises_is_raised_when_all_is_saved(name, error, tmp_path, step_by_step, whole):
    folder = tmp_path / "run"
    with pytest.raises(type(error)) as raised:
        tl.train(out=folder, progress=Raises(name, error), **OPTIONS)
    assert raised.value is error
    done = {"update": 8, "evaluated": 8, "sampled": 12, "finish": 14}[name]
    assert saved_step(folder) == len(losses(folder)) == done
    if name != "finish":  # which comes after everything
        assert error.__notes__[-1] == f"{folder} keeps the state after step {done}."
        del error.__notes__
    # And on, to the same numbers.
    tl.train(out=folder, resume=True, progress=False)
    assert losses(folder) == whole.losses.tolist()
    assert (folder / "samples.txt").read_text() == "".join(f"{text}\n" for text in whole.samples)


def test_without_a_folder_there_is_nothing_to_save():
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine"):
        tl.train(progress=Raises("update", error), **OPTIONS)
    assert not hasattr(error, "__notes__")


FAILS = {
    "validating": ("tapeless.job", "score", 2),
    "generating": ("tapeless.job", "generate", 1),
    "taking data": ("tapeless.data.documents", "Corpus.take", 4),
    "in a step": ("tapeless.engine", "Engine.train", 3),
    "looking at a step": ("tapeless.guard", "Guard.finite", 2),
    "remembering a step": ("tapeless.guard", "Snapshot.__init__", 4),
    "saving the best": ("tapeless.job", "Job._contents", 3),
    "logging": ("tapeless.io.runs", "append_rows", 2),
    "measuring": ("tapeless.meter", "Meter.speed", 3),
}


@pytest.mark.parametrize("where", FAILS)
def test_an_error_anywhere_leaves_what_was_done(where, tmp_path, monkeypatch, whole):
    """At the nth call of a function, before or after its work: between steps everything is saved, within one
    what was done before it."""
    monkeypatch.setattr(training, "CHUNK_SECONDS", 0.0)
    module, path, count = FAILS[where]
    owner = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, name)
    for late, error in ((False, MemoryError()), (True, TimeoutError("an alarm"))):
        calls = iter(range(count))

        def failing(*arguments, calls=calls, late=late, error=error, **options):
            last = next(calls, None) == count - 1
            result = None if last and not late else original(*arguments, **options)
            if last:
                raise error
            return result

        folder, told = tmp_path / f"run-{late}", Counts()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            with pytest.raises(type(error)):
                tl.train(out=folder, progress=told, **OPTIONS)
        done = saved_step(folder)
        assert done >= told.step > 0
        assert done == len(losses(folder))
        tl.train(out=folder, resume=True, progress=False)
        assert losses(folder) == whole.losses.tolist()


class Counts(Raises):
    def __init__(self):
        super().__init__("", None)


def test_too_little_memory_says_what_is_kept(tmp_path):
    code = "from tapeless import job\ndef score(*_, **__): raise MemoryError\njob.score = score\n"
    code += "from tapeless.__main__ import main\nmain()"
    options = ("--engine", "reference", "--steps", "3", "--set", "val_fraction=0.1", "--out", "run")
    command = [sys.executable, "-c", code, "train", *options]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: there is not enough memory for this: choose smaller sizes. run keeps the state after step 3."
    )
    assert saved_step(tmp_path / "run") == 3


def test_a_warning_that_is_an_error(tmp_path, monkeypatch):
    """As by python -W error, when an old checkpoint cannot be removed."""
    runs = importlib.import_module("tapeless.io.runs")

    def refuse(place):
        raise RunError(f"cannot write {place}: mine.")

    monkeypatch.setattr(runs, "remove_checkpoint", refuse)
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(training, "SAVE_SHARE", 1e9)
    monkeypatch.setattr(training, "CHUNK_SECONDS", 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="mine"):
            tl.train(out=tmp_path / "run", progress=False, engine="reference", steps=9, samples=0)
    assert saved_step(tmp_path / "run") == 2  # 0, 1, 2, of which one should have gone
    assert len(losses(tmp_path / "run")) == 2


def test_an_error_that_cannot_be_followed_by_a_save(tmp_path, monkeypatch, whole):
    """It is raised all the same, and says what is kept."""
    job = importlib.import_module("tapeless.job")

    class Breaks(Raises):
        def __getattr__(self, name):
            tell = super().__getattr__(name)

            def instead(*given):
                try:
                    tell(*given)
                except ValueError:
                    monkeypatch.setattr(job.saves, "save", full)
                    raise

            return instead

    def full(*_, **__):
        raise RunError("no space")

    with pytest.raises(ValueError, match="mine") as raised:
        tl.train(out=tmp_path / "run", progress=Breaks("update", ValueError("mine")), **OPTIONS)
    assert raised.value.__notes__ == [f"{tmp_path / 'run'} keeps the state after step 0."]
    monkeypatch.undo()
    tl.train(out=tmp_path / "run", resume=True, progress=False)
    assert losses(tmp_path / "run") == whole.losses.tolist()


@pytest.mark.signals
def test_texts_that_are_left_out_leave_no_trace(tmp_path, monkeypatch, whole):
    """Two Ctrl-C's while texts are generated: the random numbers of later steps are the same."""
    job = importlib.import_module("tapeless.job")
    generate = job.generate

    def interrupted(model, prompt, n, temperature, rng, **more):
        rng.uniforms(50)
        if n == 2:  # not those at the end
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return generate(model, prompt, n, temperature, rng, **more)

    monkeypatch.setattr(job, "generate", interrupted)
    with pytest.raises(tl.Interrupted) as stopped:
        tl.train(out=tmp_path / "run", progress=False, **OPTIONS)
    assert stopped.value.run.steps == 6
    monkeypatch.undo()
    tl.train(out=tmp_path / "run", resume=True, progress=False)
    assert losses(tmp_path / "run") == whole.losses.tolist()


def test_the_display_is_silent_where_it_cannot_write(capsys, monkeypatch):
    """In Python, too: a closed stream, a full disk, none at all."""

    class Full:
        encoding = "utf-8"

        def write(self, text):
            raise OSError(28, "No space left on device")

        flush = isatty = lambda self: False

    closed = open(os.devnull, "w")  # noqa: SIM115
    closed.close()
    for stream in (Full(), closed, None):
        monkeypatch.setattr(sys, "stderr", stream)
        run = tl.train(engine="reference", steps=12, samples=1)
        assert run.steps == 12


def test_handlers_from_before_are_there_again():
    """Of a program in Python that trains: of all signals that stop training, whatever became of it."""
    signals = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    mine = [lambda *_: None, signal.SIG_IGN, lambda *_: None]
    before = [signal.signal(number, handler) for number, handler in zip(signals, mine, strict=True)]
    try:
        options = {"engine": "reference", "samples": 0, "progress": False}
        tl.train("names", steps=2, **options)
        assert [signal.getsignal(number) for number in signals] == mine
        with pytest.raises(ConfigError):
            tl.train("names", steps=-1, **options)
        assert [signal.getsignal(number) for number in signals] == mine
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


# ---------------------------------------------------------------- programs that Python is a part of

HOST = r"""
#include <Python.h>
#include <signal.h>
static int heard;
static void mine(int number) { heard += number; }
int main(void) {
    signal(SIGINT, mine);
    signal(SIGTERM, mine);
    Py_InitializeEx(0);
    int failed = PyRun_SimpleString(
        "import tapeless\n"
        "from tapeless.data import workers\n"
        "print(tapeless.train('names', engine='reference', steps=20, samples=1, progress=False).steps)\n"
        "print(workers.trained(['aa ab'] * 9, 260).vocab_size, flush=True)\n");
    raise(SIGINT);
    raise(SIGTERM);
    printf("%d\n", heard == SIGINT + SIGTERM);
    fflush(stdout);
    Py_FinalizeEx();
    return failed ? 1 : 0;
}
"""


def test_handlers_of_a_host_program_stay(tmp_path):
    """They were installed from C, so Python could not restore them."""
    import shutil
    import sysconfig

    pytest.importorskip("tokenizers")
    include, version = sysconfig.get_path("include"), sysconfig.get_config_var("LDVERSION")
    libraries = sysconfig.get_config_var("LIBDIR")
    if not shutil.which("gcc") or not os.path.exists(f"{include}/Python.h"):
        pytest.skip("no gcc, or no Python.h")
    (tmp_path / "host.c").write_text(HOST)
    more = (sysconfig.get_config_var("LIBS") + " " + sysconfig.get_config_var("SYSLIBS")).split()
    shared = ["-L", libraries, f"-Wl,-rpath,{libraries}", f"-lpython{version}", "-Wl,--export-dynamic", *more]
    built = subprocess.run(
        ["gcc", "host.c", "-o", "host", "-I", include, *shared],
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    if built.returncode:
        pytest.skip(f"Python cannot be embedded here: {built.stderr.decode()[-200:]}")
    path = os.pathsep.join(place for place in sys.path if place)
    done = subprocess.run(
        ["./host"],
        cwd=tmp_path,
        env=environment(PYTHONPATH=path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["20", "260", "1"]
