"""Compiled programs: kept on disk, loaded without Numba, rebuilt when damaged, right on lesser processors."""

import dataclasses
import os
import platform
from pathlib import Path

import numpy as np
import pytest

import tapeless as tl
from commands import environment, refused, succeeds
from helpers import random_batch, random_model, relative
from tapeless.config import GPTConfig
from tapeless.errors import ConfigError, Notice
from tapeless.ops.cpu import code_cache, native

HERE = Path(__file__).parent
TINY = GPTConfig(vocab_size=5, block_size=4, n_head=2, n_embd=4, norm="layer", norm_final=True)

EVALUATE = f"""
import sys
import tapeless as tl
from tapeless.config import GPTConfig

model = tl.GPT({TINY!r}, seed=0)
model.engine.notice = lambda: print("compiles")
print(model.loss([1, 2, 3], [2, 3, 4]).hex())
print("numba" in sys.modules)
"""


@pytest.fixture(scope="module")
def first(child, tmp_path_factory):
    """A cache folder after one process used it, and what that process printed."""
    folder = tmp_path_factory.mktemp("cache")
    return folder, child(EVALUATE, TAPELESS_CACHE_DIR=folder).split()


@pytest.fixture
def cache(first, tmp_path, monkeypatch):
    """A copy of that folder as this process's cache, and the program's file in it."""
    native.link_routine("product")  # once a process: not under what the tests below put in place of its parts
    for file in first[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (copy,) = tmp_path.glob("evaluate-*")
    monkeypatch.setenv("TAPELESS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return copy


def evaluate(config=TINY):
    """The loss as `EVALUATE` computes it, and whether something was compiled."""
    model = tl.GPT(config, seed=0)
    notices = []
    model.engine.notice = lambda: notices.append(1)
    return model.loss([1, 2, 3], [2, 3, 4]).hex(), bool(notices)


def test_a_second_process_neither_compiles_nor_imports_numba(child, first):
    folder, (notice, loss, numba) = first
    assert (notice, numba) == ("compiles", "True")
    assert child(EVALUATE, TAPELESS_CACHE_DIR=folder).split() == [loss, "False"]
    exact = tl.GPT(TINY, seed=0, engine="reference").loss([1, 2, 3], [2, 3, 4])
    assert float.fromhex(loss) == pytest.approx(exact, abs=1e-6)
    # Nothing lies about beside the code: of the program, and of the routine that all programs call.
    names = sorted(file.name.rsplit("-", 1)[0] for file in folder.iterdir())
    assert names == ["evaluate", "routine-product"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[:-1],
        lambda content: content[:500] + bytes([content[500] ^ 1]) + content[501:],
        lambda content: b"not object code at all" * 100,
    ],
    ids=["empty", "short", "cut", "one bit", "other"],
)
def test_a_damaged_file_is_rebuilt_silently(first, cache, monkeypatch, capfd, damage):
    whole = cache.read_bytes()
    cache.write_bytes(damage(whole))
    # The compiler would take seconds for what it gave before.
    monkeypatch.setattr(native, "compile_object", lambda groups, function: whole[32:])
    assert evaluate() == (first[1][1], True)
    assert cache.read_bytes() == whole
    assert evaluate() == (first[1][1], False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(os.name != "posix", reason="looks at owners and modes")
@pytest.mark.parametrize("whose", ["everybody's file", "everybody's folder", "another user's"])
def test_code_that_others_may_have_written_is_not_run(whose, first, cache, monkeypatch):
    """Though its checksum is right: who can write the code can write that."""
    whole = cache.read_bytes()
    if whose == "another user's":
        if os.getuid() != 0:
            pytest.skip("only root can give files away")
        os.chown(cache, 12345, -1)
    else:
        place = cache if whose == "everybody's file" else cache.parent
        place.chmod(place.stat().st_mode | 0o002)
    assert code_cache.read(cache) is None
    monkeypatch.setattr(native, "compile_object", lambda groups, function: whole[32:])
    code_cache._tell.cache_clear()
    if whose == "everybody's folder":  # and stays so: another is used
        with pytest.warns(Notice, match="other users may write there"):
            assert evaluate() == (first[1][1], True)
    else:
        assert evaluate() == (first[1][1], True)
    assert evaluate() == (first[1][1], False)
    cache.parent.chmod(0o1777)  # as /tmp
    assert code_cache.read(cache) == whole[32:]


def test_a_damaged_file_is_rebuilt_by_the_compiler(child, first, cache):
    cache.write_bytes(cache.read_bytes()[:-100])
    assert child(EVALUATE, TAPELESS_CACHE_DIR=cache.parent).split() == first[1]
    assert child(EVALUATE, TAPELESS_CACHE_DIR=cache.parent).split() == [first[1][1], "False"]


OTHER_VALUES = {
    "vocab_size": 6,
    "block_size": 5,
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 8,
    "n_hidden": 17,
    "norm": "rms",
    "norm_gain": True,
    "norm_bias": True,
    "norm_embed": True,
    "norm_attn": False,
    "norm_mlp": False,
    "norm_final": False,
    "norm_eps": 1e-6,
    "activation": "gelu",
    "bias": True,
    "tied": True,
    "residual": "mhc",
    "recompute": True,
    "precision": "bf16",
}


def test_every_setting_of_a_model_has_its_own_code(cache, monkeypatch):
    """Whatever is a constant of the compiled code must be part of its key: the old code would be wrong."""
    assert set(OTHER_VALUES) >= {f.name for f in dataclasses.fields(GPTConfig)} - {
        "n_streams",  # follows residual
        "init",
        "attention",  # compiled code has one form of it
        "attention_tile",
    }
    code = cache.read_bytes()[32:]
    compiled = []
    monkeypatch.setattr(native, "compile_object", lambda groups, function: compiled.append(1) or code)
    tl.GPT(TINY, seed=0).engine.program("evaluate")
    assert not compiled
    for i, (name, value) in enumerate(OTHER_VALUES.items(), 1):
        for _ in range(2):
            tl.GPT(TINY.replace(**{name: value}), seed=0).engine.program("evaluate")
            assert len(compiled) == i, name
    assert len(list(cache.parent.glob("evaluate-*"))) == len(OTHER_VALUES) + 1


@pytest.mark.parametrize("what", ["program", "source", "processor", "features", "system", "bounds"])
def test_what_else_the_code_depends_on(cache, monkeypatch, what):
    code = cache.read_bytes()[32:]
    compiled = []
    monkeypatch.setattr(native, "compile_object", lambda groups, function: compiled.append(1) or code)
    if what == "source":
        monkeypatch.setattr(code_cache, "source_digest", lambda: "changed")
    if what == "processor":
        monkeypatch.setattr(native, "processor", lambda: ("another", ""))
    if what == "features":
        monkeypatch.setattr(native, "processor", lambda: (native.llvm.get_host_cpu_name(), "-sse2"))
    if what == "system":  # a home folder may be shared by machines of several kinds
        monkeypatch.setattr(native.llvm, "get_default_triple", lambda: "riscv64-unknown-linux-gnu")
    if what == "bounds":
        monkeypatch.setenv("NUMBA_BOUNDSCHECK", "1")
    # A processor that does not exist cannot have a target machine either.
    monkeypatch.setattr(native, "_load", lambda code, symbol: 0)
    tl.GPT(TINY, seed=0).engine.program("gradient" if what == "program" else "evaluate")
    assert compiled == [1]


def test_the_table_is_checked_before_native_code_trusts_it(cache):
    model = tl.GPT(TINY, seed=0)
    model.loss([1, 2, 3], [2, 3, 4])
    engine = model.engine
    run = engine.program("evaluate")
    for wrong in (
        engine.p._replace(wte=engine.p.wte[:4]),
        engine.p._replace(wte=engine.p.wte.astype(np.float64)),
        engine.p._replace(wqkv=engine.p.wqkv[:, ::-1]),
        engine.p._replace(wpe=engine.p.wpe.ravel()),
    ):
        with pytest.raises(TypeError, match=r"p\.w"):
            run(wrong, engine.a, engine.batch, engine._result)
    short = engine.batch._replace(tokens=engine.batch.tokens[:2])
    with pytest.raises(TypeError, match=r"batch\."):
        run(engine.p, engine.a, short, engine._result)


# ---------------------------------------------------------------- Numba's settings

FORBIDDEN = {
    "NUMBA_DISABLE_JIT=1": "NUMBA_DISABLE_JIT keeps Numba from compiling",
    "NUMBA_NUM_THREADS=0": "Number of threads specified must be > 0",
    "NUMBA_CPU_FEATURES=avx2": "NUMBA_CPU_FEATURES must be a list like +avx2,-fma: 'avx2'",
}


@pytest.mark.parametrize("setting", FORBIDDEN)
def test_settings_that_keep_numba_from_compiling(setting, tmp_path):
    variables = dict([setting.split("=")], TAPELESS_CACHE_DIR=str(tmp_path))
    options = ("train", "names", "--steps", 1, "--samples", 0)
    line = refused(*options, "--out", "run", cwd=tmp_path, env=environment(**variables))
    assert FORBIDDEN[setting] in line
    # NumPy needs none of that.
    succeeds(*options, "--engine", "reference", "--out", "other", cwd=tmp_path, env=environment(**variables))


def test_they_are_errors_of_this_package_in_python_too(child, tmp_path):
    code = """
import tapeless as tl
try:
    tl.GPT(tl.GPTConfig(vocab_size=3)).loss([1], [2])
except tl.TapelessError as error:
    print(type(error).__name__, error)
"""
    printed = child(code, TAPELESS_CACHE_DIR=tmp_path, NUMBA_NUM_THREADS=-1)
    assert printed.startswith("ConfigError Numba, which compiles for the cpu engine, does not load: ")


def test_code_in_the_cache_runs_though_numba_must_not_compile(child, first):
    folder, (_, loss, _) = first
    for setting in ({"NUMBA_DISABLE_JIT": 1}, {"NUMBA_NUM_THREADS": 0}):
        assert child(EVALUATE, TAPELESS_CACHE_DIR=folder, **setting).split() == [loss, "False"]


def test_a_setting_that_numba_ignores_is_told_in_a_line(tmp_path):
    variables = {"NUMBA_OPT": "9", "TAPELESS_CACHE_DIR": str(tmp_path)}
    tl.train(steps=1, samples=0, engine="reference", out=tmp_path / "run", progress=False)
    said = succeeds("sample", "run", "-n", 1, cwd=tmp_path, env=environment(**variables)).stderr
    assert "note: Environment variable 'NUMBA_OPT' is defined but" in said
    assert "Traceback" not in said


# ---------------------------------------------------------------- other processors


@pytest.mark.parametrize("triple", ["arm64-apple-darwin24.1.0", "aarch64-unknown-linux-gnu"])
@pytest.mark.parametrize("found", [{}, {"neon": False, "aes": True}, {"neon": True}])
def test_every_64_bit_arm_has_neon(triple, found, monkeypatch):
    """LLVM finds no features on macOS, nor where /proc/cpuinfo has none."""
    monkeypatch.delenv("NUMBA_CPU_FEATURES", raising=False)
    monkeypatch.setattr(native.llvm, "get_default_triple", lambda: triple)
    monkeypatch.setattr(native.llvm, "get_host_cpu_features", lambda: native.llvm.FeatureMap(found))
    assert native.simd() == "NEON"
    assert "+neon" in native.processor()[1].split(",")


def test_features_are_read_before_llvm_stops_the_process(monkeypatch):
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "+avx,fma")
    with pytest.raises(ConfigError, match="'fma' has no sign"):
        native.processor()


# ---------------------------------------------------------------- lesser processors

SOMETHING_OF_ALL = GPTConfig(
    vocab_size=21,
    block_size=12,
    n_layer=1,
    n_head=3,
    n_embd=27,
    n_hidden=40,
    norm="layer",
    norm_gain=True,
    norm_bias=True,
    norm_final=True,
    activation="gelu",
    bias=True,
)
GRADIENT = """
import numpy as np
from helpers import random_batch, random_model
from tapeless.config import GPTConfig
from tapeless.ops.cpu import native

model = random_model({config!r}, "cpu")
model.engine.notice = lambda: print(native.simd())
loss = model.loss_and_grad(*random_batch(model.config, [12, 1, 5, 8], 0))
np.savez({file!r}, loss=loss, grads=model.engine.grads)
"""
PROCESSORS = {
    "SSE2": ("x86-64", "+sse2"),
    "AVX2": ("haswell", "+avx2,+fma,+avx,+bmi,+bmi2,+sse4.2,+sse2"),
}


@pytest.mark.parametrize("simd", [pytest.param("SSE2", marks=pytest.mark.oracle), "AVX2"])
def test_results_on_a_lesser_processor(child, tmp_path, simd):
    """The same numbers, to rounding, as float64 gives, as if the machine had no wider vectors."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("only x86 processors can play one with SSE2 or AVX2")
    if not native.llvm.get_host_cpu_features().get(simd.lower()):
        pytest.skip(f"this processor has no {simd}")
    name, features = PROCESSORS[simd]
    file = str(tmp_path / "result.npz")
    code = f"import sys; sys.path.insert(0, {str(HERE)!r})\n" + GRADIENT.format(
        config=SOMETHING_OF_ALL, file=file
    )
    printed = child(code, TAPELESS_CACHE_DIR=tmp_path, NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES=features)
    assert printed == simd  # compiled anew, and for that processor
    got = np.load(file)
    exact = random_model(SOMETHING_OF_ALL, "reference")
    exact.engine.params[:] = exact.engine.params.astype(np.float32)
    assert abs(got["loss"] - exact.loss_and_grad(*random_batch(SOMETHING_OF_ALL, [12, 1, 5, 8], 0))) <= 2e-6
    assert relative(got["grads"], exact.engine.grads) <= 2e-6
