"""GGUF files, as llama.cpp reads GPT-2: written with the `gguf` package (the extra `gguf`)."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from tapeless.config import GPTConfig
from tapeless.data.bpe import BPETokenizer
from tapeless.errors import ConfigError, install
from tapeless.io import gpt2
from tapeless.io.runs import write_file
from tapeless.io.tensors import Checkpoint, write_array

ALIGN = 32  # bytes, of each tensor


class Vocabulary(NamedTuple):
    """A byte-level BPE tokenizer: the token of each id, or None; merges in order; the ids of special
    tokens, and that of the end of a text."""

    tokens: list[str | None]
    merges: list[str]
    special: set[int]
    end: int | None


def write_model(path: Path, model: Checkpoint, dtype: np.dtype) -> Vocabulary | None:
    """Write a model for llama.cpp, with its tokenizer if that is a BPE. Matrices are of this dtype,
    everything else float32. Returns the tokenizer.

    Raises `ConfigError` without the extra or for another architecture, `RunError` if the file cannot be
    written.
    """
    try:
        import gguf
    except ImportError:
        raise ConfigError(f"GGUF needs the gguf package: {install('gguf')}.") from None

    model = gpt2.as_gpt2(model, "GGUF's gpt2")
    config, shapes = model.config, gpt2.shapes(model.config)
    tokenizer = model.tokenizer
    vocabulary = _vocabulary(tokenizer, config.vocab) if isinstance(tokenizer, BPETokenizer) else None
    wide = np.dtype(np.float32)

    def number(names: gpt2.Names) -> np.dtype:
        return dtype if names.turned or names.ours == "wte" else wide

    def write(aside: Path) -> None:
        writer = gguf.GGUFWriter(aside, "gpt2")
        _describe(writer, config, vocabulary, dtype)
        for names in gpt2.tensors(config):
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
            for names in gpt2.tensors(config):
                for block in model.blocks(names.ours, number(names), transposed=names.turned):
                    for part in block if names.layered else [block]:
                        write_array(file, part)
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


def _vocabulary(tokenizer: BPETokenizer, vocab_size: int) -> Vocabulary:
    content = tokenizer.to_dict()
    added, end = content["added_tokens"], tokenizer.bos
    ids = content["model"]["vocab"] | {token["content"]: token["id"] for token in added}
    tokens: list[str | None] = [None] * vocab_size
    for token, i in ids.items():
        tokens[i] = token
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    special = {token["id"] for token in added if token["special"]}
    return Vocabulary(tokens, merges, special | ({end} if end is not None else set()), end)
