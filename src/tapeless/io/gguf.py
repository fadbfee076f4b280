"""GGUF files, as llama.cpp reads GPT-2: written with the `gguf` package (the extra `gguf`)."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from tapeless.config import GPTConfig
from tapeless.errors import ConfigError, RunError
from tapeless.io import gpt2
from tapeless.io.runs import read_json, write_file
from tapeless.io.tensors import Checkpoint, write_array

ALIGN = 32  # bytes, of each tensor
END = "<|endoftext|>"


class Vocabulary(NamedTuple):
    """A byte-level BPE tokenizer: the token of each id, or None; merges in order; the ids of special
    tokens, and that of the end of a text."""

    tokens: list[str | None]
    merges: list[str]
    special: set[int]
    end: int | None


def write_model(path: Path, model: Checkpoint, dtype: np.dtype) -> Vocabulary | None:
    """Write a model for llama.cpp, with the BPE tokenizer of its folder, if any. Matrices are of this
    dtype, everything else float32. Returns the tokenizer.

    Raises `ConfigError` without the extra or for another architecture, `RunError` if the tokenizer does
    not fit or the file cannot be written.
    """
    try:
        import gguf
    except ImportError:
        raise ConfigError("GGUF needs the gguf package: pip install 'tapeless[gguf]'.") from None

    model = gpt2.as_gpt2(model, "GGUF's gpt2")
    config, shapes = model.config, gpt2.shapes(model.config)
    vocabulary = read_vocabulary(model.folder, config.vocab) if model.own_folder else None
    wide = np.dtype(np.float32)

    def number(names: gpt2.Names) -> np.dtype:
        return dtype if names.turned or names.ours == "wte" else wide

    def write(aside: Path) -> None:
        writer = gguf.GGUFWriter(aside, "gpt2")
        _describe(writer, config, vocabulary, dtype)
        for names in gpt2.TENSORS:
            shape = shapes[names.ours][1 if names.layered else 0 :]
            shape = shape[::-1] if names.turned else shape
            size = prod(shape) * number(names).itemsize
            kinds = gguf.GGMLQuantizationType
            raw = kinds.F32 if number(names) == wide else kinds.BF16
            for l in range(config.n_layer) if names.layered else (0,):
                writer.add_tensor_info(names.gguf.format(l), shape, np.dtype(np.float32), size, raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        # The package takes a tensor as one array only, so these numbers follow without it.
        with open(aside, "ab") as file:
            _pad(file)
            for names in gpt2.TENSORS:
                for block in model.blocks(names.ours):
                    for part in block if names.layered else [block]:
                        write_array(file, part.T if names.turned else part, number(names))
                        if names.layered:
                            _pad(file)
                _pad(file)

    write_file(path, write)
    return vocabulary


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGN))


def _describe(writer: Any, c: GPTConfig, vocabulary: Vocabulary | None, dtype: np.dtype) -> None:
    import gguf

    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(c.n_hidden)
    writer.add_block_count(c.n_layer)
    writer.add_head_count(c.n_head)
    writer.add_layer_norm_eps(c.norm_eps)
    writer.add_vocab_size(c.vocab)
    types = gguf.LlamaFileType
    writer.add_file_type(types.ALL_F32 if dtype.itemsize == 4 else types.MOSTLY_BF16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if vocabulary is None:
        writer.add_tokenizer_model("none")  # llama.cpp then speaks in ids
        return
    kinds = [gguf.TokenType.UNUSED if token is None else gguf.TokenType.NORMAL for token in vocabulary.tokens]
    for i in vocabulary.special:
        kinds[i] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token or f"[PAD{i}]" for i, token in enumerate(vocabulary.tokens)])
    writer.add_token_types(kinds)
    writer.add_token_merges(vocabulary.merges)
    if vocabulary.end is not None:
        writer.add_bos_token_id(vocabulary.end)
        writer.add_eos_token_id(vocabulary.end)
    writer.add_add_bos_token(False)


# ---------------------------------------------------------------- tokenizers


def read_vocabulary(folder: Path, vocab_size: int) -> Vocabulary | None:
    """The byte-level BPE of a folder, from tokenizer.json, or vocab.json and merges.txt; None where there
    is none. Raises `RunError` for a damaged file, or more tokens than the model has."""
    path = folder / "tokenizer.json"
    try:
        if path.is_file() and "model" in (content := read_json(path)):
            if content["model"]["type"] != "BPE":
                raise RunError(f"{path} is a {content['model']['type']} tokenizer; GGUF's gpt2 needs BPE.")
            ids = dict(content["model"]["vocab"])
            merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
            added = content.get("added_tokens", [])
            ids |= {token["content"]: token["id"] for token in added}
            special = {token["id"] for token in added if token["special"]}
        elif (path := folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            ids, special = dict(read_json(path)), set()
            path = folder / "merges.txt"
            lines = path.read_text(encoding="utf-8").splitlines()
            merges = [line for line in lines if line and not line.startswith("#version")]
        else:
            return None
        tokens: list[str | None] = [None] * vocab_size
        if max(ids.values()) >= vocab_size:
            raise RunError(
                f"{path} has tokens up to number {max(ids.values())}, but the model knows only {vocab_size}."
            )
        for token, i in ids.items():
            tokens[i] = token
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise RunError(f"{path} is damaged: it describes no byte-level BPE.") from None
    end = ids.get(END)
    return Vocabulary(tokens, merges, special | ({end} if end is not None else set()), end)
