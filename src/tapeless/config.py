"""What a model is: `GPTConfig`, a frozen, validated description. Nothing here computes anything."""

from __future__ import annotations

import dataclasses
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

from tapeless.errors import ConfigError, did_you_mean

# How a model is computed, not what it is: these may change from one run of it to the next.
COMPUTED = ("recompute", "precision")
# One tensor index must fit 32 bits on the smallest chip we export to, and no real model comes near.
MAX_SIZE = 2**24
MAX_STREAMS = 16
SMALLEST = 1e-30  # least value of a setting that must be above 0: far smaller ones are 0 in float32
LATER = ("attention_tile", "recompute", "precision")  # fields that older versions did not write

Described = TypeVar("Described")


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


def from_saved(kind: type[Described], content: Any, later: Sequence[str]) -> Described:
    """Return the dataclass `kind` with the fields that a file holds.

    Raises `ConfigError` for an unknown or missing field, or a value that cannot be. Those in `later` may
    be missing: older versions did not write them, and their defaults are what these versions did.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"expected settings by name, not {content!r}.")
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if unknown := [name for name in content if name not in known]:
        raise ConfigError(f"this version has no setting {unknown[0]!r}.")
    if missing := [name for name in known if name not in content and name not in later]:
        raise ConfigError(f"{missing[0]} is missing.")
    return kind(**content)


def setting(
    default: Any,
    about: str,
    *choices: str,
    least: float | None = None,
    most: float = MAX_SIZE,
    ends: str = "",
) -> Any:
    """A field of a config: its default, one sentence about it, and its values: the `choices` of a word, or
    the range of a number as for `whole` and `number`."""
    return field(
        default=default,
        metadata={"about": about, "choices": choices, "range": (least, most), "ends": ends},
    )


def check_settings(config: Any) -> None:
    """Convert the fields of a config to their types. Raises `ConfigError`, naming the field, for a value
    that it cannot have."""
    for f in fields(config):
        name, value = f.name, getattr(config, f.name)
        choices, (least, most) = f.metadata["choices"], f.metadata["range"]
        if f.type == "bool":
            if not isinstance(value, bool):
                raise ConfigError(f"{name} must be true or false, not {value!r}.")
        elif f.type == "str":
            if value not in choices:
                raise ConfigError(f"{name} cannot be {value!r}.{did_you_mean(value, choices)}")
        elif f.type == "float":
            object.__setattr__(config, name, number(name, value, least, most, ends=f.metadata["ends"]))
        elif value is not None or f.default is not None:
            object.__setattr__(config, name, whole(name, value, least, most))


def described(config: type) -> type:
    """Add each field's sentence to the docstring of a config."""
    lines = [str(config.__doc__).rstrip(), "", "    Fields:", ""]
    for f in fields(config):
        line = f"{f.name} ({f.type}, default {f.default!r}): {f.metadata['about']}"
        lines += textwrap.wrap(line, 90, initial_indent=" " * 4, subsequent_indent=" " * 8)
    config.__doc__ = "\n".join([*lines, ""])
    return config


@described
@dataclass(frozen=True)
class GPTConfig:
    """The architecture of one GPT.

    Raises `ConfigError`, naming the field, for values that make no model.
    """

    vocab_size: int | None = setting(
        None, "Number of tokens (V). The data gives it where it is not set.", least=1
    )
    block_size: int = setting(16, "The longest context, in tokens (T).", least=1)
    n_layer: int = setting(1, "Number of transformer layers (L).", least=1)
    n_head: int = setting(4, "Attention heads (H), each n_embd / n_head wide.", least=1)
    n_embd: int = setting(16, "Width of the residual stream, the embedding dimension (C).", least=1)
    n_hidden: int = setting(0, "Width of the MLP's hidden layer (F); 0 means 4 · n_embd.", least=0)
    norm: str = setting("rms", "Kind of norm: RMSNorm, LayerNorm or none.", "none", "rms", "layer")
    norm_gain: bool = setting(False, "Norms have a learned gain per channel.")
    norm_bias: bool = setting(False, "Norms have a learned bias per channel (layer only).")
    norm_embed: bool = setting(False, "A norm after the embedding.")
    norm_attn: bool = setting(True, "A norm before attention (pre-norm).")
    norm_mlp: bool = setting(True, "A norm before the MLP (pre-norm).")
    norm_final: bool = setting(False, "A norm before the head.")
    norm_eps: float = setting(
        1e-5, "Added to the mean square or variance in a norm.", least=SMALLEST, most=1, ends="low"
    )
    activation: str = setting("relu", "Nonlinearity of the MLP; gelu is the tanh form.", "relu", "gelu")
    bias: bool = setting(False, "Linear layers have biases.")
    tied: bool = setting(False, "The head is the transposed token embedding (weight tying).")
    attention: str = setting(
        "full",
        "full keeps all attention probabilities, flash only their log-sum-exp (FlashAttention). The compiled "
        "engine always computes flash.",
        "full",
        "flash",
    )
    attention_tile: int = setting(
        32, "Queries and keys in a tile of flash attention on the reference engine.", least=1
    )
    recompute: bool = setting(
        False,
        "Keep only each layer's input and recompute the rest in the backward pass (gradient checkpointing).",
    )
    precision: str = setting(
        "float32",
        "What matmuls of linear layers and the head read (mixed precision): float32, or bf16 with sums in "
        "float32.",
        "float32",
        "bf16",
    )
    residual: str = setting("add", "Residual connections: add, or mhc, hyper-connections.", "add", "mhc")
    n_streams: int = setting(
        0, "Residual streams of mhc (S), 2 to 16; 0 means 2 with mhc, 1 with add.", least=0
    )
    init: str = setting(
        "microgpt",
        "How weights start, and with which random generator; see tapeless.init.",
        "microgpt",
        "esp32gpt",
        "gpt2",
        "width",
    )

    def __post_init__(self) -> None:
        check_settings(self)
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
        known = [f.name for f in fields(self)]
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
