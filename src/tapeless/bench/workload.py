"""Training steps to measure, their operations, and the comparison of losses with the reference's."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from tapeless.data.documents import Corpus, read_documents
from tapeless.data.orders import make_order
from tapeless.data.tokenizers import make_tokenizer
from tapeless.engine import Engine
from tapeless.flops import training_flops
from tapeless.init import generator, initialise
from tapeless.optim import learning_rates
from tapeless.presets import Preset

TOLERANCE = 1e-5  # of losses against the reference's, relative
SEED = 42


class Differs(Exception):
    """A run that did not do what the reference does; the message says how."""


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
        documents = names if training.of_documents else [text_of(names)]
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
        losses = engine.train(self.stream, self.spans[:steps], self.lrs[:steps], program).losses
        return time.perf_counter() - began, losses


def compare(losses: np.ndarray, reference: np.ndarray) -> float:
    """The largest relative difference of losses [..., ≥K] from the reference's [K].

    Raises `Differs` if it is above `TOLERANCE`, or a loss is not a number.
    """
    difference = float(np.max(np.abs(losses[..., : len(reference)] / reference - 1)))
    if not difference <= TOLERANCE:
        raise Differs(f"losses differ from the reference: {difference:.1e}, allowed {TOLERANCE:.0e}")
    return difference
