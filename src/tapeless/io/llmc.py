"""llm.c's files: models (`gpt2_124M.bin`) and debug states (`gpt2_124M_debug_state.bin`).

Each begins with 256 int32: a magic number, the version, and sizes. The numbers of a model or gradient
follow tensor by tensor in the order of `gpt2.TENSORS`, each over all layers, matrices as `[out, in]`,
the rows of `wte` padded with zeros to a multiple of 128.

model   version 3 float32, 5 bfloat16; 1 float32 without padding (read only)
        header: magic, version, T, V, L, H, C, padded V
state   version 2; 1 without padding (read only); header: magic, version, B, T
        inputs [B, T] and targets [B, T] int32; logits [B·T, V], loss [1], gradients float32
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from tapeless.config import GPTConfig
from tapeless.errors import ConfigError, RunError
from tapeless.io import gpt2
from tapeless.io.runs import write_file
from tapeless.io.tensors import Checkpoint, Held, Part, Stored, file_size, write_array

MODEL, STATE = 20240326, 20240327
MODEL_VERSIONS = {1: np.dtype("<f4"), 3: np.dtype("<f4"), 5: np.dtype(ml_dtypes.bfloat16)}
DTYPES = {"f32": (3, np.dtype("<f4")), "bf16": (5, np.dtype(ml_dtypes.bfloat16))}
HEADER = 1024  # bytes
EPS = 1e-5


def magic(path: Path) -> int:
    """The number a file begins with, 0 if it is shorter. Raises `RunError` if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return int.from_bytes(file.read(4), "little")
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}.") from None


def padded(vocab_size: int) -> int:
    return -(-vocab_size // 128) * 128


def _read_header(path: Path, expected: int, what: str, versions: Sequence[int]) -> tuple[list[int], int]:
    """The header, and the size of the file."""
    try:
        size = file_size(path)
        with open(path, "rb") as file:
            content = file.read(HEADER)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}.") from None
    if len(content) < HEADER:
        raise RunError(f"{path} is truncated: {size:,} bytes, where llm.c's header alone has {HEADER:,}.")
    header = np.frombuffer(content, "<i4").tolist()
    if header[0] != expected:
        raise RunError(f"{path} is no {what} of llm.c: it begins with {header[0]}, not {expected}.")
    if header[1] not in versions:
        known = ", ".join(map(str, versions))
        raise RunError(f"{path} is a {what} of version {header[1]}; the versions known are {known}.")
    return header, size


def _stored(
    path: Path, offset: int, dtype: np.dtype, config: GPTConfig, rows: int
) -> tuple[dict[str, Sequence[Part]], int]:
    """Where each tensor lies from byte `offset` on, with `rows` in wte, and where they end."""
    tensors: dict[str, Sequence[Part]] = {}
    shapes = gpt2.shapes(config)
    for names in gpt2.TENSORS:
        shape = shapes[names.ours]
        if names.turned:
            shape = (shape[0], shape[2], shape[1])
        tensors[names.ours] = [Stored(path, offset, dtype, shape, names.turned)]
        count = prod(shape) if names.ours != "wte" else rows * config.n_embd
        offset += count * dtype.itemsize
    return tensors, offset


def _write_tensors(file: BinaryIO, model: Checkpoint, dtype: Any) -> None:
    """The tensors of a GPT-2, or gradients kept like them."""
    V, C = model.config.vocab, model.config.n_embd
    for names in gpt2.TENSORS:
        for block in model.blocks(names.ours, dtype, transposed=names.turned):
            write_array(file, block)
        if names.ours == "wte":
            write_array(file, np.zeros((padded(V) - V, C)), dtype)


def _header(*values: int) -> bytes:
    header = np.zeros(256, "<i4")
    header[: len(values)] = values
    return header.tobytes()


# ---------------------------------------------------------------- models


def open_model(path: Path) -> Checkpoint:
    """A model file. Raises `RunError` for another file, an unknown version, or a size that is not the
    one the header tells."""
    header, size = _read_header(path, MODEL, "model", list(MODEL_VERSIONS))
    version, T, V, L, H, C, rows = header[1:8]
    try:
        config = gpt2.gpt2_config(
            GPTConfig(vocab_size=V, block_size=T, n_layer=L, n_head=H, n_embd=C, norm_eps=EPS, tied=True)
        )
    except ConfigError as error:
        raise RunError(f"{path} does not describe a model: {error}") from None
    rows = V if version == 1 else rows
    if rows < V:
        raise RunError(f"{path} does not describe a model: {V} tokens are padded to {rows}.")
    dtype = MODEL_VERSIONS[version]
    tensors, end = _stored(path, HEADER, dtype, config, rows)
    if size != end:
        raise RunError(
            f"{path} is {'truncated' if size < end else 'too long'}: {size:,} bytes, but its model "
            f"(V {V}, padded {rows}, T {T}, C {C}, {L} layers, {dtype.name}) needs {end:,}."
        )
    return Checkpoint(path, f"llm.c, version {version}", config, tensors, path.parent)


