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

from tapeless.layout import ME, Tensor
from tapeless.schedule import Schedule

# The other groups of views that programs take. Symbols: Q a thread's part of the parameters, M stream,
# K steps, A batches a step, B documents a batch (or tokens a sample), U uniforms, W threads (workers).
FLAT = (Tensor("grads", ("Q",)),)  # this thread's part of the gradients
WEIGHTS = (Tensor("params", ("Q",)), Tensor("rounded", ("Q",), "uint16"))  # this thread's part, in bfloat16
RESULT = (Tensor("loss", ("W",), "float64"),)  # of each thread's share
OPTIMISER = (
    Tensor("params", ("Q",)),
    Tensor("m", ("Q",)),
    Tensor("v", ("Q",)),
    Tensor("powers", (2,), "float64"),
    # What spikes are measured by: good steps so far, running means of their losses and gradients' norms;
    # and how many steps in a row were bad
    Tensor("means", (4,), "float64"),
    Tensor("segments", ("R", 3), "int64"),
    Tensor("constants", (6,), "float64"),  # beta1, beta2, eps, weight_decay, momentum, grad_clip
    Tensor("limits", (2,), "float64"),  # whether norms matter; how many times its mean is a spike, or 0
)
DATA = (
    Tensor("stream", ("M",), "int32"),
    Tensor("spans", ("K", "A", "B", 2), "int64"),
    Tensor("lrs", ("K",), "float64"),
    Tensor("losses", ("W", "K"), "float64"),  # of each thread's share
    Tensor("norms", ("K",), "float64"),  # of the gradients, where something asks for them
    Tensor("ended", (2,), "int64"),  # steps done, and why not all of them: what is wrong with the last one
)
# What may be wrong with a step.
GOOD, BAD_LOSS, BAD_NORM, LOSS_SPIKE, NORM_SPIKE = range(5)
# A running mean is of the last hundred good steps, roughly, and counts from the twentieth on.
MEAN_OVER, MEAN_FROM = 100, 20
SAMPLES = (
    Tensor("tokens", ("K", "B"), "int32"),  # each row begins with the prompt
    Tensor("lengths", ("K",), "int32"),  # tokens of each row, the prompt's included
    Tensor("uniforms", ("U",), "float64"),
    # Where to go on: at which row; its tokens so far, and how many of them have their keys and values in the
    # cache; how many uniforms are used
    Tensor("state", (4,), "int64"),
    Tensor("probs", ("V",), "float64"),  # of the tokens that may be drawn: the first ones of the vocabulary
    Tensor("eos", ("E",), "int64"),  # tokens that end a text
    # Prompt length, how many tokens to read before coming back; temperature, top_k, top_p
    Tensor("options", (5,), "float64"),
)


def _make_evaluate(schedule: Schedule, ops: Any, block_size: int) -> Callable:
    forward = schedule.forward

    def evaluate(groups):
        p, a, batch, result = groups
        result.loss[batch.share[ME]] = forward(p, a, batch)

    return evaluate


def _make_gradient(schedule: Schedule, ops: Any, block_size: int) -> Callable:
    forward, backward, rows_of, meet = schedule.forward, schedule.backward, ops.rows, ops.meet

    def gradient(groups):
        p, g, a, d, batch, flat, result = groups
        flat.grads[:] = 0
        meet(rows_of(batch))
        result.loss[batch.share[ME]] = forward(p, a, batch)
        backward(p, g, a, d, batch)

    return gradient


