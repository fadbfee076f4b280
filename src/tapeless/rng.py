"""Randomness that repeats: one seed, one stream of numbers for shuffling, weights and samples.

Three generators with the same methods: `PythonRandom` is Python's `random` (MT19937), as microgpt
uses it; `XorShift32` is what fits a microcontroller; `NumpyRandom` is fast enough for large models.
"""

from __future__ import annotations

import math
import random
from typing import Any, Protocol, runtime_checkable

import numpy as np


def _f32(x: float) -> float:
    return float(np.float32(x))


_TWO_PI = _f32(2 * math.pi)


@runtime_checkable
class Random(Protocol):
    """What a generator offers. `state` and `restore` carry it across processes."""

    def permutation(self, n: int) -> np.ndarray: ...
    def gauss(self, n: int, std: float) -> np.ndarray: ...
    def index(self, n: int) -> int: ...
    def uniforms(self, n: int) -> np.ndarray: ...
    def state(self) -> dict[str, np.ndarray]: ...
    def restore(self, state: dict[str, np.ndarray]) -> None: ...


class PythonRandom:
    """Python's `random.Random`: MT19937."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def permutation(self, n: int) -> np.ndarray:
        """What `random.shuffle` makes of 0 … n−1."""
        order = list(range(n))
        self._random.shuffle(order)
        return np.array(order, np.int64)

    def gauss(self, n: int, std: float) -> np.ndarray:
        """n draws of `random.gauss(0, std)`."""
        gauss = self._random.gauss
        return np.array([gauss(0, std) for _ in range(n)])

    def index(self, n: int) -> int:
        """A whole number from 0 to n−1."""
        return self._random.randrange(n)

    def uniforms(self, n: int) -> np.ndarray:
        """n draws of `random.random()`: uniform in [0, 1)."""
        # NumPy's legacy generator is the same MT19937 and makes the same floats of it, many at once.
        version, words, spare = self._random.getstate()
        same: Any = np.random.RandomState()
        same.set_state(("MT19937", words[:-1], words[-1]))
        drawn = same.random_sample(n)
        _, key, position, *_ = same.get_state()
        self._random.setstate((version, (*key.tolist(), int(position)), spare))
        return drawn

    def state(self) -> dict[str, np.ndarray]:
        _, words, spare = self._random.getstate()
        return {
            "words": np.array(words, np.uint32),
            "spare": np.array([math.nan if spare is None else spare]),
        }

    def restore(self, state: dict[str, np.ndarray]) -> None:
        spare = float(state["spare"][0])
        words = tuple(int(w) for w in state["words"])
        self._random.setstate((3, words, None if math.isnan(spare) else spare))


class XorShift32:
    """Marsaglia's xorshift with 32 bits of state, and Box-Muller in float32, step by step as a chip
    computes it.

    x ^= x << 13; x ^= x >> 17; x ^= x << 5.  Marsaglia 2003, "Xorshift RNGs", section 4. Zero would
    stay zero for ever, so seed 0 starts at 2463534242, the state of that paper's example.
    """

    def __init__(self, seed: int):
        self._x = seed & 0xFFFFFFFF or 2463534242
        self._spare = math.nan

    def next_u32(self) -> int:
        x = self._x
        x ^= (x << 13) & 0xFFFFFFFF
        x ^= x >> 17
        x ^= (x << 5) & 0xFFFFFFFF
        self._x = x
        return x

    def _uniform(self) -> float:
        """u32 / 2³² in float32."""
        return _f32(self.next_u32()) / 2**32

    def _normal(self) -> float:
        if not math.isnan(self._spare):
            z, self._spare = self._spare, math.nan
            return z
        u1 = self._uniform()
        while u1 <= 1e-10:
            u1 = self._uniform()
        angle = _f32(_TWO_PI * self._uniform())
        r = _f32(math.sqrt(-2 * _f32(math.log(u1))))
        self._spare = _f32(r * _f32(math.sin(angle)))
        return _f32(r * _f32(math.cos(angle)))

    def permutation(self, n: int) -> np.ndarray:
        """0 … n−1 in random order: Fisher-Yates from the last index down, `u32 mod (i+1)`."""
        order = np.arange(n)
        for i in range(n - 1, 0, -1):
            j = self.next_u32() % (i + 1)
            order[i], order[j] = order[j], order[i]
        return order

    def gauss(self, n: int, std: float) -> np.ndarray:
        """n Gaussians by Box-Muller, r·cos θ first, r·sin θ next."""
        return np.array([std * self._normal() for _ in range(n)])

    def index(self, n: int) -> int:
        """`u32 mod n`"""
        return self.next_u32() % n

    def uniforms(self, n: int) -> np.ndarray:
        """n draws of u32 / 2³² in float32."""
        return np.array([self._uniform() for _ in range(n)])

    def state(self) -> dict[str, np.ndarray]:
        return {"words": np.array([self._x], np.uint32), "spare": np.array([self._spare])}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        if not (x := int(state["words"][0])):
            raise ValueError("zero would stay zero for ever")
        self._x = x
        self._spare = float(state["spare"][0])


class NumpyRandom:
    """NumPy's PCG64: for models too large to draw their weights one by one."""

    def __init__(self, seed: int):
        self._generator = np.random.Generator(np.random.PCG64(seed))

    def permutation(self, n: int) -> np.ndarray:
        """0 … n−1 in random order."""
        return self._generator.permutation(n)

    def gauss(self, n: int, std: float) -> np.ndarray:
        """n draws from N(0, std²)."""
        return self._generator.normal(0, std, n)

    def index(self, n: int) -> int:
        """A whole number from 0 to n−1."""
        return int(self._generator.integers(n))

    def uniforms(self, n: int) -> np.ndarray:
        """n draws, uniform in [0, 1)."""
        return self._generator.random(n)

    def state(self) -> dict[str, np.ndarray]:
        s = self._generator.bit_generator.state
        numbers = (s["state"]["state"], s["state"]["inc"], s["has_uint32"], s["uinteger"])
        words = [number >> (32 * i) & 0xFFFFFFFF for number in numbers for i in range(4)]
        return {"words": np.array(words, np.uint32), "spare": np.array([math.nan])}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        rows = state["words"].reshape(4, 4)
        value, inc, has, spare = (sum(int(w) << (32 * i) for i, w in enumerate(row)) for row in rows)
        self._generator.bit_generator.state = {
            "bit_generator": "PCG64",
            "state": {"state": value, "inc": inc},
            "has_uint32": has,
            "uinteger": spare,
        }


GENERATORS: dict[str, type[PythonRandom] | type[XorShift32] | type[NumpyRandom]] = {
    "python": PythonRandom,
    "xorshift32": XorShift32,
    "numpy": NumpyRandom,
}
