"""Object code on disk: where it is kept, under which name, and who may have written it.

A file's name has a digest of all that its code depends on: what the caller asked for, the processor, the
versions of Numba and LLVM, and every module that the code can come from. Those modules are found by
following imports, so that a new one needs no entry in a list.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
import tempfile
import warnings
from collections.abc import Container, Iterator
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from tapeless.errors import Notice
from tapeless.regular import open_regular

# ---------------------------------------------------------------- what code depends on

# What compiles programs, and all ops; the rest is what these import.
ROOTS = ("tapeless.engine", "tapeless.ops")
_NAME = re.compile(rb"tapeless[\w.]*")


@cache
def source_digest() -> str | None:
    """The digest of every module that compiled code can come from; None where they cannot be read."""
    try:
        return digest_of(resources.files("tapeless"))
    except (OSError, ImportError, NotImplementedError):
        return None


def digest_of(package: Any) -> str | None:
    """The digest of a package in a folder, or in a zip, None if no modules are there."""
    sources, digest = _sources(package), hashlib.sha256()
    for name, content in sorted(sources.items()):
        digest.update(f"{name} {len(content)} ".encode())
        digest.update(content)
    return digest.hexdigest() if sources else None


def _sources(package: Any) -> dict[str, bytes]:
    """Content by name of the roots and of all that they import, directly or not; where there are no sources,
    the bytecode of all modules."""
    if not (package / "engine.py").is_file():
        return dict(_modules(package, "tapeless", ".pyc"))
    found: dict[str, bytes] = {}
    asked: set[str] = set()
    waiting = set(ROOTS)
    while waiting:
        asked |= waiting
        new = {name: content for wanted in waiting for name, content in _module(package, wanted, found)}
        found |= new
        new.pop("tapeless", None)  # its public names are of all modules, each imported where it is used
        waiting = {name for content in new.values() for name in _imports(content)} - asked
    return found


def _imports(content: bytes) -> Iterator[str]:
    """Modules of this package that a source imports, anywhere in it."""
    for match in _NAME.finditer(content):
        if content.endswith((b"from ", b"import "), 0, match.start()):
            yield match[0].decode()


def _module(package: Any, name: str, known: Container[str]) -> Iterator[tuple[str, bytes]]:
    """A module and the packages it is in, but for those that are known. A package stands for all its modules:
    a name imported from it may be one of them."""
    place, path = package, "tapeless"
    for part in name.split(".")[1:]:
        if path not in known:
            yield path, (place / "__init__.py").read_bytes()
        file, place, path = place / f"{part}.py", place / part, f"{path}.{part}"
        if file.is_file():
            yield path, file.read_bytes()
            return
    yield from _modules(place, path, ".py")


def _modules(folder: Any, path: str, ending: str) -> Iterator[tuple[str, bytes]]:
    """All modules below a folder."""
    for entry in folder.iterdir():
        if entry.name.endswith(ending):
            yield f"{path}.{entry.name.removesuffix(ending)}".removesuffix(".__init__"), entry.read_bytes()
        elif entry.name != "__pycache__" and entry.is_dir():
            yield from _modules(entry, f"{path}.{entry.name}", ending)


# ---------------------------------------------------------------- where code is kept


def chosen_folder() -> Path | None:
    """TAPELESS_CACHE_DIR, or else a folder in the user's cache folder; None if there is no home folder."""
    try:
        if chosen := os.environ.get("TAPELESS_CACHE_DIR"):
            return Path(chosen).expanduser()
        if sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        elif sys.platform == "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return base / "tapeless"


def temporary_folder() -> Path | None:
    """A folder of this user's among the temporary files, for want of another; None if there are none."""
    try:
        place = Path(tempfile.gettempdir())
    except OSError:
        return None
    return place / (f"tapeless-{os.getuid()}" if os.name == "posix" else "tapeless")


def file_name(key: str, *more: object) -> str | None:
    """The name of the file for this key, which begins with the key's first word. None where modules cannot be
    read: code of another version could have the same name."""
    source = source_digest()
    if source is None:
        return None
    digest = hashlib.sha256(repr((key, *more, source)).encode()).hexdigest()
    return f"{key.split(maxsplit=1)[0]}-{digest}.o"


def find(file: str | None) -> bytes | None:
    """The object code in this file, wherever it is kept."""
    if file is None:
        return None
    for folder in (chosen_folder, temporary_folder):
        place = folder()
        code = None if place is None else read(place / file)
        if code is not None:
            return code
    return None


def keep(file: str | None, code: bytes) -> None:
    """Write code to the chosen folder. Where that cannot be, write it to the temporary one, and tell."""
    if file is None:
        return
    problem = ""
    for folder in (chosen_folder, temporary_folder):
        place = folder()
        try:
            if place is None:
                raise OSError(None, "there is no home folder")
            _write(place / file, code)
        except OSError as error:
            if place is not None and read(place / file) is not None:
                return  # another process wrote it, and may read it just now, when Windows replaces no file
            reason = error.strerror or str(error)
            problem = problem or (reason if place is None else f"{place} cannot be used ({reason})")
        else:
            if problem:
                _tell(f"compiled code is kept in {place}: {problem}")
            return
    _tell(f"compiled code is not kept, and each process compiles anew: {problem}")


@cache  # once in a process
def _tell(what: str) -> None:
    warnings.warn(Notice(f"{what}. TAPELESS_CACHE_DIR can name another folder."), stacklevel=2)


def _write(path: Path, code: bytes) -> None:
    """Write aside, then rename, so that two processes cannot disturb each other. Raises `OSError` where that
    fails, or where nothing would be read later."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _trusted(path.parent.stat()):
        raise PermissionError(None, "other users may write there")
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(hashlib.sha256(code).digest() + code)
            file.close()  # Windows renames no open file
            os.replace(file.name, path)
        except BaseException:
            file.close()
            Path(file.name).unlink(missing_ok=True)
            raise


def read(path: Path) -> bytes | None:
    """The object code in a cache file, or None if it is not there or not whole, or if another user may have
    written it: it is run."""
    try:
        with open_regular(path) as file:
            if not _trusted(os.fstat(file.fileno())) or not _trusted(path.parent.stat()):
                return None
            content = file.read()
    except OSError:
        return None
    checksum, code = content[:32], content[32:]
    return code if hashlib.sha256(code).digest() == checksum else None


def _trusted(about: os.stat_result) -> bool:
    """Whether a file or folder is this user's or the system's, and not everybody may write there; in a folder
    as /tmp is, with the sticky bit, others cannot replace a file."""
    if os.name != "posix":
        return True
    shared = about.st_mode & stat.S_IWOTH and not about.st_mode & stat.S_ISVTX
    return about.st_uid in (os.getuid(), 0) and not shared
