"""GGUF files in llama.cpp itself: the same tokens, the same logits, the same ends of a text.

Needs `pip install llama-cpp-python`, which is compiled for minutes: `make test-llamacpp` does it.
"""

from __future__ import annotations

import copy
import json
import random
from functools import cache

import numpy as np
import pytest

import tapeless as tl
from helpers import random_model
from tapeless.convert import convert
from tapeless.data.bpe import END, BPETokenizer
from tapeless.errors import ConfigError
from tapeless.io import pretokenizers

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make test-llamacpp")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("gguf")
pytestmark = pytest.mark.oracle

ASCII = [
    "the", "The", "CAT", "don't", "DON'T", "we'll", "x'S", "'re", " ", " ", "  ", "   ", "\n", "\n\n", "\r\n",
    "\t", "1", "12", "123", "1234567", "3.14", ".", "..", "!?", "-", "_", "(", "$", "+", "<=>", "^", "~", "`",
    "/", "//", "a", "B",
]  # fmt: skip
PIECES = [
    *ASCII, "½", "٣٤", "é", "ё", "привет", "Ünï", "日本", "語", "かな", "가나", "नमस्ते", "e\u0301", "🚀",
    "👩\u200d🚀", "\xa0", "…", "،",
]  # fmt: skip


def texts(n, seed=0, pieces=PIECES):
    chance = random.Random(seed)
    return ["".join(chance.choices(pieces, k=chance.randrange(1, 14))) for _ in range(n)]


def steps(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)} if len(parts) > 1 else parts[0]


def split(regex):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def byte_level(use_regex):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def digits(each):
    return {"type": "Digits", "individual_digits": each}


p = pretokenizers
# As the tokenizer.json of the model that llama.cpp names it after has it.
PRE = {
    "gpt-2": (byte_level(True), False),
    "smollm": (steps(digits(True), byte_level(True)), False),
    "llama-bpe": (steps(split(p.LLAMA3), byte_level(False)), True),
    "smaug-bpe": (steps(split(p.LLAMA3), byte_level(False)), False),
    "qwen2": (steps(split(p.QWEN2), byte_level(False)), False),
    "qwen35": (steps(split(p.QWEN35), byte_level(False)), False),
    "bailingmoe": (steps(split(p.BAILING), byte_level(False)), False),
    "seed-coder": (steps(split(p.SEED_CODER), byte_level(False)), False),
    "deepseek-v3": (steps(*map(split, p.DEEPSEEK_V3), byte_level(False)), False),
    "deepseek-coder": (steps(*map(split, p.DEEPSEEK_CODER), digits(True), byte_level(False)), False),
    "falcon": (
        steps({"type": "Punctuation", "behavior": "Contiguous"}, byte_level(True), digits(False),
              split("[0-9][0-9][0-9]")),
        False,
    ),
}  # fmt: skip


def added(id, content, special=False, **flags):
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
    return {"id": id, "content": content, "special": special} | plain | flags


@cache
def trained(pre):
    """A BPE of 700 tokens, trained on words as this pre-tokenizer has them, and `<|endoftext|>`."""
    part, ignore_merges = PRE[pre]
    described = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": part}
    described |= {"version": "1.0", "added_tokens": [], "decoder": byte_level(True)}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(described))
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts(3000, seed=1), trainer)
    described = json.loads(tokenizer.to_str())
    described["model"]["ignore_merges"] = ignore_merges
    described["added_tokens"] = [added(700, END, special=True)]
    return described


def model_of(described, folder, rows=None, scale=1.0, **ends):
    """A random GPT-2 with this tokenizer, and llama.cpp's of it."""
    tokenizer = BPETokenizer(described)
    config = tl.presets["gpt2"].model.replace(block_size=64, n_layer=2, n_head=2, n_embd=32)
    config = config.replace(vocab_size=rows or tokenizer.vocab_size)
    model = random_model(config, dtype="float32")
    model.engine.params[:] *= scale
    model.tokenizer = tokenizer
    for name, value in ends.items():
        setattr(model, name, value)
    model.save(folder / "run")
    convert(folder / "run", folder / "model.gguf", overwrite=True)
    theirs = llama_cpp.Llama(str(folder / "model.gguf"), n_ctx=64, logits_all=True, verbose=False, seed=1)
    return model, theirs


def tokens_of(theirs, text, special=False):
    return theirs.tokenize(text.encode(), add_bos=False, special=special)