def _make_train(schedule: Schedule, ops: Any, block_size: int, adaptive: bool) -> Callable:
    """Every thread runs all steps, and updates its own part of the parameters. A step that is bad ends
    it, before anything is updated; on what is bad all threads agree, since they look at the same sums."""
    forward, backward = schedule.forward, schedule.backward
    pack, rows_of, meet = ops.pack, ops.rows, ops.meet
    adamw, sgd, global_norm = ops.adamw, ops.sgd, ops.global_norm

    def train(groups):
        p, g, a, d, batch, flat, opt, data = groups
        beta1, beta2, eps = opt.constants[0], opt.constants[1], opt.constants[2]
        weight_decay, momentum, clip = opt.constants[3], opt.constants[4], opt.constants[5]
        watch, spike = opt.limits[0] > 0, opt.limits[1]
        me, threads = batch.share[ME], batch.share[ME + 1]
        wrong, k = GOOD, 0
        while wrong == GOOD and k < data.lrs.shape[0]:
            spans = data.spans[k]
            tokens = 0
            for i in range(spans.shape[0]):
                for s in range(spans.shape[1]):
                    tokens += spans[i, s, 1]
            flat.grads[:] = 0
            loss = 0.0
            for i in range(spans.shape[0]):
                pack(batch, data.stream, spans[i], 1 / tokens)
                loss += forward(p, a, batch)
                backward(p, g, a, d, batch)
            data.losses[me, k] = loss
            lr, scale, norm = data.lrs[k], 1.0, 0.0
            if clip > 0 or watch:
                norm = global_norm(flat.grads)
            batch.sums[me, 0], batch.sums[me, 1] = loss, norm * norm
            meet(rows_of(batch))
            loss, square = 0.0, 0.0
            for thread in range(threads):
                loss += batch.sums[thread, 0]
                square += batch.sums[thread, 1]
            norm = np.sqrt(square)
            if clip > 0:
                scale = min(1.0, clip / (norm + 1e-6))
            if not np.isfinite(loss):
                wrong = BAD_LOSS
            elif not np.isfinite(norm):
                wrong = BAD_NORM
            elif spike > 0:
                if opt.means[0] >= MEAN_FROM and loss > spike * opt.means[1]:
                    wrong = LOSS_SPIKE
                elif opt.means[0] >= MEAN_FROM and norm > spike * opt.means[2]:
                    wrong = NORM_SPIKE
                else:
                    opt.means[0] += 1
                    over = min(opt.means[0], MEAN_OVER)
                    opt.means[1] += (loss - opt.means[1]) / over
                    opt.means[2] += (norm - opt.means[2]) / over
            if me == 0:
                data.norms[k] = norm
            opt.means[3] = 0 if wrong == GOOD else opt.means[3] + 1
            if wrong == GOOD:
                if adaptive:
                    adamw(
                        opt.params, flat.grads, opt.m, opt.v, opt.powers, opt.segments,
                        lr, beta1, beta2, eps, weight_decay, scale,
                    )  # fmt: skip
                else:
                    sgd(opt.params, flat.grads, opt.m, lr, momentum, scale)
            meet(rows_of(batch))
            k += 1
        if me == 0:
            data.ended[0], data.ended[1] = k, wrong

    return train


def _make_generate(schedule: Schedule, ops: Any, block_size: int, stored: bool = False) -> Callable:
    """With `stored`, single tokens, whose time is that of reading the weights, have a copy in bfloat16."""
    decode, sample_token, take = schedule.decode, ops.sample_token, ops.take
    rows_of, meet = ops.rows, ops.meet

    def generate(groups):
        p, c, batch, out = groups[0], groups[-3], groups[-2], groups[-1]
        me = batch.share[ME]
        prompt, left = int(out.options[0]), int(out.options[1])
        temperature, top_k, top_p = out.options[2], out.options[3], out.options[4]
        drawn = out.probs.shape[0]
        k, length, cached, used = out.state[0], out.state[1], out.state[2], out.state[3]
        while k < out.tokens.shape[0] and left > 0:
            row = out.tokens[k]
            # Learned positions end at the block: beyond it, read the last T tokens again.
            first = max(0, length - block_size)
            t, last = 0 if first else cached, length - first - 1
            left -= last + 1 - t
            while t <= last:
                # The last one alone: of a single token, decode finds the logits.
                n = min(batch.tokens.shape[0], last - t) if t < last else 1
                take(batch, n)
                for i in range(n):
                    batch.tokens[i], batch.positions[i] = row[first + t + i], t + i
                if stored and n == 1:
                    decode(groups[1], c, batch)
                else:
                    decode(p, c, batch)
                t += n
            cached = 0 if first else length
            if me == 0:
                row[length] = sample_token(
                    out.probs, c.logits[0][:drawn], temperature, top_k, top_p, out.uniforms[used]
                )
            meet(rows_of(batch))
            used += 1
            ended = False
            for i in range(out.eos.shape[0]):
                ended = ended or row[length] == out.eos[i]
            if not ended:
                length += 1
            if ended or length == row.shape[0]:
                out.lengths[k] = length
                k, length, cached = k + 1, prompt, min(cached, prompt - 1)
        if me == 0:
            out.state[0], out.state[1], out.state[2], out.state[3] = k, length, cached, used

    return generate


def _make_round(schedule: Schedule, ops: Any, block_size: int) -> Callable:
    round_weights = ops.round_weights

    def round_(groups):
        (weights,) = groups
        round_weights(weights.rounded, weights.params)

    return round_


_TRAINING = ("p", "g", "a", "d", "batch", "flat", "opt", "data")
PROGRAMS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "evaluate": (_make_evaluate, ("p", "a", "batch", "result")),
    "gradient": (_make_gradient, ("p", "g", "a", "d", "batch", "flat", "result")),
    "adamw": (partial(_make_train, adaptive=True), _TRAINING),
    "sgd": (partial(_make_train, adaptive=False), _TRAINING),
    "generate": (_make_generate, ("p", "c", "batch", "out")),
    # The same with weights in bfloat16, which are rounded first.
    "round": (_make_round, ("weights",)),
    "generate_stored": (partial(_make_generate, stored=True), ("p", "stored", "c", "batch", "out")),
}
