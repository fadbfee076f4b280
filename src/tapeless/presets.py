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
    order: str = "shuffle"  # documents: "shuffle" once, then round and round | "draw" at random each
    #                         time;  one long text: "windows" of it at random places
    samples: int = 20  # texts generated after training
    temperature: float = 0.5  # of those texts
    max_tokens: int = 16  # longest of those texts

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "steps": whole("steps", self.steps, 1, MAX_STEPS),
            "batch_size": whole("batch_size", self.batch_size, 1, MAX_STEPS),
            "lr": number("lr", self.lr, 0, 1e6),
            "min_lr": number("min_lr", self.min_lr, 0, 1e6, ends="low"),
            "warmup_steps": whole("warmup_steps", self.warmup_steps, 0, MAX_STEPS),
            "weight_decay": number("weight_decay", self.weight_decay, 0, 1e3, ends="low"),
            "momentum": number("momentum", self.momentum, 0, 1, ends="low"),
            "grad_clip": number("grad_clip", self.grad_clip, 0, 1e9, ends="low"),
            "samples": whole("samples", self.samples, 0, MAX_TEXTS),
            "eps": number("eps", self.eps, 0, 1),
            "beta1": number("beta1", self.beta1, 0, 1, ends="low"),
            "beta2": number("beta2", self.beta2, 0, 1, ends="low"),
            "temperature": number("temperature", self.temperature, 0, MAX_TEMPERATURE, ends="low"),
            "max_tokens": whole("max_tokens", self.max_tokens, 1, MAX_TOKENS),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        for name, choices in {
            "schedule": ("constant", "linear", "cosine"),
            "optimiser": ("sgd", "adam", "adamw"),
            "order": ("shuffle", "draw", "windows"),
        }.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"{name} cannot be {value!r}.{did_you_mean(value, choices)}")
        if self.weight_decay and self.optimiser != "adamw":
            raise ConfigError(f"weight_decay needs optimiser='adamw', not {self.optimiser!r}.")
        if self.momentum and self.optimiser != "sgd":
            raise ConfigError(f"momentum needs optimiser='sgd', not {self.optimiser!r}.")
        if self.min_lr > self.lr:
            raise ConfigError(f"min_lr, {self.min_lr:g}, must not be above lr, {self.lr:g}.")


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
_GPT2 = GPTConfig(
    vocab_size=50257,
    block_size=1024,
    norm="layer",
    norm_gain=True,
    norm_bias=True,
    norm_final=True,
    activation="gelu",
    bias=True,
    tied=True,
    attention="flash",
    init="gpt2",
)
_GPT2_TRAINING = Training(
    steps=1000,
    batch_size=4,
    lr=6e-4,
    schedule="cosine",
    min_lr=6e-5,
    warmup_steps=100,
    optimiser="adamw",
    beta1=0.9,
    beta2=0.95,
    weight_decay=0.1,
    grad_clip=1.0,
    order="windows",
    samples=2,
    temperature=0.8,
    max_tokens=100,
)


def _gpt2(size: str, n_layer: int, n_head: int, n_embd: int) -> Preset:
    model = _GPT2.replace(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    return Preset(f"GPT-2, {size} parameters", model, _GPT2_TRAINING, tokenizer="gpt2")


presets: dict[str, Preset] = {
    "microgpt": Preset(
        "Karpathy's microgpt",
        GPTConfig(norm="rms", norm_embed=True),
    ),
    "esp32gpt": Preset(
        "the first microcontroller port: no norms, xorshift32",
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
    "flashmicrogpt": Preset(
        "microgpt with FlashAttention and 2-stream hyper-connections",
        GPTConfig(attention="flash", attention_tile=4, residual="mhc"),
    ),
    "transformerlm": Preset(
        "a pre-norm language model of several layers; set its sizes",
        GPTConfig(
            block_size=32,
            n_layer=2,
            n_embd=64,
            norm_gain=True,
            norm_final=True,
            activation="gelu",
            tied=True,
            init="width",
        ),
        Training(
            batch_size=16, lr=3e-3, beta1=0.9, beta2=0.99, warmup_steps=50, grad_clip=1.0, max_tokens=32
        ),
    ),
    "shakespeare-char": Preset(
        "a character model of one long text, as nanoGPT's on a CPU",
        _GPT2.replace(vocab_size=None, block_size=64, n_layer=4, n_embd=128, norm_bias=False, bias=False),
        dataclasses.replace(
            _GPT2_TRAINING, steps=2000, batch_size=12, lr=1e-3, min_lr=1e-4, beta2=0.99, max_tokens=300
        ),
        tokenizer="text",
    ),
    "gpt2": _gpt2("124M", 12, 12, 768),
    "gpt2-medium": _gpt2("355M", 24, 16, 1024),
    "gpt2-large": _gpt2("774M", 36, 20, 1280),
    "gpt2-xl": _gpt2("1558M", 48, 25, 1600),
}


def get_preset(name: str) -> Preset:
    """The preset of this name. Raises `ConfigError`, suggesting the nearest, if there is none."""
    if not isinstance(name, str) or name not in presets:
        raise ConfigError(f"no preset is called {name!r}.{did_you_mean(name, presets)}")
    return presets[name]
