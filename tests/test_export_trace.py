"""The trace and its memory: executed with the reference's ops on the memory that the firmware will have, it
gives the engine's losses and gradients."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from helpers import configs, random_batch, random_model
from tapeless.config import GPTConfig
from tapeless.export.lifetimes import Arena, Value, plan, plans
from tapeless.export.ops import OPS
from tapeless.export.trace import Call, Ref, Trace, record
from tapeless.layout import parameter_plan
from tapeless.ops import reference
from tapeless.presets import presets
from tapeless.settings import Training

PRESETS = ("microgpt", "esp32gpt", "esp32gpt-rms", "flashmicrogpt", "transformerlm")


def traced(name: str, **changes: Any) -> tuple[GPTConfig, Trace]:
    config = presets[name].model.replace(vocab_size=27, **changes)
    return config, record(config, presets[name].training)


# ---------------------------------------------------------------- running a trace


def linear_add_forward(y, r, x, w, b, n):
    reference.linear_forward(y, x, w, b, n)
    y[:n] += r[:n]


def linear_add_backward(dx, dw, db, dy, x, w, n):
    own = np.empty_like(dx)
    reference.linear_backward(own, dw, db, dy, x, w, n)
    dx[:n] += own[:n]


def cross_entropy(dlogits, logits, targets, weights, n):
    stats, loss = np.empty((len(logits), 2)), np.empty(len(logits))
    total = reference.cross_entropy_forward(loss, stats, logits, targets, weights, n)
    reference.cross_entropy_backward(dlogits, logits.copy(), stats, targets, weights, n)
    return total


JOINED = {f.__name__: f for f in (linear_add_forward, linear_add_backward, cross_entropy)}


class Memory:
    """The one buffer of the firmware, and its parameters and gradients, in float64. What no call has
    written yet is NaN."""

    def __init__(self, config: GPTConfig, arena: Arena, params: np.ndarray):
        self.arena = arena
        self.ram = np.full(arena.size, np.nan)
        self.offsets = {name: at // 8 for name, at in parameter_plan(config, np.float64).offsets.items()}
        self.flat = {"p": params.copy(), "g": np.zeros_like(params)}

    def array(self, ref: Ref, value: Value | None) -> np.ndarray:
        if ref.buffer in self.flat:
            first = self.offsets[ref.tensor] + ref.offset
            return self.flat[ref.buffer][first : first + ref.size].reshape(ref.shape)
        if value is None:  # what C has no use for
            return np.zeros(ref.shape)
        return self.ram[value.offset : value.offset + value.size].reshape(ref.shape)

    def run(self, words: dict[str, Any]) -> float:
        loss = 0.0
        for call, values in self.arena.calls:
            given = {
                name: self.array(arg, values.get(name)) if isinstance(arg, Ref) else words.get(str(arg), arg)
                for name, arg in call.args.items()
            }
            if "docs" in given:
                given["docs"] = [(0, words["n"])]
            op = JOINED.get(call.op) or getattr(reference, call.op)
            result = op(**given)
            loss += result if call.op == "cross_entropy" else 0.0
        return loss


@settings(max_examples=60)
@given(configs(), st.integers(0, 2**16), st.data())
def test_a_step_on_shared_memory_gives_the_engines_loss_and_gradients(config, seed, data):
    assume(config.norm != "layer" and config.n_streams <= 2)
    n = data.draw(st.integers(1, config.block_size))
    model, batch = random_model(config, seed=seed), random_batch(config, [n], seed)
    loss = model.loss_and_grad(*batch)
    step, _ = plans(record(config, Training()))
    memory = Memory(config, step, model.engine.params)
    words = {
        "n": n, "tokens": batch.tokens, "targets": batch.targets, "position": np.arange(n),
        "weight": np.full(n, 1 / n),
    }  # fmt: skip
    assert memory.run(words) == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(memory.flat["g"], model.engine.grads, rtol=1e-9, atol=1e-13)


@settings(max_examples=30)
@given(configs(), st.integers(0, 2**16))
def test_decoding_on_shared_memory_gives_the_engines_logits(config, seed):
    assume(config.norm != "layer" and config.n_streams <= 2)
    model, T = random_model(config, seed=seed), config.block_size
    tokens = np.random.default_rng(seed).integers(0, config.vocab, T)
    expected = model.logits(tokens)
    _, decode = plans(record(config, Training()))
    memory = Memory(config, decode, model.engine.params)
    [logits] = [value for value in decode.values if value.name == "c.logits"]
    caches = [value for value in decode.values if "cache" in value.name]
    for position, token in enumerate(tokens):
        kept = [(v, memory.ram[v.offset : v.offset + v.size].copy()) for v in caches]
        memory.ram[:] = np.nan  # nothing else may be read again
        for value, numbers in kept:
            memory.ram[value.offset : value.offset + value.size] = numbers
        memory.run({"n": 1, "tokens": np.array([token]), "position": np.array([position])})
        found = memory.ram[logits.offset : logits.offset + config.vocab]
        np.testing.assert_allclose(found, expected[position], rtol=1e-9, atol=1e-11)


# ---------------------------------------------------------------- the plan


@pytest.mark.parametrize("name", PRESETS)
def test_values_share_memory_only_where_they_do_not_meet(name):
    _, trace = traced(name)
    for arena in plans(trace):
        in_place = {
            frozenset((id(values[y]), id(values[x])))
            for call, values in arena.calls
            if OPS[call.op].in_place
            for y, x in [OPS[call.op].in_place.split()]
            if y in values and x in values
        }
        for a, b in combinations(arena.values, 2):
            apart = a.offset + a.size <= b.offset or b.offset + b.size <= a.offset
            never_at_once = a.last < b.first or b.last < a.first
            handed_on = frozenset((id(a), id(b))) in in_place and (a.last == b.first or b.last == a.first)
            assert apart or never_at_once or handed_on, (a, b)
        assert max(v.offset + v.size for v in arena.values) == arena.size


@pytest.mark.parametrize("name", PRESETS)
def test_sharing_comes_near_what_is_needed_at_once(name):
    _, trace = traced(name)
    for arena in plans(trace):
        at_once = max(
            sum(v.size for v in arena.values if v.first <= i <= v.last) for i in range(len(arena.calls))
        )
        assert arena.size <= at_once * 1.05
        assert arena.size < sum(v.size for v in arena.values)


def test_microgpt_trains_in_the_memory_that_the_docs_tell():
    _, trace = traced("microgpt")
    step, decode = plans(trace)
    assert (4 * step.size, 4 * decode.size) == (22_720, 2_432)


def test_reading_what_was_not_written_is_found():
    calls = [
        Call("relu_forward", {"v": Ref("a", "v", (), 0, (2, 3)), "u": Ref("a", "u", (), 0, (2, 3)), "n": "n"})
    ]
    with pytest.raises(ValueError, match=r"relu_forward reads a\.u\[2, 3\], which nothing has written"):
        plan(calls)


def test_every_op_of_the_reference_is_in_c_or_refused_by_name():
    missing = {name for name in vars(reference) if name.endswith(("_forward", "_backward"))} - OPS.keys()
    assert missing == {
        "layernorm_forward", "layernorm_backward", "sinkhorn_forward", "sinkhorn_backward"
    }  # fmt: skip


def test_a_trace_reads_as_the_schedule_does():
    _, trace = traced("esp32gpt")
    text = str(trace)
    assert text.startswith("step\n  embed_forward(x=a.x[0][16, 16], wte=p.wte[27, 16], ")
    assert "linear_add_forward(y=a.y[0][16, 16], r=a.x[0][16, 16], x=a.att[0][16, 16], " in text
    assert "\n\noptimiser\n  adamw(params=opt.params[4192], " in text
    assert "attention_decode(out=c.att[0][1, 16], cache=c.cache[0][16, 2, 4, 4], " in text
