"""`GPT`: a model to hold in the hand. Parameters, gradients, logits, loss, text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from tapeless.config import GPTConfig, as_path, whole
from tapeless.ends import Ends, eos_ids
from tapeless.engine import Engine
from tapeless.errors import ConfigError, DataError
from tapeless.generate import generate
from tapeless.init import generator, initialise
from tapeless.io import runs
from tapeless.io.checkpoints import open_model, with_tokenizer
from tapeless.layout import param_views
from tapeless.memory import check_memory
from tapeless.rng import Random
from tapeless.tokenizer import Tokenizer


class GPT:
    """A GPT with its weights, on an engine.

    `engine` is "cpu" (compiled, float32) or "reference" (NumPy, float64 unless `dtype="float32"`).
    `seed` draws the initial weights by `config.init`; it may be a generator to go on with, or None
    to leave all weights zero. `threads` share the documents of a batch; None is as many as there
    are processors, or one for small batches. `tokenizer` lets `generate` speak text; it may have fewer tokens
    than the config, whose vocabulary is then padded. `bos_token_id` and `eos_token_id` begin and end a
    text; None leaves them to the tokenizer.

    Threads may share a model: its methods wait for each other (see `lock`). `copy.copy`,
    `copy.deepcopy` and pickling give an independent model with the same parameters, gradients and
    optimiser state.

    Raises `ConfigError` for an unknown engine or dtype, an invalid seed or number of threads, a
    config without `vocab_size`, or one that does not fit in memory.
    """

    def __init__(
        self,
        config: GPTConfig,
        seed: int | Random | None = 0,
        engine: str = "cpu",
        *,
        dtype: str | None = None,
        threads: int | None = None,
        tokenizer: Tokenizer | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.ends = Ends()
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.trained_positions: int | None = None  # where a run says how many of its block it was trained on
        rng = seed if seed is None or isinstance(seed, Random) else generator(config, seed)
        check_memory(config, engine, dtype, None, threads)
        self.engine = Engine(config, engine, dtype, threads)
        if rng is not None:
            initialise(self.engine.p, config, rng)

    def __copy__(self) -> GPT:
        return deepcopy(self)

    @property
    def lock(self) -> Any:
        """The re-entrant lock (`threading.RLock`) that every method holds while it computes. Hold it
        yourself around calls that belong together:

            with model.lock:
                loss = model.loss_and_grad(tokens, targets)
                norm = np.linalg.norm(model.grads["wte"])

        Without it, another thread's `loss_and_grad` may replace the gradients in between.
        """
        return self.engine.lock

    @property
    def params(self) -> Mapping[str, np.ndarray]:
        """Parameters by name: views into one flat buffer (`engine.params`). Write in place."""
        return MappingProxyType(param_views(self.config, self.engine.p))

    @property
    def grads(self) -> Mapping[str, np.ndarray]:
        """Gradients by name, as `loss_and_grad` left them: views into `engine.grads`."""
        return MappingProxyType(param_views(self.config, self.engine.g))

    @property
    def tokenizer(self) -> Tokenizer | None:
        """What turns text into tokens and back, or None. Set a `tl.Tokenizer` of at most as many tokens as
        the model has; anything else raises `ConfigError`."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer | None) -> None:
        if not isinstance(tokenizer, Tokenizer | None):
            raise ConfigError(f"tokenizer must be a tl.Tokenizer or None, not {type(tokenizer).__name__}.")
        if tokenizer is not None and tokenizer.vocab_size > self.config.vocab:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size:,} tokens, but the model only "
                f"{self.config.vocab:,}."
            )
        self._tokenizer = tokenizer

    @property
    def n_params(self) -> int:
        """Number of parameters."""
        return self.engine.params.size

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text: what was set, or else the tokenizer's. None: there is none."""
        if self.ends.bos is not None:
            return self.ends.bos[0] if self.ends.bos else None
        return self.tokenizer.bos if self.tokenizer else None

    @bos_token_id.setter
    def bos_token_id(self, id: int | None) -> None:
        bos = None if id is None else (whole("bos_token_id", id, 0, self.config.vocab - 1),)
        self.ends = self.ends._replace(bos=bos)

    @property
    def eos_token_id(self) -> tuple[int, ...]:
        """The tokens that end a text: those that were set, or else the tokenizer's. Set one id or several, or
        None for the tokenizer's."""
        if self.ends.eos is not None:
            return self.ends.eos
        return () if self.tokenizer is None or self.tokenizer.bos is None else (self.tokenizer.bos,)

    @eos_token_id.setter
    def eos_token_id(self, ids: int | Sequence[int] | None) -> None:
        eos = None if ids is None else eos_ids(ids, self.config.vocab)
        self.ends = self.ends._replace(eos=eos)

    def loss_and_grad(self, tokens: Any, targets: Any, starts: Any = None, weights: Any = None) -> float:
        """Mean cross-entropy in nats; fills `grads` with its gradient.

        `tokens`, `targets` [N]: documents packed end to end, targets one position further (what
        should follow each token). `starts` [S+1]: where each document begins, then N; None is one
        document. `weights` [N]: each token's weight in the mean, 0 to ignore it; None is 1.

        Raises `DataError` for shapes or token ids that do not fit, or a document longer than the block.
        """
        with self.lock:
            self._fill(tokens, targets, starts, weights)
            return self.engine.gradient()

    def loss(self, tokens: Any, targets: Any, starts: Any = None, weights: Any = None) -> float:
        """The loss alone; arguments as for `loss_and_grad`."""
        with self.lock:
            self._fill(tokens, targets, starts, weights)
            return self.engine.evaluate()

    def logits(self, tokens: Any, starts: Any = None) -> np.ndarray:
        """Logits [N, V] of the next token after each of `tokens` [N]; `starts` and what is raised as
        for `loss_and_grad`."""
        with self.lock:
            self._fill(tokens, tokens, starts, None)  # any targets do: the loss is not used
            self.engine.evaluate()
            return self.engine.logits()

    def generate(
        self,
        prompt: str | Sequence[int] = "",
        n: int = 5,
        temperature: float = 0.8,
        seed: int = 0,
        *,
        top_k: int = 0,
        top_p: float = 1.0,
        max_tokens: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> list[str]:
        """Return `n` texts that continue `prompt`, prompt included; see `tapeless.generate`.

        `eos_token_id` is one token or several that end a text; None is the model's own, [] none at all.

        Raises `ConfigError` for settings out of range, `DataError` for a prompt that cannot be encoded.
        """
        rng = generator(self.config, seed)
        return list(generate(self, prompt, n, temperature, rng, top_k, top_p, max_tokens, eos_token_id))

    def save(self, path: str | Path) -> None:
        """Write config.json, tokenizer.json and model.safetensors into the folder `path`, replacing
        those that are there.

        Raises `RunError` if that cannot be written.
        """
        with self.lock:
            runs.save_model(
                as_path("path", path),
                self.config,
                self.tokenizer,
                self.ends,
                self.trained_positions,
                dict(self.params),
            )

    def _fill(self, tokens: Any, targets: Any, starts: Any, weights: Any) -> int:
        tokens, targets = self._ids("tokens", tokens), self._ids("targets", targets)
        n = len(tokens)
        if len(targets) != n:
            raise DataError(f"tokens and targets differ in length: {n} and {len(targets)}.")
        starts = _array([0, n] if starts is None else starts)
        if starts.ndim != 1 or starts.dtype.kind not in "iu" or len(starts) < 2:
            raise DataError("starts must be a list of whole numbers: where each document begins, then N.")
        lengths = np.diff(starts.astype(np.int64))
        if starts[0] != 0 or starts[-1] != n or (lengths < 1).any():
            raise DataError(f"starts must increase from 0 to the number of tokens, {n}.")
        if lengths.max() > self.config.block_size:
            raise DataError(
                f"a document of {lengths.max()} tokens is longer than the block, {self.config.block_size}."
            )
        weights = np.ones(n) if weights is None else _array(weights)
        if weights.shape != (n,) or weights.dtype.kind not in "fiub":
            raise DataError(f"weights must be {n} numbers, one for each token.")
        if not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
            raise DataError("weights must be finite numbers of 0 or more, not all 0.")
        return self.engine.fill(tokens, targets, starts, weights / weights.sum())

    def _ids(self, name: str, ids: Any) -> np.ndarray:
        ids = _array(ids)
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise DataError(f"{name} must be a non-empty list of token ids.")
        if ids.min() < 0 or ids.max() >= self.config.vocab:
            raise DataError(f"{name} must be between 0 and {self.config.vocab - 1}.")
        return ids

    def __repr__(self) -> str:
        c, tokenizer = self.config, type(self.tokenizer).__name__ if self.tokenizer else "no tokenizer"
        return (
            f"GPT({self.n_params:,} parameters, n_layer={c.n_layer}, n_head={c.n_head}, n_embd={c.n_embd}, "
            f"block_size={c.block_size}, vocab_size={c.vocab}, {self.engine.name} engine, {tokenizer})"
        )


def _array(values: Any) -> np.ndarray:
    try:
        return np.asarray(values)
    except ValueError:  # rows of different lengths
        raise DataError("expected one flat list of numbers, not a list of lists.") from None


def load(
    path: str | Path,
    engine: str = "cpu",
    *,
    dtype: str | None = None,
    threads: int | None = None,
    precision: str | None = None,
) -> GPT:
    """The model of a run folder, a Hugging Face folder of GPT-2, a model file of llm.c, or of a name on
    the Hugging Face hub ("gpt2"), with its tokenizer if there is one. `precision` is that of its config
    if None; the other arguments as for `GPT`.

    Raises `RunError` if a file is missing, damaged, or does not match the others.
    """
    checkpoint = with_tokenizer(open_model(path))
    config = checkpoint.config
    if precision is not None:
        config = config.replace(precision=precision)
    model = GPT(config, None, engine, dtype=dtype, threads=threads, tokenizer=checkpoint.tokenizer)
    model.ends = checkpoint.ends.within(config.vocab)
    model.trained_positions = checkpoint.trained_positions
    checkpoint.read_into(model.params)
    return model
