"""Hugging Face folders of GPT-2: config.json, and model.safetensors or the shards that
model.safetensors.index.json lists. Files of the tokenizer lie beside them."""

from __future__ import annotations

import dataclasses
import re
import shutil
import warnings
from collections.abc import Iterator, Sequence
from itertools import dropwhile
from pathlib import Path
from typing import Any

import numpy as np

from tapeless.config import MAX_SIZE, GPTConfig, whole
from tapeless.data.bpe import BPETokenizer
from tapeless.data.table import GPT2_END, GPT2_TOKENS
from tapeless.data.tokenizers import find_tokenizer
from tapeless.ends import Ends
from tapeless.errors import ConfigError, Notice, RunError
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
from tapeless.io.tensors import Checkpoint, Part, Stored, Transposed

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
    "activation_function": (
        "gelu_new",
        "gelu_pytorch_tanh",
        "gelu_fast",
        "gelu_python_tanh",
        "gelu_accurate",
    ),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
# The same for what transformers knows of any model, and does not write into a GPT-2's.
COMMON: dict[str, tuple[Any, ...]] = {
    "is_causal": (True,),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "hidden_act": (*SETTINGS["activation_function"], None),  # of other families
}
WTE, HEAD = gpt2.TENSORS[0].huggingface, gpt2.HEAD.huggingface
TIED = "tie_word_embeddings"
SIZES = {  # GPTConfig's names, and Hugging Face's with their defaults
    "vocab_size": ("vocab_size", 50257),
    "block_size": ("n_positions", 1024),
    "n_layer": ("n_layer", 12),
    "n_head": ("n_head", 12),
    "n_embd": ("n_embd", 768),
    "n_hidden": ("n_inner", None),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
}
# transformers takes these names for the same settings,
ALIASES = {
    "n_positions": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
}
# and ignores these, which other families have for GPTConfig's.
FOREIGN = {"num_heads": "n_head", "intermediate_size": "n_hidden", "layer_norm_eps": "norm_eps"}
# What a copy of a model does not take over as it is.
OWN = {
    "architectures",
    "model_type",
    "n_ctx",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "auto_map",
    "bos_token_id",
    "eos_token_id",
    TIED,
    *SETTINGS,
    *ALIASES.values(),
    *(name for name, _ in SIZES.values()),
}
# torch.compile, FSDP and checkpointing wrap modules; DistributedDataParallel and others the whole model.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
PREFIXES = ("module", "model", "transformer")
LAYERED = re.compile(r"h\.(\d{1,9})\.")
IGNORED = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # masks


# ---------------------------------------------------------------- reading


def open_model(folder: Path) -> Checkpoint:
    """The model of a folder. Raises `RunError` for another architecture, or where a file is missing,
    damaged, or does not match config.json."""
    path = folder / CONFIG
    about = read_json(path)
    config = _config(path, about)
    stored = _stored(folder)
    ties = config.tied
    if ties and WTE not in stored and HEAD in stored:  # one tensor, under its other name
        stored[WTE] = stored.pop(HEAD)
    config = config.replace(tied=ties and HEAD not in stored)
    parts: dict[str, list[Stored]] = {}
    shapes = gpt2.shapes(config)
    for names in gpt2.tensors(config):
        shape = shapes[names.ours]
        parts[names.ours] = []
        for l in range(config.n_layer) if names.layered else (0,):
            name = names.huggingface.format(l)
            if name not in stored:
                says = f", which says {TIED} false" if name == HEAD else ""
                raise RunError(f"{folder} has no tensor {name!r}: its files do not match {CONFIG}{says}.")
            part = stored.pop(name)
            expected = shape[1:] if names.layered else shape[::-1] if name == HEAD else shape
            if part.shape != expected:
                raise RunError(
                    f"{part.path}: {name} is {list(part.shape)}, but {CONFIG} says {list(expected)}."
                )
            if part.dtype.name not in ("float32", "bfloat16", "float16", "float64"):
                raise RunError(f"{part.path}: {name} holds {part.dtype.name} numbers; expected float32.")
            shape_here = (1, *expected) if names.layered else expected
            parts[names.ours].append(dataclasses.replace(part, shape=shape_here))
    unknown = [name for name in stored if not IGNORED.fullmatch(name)]
    layers = 1 + max([int(found[1]) for name in unknown if (found := LAYERED.match(name))], default=-1)
    if layers > config.n_layer:
        raise RunError(f"{path} has n_layer {config.n_layer}, but its weights have {layers} layers.")
    if unknown:
        raise RunError(f"{folder} has a tensor {unknown[0]!r} that is no part of GPT-2.")
    tensors: dict[str, Sequence[Part]] = {name: list(found) for name, found in parts.items()}
    if not config.tied:
        (wte,), (head,) = parts["wte"], parts["head"]
        tensors["head"] = [Transposed(head)]
        if ties and _same(wte, head):
            config = config.replace(tied=True)
            del tensors["head"]
        elif ties:
            text = (
                f"{folder}: {HEAD} differs from {WTE}, although {CONFIG} ties them. It is used as the head, "
                f"as transformers 5 does; older versions ignore it. Set {TIED} to false in {CONFIG}."
            )
            warnings.warn(Notice(text), stacklevel=2)
    others = {name: value for name, value in about.items() if name not in OWN}
    return Checkpoint(
        folder, "Hugging Face", config, tensors, folder, ends=_ends(folder, about), others=others
    )


