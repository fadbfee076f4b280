"""Text from a model: encode the prompt, generate tokens, decode them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tapeless.errors import ConfigError, DataError
from tapeless.rng import Random

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

    Each token is drawn from softmax(logits / temperature), temperature 0 taking the likeliest;
    `top_k` > 0 keeps only the k likeliest, `top_p` < 1 the likeliest that together reach p.
    `max_tokens` None fills the block. One uniform number of `rng` is used for each token.

    Raises `ConfigError` for settings out of range, `DataError` for a prompt that cannot be encoded.
    """
    if not isinstance(n, int) or n < 1:
        raise ConfigError(f"n must be a whole number of 1 or more, not {n!r}.")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature must be 0 or more, not {temperature!r}.")
    if not isinstance(top_k, int) or top_k < 0:
        raise ConfigError(f"top_k must be 0 (off) or more, not {top_k!r}.")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p must be above 0 and at most 1, not {top_p!r}.")
    if model.tokenizer is None:
        raise ConfigError("this model has no tokenizer: make it with GPT(config, tokenizer=…).")
    tokenizer = model.tokenizer
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else [int(t) for t in prompt]
    if any(not 0 <= t < tokenizer.vocab_size for t in ids):
        raise DataError(f"prompt tokens must be between 0 and {tokenizer.vocab_size - 1}.")
    if max_tokens is None:
        max_tokens = max(1, model.config.block_size - len(ids))
    if not isinstance(max_tokens, int) or not 1 <= max_tokens <= 2**24:
        raise ConfigError(f"max_tokens must be between 1 and {2**24:,}, not {max_tokens!r}.")

    texts: list[str] = []
    while len(texts) < n:
        some = min(n - len(texts), max(1, MANY // max_tokens))
        start = rng.state()
        rows, used = model.engine.generate(
            [tokenizer.bos, *ids],
            some,
            max_tokens,
            rng.uniforms(some * max_tokens),
            stop=tokenizer.bos,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        # Draws cannot be made inside the engine, so enough were made for the longest texts; go back
        # and take only those used, as if each had been drawn when it was needed.
        rng.restore(start)
        rng.uniforms(used)
        texts += [tokenizer.decode([*ids, *row]) for row in rows]
    return texts
