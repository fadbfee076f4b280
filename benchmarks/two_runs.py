"""Two training runs in two threads of one process, against the same two one after the other.

    python benchmarks/two_runs.py

Compiled code runs without Python's lock, so two runs use two cores. Prints both times and the
speed-up; exit code 1 if the losses are not the same, bit for bit.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import tapeless as tl

REPEATS = 5
SETTINGS = {"n_embd": 64, "batch_size": 16, "lr": 0.0025}


def run(seed: int) -> np.ndarray:
    """The losses of one run."""
    return tl.train("names", steps=2000, seed=seed, threads=1, set=SETTINGS, samples=0, progress=False).losses


def main() -> int:
    run(0)  # compiles
    alone, together = [], []
    with ThreadPoolExecutor(2) as pool:
        for _ in range(REPEATS):
            began = time.perf_counter()
            one_by_one = [run(1), run(2)]
            alone.append(time.perf_counter() - began)
            began = time.perf_counter()
            at_once = list(pool.map(run, (1, 2)))
            together.append(time.perf_counter() - began)
            if not np.array_equal(one_by_one, at_once):
                print("the losses of the two ways differ.")
                return 1
    first, second = min(alone), min(together)
    print(f"two runs of microgpt, width {SETTINGS['n_embd']}, 16 documents, 2,000 steps")
    print(f"one after the other   {first:6.2f} s")
    print(f"in two threads        {second:6.2f} s   {first / second:.2f} times as fast")
    return 0


if __name__ == "__main__":
    sys.exit(main())