def _same(a: Stored, b: Stored) -> bool:
    """Whether two tensors of one shape hold the same numbers."""
    pairs = zip(a.blocks(), b.blocks(), strict=False)
    return a.dtype == b.dtype and all(np.array_equal(x, y) for x, y in pairs)


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
    """Return the model that config.json describes, tied if it says so.

    Raises `RunError` for a value that GPT-2 cannot have here, or two names of a setting that disagree.
    """
    if about.get("model_type", "gpt2") != "gpt2":
        raise RunError(f"{path} describes a model of type {about['model_type']!r}; expected 'gpt2'.")
    for name, values in (SETTINGS | COMMON).items():
        value = about.get(name, values[0])
        if value not in values:
            raise RunError(f"{path}: {name} is {value!r}; only GPT-2's own, {values[0]!r}, can be loaded.")
    if not isinstance(tied := about.get(TIED, True), bool):
        raise RunError(f"{path}: {TIED} is {tied!r}; expected true or false.")
    sizes: dict[str, Any] = {}
    for ours, (theirs, default) in SIZES.items():
        said = {name: about[name] for name in (theirs, ALIASES.get(theirs)) if name in about}
        sizes[ours] = next(iter(said.values()), default)
        if any(value != sizes[ours] for value in said.values()):
            both = " and ".join(f"{name} {value!r}" for name, value in said.items())
            raise RunError(f"{path} says {both}, two names of one setting: remove the wrong one.")
    try:
        inner = sizes["n_hidden"]
        sizes["n_hidden"] = 0 if inner is None else whole("n_inner", inner, 1, MAX_SIZE)
        config = gpt2.gpt2_config(GPTConfig(**sizes, tied=tied))
        assert config.vocab  # null is none
    except (ConfigError, TypeError) as error:
        raise RunError(f"{path} does not describe a model: {error}") from None
    for name, ours in FOREIGN.items():
        used = getattr(config, ours)
        if about.get(name, used) not in (used, None):
            raise RunError(
                f"{path} says {name} {about[name]!r}, which is no setting of GPT-2: the model has "
                f"{SIZES[ours][0]} {used!r}. Remove it, or correct {SIZES[ours][0]}."
            )
    return config


def _stored(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder, by its name in GPT-2 itself: see `_plain`."""
    one, index = folder / MODEL, folder / INDEX
    if one.exists() and index.exists():
        raise RunError(f"{folder} holds two models, {MODEL} and that of {INDEX}: remove one of them.")
    homes = None
    if one.exists():
        paths = [one]
    elif index.exists():
        homes = _homes(index)
        paths = [folder / name for name in sorted(set(homes.values()))]
    else:
        other = [name for name in ("pytorch_model.bin", "tf_model.h5") if (folder / name).exists()]
        hint = f" Save {other[0]} again as safetensors, with transformers." if other else ""
        raise RunError(f"{folder} has no {MODEL}, the weights of its {CONFIG}.{hint}")
    tensors: dict[str, Stored] = {}
    found: dict[str, str] = {}
    for path in paths:
        for full_name, stored in safetensors.open_file(path).items():
            name = _plain(full_name)
            if name in tensors:
                raise RunError(f"{folder} has the tensor {name!r} twice.")
            tensors[name] = stored
            found[full_name] = path.name
    if homes is not None and (differing := homes.items() ^ found.items()):
        name = min(differing)[0]
        raise RunError(
            f"{index} does not match its files: it has {name!r} in {homes.get(name, 'none')}, but that is in "
            f"{found.get(name, 'none')} of them."
        )
    return tensors


def _plain(name: str) -> str:
    """A tensor's name without those of what the model was wrapped in, and without "transformer."."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    return ".".join(dropwhile(PREFIXES.__contains__, parts)) or name


def _homes(index: Path) -> dict[str, str]:
    """The file of each tensor. What else an index says, such as total_size, nobody goes by."""
    try:
        homes = read_json(index)["weight_map"]
        if not all(name == Path(name).name for name in homes.values()):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise RunError(f"{index} is damaged: expected weight_map, with files of this folder.") from None
    return homes


# ---------------------------------------------------------------- writing


def write_model(folder: Path, model: Checkpoint, dtype: np.dtype) -> None:
    """Write config.json and model.safetensors as `GPT2LMHeadModel.save_pretrained` does, and the model's
    tokenizer if it is a BPE.

    Raises `ConfigError` for another architecture, `RunError` if that cannot be written.
    """
    model = gpt2.as_gpt2(model, "a Hugging Face folder")
    shapes = gpt2.shapes(model.config)
    entries = []
    for names in gpt2.tensors(model.config):
        shape = shapes[names.ours]
        if names is gpt2.HEAD:
            entries.append((names.huggingface, dtype, shape[::-1]))
            continue
        for l in range(shape[0]) if names.layered else (0,):
            name = "transformer." + names.huggingface.format(l)
            entries.append((name, dtype, shape[1:] if names.layered else shape))

    def blocks() -> Iterator[np.ndarray]:
        for names in gpt2.tensors(model.config):
            yield from model.blocks(names.ours, dtype, transposed=names is gpt2.HEAD)

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
        **model.others,
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "torch_dtype": dtype.name,
        "n_ctx": c.block_size,
        **{theirs: getattr(c, ours) for ours, (theirs, _) in SIZES.items()},
        "n_inner": None if c.n_hidden == 4 * c.n_embd else c.n_hidden,
        **{name: values[0] for name, values in SETTINGS.items()},
        TIED: c.tied,
        "bos_token_id": None,
        "eos_token_id": None,
        **_ends_written(model).to_dict(),
    }
