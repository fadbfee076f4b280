"""Run folders: what training leaves behind, and models loaded from it.

config.json          model and training settings, data, seed, engine
tokenizer.json       the tokenizer
model.safetensors    the parameters by name
state.safetensors    everything needed to go on: parameters, moments, step, random state
metrics.jsonl        one object a logged step: step (from 1), loss, lr
samples.txt          texts generated at the end

Every file but `metrics.jsonl` is written aside, flushed to disk and renamed, so a killed process
leaves the old file or the new one. `metrics.jsonl` only grows by whole lines; reading it stops at
the last one.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tapeless.config import GPTConfig
from tapeless.data.tokenizers import CharTokenizer, tokenizer_from_dict
from tapeless.errors import ConfigError, DataError, RunError

CONFIG, TOKENIZER, MODEL, STATE, METRICS, SAMPLES = FILES = (
    "config.json",
    "tokenizer.json",
    "model.safetensors",
    "state.safetensors",
    "metrics.jsonl",
    "samples.txt",
)


# ---------------------------------------------------------------- writing


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, flush it to disk, and rename it into place.

    Raises `RunError` if the folder or the disk will not have it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            write(Path(aside))
            with open(aside, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(aside, 0o666 & ~_umask())
            os.replace(aside, path)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}.") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_file(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    metadata = {"format": "tapeless"}
    write_file(path, lambda aside: save_file(tensors, str(aside), metadata))


def save_model(
    folder: Path,
    config: GPTConfig,
    tokenizer: CharTokenizer | None,
    params: dict[str, np.ndarray],
    about: dict[str, Any] | None = None,
) -> None:
    """Write config.json, tokenizer.json and model.safetensors."""
    from tapeless import __version__

    write_json(folder / CONFIG, {"tapeless": __version__, "model": config.to_dict(), **(about or {})})
    if tokenizer is not None:
        write_json(folder / TOKENIZER, tokenizer.to_dict())
    write_tensors(folder / MODEL, params)


def json_lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def append_metrics(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json_lines(rows))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}.") from None


# ---------------------------------------------------------------- reading


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path.parent} has no {path.name}: it is not a run folder, or incomplete.") from None
    except (ValueError, RecursionError):
        raise RunError(f"{path} is damaged: it is not JSON.") from None
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}.") from None


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        raise RunError(f"{path.parent} has no {path.name}: it is not a run folder, or incomplete.")
    try:
        return load_file(str(path))
    except SafetensorError:
        raise RunError(f"{path} is damaged or truncated: it is not a whole safetensors file.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"cannot read {path}: {error}.") from None


def read_config(folder: Path) -> tuple[GPTConfig, dict[str, Any]]:
    """The model's config, and all of config.json."""
    if not folder.is_dir():
        raise RunError(f"no run folder {str(folder)!r}.")
    path = folder / CONFIG
    content = read_json(path)
    try:
        return GPTConfig(**content["model"]), content
    except (KeyError, TypeError):
        raise RunError(f"{path} is damaged: it does not describe a model.") from None
    except ConfigError as error:
        raise RunError(f"{path} does not describe a model: {error}") from None


def read_tokenizer(folder: Path, vocab_size: int) -> CharTokenizer | None:
    """The run's tokenizer, or None where a model was saved without one."""
    path = folder / TOKENIZER
    if not path.exists():
        return None
    try:
        tokenizer = tokenizer_from_dict(read_json(path))
    except DataError as error:
        raise RunError(f"{path} is damaged: {error}") from None
    if tokenizer.vocab_size != vocab_size:
        raise RunError(
            f"{path} has {tokenizer.vocab_size} tokens but the model of {folder / CONFIG} has "
            f"{vocab_size}: they are not of the same run."
        )
    return tokenizer


def fill_params(path: Path, tensors: dict[str, np.ndarray], views: dict[str, np.ndarray]) -> None:
    """Copy tensors read from `path` into parameter views. Raises `RunError` where they do not match."""
    missing = [name for name in views if name not in tensors]
    if missing:
        raise RunError(f"{path} has no tensor {missing[0]!r}: it does not match config.json.")
    unknown = [name for name in tensors if name not in views]
    if unknown:
        raise RunError(f"{path} has a tensor {unknown[0]!r} that config.json does not describe.")
    for name, view in views.items():
        if tensors[name].shape != view.shape:
            raise RunError(
                f"{path}: {name} is {list(tensors[name].shape)}, but config.json says {list(view.shape)}."
            )
        if tensors[name].dtype.kind != "f":
            raise RunError(f"{path}: {name} holds {tensors[name].dtype}, not floating-point numbers.")
    for name, view in views.items():
        view[...] = tensors[name]


def read_metrics(path: Path, steps: int) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl up to `steps`."""
    rows = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    for line in text.splitlines():
        try:
            row = json.loads(line)
            if row["step"] > steps:
                break
        except (ValueError, KeyError, TypeError):
            break
        rows.append(row)
    return rows


# ---------------------------------------------------------------- folders


def is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in FILES)


def numbered_runs(preset: str, base: Path = Path("runs")) -> dict[int, Path]:
    """The folders `base/<preset>-<n>`, by n."""
    pattern = re.compile(re.escape(preset) + r"-(\d+)")
    found = {}
    if base.is_dir():
        for path in base.iterdir():
            if match := pattern.fullmatch(path.name):
                found[int(match[1])] = path
    return found


def next_run(preset: str, base: Path = Path("runs")) -> Path:
    """The folder for a new run: `base/<preset>-<n>`, the next free number."""
    return base / f"{preset}-{max(numbered_runs(preset, base), default=0) + 1}"
