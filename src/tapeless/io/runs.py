"""Run folders: what training leaves behind, and models loaded from it.

config.json          model and training settings, data, seed, engine; bos_token_id and eos_token_id where
                     they are not the tokenizer's, tokenizer_vocab_size where it is smaller than the model's
tokenizer.json       the tokenizer
model.safetensors    the parameters by name
state.safetensors    everything needed to go on: parameters, moments, step, random state
metrics.jsonl        one object a logged step: step (from 1), loss, lr, and at validations val_loss
samples.txt          texts generated at the end
samples.jsonl        with sample_every, one object each time: step, samples
best/                the model that was best in validation, as a folder of its own
checkpoints/         what was saved last and before: see `tapeless.io.saves`
    0012-step-900/   the twelfth save: the first four files, and manifest.json with their checksums
.lock                there while a process trains: see `tapeless.io.lock`

The first four files at the top are the newest checkpoint's, as hard links where the file system has
them: they are there for other programs. tapeless itself reads the newest checkpoint that is whole; only
where there is none, as in runs of older versions and in models saved by themselves, those at the top.

Every file is written aside (in `.NAME.part/`), flushed to disk and renamed, so a killed process leaves
the old file or the new one. But what ends in `.jsonl` only grows, by whole lines; a last line without
its end is ignored. A new run is written aside as a whole, until it has been saved once: see
`tapeless.io.folders`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from tapeless import files
from tapeless.config import LATER, GPTConfig, from_saved
from tapeless.data.tokenizers import Tokenizer, tokenizer_from_dict
from tapeless.ends import Ends
from tapeless.errors import ConfigError, DataError, RunError
from tapeless.io import safetensors
from tapeless.io.tensors import FLOAT, Checkpoint, Stored, check_fit
from tapeless.layout import n_params, parameters
from tapeless.regular import open_regular, read_text

TOKENS = "tokenizer_vocab_size"  # in config.json, where it is not the model's
METADATA = {"format": "tapeless"}  # of safetensors files
CONFIG, TOKENIZER, MODEL, STATE, METRICS, SAMPLES, SAMPLES_LOG = FILES = (
    "config.json",
    "tokenizer.json",
    "model.safetensors",
    "state.safetensors",
    "metrics.jsonl",
    "samples.txt",
    "samples.jsonl",
)
BEST, CHECKPOINTS = "best", "checkpoints"
EVERYTHING = (*FILES, *(f"{BEST}/{name}" for name in (CONFIG, TOKENIZER, MODEL)))
PART = ".part"  # a checkpoint that is being written


# ---------------------------------------------------------------- writing


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file aside, flush it to disk, and rename it into place.

    Raises `RunError` if the folder or the disk will not have it.
    """
    # A folder, since libraries write files of their own beside the one they are asked for; one name
    # for all attempts, so that what a killed process left in it goes with the next one.
    aside = path.with_name(f".{path.name}.part")
    with writing(path):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            write(aside / path.name)
            with open(aside / path.name, "rb+") as file:
                files.flush(file.fileno())
            files.replace(aside / path.name, path)
            files.flush_folder(path.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


class CannotWrite(RunError):
    """`in_use`: since another process has a file open, which matters on Windows only."""

    def __init__(self, path: Path, reason: object, in_use: bool):
        super().__init__(f"cannot write {path}: {reason}.")
        self.reason, self.in_use = reason, in_use


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses, as a `RunError` that names `path`: where one of these stands within
    another, the outer one's."""
    try:
        yield
    except OSError as error:
        in_use = files.WINDOWS and isinstance(error, PermissionError)
        raise CannotWrite(path, error.strerror or error, in_use) from None
    except CannotWrite as error:
        raise CannotWrite(path, error.reason, error.in_use) from None


def write_json(path: Path, content: Any) -> None:
    write_text(path, as_json(content))


def as_json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    write_content(path, content_of_text(text))


Content = Callable[[BinaryIO], object]  # what writes a file's bytes


def write_content(path: Path, content: Content) -> None:
    def write(aside: Path) -> None:
        with open(aside, "wb") as file:
            content(file)

    write_file(path, write)


def content_of_text(text: str) -> Content:
    # A file name need not be Unicode; what of it cannot be encoded becomes "\udcxx", as in JSON.
    encoded = text.encode("utf-8", errors="backslashreplace")
    return lambda file: file.write(encoded)


def content_of_tensors(tensors: Mapping[str, np.ndarray]) -> Content:
    # The widest numbers first, so that each tensor lies where its own may.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    entries = [(name, tensor.dtype, tensor.shape) for name, tensor in ordered]
    blocks = [tensor for _, tensor in ordered]
    return lambda file: safetensors.write(file, entries, blocks, METADATA)


def save_model(
    folder: Path,
    config: GPTConfig,
    tokenizer: Tokenizer | None,
    ends: Ends,
    trained_positions: int | None,
    params: dict[str, np.ndarray],
) -> None:
    """Write config.json, tokenizer.json and model.safetensors, in place of a run or model that is there.
    Raises `RunError` if that fails."""
    _write_model(folder, config, tokenizer, ends, trained_positions, content_of_tensors(params))


def write_model(folder: Path, model: Checkpoint) -> None:
    """The same for a model in files, with numbers of float32."""
    entries = [(name, FLOAT, shape) for name, shape in _shapes(model.config).items()]
    blocks = (block for name, *_ in entries for block in model.blocks(name, FLOAT))
    tensors: Content = lambda file: safetensors.write(file, entries, blocks, METADATA)  # noqa: E731
    ends = model.ends.within(model.config.vocab)
    _write_model(folder, model.config, model.tokenizer, ends, model.trained_positions, tensors)


def _write_model(
    folder: Path,
    config: GPTConfig,
    tokenizer: Tokenizer | None,
    ends: Ends,
    trained_positions: int | None,
    tensors: Content,
) -> None:
    about = {} if trained_positions is None else {"trained_positions": trained_positions}
    contents = contents_of_model(config, tokenizer, ends, tensors, about)
    for name, content in contents.items():
        write_content(folder / name, content)
    if tokenizer is None:
        remove([folder / TOKENIZER])  # of another model saved here before
    remove_checkpoints(folder)


def contents_of_model(
    config: GPTConfig, tokenizer: Tokenizer | None, ends: Ends, tensors: Content, about: dict[str, Any]
) -> dict[str, Content]:
    """What a model's files hold, by name."""
    from tapeless import __version__

    described = {"tapeless": __version__, "model": config.to_dict(), **ends.to_dict()}
    if tokenizer is not None and tokenizer.vocab_size != config.vocab:
        described[TOKENS] = tokenizer.vocab_size
    described |= about
    contents = {CONFIG: content_of_text(as_json(described))}
    if tokenizer is not None:
        contents[TOKENIZER] = content_of_tokenizer(tokenizer)
    return contents | {MODEL: tensors}


def content_of_tokenizer(tokenizer: Tokenizer) -> Content:
    # On one line: a BPE has a hundred thousand.
    return content_of_text(json.dumps(tokenizer.to_dict(), ensure_ascii=False) + "\n")


def _shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters that a config really has."""
    shapes = {t.name: t.resolve({}) for t in parameters(config)}
    return {name: shape for name, shape in shapes.items() if prod(shape)}


def json_lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def begin_log(path: Path) -> None:
    """Let there be a log to append to."""
    with writing(path):
        path.touch()


def append_rows(path: Path, rows: Iterable[dict[str, Any]], flush: bool = True) -> None:
    """Append to a log, and flush it to disk. One that is gone is not begun again: it would lack rows."""
    with writing(path), open(path, "r+b") as file:
        file.seek(0, os.SEEK_END)
        file.write(json_lines(rows).encode())
        file.flush()
        if flush:
            files.flush(file.fileno())


def remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with writing(path):
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------- checkpoints


class Saved(NamedTuple):
    """A checkpoint's number, steps, and folder."""

    number: int
    step: int
    place: Path


def saved(folder: Path) -> list[Saved]:
    """The checkpoints of a run, whole or not, the newest first."""
    found = []
    with suppress(OSError):  # there are none
        for path in (folder / CHECKPOINTS).iterdir():
            if name := re.fullmatch(r"(\d+)-step-(\d+)", path.name):
                found.append(Saved(int(name[1]), int(name[2]), path))
    return sorted(found, reverse=True)


def sweep(folder: Path) -> None:
    """Remove what a killed process left beside checkpoints."""
    store = folder / CHECKPOINTS
    for left in (store / PART, *store.glob(".*-step-*.gone")):
        shutil.rmtree(left, ignore_errors=True)


def remove_checkpoint(place: Path) -> None:
    """At once, as far as others can see."""
    with writing(place):
        gone = place.with_name(f".{place.name}.gone")
        files.replace(place, gone)
        shutil.rmtree(gone, ignore_errors=True)


def remove_checkpoints(folder: Path) -> None:
    """The newest last: it counts as long as it is there."""
    sweep(folder)
    for checkpoint in reversed(saved(folder)):
        remove_checkpoint(checkpoint.place)
    with suppress(OSError):  # there is none, or it holds something else
        (folder / CHECKPOINTS).rmdir()


# ---------------------------------------------------------------- reading


class _Repeated(ValueError):
    pass


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise _Repeated(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return content


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, which may begin with a byte-order mark.

    Raises `RunError` if it is missing or not JSON, or an object has a key twice.
    """
    try:
        return json.loads(read_text(path), object_pairs_hook=_unrepeated)
    except FileNotFoundError:
        raise RunError(f"{path.parent} has no {path.name}: it is not a run folder, or incomplete.") from None
    except _Repeated as error:
        raise RunError(f"{path} has {error.args[0]!r} twice: remove the wrong one.") from None
    except (ValueError, RecursionError):
        raise RunError(f"{path} is damaged: it is not JSON.") from None
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}.") from None


def open_tensors(
    path: Path,
    expected: Mapping[str, tuple[tuple[int, ...], Any]],
    optional: Sequence[str] = (),
    unused: Sequence[str] = (),
) -> dict[str, Stored]:
    """The tensors of a file, to be read, without the `unused` ones. Raises `RunError` where it cannot be
    read, or does not hold the `expected` names but for the `optional` ones, with these shapes and kinds of
    number."""
    if not path.is_file():
        raise RunError(f"{path.parent} has no {path.name}: it is not a run folder, or incomplete.")
    tensors = {name: stored for name, stored in safetensors.open_file(path).items() if name not in unused}
    expected = {name: what for name, what in expected.items() if name in tensors or name not in optional}
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise RunError(f"{path} has no tensor {missing[0]!r}: it does not match config.json.")
    unknown = [name for name in tensors if name not in expected]
    if unknown:
        raise RunError(f"{path} has a tensor {unknown[0]!r} that config.json does not describe.")
    for name, (shape, dtype) in expected.items():
        if tensors[name].shape != shape:
            raise RunError(
                f"{path}: {name} is {list(tensors[name].shape)}, but config.json says {list(shape)}."
            )
        if tensors[name].dtype.kind != dtype.kind:
            raise RunError(f"{path}: {name} holds {tensors[name].dtype} numbers; expected {dtype}.")
    return tensors


def read_config(folder: Path) -> tuple[GPTConfig, dict[str, Any]]:
    """The model's config, and all of config.json."""
    path = folder / CONFIG
    content = read_json(path)
    try:
        config = from_saved(GPTConfig, content["model"], LATER)
        assert config.vocab  # a saved model knows its tokens
        return config, content
    except (KeyError, TypeError):
        raise RunError(f"{path} is damaged: it does not describe a model.") from None
    except ConfigError as error:
        raise RunError(f"{path} does not describe a model: {error}") from None


def trained_positions(folder: Path, config: GPTConfig, about: Mapping[str, Any]) -> int | None:
    """The length of the longest document or window that a run was trained on, by its config.json; None if it
    does not say so."""
    count = about.get("trained_positions")
    if count is None or (type(count) is int and 1 <= count <= config.block_size):
        return count
    raise RunError(f"{folder / CONFIG} is damaged: trained_positions is {count!r}.")


def tokens_of(config: GPTConfig, about: Mapping[str, Any]) -> int:
    """How many tokens the tokenizer must have: config.json says so where the vocabulary is padded."""
    tokens = about.get(TOKENS, config.vocab)
    return tokens if isinstance(tokens, int) and tokens <= config.vocab else config.vocab


def read_tokenizer(folder: Path, tokens: int) -> Tokenizer | None:
    """The run's tokenizer, or None where a model was saved without one. Raises `RunError` if it has another
    number of tokens."""
    path = folder / TOKENIZER
    if not path.exists():
        return None
    try:
        tokenizer = tokenizer_from_dict(read_json(path))
    except DataError as error:
        raise RunError(f"{path} is damaged: {error}") from None
    if tokenizer.vocab_size != tokens:
        raise RunError(
            f"{path} has {tokenizer.vocab_size} tokens but the model of {folder / CONFIG} has "
            f"{tokens}: they are not of the same run."
        )
    return tokenizer


def open_model(folder: Path, place: Path) -> Checkpoint:
    """The model of a run folder, and its tokenizer, whose files lie in `place`. Raises `RunError` if one
    is missing, damaged, or does not match the others."""
    config, about = read_config(place)
    expected = {name: (shape, FLOAT) for name, shape in _shapes(config).items()}
    tensors = open_tensors(place / MODEL, expected)
    parts = {name: [tensors[name]] for name in expected}
    tokenizer = read_tokenizer(place, tokens_of(config, about))
    ends = ends_of(place / CONFIG, about)
    return Checkpoint(
        folder,
        "a run of tapeless",
        config,
        parts,
        folder,
        tokenizer,
        ends,
        trained_positions=trained_positions(place, config, about),
    )


def ends_of(path: Path, about: Mapping[str, Any]) -> Ends:
    """The tokens that begin and end a text, of what a file holds. Raises `RunError` if they are no ids."""
    try:
        return Ends.from_dict(about)
    except ConfigError as error:
        raise RunError(f"{path} cannot be used: {error}") from None


def check_state_size(place: Path, config: GPTConfig) -> None:
    """Raise `RunError` if the state in `place` is smaller than the model of config.json alone, before
    memory is taken for that."""
    path, least = place / STATE, FLOAT.itemsize * n_params(config)
    if path.is_file() and (size := path.stat().st_size) < least:
        raise RunError(f"{path} has {size:,} bytes, but the model of {CONFIG} alone has {least:,}.")


def read_into(
    views: Mapping[str, np.ndarray], path: Path, optional: Sequence[str] = (), unused: Sequence[str] = ()
) -> None:
    """Copy the tensors of a file into `views`, by name, without the `unused` ones; of the `optional` ones
    those that it has. Raises `RunError`, before anything is copied, where `open_tensors` does,
    and for a number that does not fit."""
    expected = {name: (view.shape, view.dtype) for name, view in views.items()}
    tensors = open_tensors(path, expected, optional, unused)
    for name, tensor in tensors.items():
        stored, view = tensor.map(), views[name]
        with np.errstate(over="ignore"):
            view[...] = stored
        if stored.dtype != view.dtype:
            check_fit(stored, view, path, name)


def cut_log(path: Path, steps: int, size: int = sys.maxsize) -> None:
    """Take from a file of rows what lies beyond `steps`: logged by a process killed before it saved.

    Raises `RunError` if a whole line is not an object with a step; then nothing is changed. But beyond
    `size`, what the file had when it was saved, anything may lie if the machine broke down.
    """
    try:
        with open_regular(path) as file:
            left = sum(map(len, _kept(path, file, steps, size)))
            if left == os.fstat(file.fileno()).st_size:
                return

        def write(aside: Path) -> None:
            with open(path, "rb") as file, open(aside, "wb") as other:
                other.writelines(_kept(path, file, steps, size))

        write_file(path, write)
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}.") from None


def _kept(path: Path, file: Iterable[bytes], steps: int, size: int) -> Iterator[bytes]:
    """The lines of a log that `cut_log` leaves."""
    end = 0
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            return
        try:
            if json.loads(line)["step"] <= steps:
                yield line
            end += len(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            if end >= size:
                return
            raise RunError(f"{path} is damaged in line {number}: mend or remove it to go on.") from None
