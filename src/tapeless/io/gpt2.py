"""GPT-2 as other programs know it: which models are one, and what they call its tensors."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from tapeless.config import COMPUTED, GPTConfig
from tapeless.errors import ConfigError
from tapeless.io.tensors import Checkpoint, Zeros
from tapeless.layout import parameters
from tapeless.presets import presets


class Names(NamedTuple):
    """What a tensor is called here and elsewhere; `{}` is the layer. `turned`: llm.c and GGUF keep the
    matrix as `[out, in]`."""

    ours: str
    llmc: str
    huggingface: str
    gguf: str
    turned: bool = False

    @property
    def layered(self) -> bool:
        return "{}" in self.gguf


TENSORS = (  # in llm.c's order
    Names("wte", "wte", "wte.weight", "token_embd.weight"),
    Names("wpe", "wpe", "wpe.weight", "position_embd.weight"),
    Names("norm1_w", "ln1w", "h.{}.ln_1.weight", "blk.{}.attn_norm.weight"),
    Names("norm1_b", "ln1b", "h.{}.ln_1.bias", "blk.{}.attn_norm.bias"),
    Names("wqkv", "qkvw", "h.{}.attn.c_attn.weight", "blk.{}.attn_qkv.weight", turned=True),
    Names("bqkv", "qkvb", "h.{}.attn.c_attn.bias", "blk.{}.attn_qkv.bias"),
    Names("wo", "attprojw", "h.{}.attn.c_proj.weight", "blk.{}.attn_output.weight", turned=True),
    Names("bo", "attprojb", "h.{}.attn.c_proj.bias", "blk.{}.attn_output.bias"),
    Names("norm2_w", "ln2w", "h.{}.ln_2.weight", "blk.{}.ffn_norm.weight"),
    Names("norm2_b", "ln2b", "h.{}.ln_2.bias", "blk.{}.ffn_norm.bias"),
    Names("w1", "fcw", "h.{}.mlp.c_fc.weight", "blk.{}.ffn_up.weight", turned=True),
    Names("b1", "fcb", "h.{}.mlp.c_fc.bias", "blk.{}.ffn_up.bias"),
    Names("w2", "fcprojw", "h.{}.mlp.c_proj.weight", "blk.{}.ffn_down.weight", turned=True),
    Names("b2", "fcprojb", "h.{}.mlp.c_proj.bias", "blk.{}.ffn_down.bias"),
    Names("normf_w", "lnfw", "ln_f.weight", "output_norm.weight"),
    Names("normf_b", "lnfb", "ln_f.bias", "output_norm.bias"),
)
# Of models that are not tied, the last. Unlike its other matrices, Hugging Face's is `[out, in]`, too.
HEAD = Names("head", "", "lm_head.weight", "output.weight", turned=True)
# What may differ from GPT-2's config: it changes no result, or can be had with biases of zero.
FREE = (*COMPUTED, "attention", "attention_tile", "init", "bias", "norm_bias")


def gpt2_config(sizes: GPTConfig) -> GPTConfig:
    """GPT-2's architecture in the sizes of `sizes`, with its `norm_eps`, and tied or not as it is."""
    names = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "n_hidden", "norm_eps", "tied")
    return presets["gpt2"].model.replace(**{name: getattr(sizes, name) for name in names})


def tensors(config: GPTConfig) -> tuple[Names, ...]:
    """The tensors of a GPT-2 with this config."""
    return TENSORS if config.tied else (*TENSORS, HEAD)


def shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each of its `tensors`, by our names."""
    all_shapes = {t.name: t.resolve({}) for t in parameters(config)}
    return {names.ours: all_shapes[names.ours] for names in tensors(config)}


def as_gpt2(model: Checkpoint, format: str) -> Checkpoint:
    """The same model as GPT-2 for `format`: where it has no biases, with biases of zero.

    Raises `ConfigError`, naming what differs, for a model of another architecture.
    """
    config = gpt2_config(model.config)
    different = [
        f"{f.name}={getattr(model.config, f.name)!r}"
        for f in dataclasses.fields(config)
        if f.name not in FREE and getattr(model.config, f.name) != getattr(config, f.name)
    ]
    if different:
        raise ConfigError(
            f"{model.path} is not GPT-2's architecture ({', '.join(different)}), the only one that "
            f"{format} can hold."
        )
    tensors = {
        name: model.tensors[name] if name in model.tensors else [Zeros(shape)]
        for name, shape in shapes(config).items()
    }
    return dataclasses.replace(model, config=config, tensors=tensors)