def fitted(model: Checkpoint) -> Checkpoint:
    """The model as llm.c's format holds it: see `gpt2.as_gpt2`. Raises `ConfigError` if it cannot."""
    model = gpt2.as_gpt2(model, "llm.c's format")
    c = model.config
    if not c.tied:
        raise ConfigError(
            f"llm.c's format has no place for the head of {model.path}, lm_head.weight: there, the head is "
            "the token embedding, wte. Convert it to a Hugging Face folder or a .gguf file."
        )
    if c.n_hidden != 4 * c.n_embd or c.norm_eps != EPS:
        raise ConfigError(
            f"llm.c's format has no place for n_hidden={c.n_hidden} and norm_eps={c.norm_eps:g} of "
            f"{model.path}: there, they are 4·n_embd={4 * c.n_embd} and {EPS:g}."
        )
    return model


def write_model(path: Path, model: Checkpoint, dtype: str = "f32") -> None:
    """Write a model as version 3 ("f32") or 5 ("bf16").

    Raises `ConfigError` for a model that the format cannot hold, `RunError` if it cannot be written.
    """
    model = fitted(model)
    c, (version, numbers) = model.config, DTYPES[dtype]
    header = _header(MODEL, version, c.block_size, c.vocab, c.n_layer, c.n_head, c.n_embd, padded(c.vocab))

    def write(aside: Path) -> None:
        with open(aside, "wb") as file:
            file.write(header)
            _write_tensors(file, model, numbers)

    write_file(path, write)


# ---------------------------------------------------------------- debug states


@dataclass(frozen=True)
class State:
    """A debug state: `tokens` and `targets` [B, T], `logits` [B·T, V], the loss, and the gradients as a
    model keeps its parameters."""

    tokens: np.ndarray
    targets: np.ndarray
    logits: np.ndarray
    loss: float
    grads: Checkpoint


def open_state(path: Path, config: GPTConfig) -> State:
    """The state of a model with this config; logits and gradients stay in the file until they are used.

    Raises `RunError` for another file, or one that does not fit the model.
    """
    header, size = _read_header(path, STATE, "debug state", (1, 2))
    version, B, T = header[1:4]
    V = config.vocab
    if B < 1 or T < 1:
        raise RunError(f"{path} is damaged: a batch of {B} × {T} tokens.")
    if config.block_size < T:
        raise RunError(f"{path} has texts of {T} tokens, but the model's block is {config.block_size}.")
    N = B * T
    logits, loss = HEADER + 8 * N, HEADER + 8 * N + 4 * N * V
    floats = np.dtype("<f4")
    tensors, end = _stored(path, loss + 4, floats, config, V if version == 1 else padded(V))
    if size != end:
        raise RunError(
            f"{path} does not fit this model: {size:,} bytes, but with {B} × {T} tokens its state has "
            f"{end:,}. It may belong to another model."
        )
    tokens, targets = (Stored(path, at, np.dtype("<i4"), (B, T)).map() for at in (HEADER, HEADER + 4 * N))
    largest = max(int(tokens.max()), int(targets.max()))
    if min(int(tokens.min()), int(targets.min())) < 0 or largest >= V:
        raise RunError(f"{path} has tokens that the model does not know: expected ids from 0 to {V - 1}.")
    return State(
        tokens,
        targets,
        Stored(path, logits, floats, (N, V)).map(),
        float(Stored(path, loss, floats, (1,)).map()[0]),
        Checkpoint(path, "llm.c", config, tensors, path.parent),
    )


def write_state(
    path: Path,
    tokens: np.ndarray,
    targets: np.ndarray,
    logits: np.ndarray,
    loss: float,
    config: GPTConfig,
    grads: Mapping[str, np.ndarray],
) -> None:
    """Write a debug state of a batch [B, T]: its logits [B·T, V] and the gradients of its mean loss, for
    a model that is `fitted`. Raises `RunError` if it cannot be written."""
    held = {name: [Held(grad)] for name, grad in grads.items()}
    model = Checkpoint(path, "gradients", config, held, path.parent)

    def write(aside: Path) -> None:
        with open(aside, "wb") as file:
            file.write(_header(STATE, 2, *tokens.shape))
            write_array(file, tokens, "<i4")
            write_array(file, targets, "<i4")
            write_array(file, logits, "<f4")
            write_array(file, np.array([loss]), "<f4")
            _write_tensors(file, model, "<f4")

    write_file(path, write)
