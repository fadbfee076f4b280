"""The cache of compiled code: its key covers all that the code comes from, and it finds a place."""

from __future__ import annotations

import compileall
import errno
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

import tapeless
from commands import environment
from tapeless.errors import Notice
from tapeless.ops.cpu import code_cache, native

PACKAGE = Path(tapeless.__file__).parent

# ---------------------------------------------------------------- what code depends on

# A process that imports only what builds and compiles programs: whatever code can come from is loaded then.
EVERYTHING = """
import sys
from tapeless.config import GPTConfig
from tapeless.engine import Engine
from tapeless.ops.cpu import native, peak, profile, routines
from tapeless.programs import PROGRAMS

for precision in ("float32", "bf16"):
    config = GPTConfig(vocab_size=5, n_embd=256, n_head=4, residual="mhc", precision=precision)
    for kind in Engine, profile.ProfiledEngine:
        for name, (make, _) in PROGRAMS.items():
            kind(config)._build(name, make)
for name in routines.ROUTINES:
    routines.make_routine(name)
Engine(GPTConfig(vocab_size=5, n_embd=4)).program("evaluate")
peak.kernel()
print(*(name for name in sys.modules if name.split(".")[0] == "tapeless"))
"""


@pytest.fixture
def copied(tmp_path):
    """A copy of the package."""
    ignore = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(PACKAGE, tmp_path / "tapeless", ignore=ignore))


def file_of(package, module):
    path = package.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_every_module_that_code_comes_from_is_part_of_the_key(child, copied, tmp_path):
    reached = set(child(EVERYTHING, TAPELESS_CACHE_DIR=tmp_path / "cache").split())
    assert {"tapeless.team", "tapeless.ops.cpu.share", "tapeless.ops.cpu.peak", "tapeless.errors"} <= reached
    before = code_cache.digest_of(copied)
    assert before == code_cache.source_digest()
    unnoticed = set()
    for file in sorted(copied.rglob("*.py")):
        module = ".".join(("tapeless", *file.relative_to(copied).with_suffix("").parts))
        content = file.read_bytes()
        file.write_bytes(content + b"\n")
        if code_cache.digest_of(copied) == before:
            unnoticed.add(module.removesuffix(".__init__"))
        file.write_bytes(content)
    assert not unnoticed & reached
    # Who works on what trains, loads or prints does not wait for the compiler each time.
    assert unnoticed >= {"tapeless.cli", "tapeless.cli.runs", "tapeless.train", "tapeless.io.runs"}


def test_a_new_module_is_part_of_the_key(copied):
    before = code_cache.digest_of(copied)
    (copied / "constants.py").write_text("HALF = 0.5\n")
    assert code_cache.digest_of(copied) == before
    share = copied / "ops" / "cpu" / "share.py"
    share.write_text(share.read_text().replace("\n\n", "\n\nfrom tapeless.constants import HALF\n", 1))
    imported = code_cache.digest_of(copied)
    (copied / "constants.py").write_text("HALF = 0.25\n")
    assert len({before, imported, code_cache.digest_of(copied)}) == 3


def zipped(package, file):
    with zipfile.ZipFile(file, "w") as archive:
        for path in package.rglob("*"):
            archive.write(path, path.relative_to(package.parent))
    return zipfile.Path(file, "tapeless/")


def change(package, text="v[t, f] = 0.0", module="tapeless.ops.cpu.activation"):
    file = file_of(package, module)
    file.write_text(file.read_text() + f"\n# {text}\n")


def test_a_package_in_a_zip(copied, tmp_path):
    first = code_cache.digest_of(zipped(copied, tmp_path / "one.zip"))
    assert first == code_cache.digest_of(copied)
    change(copied, module="tapeless.team")
    assert code_cache.digest_of(zipped(copied, tmp_path / "two.zip")) == code_cache.digest_of(copied) != first


@pytest.mark.parametrize("place", ["folder", "zip"])
def test_a_package_without_sources(copied, tmp_path, place):
    """As `compileall -b` leaves it when the sources are removed."""

    def digest(name):
        bare = Path(shutil.copytree(copied, tmp_path / name / "tapeless"))
        assert compileall.compile_dir(bare, quiet=2, legacy=True)
        for source in bare.rglob("*.py"):
            source.unlink()
        found = bare if place == "folder" else zipped(bare, tmp_path / f"{name}.zip")
        return code_cache.digest_of(found)

    first = digest("one")
    change(copied, module="tapeless.team")
    assert None not in (first, second := digest("two"))
    assert first != second


