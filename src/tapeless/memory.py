"""What training will allocate, what the machine has free, and what would fit instead."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tapeless.config import GPTConfig
from tapeless.engine import check_engine, effective
from tapeless.errors import ConfigError
from tapeless.layout import Plan, memory, n_params
from tapeless.team import check_threads, team_size


def training_memory(
    config: GPTConfig, engine: str, dtype: Any, batch_size: int, threads: int | None
) -> tuple[dict[str, Plan], int]:
    """What training with this batch size allocates, by buffer, and how many threads share a step. Raises
    `ConfigError` for no number of threads."""
    check_threads(engine, threads)
    team = 1 if engine == "reference" else team_size(config, batch_size, threads)
    return memory(effective(config, engine), dtype, batch_size * config.block_size, batch_size, team), team


def check_memory(
    config: GPTConfig, engine: str, dtype: str | None, batch_size: int, threads: int | None = None
) -> None:
    """Raise `ConfigError` if training with this batch size, or with 0 just holding a model and its
    gradients, needs more memory than is free, saying what would fit."""
    number = check_engine(engine, dtype)

    def needs(config: GPTConfig, batch_size: int) -> int:
        plans, _ = training_memory(config, engine, number, batch_size, threads)
        held = ("parameters", "gradients") if batch_size == 0 else tuple(plans)
        return sum(plans[name].nbytes for name in held)

    needed, free = needs(config, batch_size), free_memory()
    if needed <= free:
        return
    size = f"{n_params(config):,} parameters"
    if batch_size:
        size += f", batches of up to {batch_size * config.block_size:,} tokens"
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


def free_memory() -> float:
    """Bytes of memory that a process may still take: what Linux calls available, within the limits of its
    control group; elsewhere all physical memory; infinity where the system does not say."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free: float = 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError):
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):
            return float("inf")
    group = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, taken = int((group / limit).read_text()), int((group / used).read_text())
        except (OSError, ValueError):
            continue  # no such control group, or no limit
        free = min(free, most - taken)
    return free
