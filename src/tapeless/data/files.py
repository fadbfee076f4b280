"""Which token files a data set has: a file, a folder, a glob, or a name below a folder."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tapeless.data.shards import FORMATS, OTHERS, is_npy, magic_number
from tapeless.errors import DataError, argument

KINDS = (".bin", ".npy")
# shakespeare_train.bin, fineweb_val_000000.bin, train.bin, fineweb-train-1.bin, edufineweb_train_000001.npy,
# train-00000-of-00010.bin
NAME = re.compile(
    r"(?:(?P<name>.+)[-_.])?(?P<split>train|val)(?:(?<=val)(?:id|idation))?"
    r"(?P<number>[-_.]\d+(?:-of-\d+)?)?(?P<kind>\.bin|\.npy)"
)
# What a file to validate on, or to test on, has somewhere in its name: validation_shard_0.npy
HELD = re.compile(r"(?:^|[-_.])(?:(val|valid|validation)|test|eval|dev)(?:[-_.]|$)")


class TokenFiles(NamedTuple):
    """The token files of a data set, in order; `val` may be empty."""

    name: str
    train: list[Path]
    val: list[Path]


Set = tuple[Path, str | None]  # the folder and NAME of a data set


def is_tokens(source: str | Path) -> bool:
    """Whether `source` means token files, not a text: a folder, a glob, a name below a folder, or a
    file that is called .bin, .npy or .npz, or begins as one does."""
    path = Path(source)
    if path.is_file():
        return path.suffix in (*KINDS, ".npz") or magic_number(path) in FORMATS or is_npy(path)
    return path.is_dir() or bool(_globbed(path)) or bool(_sets_called(path))


def find_tokens(source: str | Path, paired: bool = True) -> TokenFiles:
    """The token files that `source` means; if not `paired`, what to validate on is known otherwise, and
    only looked for beside what to train on.

    A file: that one to train on; for NAME_train.bin also NAME_val.bin beside it. A glob: the files it
    matches, those named *_val* to validate on; where it matches none of them, those beside the others.
    A folder: the pairs NAME_train.bin, NAME_val.bin (or NAME_train_000001.bin …) anywhere below it,
    beside each other or not; where there are none, the token files in it. FOLDER/NAME: of several pairs
    below a folder, the ones of that name. Files may be .npy, too, and "-" or "." stand for "_", "valid" or
    "validation" for "val".

    Raises `DataError` if there is nothing of that kind, more than one data set, or a file whose name does
    not tell whether it is to be trained on.
    """
    path = Path(source)
    if path.is_file():
        return TokenFiles(path.stem, [path], _beside([path]))
    if path.is_dir():
        return _only(_sets(path), path, paired) or _unnamed(path)
    if matched := _globbed(path):
        train, val = _divided(matched)
        if not train:
            raise DataError(f"{source} only matches files to validate on: {_listed(val)}.")
        return TokenFiles(path.name, train, val or _beside(train))
    if found := _only(_sets_called(path), path, paired):
        return found
    raise DataError(
        f"no token files {str(source)!r}. Give a .bin file, a folder or glob of them, or FOLDER/NAME for "
        "NAME_train.bin below that folder."
    )


def _divided(paths: list[Path]) -> tuple[list[Path], list[Path]]:
    """The files to train on, and those to validate on, by their names."""
    train: list[Path] = []
    val: list[Path] = []
    unclear: list[Path] = []
    for path in paths:
        if match := NAME.fullmatch(path.name):
            (train if match["split"] == "train" else val).append(path)
        elif held := HELD.search(path.stem):
            (val if held[1] else unclear).append(path)
        else:
            train.append(path)
    if unclear and train:
        raise DataError(
            f"{_listed(unclear)}: the name says that this is not to train on. Choose by a glob what is, "
            f"and what to validate on by {argument('val')}."
        )
    return [*train, *unclear], val


def _globbed(path: Path) -> list[Path]:
    if not glob.has_magic(str(path)):
        return []
    return [p for p in map(Path, sorted(glob.glob(str(path), recursive=True))) if p.is_file()]


def _token_files(folder: Path) -> list[Path]:
    return sorted(p for kind in KINDS for p in folder.glob(f"*{kind}") if p.is_file())


def _beside(train: list[Path]) -> list[Path]:
    """The files to validate on that go with files to train on."""
    keys = {(p.parent, m["name"]) for p in train if (m := NAME.fullmatch(p.name)) and m["split"] == "train"}
    return [p for folder, name in sorted(keys, key=str) for p in _files(folder, name, "val")]


def _files(folder: Path, name: str | None, split: str) -> list[Path]:
    matches = [(m, p) for p in _token_files(folder) if (m := NAME.fullmatch(p.name))]
    found = [(m, p) for m, p in matches if (m["name"], m["split"]) == (name, split)]
    alone, kinds = any(m["number"] is None for m, _ in found), {m["kind"] for m, _ in found}
    if len(found) > 1 and (alone or len(kinds) > 1):
        raise DataError(
            f"{folder} has the same data in one file and in numbered ones, or twice: "
            f"{_listed(p for _, p in found)}. Remove some, or choose by a glob."
        )
    return [p for _, p in found]


def _sets(folder: Path, split: str = "train") -> list[Set]:
    """The data sets below a folder, hidden folders left out, that have files for this."""
    found: list[Set] = []
    seen: set[str] = set()  # links may lead in circles
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else sorted(f for f in folders if not f.startswith("."))
        if real not in seen:
            names = {m["name"] for f in files if (m := NAME.fullmatch(f)) and m["split"] == split}
            found += [(Path(parent), each) for each in sorted(names, key=str)]
        seen.add(real)
    return found


def _sets_called(path: Path) -> list[Set]:
    """The data sets that FOLDER/NAME means."""
    # A word alone is none: what lies below the present folder may be anything, and a lot.
    if path.suffix or path.parent == Path() or path.exists() or not path.parent.is_dir():
        return []
    return [each for each in _sets(path.parent) if each[1] == path.name]


def _only(sets: list[Set], source: Path, paired: bool) -> TokenFiles | None:
    if not sets:
        return None
    root = source if source.is_dir() else source.parent
    names = [name for _, name in sets]
    held = _sets(root, "val")
    if len(sets) > 1:
        of_that_name = f" called {source.name}" if set(names) == {source.name} else ""
        ways = []
        for folder, name in sets:
            apart = (folder, name) not in held and any(name == each for _, each in held)
            if name and apart and names.count(name) == 1:
                ways.append(root / name)
            else:
                ways.append(folder if len(_sets(folder)) == 1 else folder / (name or "train.bin"))
        raise DataError(f"{source} means {len(sets)} data sets{of_that_name}. Choose one: {_listed(ways)}.")
    [(folder, name)] = sets
    train, val = _files(folder, name, "train"), _files(folder, name, "val")
    if paired and not val:
        elsewhere = [_files(other, each, "val") for other, each in held if each == name]
        if len(elsewhere) > 1:
            raise DataError(
                f"{root} has several sets to validate on that go with {train[0]}: "
                f"{_listed(files[0] for files in elsewhere)}. Choose one, as {argument('val')} when training."
            )
        val = elsewhere[0] if elsewhere else []
    return TokenFiles(name or folder.name, train, val)


def _unnamed(folder: Path) -> TokenFiles:
    tokens = [p for p in _token_files(folder) if magic_number(p) not in OTHERS]
    if not tokens:
        raise DataError(
            f"{folder} has no token files: it is a folder with neither NAME_train.bin anywhere below it nor "
            "*.bin or *.npy in it."
        )
    train, val = _divided(tokens)
    if not train:
        raise DataError(f"{folder} only has files to validate on: {_listed(val)}. Expected NAME_train.bin.")
    return TokenFiles(folder.name, train, val)


def _listed(paths: Iterable[Path]) -> str:
    names = [str(p) for p in paths]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
