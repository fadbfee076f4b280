"""The first weights of a program that trains: drawn where it runs, or copied from flash."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tapeless.config import GPTConfig
from tapeless.init import initialise
from tapeless.layout import n_params, parameter_plan


def number(x: float) -> str:
    """A float of C that is this float32 exactly."""
    return f"{np.float32(x)!s}f"


class _Counting:
    """In the place of a random generator: the k-th number that it gives says so."""

    MARK = 1e9

    def __init__(self) -> None:
        self.drawn = 0
        self.draws: list[tuple[int, int, float]] = []  # first, count, standard deviation

    def gauss(self, n: int, std: float) -> np.ndarray:
        first, self.drawn = self.drawn, self.drawn + n
        self.draws.append((first, n, std))
        return self.MARK + np.arange(first, self.drawn)


def begin(config: GPTConfig, drawn: bool) -> Iterator[str]:
    """The statements that fill the parameters: with weights `drawn` as `initialise` was seen to do it, or
    with a copy of those in flash."""
    if not drawn:
        yield f"tl_add(ram, tl_weights, {n_params(config)});"
        return
    layout = parameter_plan(config, np.float64)
    buffer = layout.allocate()
    flat, counting = buffer.view(np.float64), _Counting()
    initialise(layout.views("p", buffer), config, counting)  # type: ignore[arg-type]
    where = np.empty(counting.drawn, np.int64)
    filled = flat >= counting.MARK
    where[(flat[filled] - counting.MARK).astype(np.int64)] = np.flatnonzero(filled)
    for first, count, std in counting.draws:
        places = where[first : first + count]
        across = places[1] - places[0] if count > 1 else 1
        line = np.flatnonzero(np.diff(places) != across)
        columns = int(line[0]) + 1 if len(line) else count
        down = int(places[columns] - places[0]) if columns < count else 0
        rows = count // columns
        affine = places[0] + np.add.outer(np.arange(rows) * down, np.arange(columns) * across).ravel()
        assert np.array_equal(affine, places)
        # 1 / 0.1 and 1 / 0.08 are floats, 0.1 and 0.08 are not: divided by them, weights are rounded once.
        yield f"draw(ram + {places[0]}, {rows}, {columns}, {down}, {across}, {number(1 / std)});"
    rest = np.where(filled, 0, flat)
    for run in np.split(np.arange(len(rest)), np.flatnonzero(np.diff(rest)) + 1):
        if rest[run[0]]:
            yield f"for (int i = {run[0]}; i < {run[-1] + 1}; i++)"
            yield f"    ram[i] = {number(rest[run[0]])};"
