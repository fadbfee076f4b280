"""How weights start. Gains are one, biases zero, hyper-connections the plain residual; the
matrices follow the scheme `config.init`.

scheme     each weight                            drawn in the order
microgpt   N(0, 0.08²)                            wte, wpe, head; per layer wq, wk, wv, wo, w1, w2
esp32gpt   N(0, 0.1²)                             wte, wpe; per layer wq, wk, wv, wo, w1, w2; head
gpt2       N(0, 0.02²); wo, w2 with 0.02/√(2L)    as microgpt
width      N(0, 1/C)                              as microgpt

Each weight is drawn row by row as `[out][in]`, in esp32gpt as `[in][out]`.
"""

from __future__ import annotations

from typing import Any

from tapeless.config import GPTConfig, whole
from tapeless.rng import GENERATORS, Random

MAX_SEED = 2**63 - 1


def generator_name(config: GPTConfig) -> str:
    """The random generator that goes with a config's initialisation."""
    return {"microgpt": "python", "esp32gpt": "xorshift32"}.get(config.init, "numpy")


def generator(config: GPTConfig, seed: int) -> Random:
    """A fresh random generator for this config. Raises `ConfigError` for an invalid seed."""
    return GENERATORS[generator_name(config)](whole("seed", seed, 0, MAX_SEED))


def initialise(p: Any, config: GPTConfig, rng: Random) -> None:
    """Fill the parameter views `p` from `rng`."""
    C = config.n_embd
    std = {"microgpt": 0.08, "esp32gpt": 0.1, "gpt2": 0.02, "width": C**-0.5}[config.init]
    residual_std = std / (2 * config.n_layer) ** 0.5 if config.init == "gpt2" else std
    transpose = config.init != "esp32gpt"

    def fill(w: Any, std: float = std) -> None:
        # An embedding is a table of rows [V][C] in every scheme; only `[in, out]` weights turn.
        target = w if w is p.wte or w is p.wpe or not transpose else w.T
        target[...] = rng.gauss(w.size, std).reshape(target.shape)

    fill(p.wte)
    fill(p.wpe)
    head_first = config.init != "esp32gpt"
    if head_first and not config.tied:
        fill(p.head)
    for l in range(config.n_layer):
        for part in range(3):
            fill(p.wqkv[l][:, part * C : (part + 1) * C])
        fill(p.wo[l], residual_std)
        fill(p.w1[l])
        fill(p.w2[l], residual_std)
    if not head_first and not config.tied:
        fill(p.head)
    for name in ("norme_w", "norm1_w", "norm2_w", "normf_w"):
        getattr(p, name)[...] = 1
    # Hyper-connections start as the plain residual; mix = 0 mixes evenly.
    for name in ("alpha1", "alpha2", "contract"):
        getattr(p, name)[...] = 1 / config.n_streams
    for name in ("beta1", "beta2"):
        getattr(p, name)[...] = 1