@pytest.mark.parametrize("pre", PRE)
def test_tokens(pre, tmp_path):
    model, theirs = model_of(trained(pre), tmp_path)
    assert pretokenizers.name_of(model.tokenizer.to_dict()) == pre
    assert theirs.metadata["tokenizer.ggml.pre"] == pre
    for text in texts(1500, seed=2):
        assert tokens_of(theirs, text) == model.tokenizer.encode(text), text


def test_every_pretokenizer_is_tried():
    assert set(PRE) == set(pretokenizers.NAMES.values())


def test_logits(tmp_path):
    """llama.cpp looks GELU up in half precision, of which numbers near 1 have three digits."""
    model, theirs = model_of(trained("gpt-2"), tmp_path, scale=0.6)
    tokens = model.tokenizer.encode("the CAT 3.14, don't")[:64]
    theirs.eval(tokens)
    found = np.array(theirs.scores[: len(tokens)])
    expected = model.logits(tokens)
    print(f"logits to {np.abs(expected).max():.1f}, apart by {np.abs(found - expected).max():.1e}")
    assert np.abs(expected).max() > 2
    np.testing.assert_allclose(found, expected, rtol=0, atol=1.5e-3)


def test_added_tokens_and_ends(tmp_path):
    described = copy.deepcopy(trained("smollm"))
    more = [("<|im_end|>", True), ("<user>", False), ("new word", False), ("<|stop|>", True), ("é!", False)]
    described["added_tokens"] += [added(701 + i, name, special) for i, (name, special) in enumerate(more)]
    model, theirs = model_of(described, tmp_path, rows=768, bos_token_id=700, eos_token_id=[701, 704])
    for text in texts(500, seed=3, pieces=[*PIECES, *(name for name, _ in more), END]):
        assert tokens_of(theirs, text, special=True) == model.tokenizer.encode(text), text
    assert tokens_of(theirs, "a<user>new word") == model.tokenizer.encode("a<user>new word")
    vocabulary = theirs._model.vocab
    is_end = {i for i in range(768) if llama_cpp.llama_vocab_is_eog(vocabulary, i)}
    assert is_end == {700, 701, 704}  # <|endoftext|> is always one there
    assert (theirs.token_bos(), theirs.token_eos()) == (700, 701)
    assert theirs.n_vocab() == 768


def test_a_model_without_an_end(tmp_path):
    described = trained("gpt-2") | {"added_tokens": []}
    _, theirs = model_of(described, tmp_path, rows=704)
    assert theirs.token_eos() >= 700  # a row that no token has, not token 11


def test_a_template_that_begins_with_bos(tmp_path):
    pieces = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": pieces,
        "special_tokens": {"<s>": {"id": "<s>", "ids": [701], "tokens": ["<s>"]}},
    }
    described = copy.deepcopy(trained("gpt-2")) | {"post_processor": template}
    described["added_tokens"].append(added(701, "<s>", special=True))
    model, theirs = model_of(described, tmp_path, eos_token_id=700)
    assert model.bos_token_id == 701
    expected = tokenizers.Tokenizer.from_str(json.dumps(described)).encode("the cat").ids
    assert theirs.tokenize(b"the cat") == expected == [701, *model.tokenizer.encode("the cat")]


@pytest.mark.parametrize(("first", "second"), [("ab", "abc"), ("<a>", "<b>"), ("  ", "   ")])
def test_tokens_that_cannot_be_mistaken(first, second, tmp_path):
    described = copy.deepcopy(trained("gpt-2"))
    described["added_tokens"] += [added(701, first, special=True), added(702, second, special=True)]
    model, theirs = model_of(described, tmp_path)
    for text in texts(300, seed=4, pieces=["a", "b", "c", " ", "<", ">", first, second]):
        assert tokens_of(theirs, text, special=True) == model.tokenizer.encode(text), text


@pytest.mark.parametrize(("first", "second", "text"), [("ab", "bcd", "abcd"), ("aba", "bab", "abab")])
def test_tokens_that_overlap_are_refused_for_a_reason(first, second, text, tmp_path, monkeypatch):
    described = copy.deepcopy(trained("gpt-2"))
    described["added_tokens"] += [added(701, first, special=True), added(702, second, special=True)]
    with pytest.raises(ConfigError, match="can overlap in a text"):
        model_of(described, tmp_path)
    monkeypatch.setattr(pretokenizers, "_crossing", lambda added: None)
    model, theirs = model_of(described, tmp_path)
    if len(first) < len(second):  # of two as long, llama.cpp may take either
        assert tokens_of(theirs, text, special=True) != model.tokenizer.encode(text)