def test_where_modules_cannot_be_read_nothing_is_kept(tmp_path, monkeypatch):
    assert code_cache.digest_of(tmp_path) is None
    monkeypatch.setenv("TAPELESS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(code_cache, "source_digest", lambda: None)
    assert [native.cached("program key", lambda n=n: b"%d" % n) for n in (1, 2)] == [b"1", b"2"]
    assert not list(tmp_path.iterdir())


LOSSES = """
import numpy as np
import tapeless as tl
from tapeless.ops import reference

config = tl.GPTConfig(vocab_size=5, block_size=4, n_head=2, n_embd=4)
loss = tl.GPT(config, 0).loss([1, 2, 3], [2, 3, 4])
if {changed}:
    def relu(v, u, n):
        np.maximum(u[:n], 5, out=v[:n])
    reference.relu_forward = relu
exact = tl.GPT(config, 0, "reference").loss([1, 2, 3], [2, 3, 4])
assert tl.__file__.startswith({zip!r}), tl.__file__
print(abs(loss - exact) < 1e-6)
"""


@pytest.mark.oracle
def test_a_new_version_in_a_zip_runs_its_own_code(copied, tmp_path, child):
    for i, name in enumerate(("one.zip", "two.zip")):
        if i:
            file = file_of(copied, "tapeless.ops.cpu.activation")
            changed = file.read_text().replace("maximum(load(u, t, f), 0.0)", "maximum(load(u, t, f), 5.0)")
            assert changed != file.read_text()
            file.write_text(changed)
        zipped(copied, tmp_path / name)
        where = str(tmp_path / name)
        code = f"import sys; sys.path.insert(0, {where!r})" + LOSSES.format(changed=i, zip=where)
        for _ in range(2):
            assert child(code, TAPELESS_CACHE_DIR=tmp_path / "cache") == "True"


# ---------------------------------------------------------------- where it is kept


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A home folder and one for temporary files, both empty."""
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    home.mkdir()
    temporary.mkdir()
    for name in ("TAPELESS_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    code_cache._tell.cache_clear()
    return home, temporary


def keep(name="program"):
    """Whether code was made, and the notices that were given."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("warnings.warn", lambda notice, **_: said.append(notice))
        code = native.cached(f"{name} key", lambda: made.append(1) or b"code")
    assert code == b"code"
    assert all(isinstance(notice, Notice) for notice in said)
    return bool(made), [str(notice) for notice in said]


def test_code_is_kept_in_the_users_cache_folder(places):
    home, temporary = places
    assert keep() == (True, [])
    assert keep() == (False, [])
    (file,) = home.rglob("program-*.o")
    assert file.parent.name == "tapeless"
    assert not list(temporary.iterdir())


def test_a_tilde_is_the_home_folder(places, monkeypatch):
    monkeypatch.setenv("TAPELESS_CACHE_DIR", "~/x")
    assert keep() == (True, [])
    (file,) = (places[0] / "x").iterdir()
    assert file.name.startswith("program-")


def no_home(home, monkeypatch):
    pwd = pytest.importorskip("pwd")

    def nobody(_):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    return "there is no home folder"


def tilde_without_home(home, monkeypatch):
    monkeypatch.setenv("TAPELESS_CACHE_DIR", "~/x")
    return no_home(home, monkeypatch)


def below_a_file(home, monkeypatch):
    (home / "file").write_text("not a folder")
    monkeypatch.setenv("TAPELESS_CACHE_DIR", str(home / "file" / "below"))
    return f"{home / 'file' / 'below'} cannot be used (Not a directory)"


def read_only(home, monkeypatch):
    write = tempfile.NamedTemporaryFile

    def refuse(dir, **options):
        if Path(dir).is_relative_to(home):
            raise OSError(errno.EROFS, "Read-only file system")
        return write(dir=dir, **options)

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    return "cannot be used (Read-only file system)"


def everybodys(home, monkeypatch):
    (home / "shared").mkdir()
    (home / "shared").chmod(0o777)
    monkeypatch.setenv("TAPELESS_CACHE_DIR", str(home / "shared"))
    return f"{home / 'shared'} cannot be used (other users may write there)"


@pytest.mark.skipif(os.name != "posix", reason="looks at owners and modes")
@pytest.mark.parametrize("fault", [no_home, tilde_without_home, below_a_file, read_only, everybodys])
def test_a_temporary_folder_in_place_of_one_that_cannot_be_used(fault, places, monkeypatch):
    home, temporary = places
    reason = fault(home, monkeypatch)
    made, (line,) = keep()
    assert made
    assert reason in line
    (folder,) = temporary.iterdir()
    assert str(folder) in line
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert keep("other") == (True, [])  # said once
    assert keep() == keep("other") == (False, [])


@pytest.mark.skipif(os.name != "posix", reason="looks at owners and modes")
@pytest.mark.parametrize("why", ["a file", "everybody's", "another user's"])
def test_without_any_place_code_is_made_by_each_process(why, places, monkeypatch):
    home, temporary = places
    no_home(home, monkeypatch)
    folder = code_cache.temporary_folder()
    assert folder.parent == temporary
    if why == "a file":
        folder.write_text("")
    else:
        folder.mkdir()
        folder.chmod(0o777 if why == "everybody's" else 0o755)
    if why == "another user's":
        if os.getuid() != 0:
            pytest.skip("only root can give files away")
        os.chown(folder, 12345, -1)
    made, (line,) = keep()
    assert made
    assert line.startswith("compiled code is not kept, and each process compiles anew: there is no home")
    assert keep() == (True, [])


def test_code_in_a_folder_that_cannot_be_written_is_used(places, monkeypatch):
    home, _ = places
    keep()
    read_only(home, monkeypatch)
    assert keep() == (False, [])


def test_a_real_process_without_a_place(tmp_path):
    """It computes what it should, says one line, and the next process finds the code."""
    (tmp_path / "file").write_text("not a folder")
    code = """
import tapeless as tl

model = tl.GPT(tl.GPTConfig(vocab_size=5, block_size=4, n_head=2, n_embd=4), seed=0)
exact = tl.GPT(model.config, seed=0, engine="reference")
model.engine.notice = lambda: print("compiles")
print(abs(model.loss([1, 2, 3], [2, 3, 4]) - exact.loss([1, 2, 3], [2, 3, 4])) < 1e-6)
"""
    # Not even an administrator can make a folder below a file.
    variables = environment(TAPELESS_CACHE_DIR=str(tmp_path / "file" / "below"), TMPDIR=str(tmp_path))
    first, second = (
        subprocess.run(
            [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
        )
        for _ in range(2)
    )
    assert (first.stdout, second.stdout) == ("compiles\nTrue\n", "True\n")
    assert first.stderr.count("Notice: compiled code is kept in") == 1
    assert second.stderr == ""
    assert (tmp_path / "file").read_text() == "not a folder"
