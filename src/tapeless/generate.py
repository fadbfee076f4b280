"""Text from a model: encode the prompt, generate tokens, decode them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tapeless.config import MAX_SIZE, number, whole
from tapeless.data.table import TableTokenizer
from tapeless.data.tokenizers import Numbers
from tapeless.errors import ConfigError, DataError
from tapeless.rng import Random
from tapeless.settings import MAX_TEMPERATURE, MAX_TEXTS, MAX_TOKENS

MANY = 2**16  # tokens asked of the engine in one call

if TYPE_CHECKING:
    from tapeless.model import GPT


def generate(
    model: GPT,
    prompt: str | Sequence[int],
    n: int,
    *,
    temperature: float,
    rng: Random,
    top_k: int = 0,
    top_p: float = 1.0,
    max_tokens: int | None = None,
) -> list[str]:
    """`n` texts that begin with `prompt` and go on until BOS, or `max_tokens` new tokens.

    Without a BOS in the tokenizer, texts only end at `max_tokens`, and an empty prompt is a line end.
    Without a tokenizer, texts are tokens as numbers; so is the prompt where the tokenizer cannot encode.

    Each token is drawn from softmax(logits / temperature), temperature 0 taking the likeliest;
    `top_k` > 0 keeps only the k likeliest, `top_p` < 1 the likeliest that together reach p.
    `max_tokens` None fills the block. One uniform number of `rng` is used for each token.

    Raises `ConfigError` for settings out of range, `DataError` for a prompt that cannot be encoded.
    """
    n = whole("n", n, 1, MAX_TEXTS)
    temperature = number("temperature", temperature, 0, MAX_TEMPERATURE, ends="low")
    top_k = whole("top_k", top_k, 0, MAX_SIZE)
    top_p = number("top_p", top_p, 0, 1, ends="high")
    tokenizer = Numbers(model.config.vocab) if model.tokenizer is None else model.tokenizer
    ids = _encoded(prompt, tokenizer) if isinstance(prompt, str) else _token_ids(prompt, tokenizer.vocab_size)
    context = ids if tokenizer.bos is None and ids else [tokenizer.start, *ids]
    if max_tokens is None:
        max_tokens = min(max(1, model.config.block_size - len(ids)), MAX_TOKENS)
    max_tokens = whole("max_tokens", max_tokens, 1, MAX_TOKENS)

    texts: list[str] = []
    while len(texts) < n:
        some = min(n - len(texts), max(1, MANY // max_tokens))
        start = rng.state()
        rows, used = model.engine.generate(
            context,
            some,
            max_tokens,
            rng.uniforms(some * max_tokens),
            stop=-1 if tokenizer.bos is None else tokenizer.bos,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        # Draws cannot be made inside the engine, so enough were made for the longest texts; go back
        # and take only those used, as if each had been drawn when it was needed.
        rng.restore(start)
        rng.uniforms(used)
        texts += [tokenizer.decode([*ids, *row.tolist()]) for row in rows]
    return texts


def _encoded(prompt: str, tokenizer: Any) -> list[int]:
    if isinstance(tokenizer, TableTokenizer) and tokenizer.merges is None:
        with suppress(DataError):  # the tokenizer's own tells more
            return Numbers(tokenizer.vocab_size).encode(prompt)
    return tokenizer.encode(prompt)


def _token_ids(prompt: Sequence[int], vocab_size: int) -> list[int]:
    try:
        return [whole("a prompt token", token, 0, vocab_size - 1) for token in prompt]
    except (ConfigError, TypeError):
        raise DataError(f"the prompt must be text, or tokens from 0 to {vocab_size - 1}.") from None


def listed(texts: list[str]) -> str:
    """Texts one under the other, with a line between them where some have several lines."""
    between = "---\n" if any("\n" in text for text in texts) else ""
    return between.join(f"{text}\n" for text in texts)
