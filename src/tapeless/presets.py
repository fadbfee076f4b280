"""The named models: an architecture, how it is trained, its tokenizer and its random generator."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from tapeless.config import GPTConfig, number, whole
from tapeless.errors import ConfigError, did_you_mean
from tapeless.init import generator_name

# Beyond these, something was mistyped: it would take days, or memory that nobody has.
MAX_STEPS = 2**40
MAX_TOKENS = 2**20  # of one text
MAX_TEXTS = 2**20  # of one call
MAX_TEMPERATURE = 1e6


@dataclass(frozen=True)
class Training:
    """How a model is trained. Raises `ConfigError`, naming the field, for values that cannot work."""

    steps: int = 1000
    batch_size: int = 1  # documents a step
    lr: float = 0.01  # at the first step
    schedule: str = "linear"  # "linear" (to zero at the last step) | "constant"
    optimiser: str = "adam"
    beta1: float = 0.85
    beta2: float = 0.99
    eps: float = 1e-8
    order: str = "shuffle"  # "shuffle" once, then round and round | "draw" at random each time
    temperature: float = 0.5  # of the samples after training
    max_tokens: int = 16  # longest sample

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "steps": whole("steps", self.steps, 1, MAX_STEPS),
            "batch_size": whole("batch_size", self.batch_size, 1, MAX_STEPS),
            "lr": number("lr", self.lr, 0, 1e6),
            "eps": number("eps", self.eps, 0, 1),
            "beta1": number("beta1", self.beta1, 0, 1, ends="low"),
            "beta2": number("beta2", self.beta2, 0, 1, ends="low"),
            "temperature": number("temperature", self.temperature, 0, MAX_TEMPERATURE, ends="low"),
            "max_tokens": whole("max_tokens", self.max_tokens, 1, MAX_TOKENS),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        for name, choices in {
            "schedule": ("linear", "constant"),
            "optimiser": ("adam",),
            "order": ("shuffle", "draw"),
        }.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"{name} cannot be {value!r}.{did_you_mean(value, choices)}")


@dataclass(frozen=True)
class Preset:
    """A named model with everything that goes with it."""

    summary: str
    model: GPTConfig
    training: Training = field(default_factory=Training)
    tokenizer: str = "chars"  # see tapeless.data.tokenizers

    @property
    def random(self) -> str:
        """The random generator, which goes with the initialisation: see tapeless.rng."""
        return generator_name(self.model)

    def with_settings(self, settings: dict[str, Any]) -> Preset:
        """A copy with model and training settings changed by name.

        Raises `ConfigError` for an unknown name, suggesting the nearest.
        """
        homes = {name: _field(name)[0] for name in settings}
        model, training = (
            {name: value for name, value in settings.items() if homes[name] is home}
            for home in (GPTConfig, Training)
        )
        return dataclasses.replace(
            self,
            model=self.model.replace(**model),
            training=dataclasses.replace(self.training, **training),
        )


def _field(name: Any) -> tuple[type, dataclasses.Field]:
    """The setting of this name, and whose it is: the model's or the training's."""
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


_ESP32GPT = GPTConfig(norm="none", norm_embed=False, norm_attn=False, norm_mlp=False, init="esp32gpt")
_ESP32_TRAINING = Training(order="draw", temperature=0.8, max_tokens=15)

presets: dict[str, Preset] = {
    "microgpt": Preset(
        "Karpathy's microgpt",
        GPTConfig(norm="rms", norm_embed=True),
    ),
    "esp32gpt": Preset(
        "the first microcontroller port: no norms, 26 letters, xorshift32",
        _ESP32GPT,
        _ESP32_TRAINING,
        tokenizer="letters",
    ),
    "esp32gpt-rms": Preset(
        "esp32gpt with RMSNorm before attention",
        _ESP32GPT.replace(norm="rms", norm_attn=True),
        _ESP32_TRAINING,
        tokenizer="letters",
    ),
}


def get_preset(name: str) -> Preset:
    """The preset of this name. Raises `ConfigError`, suggesting the nearest, if there is none."""
    if not isinstance(name, str) or name not in presets:
        raise ConfigError(f"no preset is called {name!r}.{did_you_mean(name, presets)}")
    return presets[name]
