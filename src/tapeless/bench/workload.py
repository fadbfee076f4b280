"""Training steps to measure, their operations, and the comparison of losses with the reference's."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import numpy as np

from tapeless.config import GPTConfig
from tapeless.data.documents import Corpus, make_order, read_documents
from tapeless.data.tokenizers import make_tokenizer
from tapeless.engine import Engine
from tapeless.init import generator, initialise
from tapeless.optim import learning_rates
from tapeless.presets import Preset

TOLERANCE = 1e-5  # of losses against the reference's, relative
SEED = 42


class Differs(Exception):
    """A run that did not do what the reference does; the message says how."""


def forward_flops(config: GPTConfig, lengths: Iterable[int]) -> int:
    """Operations of the forward pass over documents of these lengths: 2 for each multiply-add of the
    matrix products and of attention, and none for anything else.

    A token meets the weights wqkv, wo, w1 and w2 of each layer and the head:
    L·(3C² + C² + 2CF) + C·V multiply-adds. A document of n tokens has n(n+1)/2 causal pairs of query
    and key; each takes C multiply-adds for the scores and C for the sum of values, in each layer.
    """
    C, F, L, V = config.n_embd, config.n_hidden, config.n_layer, config.vocab
    n = np.asarray(lengths, np.int64)
    tokens, pairs = int(n.sum()), int((n * (n + 1) // 2).sum())
    return 2 * (tokens * (L * (4 * C * C + 2 * C * F) + C * V) + pairs * L * 2 * C)


def training_flops(config: GPTConfig, lengths: Iterable[int]) -> int:
    """Operations of the forward and the backward pass. Each product y = x·w has two in the backward
    pass, dx = dy·wᵀ and dw = xᵀ·dy, of the same size; what a backward pass computes again (as
    FlashAttention does) is not counted."""
    return 3 * forward_flops(config, lengths)


def text_of(names: Sequence[str]) -> str:
    """One long text of 65 different characters, as many as Shakespeare's plays have: the names in
    capitals or capitalised, with punctuation between. Speed does not depend on what a text says."""
    between = "\n !$&',-.3:;?"
    return "".join(
        (name.upper() if i % 5 == 0 else name.capitalize()) + between[i % len(between)]
        for i, name in enumerate(names)
    )


class Workload:
    """Training steps to measure: a preset's model and training, its first weights, and the batches
    and learning rates of `steps` steps. The data are the built-in names, or a text made of them."""

    def __init__(self, preset: Preset, steps: int):
        self.training = training = preset.training
        names = read_documents("names")
        documents = [text_of(names)] if training.order == "windows" else names
        tokenizer = make_tokenizer(preset.tokenizer, documents)
        self.config = config = preset.model.replace(vocab_size=tokenizer.vocab_size)
        corpus = Corpus.from_documents(documents, tokenizer, config.block_size)
        rng = generator(config, SEED)
        order = make_order(training.order, corpus, rng, training.batch_size, config.block_size)
        self.stream = corpus.stream
        self.spans = order.take(0, steps)  # [steps, B, 2]
        self.lrs = learning_rates(training, 0, steps)
        first = Engine(config, "reference", "float32")
        initialise(first.p, config, rng)
        self.weights = first.params

    @property
    def flops(self) -> int:
        """Operations of all steps."""
        return training_flops(self.config, self.spans[..., 1].ravel())

    def engine(self, name: str = "cpu", kind: type[Engine] = Engine, threads: int = 1) -> Engine:
        return kind(self.config, name, threads=threads)

    def run(self, engine: Engine, steps: int | None = None) -> tuple[float, np.ndarray]:
        """Train from the first weights: seconds, and the losses."""
        t, opt = self.training, engine.optimiser
        opt.params[:] = self.weights
        opt.m[:], opt.v[:], opt.powers[:] = 0, 0, 1
        opt.constants[:] = t.beta1, t.beta2, t.eps, t.weight_decay, t.momentum, t.grad_clip
        program = "sgd" if t.optimiser == "sgd" else "adamw"
        began = time.perf_counter()
        losses = engine.train(self.stream, self.spans[:steps], self.lrs[:steps], program)
        return time.perf_counter() - began, losses


def compare(losses: np.ndarray, reference: np.ndarray) -> float:
    """The largest relative difference of losses [..., ≥K] from the reference's [K].

    Raises `Differs` if it is above `TOLERANCE`, or a loss is not a number.
    """
    difference = float(np.max(np.abs(losses[..., : len(reference)] / reference - 1)))
    if not difference <= TOLERANCE:
        raise Differs(f"losses differ from the reference: {difference:.1e}, allowed {TOLERANCE:.0e}")
    return difference
