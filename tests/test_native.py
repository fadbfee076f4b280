"""Compiled programs: kept on disk, loaded without Numba, rebuilt when damaged, right on lesser processors."""

import dataclasses
import os
import platform
from pathlib import Path

import numpy as np
import pytest

import tapeless as tl
from helpers import random_batch, random_model, relative
from tapeless.config import GPTConfig
from tapeless.ops.cpu import native

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
    assert native._read(cache) is None
    monkeypatch.setattr(native, "compile_object", lambda groups, function: whole[32:])
    assert evaluate() == (first[1][1], True)
    if whose != "everybody's folder":  # which stays so
        assert evaluate() == (first[1][1], False)
    cache.parent.chmod(0o1777)  # as /tmp
    assert native._read(cache) == whole[32:]


def test_a_damaged_file_is_rebuilt_by_the_compiler(child, first, cache):
    cache.write_bytes(cache.read_bytes()[:-100])
    assert child(EVALUATE, TAPELESS_CACHE_DIR=cache.parent).split() == first[1]
    assert child(EVALUATE, TAPELESS_CACHE_DIR=cache.parent).split() == [first[1][1], "False"]


def test_without_a_place_for_the_cache_everything_works(child, first, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    # Not even an administrator can make a folder below a file.
    assert child(EVALUATE, TAPELESS_CACHE_DIR=tmp_path / "file" / "below").split() == first[1]
    assert (tmp_path / "file").read_text() == "not a folder"


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


@pytest.mark.parametrize("what", ["program", "source", "processor", "features"])
def test_what_else_the_code_depends_on(cache, monkeypatch, what):
    code = cache.read_bytes()[32:]
    compiled = []
    monkeypatch.setattr(native, "compile_object", lambda groups, function: compiled.append(1) or code)
    if what == "source":
        monkeypatch.setattr(native, "_source_digest", lambda: "changed")
    if what == "processor":
        monkeypatch.setattr(native, "processor", lambda: ("another", ""))
    if what == "features":
        monkeypatch.setattr(native, "processor", lambda: (native.llvm.get_host_cpu_name(), "-sse2"))
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
