"""What training will allocate, whether that fits, and what would fit instead.

The budget counts arrays: buffers exactly, what a call works with besides at most. Python itself, its
modules and compiled code come on top (100 MB, roughly), and reading a text takes several times the text's
size for a moment.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tapeless.config import GPTConfig
from tapeless.engine import check_engine, effective
from tapeless.errors import ConfigError
from tapeless.generate import texts_at_once
from tapeless.layout import (
    BATCH,
    Plan,
    Tensor,
    decoding,
    decoding_sizes,
    memory,
    n_params,
    streamed_width,
)
from tapeless.machine import free_memory
from tapeless.programs import RESULT, moments
from tapeless.settings import Training
from tapeless.team import check_threads, decoding_team, team_size

# Bytes of parameters up to which training keeps copies of its state in memory, to return to where numbers
# overflow.
SNAPSHOTS = 2**25
# Bytes, at most, of what one call's steps are done on, unless a single step takes more; and what drawing and
# looking up one document or window takes, and one token of it that is read from a file or evaluated.
CALL, SPAN, READ, SCORED = 2**22, 128, 8, 128
# Numbers of the state that are looked at together, whether they are finite.
PIECE = 2**20
# Bytes of a tensor that are written together, and of a file that is hashed.
WRITTEN, HASHED = 2**22, 2**18
# Losses that are kept at least, of the last steps. They are kept twice while room is made for more.
LOSSES = 2**23


def steps_at_once(training: Training, longest: int, reads: bool) -> int:
    """How many steps one call may do. `reads`: their tokens are read from files each time."""
    return max(1, CALL // _step_bytes(training, longest, reads))


def _step_bytes(training: Training, longest: int, reads: bool) -> int:
    """What a step's documents take while they are chosen and read, and its losses and learning rate."""
    spans = max(training.batch_size, -(-training.total_batch_tokens // longest))
    return spans * (SPAN + READ * (longest + 1) * reads) + SPAN


def training_memory(
    config: GPTConfig,
    training: Training,
    engine: str,
    dtype: Any,
    threads: int | None,
    longest: int,
    held: int = 0,
    reads: bool = True,
    scored: int = 0,
) -> tuple[dict[str, Plan], int]:
    """What training on documents of up to `longest` tokens allocates, by what it is for, and how many
    threads share a step. `held` are the bytes of the data, 0 where they are not known; `reads` says that
    they stay in files; `scored` is the number of documents it validates on.

    Raises `ConfigError` for an invalid number of threads.
    """
    check_threads(engine, threads)
    compiled, runs, size = engine == "cpu", effective(config, engine), n_params(config)
    documents, kept = training.batch_size, moments(training.optimiser, training.momentum)
    team = team_size(config, documents, threads) if compiled else 1
    plans = memory(runs, dtype, documents * longest, documents, team, kept)
    plans["loss of each thread"] = Plan(RESULT, dtype, {"W": team})
    if size * np.dtype(dtype).itemsize <= SNAPSHOTS:
        copies = [Tensor(name, (2, size)) for name in ("parameters", *kept)]
        copies += [Tensor("powers", (2, 2), "float64"), Tensor("means", (2, 4), "float64")]
        plans["two copies of the state"] = Plan(copies, dtype, aligned=False)
    sizes = decoding_sizes(config, decoding_team(config, threads) if compiled else 1)
    plans["generating texts"] = Plan(decoding(runs), dtype, sizes)
    plans["sampling batch"] = Plan(BATCH, dtype, sizes)
    if compiled and config.precision == "bf16" and streamed_width(config):
        plans["bfloat16 weights for sampling"] = Plan([Tensor("parameters", (size,), "uint16")], dtype)

    def at_most(name: str, **tensors: int) -> None:
        plans[name] = Plan([Tensor(t, (n,), "uint8") for t, n in tensors.items()], dtype, aligned=False)

    steps = min(training.steps, steps_at_once(training, longest, reads))
    at_most("documents of a call", steps=steps * _step_bytes(training, longest, reads))
    texts = min(max(training.samples, 1), texts_at_once(size, training.max_tokens))
    at_most(
        "texts of a call",
        uniforms=16 * texts * training.max_tokens,
        tokens=4 * texts * (config.block_size + training.max_tokens),
        probs=8 * config.vocab,
    )
    at_most("looking at the state", finite=min(size, PIECE))
    at_most("saving", block=min(size * np.dtype(dtype).itemsize, WRITTEN), checksum=HASHED)
    at_most("losses", losses=32 * min(max(training.steps, 2**9), LOSSES))
    if scored:
        windows = 64 * scored * max(1, -(-config.block_size // longest))
        at_most("validating", windows=windows, batch=SCORED * documents * (longest + 1))
    if held:
        at_most("data", tokens_and_spans=held)
    return plans, team


def array_bytes(*objects: Any) -> int:
    """The bytes of the arrays that these objects hold as attributes."""
    arrays = {id(a): a for o in objects for a in vars(o).values() if isinstance(a, np.ndarray)}
    return sum(array.nbytes for array in arrays.values())


def check_memory(
    config: GPTConfig,
    engine: str,
    dtype: str | None,
    training: Training | None,
    threads: int | None = None,
    longest: int | None = None,
    **data: Any,
) -> None:
    """Raise `ConfigError` if training, or with None just holding a model and its gradients, needs more memory
    than is free, saying what would fit. Documents have up to `longest` tokens (None: as many as the
    model's block); `data` is as for `training_memory`."""
    number, longest = check_engine(engine, dtype), longest or config.block_size

    def needs(config: GPTConfig, batch_size: int) -> int:
        each = dataclasses.replace(training or Training(), batch_size=batch_size or 1)
        plans, _ = training_memory(config, each, engine, number, threads, longest, **data)
        held = ("parameters", "gradients") if batch_size == 0 else tuple(plans)
        return sum(plans[name].nbytes for name in held)

    batch_size = 0 if training is None else training.batch_size
    needed, free = needs(config, batch_size), free_memory()
    if needed <= free:
        return
    size = f"{n_params(config):,} parameters"
    if batch_size:
        size += f", batches of up to {batch_size * longest:,} tokens"
    raise ConfigError(
        f"this needs {needed / 1e9:,.1f} GB of memory ({size}) but {free / 1e9:,.1f} GB are free: "
        f"{_what_fits(config, batch_size, needs, free)}."
    )


def _what_fits(config: GPTConfig, batch_size: int, needs: Any, free: float) -> str:
    options = []
    for recompute in sorted({config.recompute, True}):
        smaller = config.replace(recompute=recompute)
        fits, too_much = 0, batch_size
        while too_much - fits > 1:
            middle = (fits + too_much) // 2
            fits, too_much = (middle, too_much) if needs(smaller, middle) <= free else (fits, middle)
        also = " with recompute=true" if recompute and not config.recompute else ""
        if also and batch_size and needs(smaller, batch_size) <= free:
            options.append("recompute=true")
        elif fits:
            options.append(f"batch_size={fits}{also}")
    return f"{' or '.join(options)} would fit" if options else "choose a smaller model"
