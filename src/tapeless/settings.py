"""What can be set by name: how a model is trained (`Training`), beside what it is (`GPTConfig`)."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tapeless.config import SMALLEST, GPTConfig, check_settings, described, setting
from tapeless.data.headerless import AUTO, TOKEN_DTYPES
from tapeless.errors import ConfigError, did_you_mean

# Beyond these, something was mistyped: it would take days, or memory that nobody has.
MAX_STEPS = 2**40
MAX_TOKENS = 2**20  # of one text
MAX_TEXTS = 2**20  # of one call
MAX_TEMPERATURE = 1e6

MAX_TOML = 2**14  # bytes

LATER = ("bad_steps", "spike", "token_dtype")  # fields that older versions did not write
DOCUMENTS = ("shuffle", "draw")  # the orders of documents; the others are of windows


@described
@dataclass(frozen=True)
class Training:
    """How a model is trained. Raises `ConfigError`, naming the field, for values that cannot work."""

    steps: int = setting(1000, "Optimiser steps.", least=1, most=MAX_STEPS)
    batch_size: int = setting(
        1, "Documents or windows in a batch, computed together (B).", least=1, most=MAX_STEPS
    )
    total_batch_tokens: int = setting(
        0,
        "Tokens per step, by gradient accumulation over several batches of windows; 0 means one batch.",
        least=0,
        most=MAX_STEPS,
    )
    window: int = setting(
        0, "Longest document or window to train on, in tokens; 0 means block_size.", least=0, most=MAX_STEPS
    )
    lr: float = setting(0.01, "The highest learning rate.", least=SMALLEST, most=1e6, ends="low")
    schedule: str = setting(
        "linear", "How the learning rate falls from lr to min_lr.", "constant", "linear", "cosine"
    )
    min_lr: float = setting(0.0, "Learning rate at which the schedule ends.", least=0, most=1e6, ends="low")
    warmup_steps: int = setting(0, "Steps over which the learning rate rises to lr.", least=0, most=MAX_STEPS)
    optimiser: str = setting("adam", "The update rule.", "sgd", "adam", "adamw")
    beta1: float = setting(0.85, "Decay of Adam's first moment.", least=0, most=1, ends="low")
    beta2: float = setting(0.99, "Decay of Adam's second moment.", least=0, most=1, ends="low")
    eps: float = setting(1e-8, "Added to Adam's denominator.", least=SMALLEST, most=1, ends="low")
    weight_decay: float = setting(
        0.0, "Decoupled weight decay of matrices (adamw only).", least=0, most=1e3, ends="low"
    )
    momentum: float = setting(0.0, "Momentum (sgd only).", least=0, most=1, ends="low")
    grad_clip: float = setting(
        0.0,
        "Largest global norm of the gradient, clipped to it; 0 means no clipping.",
        least=0,
        most=1e9,
        ends="low",
    )
    bad_steps: str = setting(
        "stop",
        "What to do at a step whose loss or gradient norm is not finite, or a spike: stop the run, or skip "
        "the update. stop looks at the norm only with spike or grad_clip.",
        "stop",
        "skip",
    )
    spike: float = setting(
        0.0,
        "A step is a spike if its loss or gradient norm is above this many times the running mean; 0 means "
        "never.",
        least=0,
        most=1e9,
        ends="low",
    )
    order: str = setting(
        "shuffle",
        "Documents: shuffle once, or draw at random. One long text: windows at random, in sequence, or in "
        "the order of llmc.",
        "shuffle",
        "draw",
        "windows",
        "sequence",
        "llmc",
    )
    token_dtype: str = setting(AUTO, "Integer type of token files without a header.", AUTO, *TOKEN_DTYPES)
    val_fraction: float = setting(
        0.0,
        "Fraction of the data held out for validation: the end of a text, or documents here and there.",
        least=0,
        most=1,
        ends="low",
    )
    eval_every: int = setting(
        0, "Steps between validations; 0 means only at the end.", least=0, most=MAX_STEPS
    )
    eval_batches: int = setting(
        0, "Batches of a validation, from the first; 0 means all.", least=0, most=MAX_STEPS
    )
    sample_every: int = setting(
        0, "Steps between texts generated while training; 0 means none.", least=0, most=MAX_STEPS
    )
    samples: int = setting(20, "Texts generated after training.", least=0, most=MAX_TEXTS)
    temperature: float = setting(
        0.5, "Sampling temperature of those texts.", least=0, most=MAX_TEMPERATURE, ends="low"
    )
    max_tokens: int = setting(16, "Maximum tokens of those texts.", least=1, most=MAX_TOKENS)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.weight_decay and self.optimiser != "adamw":
            raise ConfigError(f"weight_decay needs optimiser='adamw', not {self.optimiser!r}.")
        if self.momentum and self.optimiser != "sgd":
            raise ConfigError(f"momentum needs optimiser='sgd', not {self.optimiser!r}.")
        if 0 < self.spike <= 1:
            raise ConfigError(f"spike must be above 1, or 0 for none, not {self.spike:g}.")
        if self.min_lr > self.lr:
            raise ConfigError(f"min_lr, {self.min_lr:g}, must not be above lr, {self.lr:g}.")
        if self.total_batch_tokens and self.of_documents:
            raise ConfigError(
                "total_batch_tokens counts the tokens of windows, and documents differ in length: set a "
                "larger batch_size, or an order of windows, such as order=sequence."
            )

    @property
    def watches(self) -> bool:
        """Whether a step's norm of the gradient decides if it is bad."""
        return self.bad_steps == "skip" or self.spike > 0

    @property
    def of_documents(self) -> bool:
        """Whether the data are documents, not one long text."""
        return self.order in DOCUMENTS

    def batches(self, block_size: int) -> int:
        """A: how many batches of windows of this length make a step.

        Raises `ConfigError` unless that is a whole number.
        """
        tokens = self.batch_size * block_size
        if self.total_batch_tokens % tokens:
            raise ConfigError(
                f"total_batch_tokens must be a multiple of batch_size × block_size = {self.batch_size} × "
                f"{block_size:,} = {tokens:,} tokens, not {self.total_batch_tokens:,}."
            )
        return self.total_batch_tokens // tokens or 1


