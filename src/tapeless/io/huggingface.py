"""Hugging Face folders of GPT-2: config.json, and model.safetensors or the shards that
model.safetensors.index.json lists. Files of the tokenizer lie beside them."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tapeless.config import GPTConfig
from tapeless.data.bpe import BPETokenizer
from tapeless.data.table import GPT2_END, GPT2_TOKENS
from tapeless.data.tokenizers import find_tokenizer
from tapeless.ends import Ends
from tapeless.errors import ConfigError, RunError
from tapeless.io import gpt2, safetensors
from tapeless.io.runs import (
    CONFIG,
    MODEL,
    TOKENIZER,
    content_of_tokenizer,
    ends_of,
    read_json,
    write_content,
    write_json,
)
from tapeless.io.tensors import Checkpoint, Part, Stored

INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    GENERATION,
)
FILES = (CONFIG, MODEL, INDEX, "model-*-of-*.safetensors", *TOKENIZER_FILES)  # of all on the hub
# What must stand in config.json, or not at all. The first is GPT-2's; the others are the same.
SETTINGS = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
SIZES = {  # GPTConfig's names, and Hugging Face's with their defaults
    "vocab_size": ("vocab_size", 50257),
    "block_size": ("n_positions", 1024),
    "n_layer": ("n_layer", 12),
    "n_head": ("n_head", 12),
    "n_embd": ("n_embd", 768),
    "n_hidden": ("n_inner", None),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
}
LAYERED = re.compile(r"h\.(\d{1,9})\.")
IGNORED = re.compile(r"h\.\d+\.attn\.(masked_)?bias|lm_head\.weight")  # masks; the tied head


# ---------------------------------------------------------------- reading


def open_model(folder: Path) -> Checkpoint:
    """The model of a folder. Raises `RunError` for another architecture, or where a file is missing,
    damaged, or does not match config.json."""
    path = folder / CONFIG
    about = read_json(path)
    config = _config(path, about)
    stored = _stored(folder)
    tensors: dict[str, list[Part]] = {}
    shapes, numbers = gpt2.shapes(config), set()
    for names in gpt2.TENSORS:
        shape = shapes[names.ours]
        tensors[names.ours] = []
        for l in range(config.n_layer) if names.layered else (0,):
            name = names.huggingface.format(l)
            if name not in stored:
                raise RunError(f"{folder} has no tensor {name!r}: its files do not match {CONFIG}.")
            part = stored.pop(name)
            expected = shape[1:] if names.layered else shape
            if part.shape != expected:
                raise RunError(
                    f"{part.path}: {name} is {list(part.shape)}, but {CONFIG} says {list(expected)}."
                )
            if part.dtype.name not in ("float32", "bfloat16", "float16", "float64"):
                raise RunError(f"{part.path}: {name} holds {part.dtype.name} numbers; expected float32.")
            numbers.add(part.dtype.name)
            shape_here = (1, *expected) if names.layered else expected
            tensors[names.ours].append(dataclasses.replace(part, shape=shape_here))
    unknown = [name for name in stored if not IGNORED.fullmatch(name)]
    layers = 1 + max([int(found[1]) for name in unknown if (found := LAYERED.match(name))], default=-1)
    if layers > config.n_layer:
        raise RunError(f"{path} has n_layer {config.n_layer}, but its weights have {layers} layers.")
    if unknown:
        raise RunError(f"{folder} has a tensor {unknown[0]!r} that is no part of GPT-2.")
    format = f"Hugging Face, {', '.join(sorted(numbers))}"
    return Checkpoint(folder, format, config, tensors, folder, ends=_ends(folder, about))


def _ends(folder: Path, about: dict[str, Any]) -> Ends:
    """The tokens that begin and end a text: those of generation_config.json, or else of config.json."""
    ends = ends_of(folder / CONFIG, about)
    path = folder / GENERATION
    if not path.exists():
        return ends
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise RunError(f"{path} is damaged: expected a JSON object.")
    return ends_of(path, settings).or_else(ends)


def _config(path: Path, about: dict[str, Any]) -> GPTConfig:
    if about.get("model_type", "gpt2") != "gpt2":
        raise RunError(f"{path} describes a model of type {about['model_type']!r}; expected 'gpt2'.")
    for name, values in SETTINGS.items():
        value = about.get(name, values[0])
        if value not in values:
            raise RunError(f"{path}: {name} is {value!r}; only GPT-2's own, {values[0]!r}, can be loaded.")
    sizes: dict[str, Any] = {ours: about.get(theirs, default) for ours, (theirs, default) in SIZES.items()}
    sizes["n_hidden"] = sizes["n_hidden"] or 0
    try:
        return gpt2.gpt2_config(GPTConfig(**sizes))
    except (ConfigError, TypeError) as error:
        raise RunError(f"{path} does not describe a model: {error}") from None


def _stored(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder, by its name without "transformer."."""
    one, index = folder / MODEL, folder / INDEX
    if one.exists() and index.exists():
        raise RunError(f"{folder} holds two models, {MODEL} and that of {INDEX}: remove one of them.")
    if one.exists():
        paths = [one]
    elif index.exists():
        paths = [folder / name for name in _shards(index)]
    else:
        other = [name for name in ("pytorch_model.bin", "tf_model.h5") if (folder / name).exists()]
        hint = f" Save {other[0]} again as safetensors, with transformers." if other else ""
        raise RunError(f"{folder} has no {MODEL}, the weights of its {CONFIG}.{hint}")
    tensors: dict[str, Stored] = {}
    for path in paths:
        for full_name, stored in safetensors.open_file(path).items():
            name = full_name.removeprefix("transformer.")
            if name in tensors:
                raise RunError(f"{folder} has the tensor {name!r} twice.")
            tensors[name] = stored
    return tensors


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        if not all(name == Path(name).name for name in names):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise RunError(f"{index} is damaged: expected weight_map, with files of this folder.") from None
    return names


