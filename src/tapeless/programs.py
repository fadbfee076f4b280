"""What an engine runs: loops over the schedule, each written once, as a function over groups of views.

`gradient` (one batch), `evaluate` (loss and logits), `adamw` and `sgd` (many training steps),
`generate` (many samples). The reference engine calls these functions as they are, with NumPy ops; the
CPU engine compiles them, and may run one on several threads at once (a team).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from tapeless.layout import Tensor
from tapeless.schedule import Schedule

# The other groups of views that programs take. Symbols: P parameters, M stream, K steps, B documents
# a step (or tokens a sample), U uniforms, W threads (workers), O of them all but the first.
FLAT = (Tensor("grads", ("P",)),)  # this thread's
RESULT = (Tensor("loss", (1,), "float64"),)  # of this thread's share
# A thread adds up all threads' gradients of its own part of the parameters, Q of them, and updates it.
TEAM = (
    Tensor("mine", (2,), "int64"),  # which thread this is, and where its part begins
    Tensor("grads", ("Q",)),  # its part of the first thread's gradients: the sum
    Tensor("others", ("O", "P")),  # the other threads' gradients
    # Of each thread, a cache line apart, so that nobody waits for a line that another one writes:
    Tensor("arrivals", ("W", 8), "int64"),  # how often it has come to a place where all meet
    Tensor("squares", ("W", 8), "float64"),  # the squared norm of its part of the gradient
)
OPTIMISER = (
    Tensor("params", ("Q",)),
    Tensor("m", ("Q",)),
    Tensor("v", ("Q",)),
    Tensor("powers", (2,), "float64"),
    Tensor("segments", ("R", 3), "int64"),
    Tensor("constants", (6,), "float64"),  # beta1, beta2, eps, weight_decay, momentum, grad_clip
)
DATA = (
    Tensor("stream", ("M",), "int32"),
    Tensor("spans", ("K", "B", 2), "int64"),
    Tensor("lrs", ("K",), "float64"),
    Tensor("losses", ("K",), "float64"),  # of this thread's share
)
SAMPLES = (
    Tensor("tokens", ("K", "B"), "int32"),  # each row begins with the prompt
    Tensor("lengths", ("K",), "int32"),  # tokens of each row, the prompt's included
    Tensor("uniforms", ("U",), "float64"),
    Tensor("used", (1,), "int64"),
    Tensor("probs", ("V",), "float64"),
    Tensor("options", (5,), "float64"),  # prompt length, stop token or -1, temperature, top_k, top_p
)


def _make_evaluate(schedule: Schedule, ops: Any, block_size: int) -> Callable:
    forward = schedule.forward

    def evaluate(groups):
        p, a, batch, result = groups
        result.loss[0] = forward(p, a, batch)

    return evaluate


def _make_gradient(schedule: Schedule, ops: Any, block_size: int) -> Callable:
    forward, backward = schedule.forward, schedule.backward
    wait, gather = ops.wait, ops.gather

    def gradient(groups):
        p, g, a, d, batch, flat, result, team = groups
        flat.grads[:] = 0
        result.loss[0] = forward(p, a, batch)
        backward(p, g, a, d, batch)
        wait(team.arrivals, team.mine[0])
        gather(team.grads, team.others, team.mine[1])

    return gradient


def _make_train(schedule: Schedule, ops: Any, block_size: int, adaptive: bool) -> Callable:
    """Every thread runs all steps, on its share of each step's documents and with gradients of its
    own; then it adds up all threads' gradients of its part of the parameters, and updates that."""
    forward, backward, pack = schedule.forward, schedule.backward, ops.pack
    adamw, sgd, global_norm = ops.adamw, ops.sgd, ops.global_norm
    wait, gather = ops.wait, ops.gather

    def train(groups):
        p, g, a, d, batch, flat, opt, data, team = groups
        beta1, beta2, eps = opt.constants[0], opt.constants[1], opt.constants[2]
        weight_decay, momentum, clip = opt.constants[3], opt.constants[4], opt.constants[5]
        me, first = team.mine[0], team.mine[1]
        threads, documents = team.arrivals.shape[0], data.spans.shape[1]
        begin, stop = me * documents // threads, (me + 1) * documents // threads
        for k in range(data.losses.shape[0]):
            pack(batch, data.stream, data.spans[k], begin, stop)
            flat.grads[:] = 0
            data.losses[k] = forward(p, a, batch)
            backward(p, g, a, d, batch)
            wait(team.arrivals, me)
            gather(team.grads, team.others, first)
            lr, scale = data.lrs[k], 1.0
            if clip > 0:
                team.squares[me, 0] = global_norm(team.grads) ** 2
                wait(team.arrivals, me)
                square = 0.0
                for thread in range(threads):
                    square += team.squares[thread, 0]
                scale = min(1.0, clip / (np.sqrt(square) + 1e-6))
            if adaptive:
                adamw(
                    opt.params, team.grads, opt.m, opt.v, opt.powers, opt.segments,
                    lr, beta1, beta2, eps, weight_decay, scale,
                )  # fmt: skip
            else:
                sgd(opt.params, team.grads, opt.m, lr, momentum, scale)
            wait(team.arrivals, me)

    return train


def _make_generate(schedule: Schedule, ops: Any, block_size: int) -> Callable:
    decode, sample_token = schedule.decode, ops.sample_token

    def generate(groups):
        p, c, batch, out = groups
        prompt, stop = int(out.options[0]), int(out.options[1])
        temperature, top_k, top_p = out.options[2], out.options[3], out.options[4]
        batch.sizes[0] = 1
        used = 0
        cached = 0  # positions of the present row whose keys and values are in the cache
        for k in range(out.tokens.shape[0]):
            row, length = out.tokens[k], prompt
            cached = min(cached, prompt - 1)
            while length < row.shape[0]:
                # Learned positions end at the block: beyond it, read the last T tokens again.
                first = max(0, length - block_size)
                for t in range(0 if first else cached, length - first):
                    batch.tokens[0] = row[first + t]
                    batch.positions[0] = t
                    decode(p, c, batch)
                cached = 0 if first else length
                token = sample_token(out.probs, c.logits[0], temperature, top_k, top_p, out.uniforms[used])
                used += 1
                if token == stop:
                    break
                row[length] = token
                length += 1
            out.lengths[k] = length
        out.used[0] = used

    return generate


_TRAINING = ("p", "g", "a", "d", "batch", "flat", "opt", "data", "team")
PROGRAMS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "evaluate": (_make_evaluate, ("p", "a", "batch", "result")),
    "gradient": (_make_gradient, ("p", "g", "a", "d", "batch", "flat", "result", "team")),
    "adamw": (partial(_make_train, adaptive=True), _TRAINING),
    "sgd": (partial(_make_train, adaptive=False), _TRAINING),
    "generate": (_make_generate, ("p", "c", "batch", "out")),
}