def home(name: Any) -> type:
    """Whose setting this is: `GPTConfig`, the model's, or `Training`.

    Raises `ConfigError` for an unknown name, suggesting the nearest.
    """
    return _field(name)[0]


def _field(name: Any) -> tuple[type, dataclasses.Field]:
    fields = {f.name: (home, f) for home in (GPTConfig, Training) for f in dataclasses.fields(home)}
    if name not in fields:
        raise ConfigError(f"no setting is called {name!r}.{did_you_mean(name, fields)}")
    return fields[name]


class Setting(NamedTuple):
    """What there is to know about a setting."""

    name: str
    table: str  # of a TOML file
    type: str
    values: str
    default: str
    about: str


def text_of(value: Any) -> str:
    """A setting's value as it is written after `--set` or in TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe(name: str) -> Setting:
    """What there is to know about a setting. Raises `ConfigError` for an unknown name."""
    where, f = _field(name)
    kind, (least, most), ends = f.type.removesuffix(" | None"), f.metadata["range"], f.metadata["ends"]
    if kind in ("bool", "str"):
        values = "true, false" if kind == "bool" else ", ".join(f.metadata["choices"])
    else:
        values = f"{'at least' if kind == 'int' or ends == 'low' else 'above'} {least}"
        if most == 1:  # larger limits only catch slips of the fingers
            values += ", below 1"
    default = "from the data" if f.default is None else text_of(f.default)
    table = "model" if where is GPTConfig else "training"
    return Setting(name, table, kind, values, default, f.metadata["about"])


def names() -> list[str]:
    """The names of all settings, the model's first."""
    return [f.name for home in (GPTConfig, Training) for f in dataclasses.fields(home)]


def parse_setting(name: str, text: str) -> Any:
    """The value of `--set name=text`, by the type of the field it names.

    Raises `ConfigError` for an unknown name, or text that is no such value.
    """
    kind = str(_field(name)[1].type).removesuffix(" | None")
    try:
        if kind == "bool":
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if kind == "int":
            return int(text.replace("_", ""))
        if kind == "float":
            return float(text)
    except (ValueError, KeyError):
        expected = {"bool": "true or false", "int": "a whole number", "float": "a number"}[kind]
        raise ConfigError(f"{name} must be {expected}, not {text!r}.") from None
    return text


TABLES = ("model", "training")


def _table(name: str) -> str:
    """Where a setting stands in a TOML file. Raises `ConfigError` for an unknown name."""
    return "training" if name == "seed" or home(name) is Training else "model"


def read_toml(path: Path) -> dict[str, Any]:
    """The settings of a TOML file, at its top or in the tables [model] and [training]; with them `seed`.

    Raises `ConfigError` if it cannot be read, or has a name that is no setting, or not of its table.
    """
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # some never end
            raise ConfigError(f"{path} is no regular file; expected TOML.")
        with open(path, "rb") as file:
            text = file.read(MAX_TOML + 1)
        if len(text) > MAX_TOML:  # its time and memory go with the square
            raise ConfigError(f"{path} is too long for settings: expected at most {MAX_TOML:,} bytes.")
        content = tomllib.loads(text.decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"no settings file {str(path)!r}.") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:  # of TOML, and of UTF-8
        raise ConfigError(f"{path} is not TOML: {str(error).rstrip('.')}.") from None
    settings: dict[str, Any] = {}

    def put(name: str, value: Any) -> None:
        if isinstance(value, int) and value.bit_length() > 64:  # hexadecimal ones may be of any length
            raise ConfigError(f"{name} is beyond the 64 bits of TOML's whole numbers.")
        settings[name] = value

    try:
        for key, value in content.items():
            if key not in TABLES:
                if isinstance(value, dict):
                    raise ConfigError(f"no table is called [{key}]; expected [model] or [training].")
                _table(key)
                put(key, value)
                continue
            if not isinstance(value, dict):
                raise ConfigError(f"{key} must be a table of settings: [{key}].")
            for name, setting in value.items():
                if _table(name) != key:
                    raise ConfigError(f"{name} is a setting of [{_table(name)}], not of [{key}].")
                if name in settings:
                    raise ConfigError(f"{name} is there twice.")
                put(name, setting)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return settings
