"""The named models: an architecture, how it is trained, its tokenizer and its random generator."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from tapeless.config import GPTConfig
from tapeless.errors import ConfigError, did_you_mean
from tapeless.init import generator_name
from tapeless.settings import Training, home, text_of


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
        homes = {name: home(name) for name in settings}
        model, training = (
            {name: value for name, value in settings.items() if homes[name] is where}
            for where in (GPTConfig, Training)
        )
        return dataclasses.replace(
            self,
            model=self.model.replace(**model),
            training=dataclasses.replace(self.training, **training),
        )


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
    order="sequence",
    eval_batches=20,
    samples=2,
    temperature=0.8,
    max_tokens=100,
)
# How a checkpoint is trained further, whatever it is: as llm.c's CPU program does it. Its documents or
# windows are read as its data ask for it.
FINETUNING = Training(
    steps=1000,
    batch_size=4,
    lr=1e-4,
    schedule="constant",
    optimiser="adamw",
    beta1=0.9,
    beta2=0.999,
    order="sequence",
    val_fraction=0.1,  # of texts; see plan.fresh
    eval_batches=20,
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
        "a character model of one long text, after nanoGPT's",
        _GPT2.replace(vocab_size=None, block_size=64, n_layer=4, n_embd=128, norm_bias=False, bias=False),
        dataclasses.replace(
            _GPT2_TRAINING,
            steps=2000,
            batch_size=12,
            lr=1e-3,
            min_lr=1e-4,
            beta2=0.99,
            order="windows",
            val_fraction=0.1,
            eval_every=500,
            eval_batches=0,
            max_tokens=300,
        ),
        tokenizer="text",
    ),
    "gpt2": _gpt2("124M", 12, 12, 768),
    "gpt2-medium": _gpt2("355M", 24, 16, 1024),
    "gpt2-large": _gpt2("774M", 36, 20, 1280),
    "gpt2-xl": _gpt2("1558M", 48, 25, 1600),
}


def changed_by(name: str) -> dict[str, list[str]]:
    """The presets that change a setting: their names, by the value that they give it."""
    values: dict[str, list[str]] = {}
    default = getattr(home(name), name)
    for preset_name, preset in presets.items():
        where: Any = preset.model if home(name) is GPTConfig else preset.training
        value = getattr(where, name)
        # 0 is replaced by what follows from other settings.
        follows = default == 0 and dataclasses.replace(where, **{name: default}) == where
        if value != default and not follows:
            values.setdefault(text_of(value), []).append(preset_name)
    return values


def get_preset(name: str) -> Preset:
    """The preset of this name. Raises `ConfigError`, suggesting the nearest, if there is none."""
    if not isinstance(name, str) or name not in presets:
        raise ConfigError(f"no preset is called {name!r}.{did_you_mean(name, presets)}")
    return presets[name]
