"""What can be set by name: how a model is trained (`Training`), beside what it is (`GPTConfig`)."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tapeless.config import GPTConfig, number, whole
from tapeless.data.headerless import AUTO, TOKEN_DTYPES
from tapeless.errors import ConfigError, did_you_mean

# Beyond these, something was mistyped: it would take days, or memory that nobody has.
MAX_STEPS = 2**40
MAX_TOKENS = 2**20  # of one text
MAX_TEXTS = 2**20  # of one call
MAX_TEMPERATURE = 1e6

MAX_TOML = 2**14  # bytes

CHOICES = {
    "schedule": ("constant", "linear", "cosine"),
    "optimiser": ("sgd", "adam", "adamw"),
    "order": ("shuffle", "draw", "windows", "sequence", "llmc"),
    "bad_steps": ("stop", "skip"),
    "token_dtype": (AUTO, *TOKEN_DTYPES),
}
DOCUMENTS = ("shuffle", "draw")  # the orders of documents; the others are of windows


@dataclass(frozen=True)
class Training:
    """How a model is trained. Raises `ConfigError`, naming the field, for values that cannot work."""

    steps: int = 1000
    batch_size: int = 1  # documents or windows that are computed at once
    total_batch_tokens: int = 0  # of a step, in several batches of windows; 0 is one batch
    window: int = 0  # longest document or window trained on; 0 is the model's block_size
    lr: float = 0.01  # the highest learning rate
    schedule: str = "linear"  # "constant" | "linear" | "cosine", from lr to min_lr: see tapeless.optim
    min_lr: float = 0.0  # where the schedule ends
    warmup_steps: int = 0  # steps over which the learning rate rises to lr
    optimiser: str = "adam"  # "sgd" | "adam" | "adamw"
    beta1: float = 0.85
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0  # of matrices, decoupled: "adamw" only
    momentum: float = 0.0  # "sgd" only
    grad_clip: float = 0.0  # largest global norm of the gradient; 0 leaves it as it is
    # A step is bad if its loss or its gradient's norm is not finite, or a spike: more than `spike` times its
    # running mean. 0: nothing is a spike. "stop" looks at the norm only for spikes and for grad_clip.
    bad_steps: str = "stop"  # "stop" | "skip": leave the model as it was, and go on with the next step
    spike: float = 0.0
    # Documents: "shuffle" once, then round and round | "draw" at random each time. A long text: "windows"
    # of it at random places | "sequence": one after the other, over and over | "llmc": in llm.c's order.
    order: str = "shuffle"
    # Integers in token files without a header: "auto", by content | "uint16" | "uint32" | "int32" | "int64".
    token_dtype: str = AUTO
    val_fraction: float = 0.0  # of the data, held out: the end of a text, or documents here and there
    eval_every: int = 0  # steps between evaluations on what is held out; 0 is once, at the end
    eval_batches: int = 0  # of batch_size, from the first, in an evaluation; 0 is all
    sample_every: int = 0  # steps between texts generated while training; 0 is none
    samples: int = 20  # texts generated after training
    temperature: float = 0.5  # of those texts
    max_tokens: int = 16  # longest of those texts

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "steps": whole("steps", self.steps, 1, MAX_STEPS),
            "batch_size": whole("batch_size", self.batch_size, 1, MAX_STEPS),
            "total_batch_tokens": whole("total_batch_tokens", self.total_batch_tokens, 0, MAX_STEPS),
            "window": whole("window", self.window, 0, MAX_STEPS),
            "lr": number("lr", self.lr, 0, 1e6),
            "min_lr": number("min_lr", self.min_lr, 0, 1e6, ends="low"),
            "warmup_steps": whole("warmup_steps", self.warmup_steps, 0, MAX_STEPS),
            "weight_decay": number("weight_decay", self.weight_decay, 0, 1e3, ends="low"),
            "momentum": number("momentum", self.momentum, 0, 1, ends="low"),
            "grad_clip": number("grad_clip", self.grad_clip, 0, 1e9, ends="low"),
            "spike": number("spike", self.spike, 0, 1e9, ends="low"),
            "val_fraction": number("val_fraction", self.val_fraction, 0, 1, ends="low"),
            "eval_every": whole("eval_every", self.eval_every, 0, MAX_STEPS),
            "eval_batches": whole("eval_batches", self.eval_batches, 0, MAX_STEPS),
            "sample_every": whole("sample_every", self.sample_every, 0, MAX_STEPS),
            "samples": whole("samples", self.samples, 0, MAX_TEXTS),
            "eps": number("eps", self.eps, 0, 1),
            "beta1": number("beta1", self.beta1, 0, 1, ends="low"),
            "beta2": number("beta2", self.beta2, 0, 1, ends="low"),
            "temperature": number("temperature", self.temperature, 0, MAX_TEMPERATURE, ends="low"),
            "max_tokens": whole("max_tokens", self.max_tokens, 1, MAX_TOKENS),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"{name} cannot be {value!r}.{did_you_mean(value, choices)}")
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
        content = tomllib.loads(text.decode())
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
