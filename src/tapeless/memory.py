"""What training will allocate, whether that fits, and what would fit instead."""

from __future__ import annotations

from typing import Any

import numpy as np

from tapeless.config import GPTConfig
from tapeless.engine import check_engine, effective
from tapeless.errors import ConfigError
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
from tapeless.programs import RESULT
from tapeless.team import check_threads, decoding_team, team_size

# Bytes of parameters up to which training keeps copies of its state in memory, to return to where numbers
# overflow.
SNAPSHOTS = 2**25


def training_memory(
    config: GPTConfig, engine: str, dtype: Any, batch_size: int, threads: int | None, longest: int
) -> tuple[dict[str, Plan], int]:
    """What training on documents of up to `longest` tokens allocates, by buffer, and how many threads share
    a step. Raises `ConfigError` for no number of threads."""
    check_threads(engine, threads)
    compiled, runs, size = engine == "cpu", effective(config, engine), n_params(config)
    team = team_size(config, batch_size, threads) if compiled else 1
    plans = memory(runs, dtype, batch_size * longest, batch_size, team)
    plans["losses"] = Plan(RESULT, dtype, {"W": team})
    if size * np.dtype(dtype).itemsize <= SNAPSHOTS:
        copies = [Tensor(name, (2, size)) for name in ("parameters", "m", "v")]
        copies += [Tensor("powers", (2, 2), "float64"), Tensor("means", (2, 4), "float64")]
        plans["two copies of the state"] = Plan(copies, dtype, aligned=False)
    sizes = decoding_sizes(config, decoding_team(config, threads) if compiled else 1)
    plans["generating texts"] = Plan(decoding(runs), dtype, sizes)
    plans["their batch"] = Plan(BATCH, dtype, sizes)
    if compiled and config.precision == "bf16" and streamed_width(config):
        plans["their weights in bfloat16"] = Plan([Tensor("parameters", (size,), "uint16")], dtype)
    return plans, team


def check_memory(
    config: GPTConfig,
    engine: str,
    dtype: str | None,
    batch_size: int,
    threads: int | None = None,
    longest: int | None = None,
) -> None:
    """Raise `ConfigError` if training with this batch size, or with 0 just holding a model and its
    gradients, needs more memory than is free, saying what would fit. Documents have up to `longest`
    tokens (None: as many as the model's block)."""
    number, longest = check_engine(engine, dtype), longest or config.block_size

    def needs(config: GPTConfig, batch_size: int) -> int:
        plans, _ = training_memory(config, engine, number, batch_size, threads, longest)
        held = ("parameters", "gradients") if batch_size == 0 else tuple(plans)
        return sum(plans[name].nbytes for name in held)

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
