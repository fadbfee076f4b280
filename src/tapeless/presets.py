"""The named models: an architecture, how it is trained, its tokenizer and its random generator."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from tapeless.config import GPTConfig
from tapeless.errors import ConfigError, did_you_mean
from tapeless.init import generator_name


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
        for name in ("steps", "batch_size", "max_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**40:
                raise ConfigError(f"{name} must be a whole number of 1 or more, not {value!r}.")
        for name in ("lr", "eps"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < 1e6:
                raise ConfigError(f"{name} must be a number above 0, not {value!r}.")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise ConfigError(f"{name} must be at least 0 and below 1, not {value!r}.")
        if not isinstance(self.temperature, (int, float)) or not 0 <= self.temperature < 1e6:
            raise ConfigError(f"temperature must be 0 or more, not {self.temperature!r}.")
        for name, choices in {
            "schedule": ("linear", "constant"),
            "optimiser": ("adam",),
            "order": ("shuffle", "draw"),
        }.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"{name} cannot be {value!r}.{did_you_mean(str(value), choices)}")


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
        model_names = [f.name for f in dataclasses.fields(GPTConfig)]
        training_names = [f.name for f in dataclasses.fields(Training)]
        for name in settings:
            if name not in model_names + training_names:
                hint = did_you_mean(name, model_names + training_names)
                raise ConfigError(f"no setting is called {name!r}.{hint}")
        return dataclasses.replace(
            self,
            model=self.model.replace(**{k: v for k, v in settings.items() if k in model_names}),
            training=dataclasses.replace(
                self.training, **{k: v for k, v in settings.items() if k in training_names}
            ),
        )


def parse_setting(name: str, text: str) -> Any:
    """The value of `--set name=text`, by the type of the field it names."""
    for cls in (GPTConfig, Training):
        for f in dataclasses.fields(cls):
            if f.name == name:
                return _parse(name, text, str(f.type))
    names = [f.name for cls in (GPTConfig, Training) for f in dataclasses.fields(cls)]
    raise ConfigError(f"no setting is called {name!r}.{did_you_mean(name, names)}")


def _parse(name: str, text: str, kind: str) -> Any:
    kind = kind.removesuffix(" | None")
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
        "Karpathy's microgpt: 1 layer, 4 heads, width 16, 16 characters",
        GPTConfig(norm="rms", norm_embed=True),
    ),
    "esp32gpt": Preset(
        "the first microcontroller port: no norms, 26 letters and BOS, xorshift32",
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
    if name not in presets:
        raise ConfigError(f"no preset is called {name!r}.{did_you_mean(name, presets)}")
    return presets[name]
