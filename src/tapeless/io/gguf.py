"""GGUF files, as llama.cpp reads GPT-2: written with the `gguf` package (the extra `gguf`)."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from tapeless.config import GPTConfig
from tapeless.data.bpe import BPETokenizer
from tapeless.ends import Ends
from tapeless.errors import ConfigError, install
from tapeless.io import gpt2
from tapeless.io.pretokenizers import name_of
from tapeless.io.runs import write_file
from tapeless.io.tensors import Checkpoint, write_array

ALIGN = 32  # bytes, of each tensor
PLACES = 3  # for tokens that end a text
FALCON_END = 11


class Vocabulary(NamedTuple):
    """A byte-level BPE as llama.cpp has it: the text and the kind of each token, merges in order, the name of
    the pre-tokenizer, which tokens begin and end a text, and whether a prompt begins or ends with one."""

    tokens: list[str]
    kinds: list[Any]
    merges: list[str]
    pre: str
    ends: Ends
    add_bos: bool
    add_eos: bool


def write_model(
    path: Path, model: Checkpoint, dtype: np.dtype, say: Callable[[str], object] = lambda line: None
) -> None:
    """Write a model for llama.cpp, with its tokenizer if that is a BPE. Matrices are of this dtype,
    everything else float32. `say` is told what the file cannot hold.

    Raises `ConfigError` without the extra, for another architecture, or a tokenizer that llama.cpp would use
    otherwise, and `RunError` if the file cannot be written.
    """
    try:
        import gguf
    except ImportError:
        raise ConfigError(f"GGUF needs the gguf package: {install('gguf')}.") from None

    model = gpt2.as_gpt2(model, "GGUF's gpt2")
    config, shapes = model.config, gpt2.shapes(model.config)
    vocabulary = None
    if isinstance(model.tokenizer, BPETokenizer):
        vocabulary = _vocabulary(model.tokenizer, config.vocab, model.ends, say)
    else:
        say(f"No BPE tokenizer comes with {model.path}: llama.cpp will know tokens only by number.")
        if named := model.ends.within(config.vocab).to_dict():
            names = ", ".join(f"{name} {value}" for name, value in named.items())
            say(f"Without a tokenizer, a GGUF file has no place for {names}.")
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
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    for id in vocabulary.ends.bos or ():
        writer.add_bos_token_id(id)
    # llama.cpp ends a text at each of these.
    places = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, id in zip(places, vocabulary.ends.eos or (), strict=False):
        add(id)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)


def _vocabulary(
    tokenizer: BPETokenizer, vocab_size: int, ends: Ends, say: Callable[[str], object]
) -> Vocabulary:
    import gguf

    content = tokenizer.to_dict()
    pre = name_of(content)
    if content.get("normalizer") is not None:
        say("llama.cpp does not apply the tokenizer's NFC normalization: texts in another form differ.")
    kind = gguf.TokenType
    texts = {id: token for token, id in content["model"]["vocab"].items()}
    kinds = dict.fromkeys(texts, kind.NORMAL)
    for token in content["added_tokens"]:
        texts[token["id"]] = token["content"]
        kinds[token["id"]] = kind.CONTROL if token["special"] else kind.USER_DEFINED
    if tokenizer.bos is not None:
        kinds[tokenizer.bos] = kind.CONTROL
    used = set(texts.values())
    for id in range(vocab_size):
        if id not in texts:
            filler = f"[PAD{id}]"
            while filler in used:  # llama.cpp wants all to be different
                filler += "_"
            texts[id] = filler
            used.add(filler)
    tokens = [texts[id] for id in range(vocab_size)]
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    if any(merge.count(" ") != 1 for merge in merges):
        raise ConfigError("the tokenizer merges tokens that hold spaces, which GGUF cannot say.")
    begins, finishes = tokenizer.template
    own = None if tokenizer.bos is None else (tokenizer.bos,)
    ends = ends.within(vocab_size).or_else(Ends(own, own))
    if len(begins) > 1 or len(finishes) > 1 or (begins and (begins[0],) != ends.bos):
        raise ConfigError("the tokenizer puts other tokens than BOS before a text, which GGUF cannot say.")
    ends = _named(ends, [id for id in range(vocab_size) if id not in kinds], vocab_size, say)
    if finishes and (not ends.eos or finishes[0] != ends.eos[0]):
        raise ConfigError("the tokenizer puts another token than EOS after a text, which GGUF cannot say.")
    kinds |= {id: kind.UNUSED for id in range(vocab_size) if id not in kinds}
    return Vocabulary(
        tokens, [kinds[id] for id in range(vocab_size)], merges, pre, ends, bool(begins), bool(finishes)
    )


def _named(ends: Ends, unused: list[int], vocab_size: int, say: Callable[[str], object]) -> Ends:
    """What can be named as the end of a text."""
    if ends.eos:
        if len(ends.eos) > PLACES:
            left = ", ".join(map(str, ends.eos[PLACES:]))
            say(f"A GGUF file has room for {PLACES} tokens that end a text: {left} is left out.")
        return ends
    # Without a name llama.cpp takes a token of Falcon's.
    if unused:
        return ends._replace(eos=(unused[0],))
    if vocab_size > FALCON_END:
        say(f"The model has no token that ends a text: llama.cpp will take token {FALCON_END} for one.")
    return ends