# ---------------------------------------------------------------- writing


def write_model(folder: Path, model: Checkpoint, dtype: np.dtype) -> None:
    """Write config.json and model.safetensors as `GPT2LMHeadModel.save_pretrained` does, and the model's
    tokenizer if it is a BPE.

    Raises `ConfigError` for another architecture, `RunError` if that cannot be written.
    """
    model = gpt2.as_gpt2(model, "a Hugging Face folder")
    shapes = gpt2.shapes(model.config)
    entries = []
    for names in gpt2.TENSORS:
        shape = shapes[names.ours]
        for l in range(shape[0]) if names.layered else (0,):
            name = "transformer." + names.huggingface.format(l)
            entries.append((name, dtype, shape[1:] if names.layered else shape))

    def blocks() -> Iterator[np.ndarray]:
        for names in gpt2.TENSORS:
            for block in model.blocks(names.ours):
                yield block.astype(dtype)

    write_content(folder / MODEL, lambda file: safetensors.write(file, entries, blocks(), {"format": "pt"}))
    write_json(folder / CONFIG, _about(model, dtype))
    _write_tokenizer(folder, model)


def _write_tokenizer(folder: Path, model: Checkpoint) -> None:
    tokenizer = model.tokenizer
    if model.own_folder and isinstance(tokenizer, BPETokenizer | None):
        for path in [model.folder / name for name in TOKENIZER_FILES]:
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    if isinstance(tokenizer, BPETokenizer) and find_tokenizer(folder) is None:
        # It lay beside the model, or in files of other names.
        write_content(folder / TOKENIZER, content_of_tokenizer(tokenizer))
    about = folder / TOKENIZER_CONFIG
    if isinstance(tokenizer, BPETokenizer) and (folder / TOKENIZER).exists() and not about.exists():
        write_json(about, _about_tokenizer(tokenizer, model))


def _about_tokenizer(tokenizer: BPETokenizer, model: Checkpoint) -> dict[str, Any]:
    """What tokenizer_config.json says. Without it, transformers would take the vocabulary and the merges of
    tokenizer.json, and nothing else of it."""
    ends, spelled = _ends_written(model), tokenizer.spelled()
    named = {
        role: spelled[ids[0]]
        for role, ids in (("bos_token", ends.bos), ("eos_token", ends.eos))
        if ids and ids[0] < len(spelled)
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.block_size,
        "clean_up_tokenization_spaces": False,
        **named,
    }


def _ends_written(model: Checkpoint) -> Ends:
    """The tokens that begin and end a text. Without a tokenizer, only GPT-2's own vocabulary is known to have
    an end."""
    end = model.tokenizer.bos if model.tokenizer else GPT2_END if model.config.vocab == GPT2_TOKENS else None
    own = None if end is None else (end,)
    return model.ends.or_else(Ends(own, own))


def _about(model: Checkpoint, dtype: np.dtype) -> dict[str, Any]:
    """What config.json says."""
    c = model.config
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "torch_dtype": dtype.name,
        "n_ctx": c.block_size,
        **{theirs: getattr(c, ours) for ours, (theirs, _) in SIZES.items()},
        "n_inner": None if c.n_hidden == 4 * c.n_embd else c.n_hidden,
        **{name: values[0] for name, values in SETTINGS.items()},
        "bos_token_id": None,
        "eos_token_id": None,
        **_ends_written(model).to_dict(),
    }
