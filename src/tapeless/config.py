"""What a model is: `GPTConfig`, a frozen, validated description. Nothing here computes anything."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from tapeless.errors import ConfigError, did_you_mean

CHOICES = {
    "norm": ("none", "rms", "layer"),
    "activation": ("relu", "gelu"),
    "attention": ("full", "flash"),
    "residual": ("add", "mhc"),
    "init": ("microgpt", "esp32gpt", "gpt2", "width"),
    "precision": ("float32", "bf16"),
}
# How a model is computed, not what it is: these may change from one run of it to the next.
COMPUTED = ("recompute", "precision")
# One tensor index must fit 32 bits on the smallest chip we export to, and no real model comes near.
MAX_SIZE = 2**24
MAX_STREAMS = 16


def whole(name: str, value: Any, least: int, most: int) -> int:
    """`value` as an int. Raises `ConfigError`, naming it, unless it is a whole number in this range."""
    ok = isinstance(value, Integral) and not isinstance(value, bool)
    if not ok or not least <= value <= most:
        raise ConfigError(f"{name} must be a whole number from {least:,} to {most:,}, not {value!r}.")
    return int(value)


def number(name: str, value: Any, low: float, high: float, *, ends: str = "") -> float:
    """`value` as a float. Raises `ConfigError`, naming it, unless it is a number between `low` and
    `high`, or equal to the one that `ends` names: "low" or "high"."""
    ok = isinstance(value, Real) and not isinstance(value, bool)
    if not ok or not (low < value < high or (ends and value == {"low": low, "high": high}[ends])):
        least = f"at least {low:g}" if ends == "low" else f"above {low:g}"
        most = f"at most {high:g}" if ends == "high" else f"below {high:g}"
        raise ConfigError(f"{name} must be a number {least} and {most}, not {value!r}.")
    return float(value)


def as_path(name: str, value: Any) -> Path:
    """`value` as a path. Raises `ConfigError`, naming it, if it is not one, or empty: the empty path would
    be the present folder."""
    if not isinstance(value, (str, os.PathLike)) or isinstance(os.fspath(value), bytes):
        raise ConfigError(f"{name} must be a path, not {value!r:.60}.")
    if not os.fspath(value) or "\0" in os.fspath(value):
        raise ConfigError(f"{name} is {'no path' if os.fspath(value) else 'empty'}: give a path.")
    return Path(value)


@dataclass(frozen=True)
class GPTConfig:
    """The architecture of one GPT.

    Raises `ConfigError`, naming the field, for values that make no model.
    """

    vocab_size: int | None = None  # V: number of tokens; None in a preset, until the data gives it
    block_size: int = 16  # T: the longest context
    n_layer: int = 1  # L
    n_head: int = 4  # H: attention heads, each n_embd / n_head wide
    n_embd: int = 16  # C: width of the residual stream
    n_hidden: int = 0  # F: width of the MLP; 0 means 4·n_embd and is replaced by it
    norm: str = "rms"  # "none" | "rms" | "layer"
    norm_gain: bool = False  # a learned gain per channel
    norm_bias: bool = False  # a learned bias per channel ("layer" only)
    norm_embed: bool = False  # a norm after the embedding
    norm_attn: bool = True  # a norm before attention
    norm_mlp: bool = True  # a norm before the MLP
    norm_final: bool = False  # a norm before the head
    norm_eps: float = 1e-5
    activation: str = "relu"  # "relu" | "gelu" (tanh form)
    bias: bool = False  # biases in the linear layers
    tied: bool = False  # the head is the transposed token embedding
    # "full" keeps the probabilities, "flash" only their log-sum-exp, as compiled code always does.
    attention: str = "full"
    attention_tile: int = 32  # queries and keys in a tile of "flash" on the reference engine
    recompute: bool = False  # keep only the input of each layer; the backward pass makes the rest again
    # What the compiled engine's products of linear layers and the head read: "float32", or "bf16", rounded
    # to bfloat16. Sums, and all else, are float32.
    precision: str = "float32"
    residual: str = "add"  # "add" | "mhc" (hyper-connections)
    n_streams: int = 0  # S: residual streams; 0 means 2 with "mhc", 1 with "add"
    init: str = "microgpt"  # how weights start; see tapeless.init

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            name, value = f.name, getattr(self, f.name)
            if not f.type.startswith("int") or value == f.default is None:
                continue
            least = 0 if f.default == 0 else 1  # 0 where the default is to derive it
            object.__setattr__(self, name, whole(name, value, least, MAX_SIZE))
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"{name} cannot be {value!r}.{did_you_mean(value, choices)}")
        for f in dataclasses.fields(self):
            if f.type == "bool" and not isinstance(getattr(self, f.name), bool):
                raise ConfigError(f"{f.name} must be true or false, not {getattr(self, f.name)!r}.")
        object.__setattr__(self, "norm_eps", number("norm_eps", self.norm_eps, 0, 1))
        if self.n_hidden == 0:
            object.__setattr__(self, "n_hidden", 4 * self.n_embd)
        if self.n_embd % self.n_head:
            raise ConfigError(
                f"n_embd must be divisible by n_head: {self.n_embd} / {self.n_head} leaves "
                f"{self.n_embd % self.n_head}. Change one of them."
            )
        places = [n for n in ("norm_embed", "norm_attn", "norm_mlp", "norm_final") if getattr(self, n)]
        if self.norm == "none" and places:
            verb = "is" if len(places) == 1 else "are"
            raise ConfigError(
                f"norm='none' but {', '.join(places)} {verb} true: set that to false or choose a norm."
            )
        if self.norm_bias and self.norm != "layer":
            raise ConfigError(f"norm_bias needs norm='layer', not {self.norm!r}.")
        if self.norm_gain and not places:
            raise ConfigError("norm_gain is true but no norm stands anywhere: set it to false.")
        if self.norm_bias and not places:
            raise ConfigError("norm_bias is true but no norm stands anywhere: set it to false.")
        if self.n_streams == 0:
            object.__setattr__(self, "n_streams", 2 if self.residual == "mhc" else 1)
        if self.residual == "add" and self.n_streams != 1:
            raise ConfigError(f"residual='add' has one stream: n_streams must be 1, not {self.n_streams}.")
        if self.residual == "mhc" and not 2 <= self.n_streams <= MAX_STREAMS:
            raise ConfigError(
                f"residual='mhc' needs n_streams from 2 to {MAX_STREAMS}, not {self.n_streams}."
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def vocab(self) -> int:
        """V, once it is known. Raises `ConfigError` while `vocab_size` is None."""
        if self.vocab_size is None:
            raise ConfigError("vocab_size is not set: it comes from the data, or give it yourself.")
        return self.vocab_size

    def replace(self, **changes: Any) -> GPTConfig:
        """A copy with some fields changed. `n_hidden` follows `n_embd` where it was four times as wide,
        `n_streams` follows `residual`.

        Raises `ConfigError` for unknown fields, suggesting the nearest.
        """
        known = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise ConfigError(f"no model setting is called {name!r}.{did_you_mean(name, known)}")
        if "n_hidden" not in changes and self.n_hidden == 4 * self.n_embd:
            changes["n_hidden"] = 0
        if "n_streams" not in changes and changes.get("residual", self.residual) != self.residual:
            changes["n_streams"] = 0
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return dataclasses.asdict(self)
