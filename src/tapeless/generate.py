"""Text from a model: encode the prompt, generate tokens, decode them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tapeless.config import MAX_SIZE, number, whole
from tapeless.data.table import TableTokenizer
from tapeless.data.tokenizers import Numbers
from tapeless.ends import eos_ids
from tapeless.errors import ConfigError, DataError
from tapeless.rng import Random
from tapeless.settings import MAX_TEMPERATURE, MAX_TEXTS, MAX_TOKENS

# Tokens asked of the engine in one call: at most, and times parameters, some seconds of work.
MANY, WORK = 2**16, 10_000_000_000

if TYPE_CHECKING:
    from tapeless.model import GPT


def generate(
    model: GPT,
    prompt: str | Sequence[int],
    n: int,
    temperature: float,
    rng: Random,
    top_k: int = 0,
    top_p: float = 1.0,
    max_tokens: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
) -> Iterator[str]:
    """Yield `n` texts that begin with `prompt`, each as soon as it is complete.

    A text ends before one of `eos_token_id` (None: the model's), or after `max_tokens` new tokens. It begins
    with the model's `bos_token_id`; where there is none, an empty prompt is a line end. A prompt follows
    that token only if the tokenizer has a BOS of its own.
    Without a tokenizer, texts are tokens as numbers; so is the prompt where the tokenizer cannot encode.
    Ids that the tokenizer does not have (of a padded vocabulary) are never drawn.

    Each token is drawn from softmax(logits / temperature), temperature 0 taking the likeliest;
    `top_k` > 0 keeps only the k likeliest, `top_p` < 1 the likeliest that together reach p.
    `max_tokens` None fills the block. One uniform number of `rng` is used for each token.

    Texts are generated some at a time, and only meanwhile is the model's lock held: other threads can use
    the model while the caller reads the texts.

    Raises `ConfigError` for settings out of range, `DataError` for a prompt that cannot be encoded.
    """
    n = whole("n", n, 1, MAX_TEXTS)
    temperature = number("temperature", temperature, 0, MAX_TEMPERATURE, ends="low")
    top_k = whole("top_k", top_k, 0, MAX_SIZE)
    top_p = number("top_p", top_p, 0, 1, ends="high")
    tokenizer = Numbers(model.config.vocab) if model.tokenizer is None else model.tokenizer
    ids = _encoded(prompt, tokenizer) if isinstance(prompt, str) else _token_ids(prompt, model.config.vocab)
    eos = model.eos_token_id if eos_token_id is None else eos_ids(eos_token_id, model.config.vocab)
    begin = tokenizer.start if model.bos_token_id is None else model.bos_token_id
    context = ids if tokenizer.bos is None and ids else [begin, *ids]
    if max_tokens is None:
        max_tokens = min(max(1, model.config.block_size - len(ids)), MAX_TOKENS)
    max_tokens = whole("max_tokens", max_tokens, 1, MAX_TOKENS)

    at_once = texts_at_once(model.n_params, max_tokens)
    while n:
        some = min(n, at_once)
        n -= some
        start = rng.state()
        rows, used = model.engine.generate(
            context,
            some,
            max_tokens,
            rng.uniforms(some * max_tokens),
            eos=eos,
            drawn=min(tokenizer.vocab_size, model.config.vocab),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        # Draws cannot be made inside the engine, so enough were made for the longest texts; go back
        # and take only those used, as if each had been drawn when it was needed.
        rng.restore(start)
        rng.uniforms(used)
        for row in rows:
            yield tokenizer.decode([*ids, *row.tolist()])


def texts_at_once(n_params: int, max_tokens: int) -> int:
    """How many texts of up to `max_tokens` one call of the engine generates."""
    return max(1, min(MANY, WORK // n_params) // max_tokens)


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


def listed(texts: Iterable[str]) -> Iterator[str]:
    """Texts to be shown one under the other, from the first on that has several lines with a line between."""
    between, several = "", False
    for text in texts:
        several = several or "\n" in text
        yield f"{between if several else ''}{text}\n"
        between = "---\n"
