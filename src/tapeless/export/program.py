"""A model as a C program: the trace as calls on fixed places of one static buffer, and what it reads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tapeless.data.tokenizers import Numbers
from tapeless.export.firmware import Firmware
from tapeless.export.int8 import Quantised
from tapeless.export.lifetimes import Arena, Placed, dimension, plans
from tapeless.export.ops import OPS
from tapeless.export.trace import Ref
from tapeless.export.weights import begin, number
from tapeless.layout import parameter_plan

PLACES_EVERY = 16  # documents; those between are found by walking
TOKEN_TYPES = {"uint8_t": 1, "uint16_t": 2, "uint32_t": 4}  # and their bytes


class Memory(NamedTuple):
    """Where everything lies in the one static buffer, in numbers of 4 bytes."""

    step: Arena | None
    decode: Arena | None
    kept: int  # parameters, gradients and moments, which come first

    @property
    def shared(self) -> int:
        """A step and a text never need their buffers at once."""
        return max(arena.size for arena in (self.step, self.decode) if arena is not None)

    @property
    def size(self) -> int:
        return self.kept + self.shared


def memory(firmware: Firmware) -> Memory:
    """The plan of all RAM that the model itself takes."""
    step, decode = plans(firmware.trace)
    moments = 1 if firmware.training.optimiser == "sgd" else 2
    return Memory(
        step if firmware.trains else None,
        decode if firmware.generates else None,
        (2 + moments) * firmware.size if firmware.trains else 0,
    )


# ---------------------------------------------------------------- C


def identifier(name: str) -> str:
    """A buffer's name for C: a.qkv[0] is a_qkv_0, and what it holds the second time, "a.f 2", a_f_v2."""
    return re.sub(r"\W+", "_", name.replace(" ", "_v").replace("]", "").strip())


def comment(text: str) -> str:
    """Text that may stand in a comment of C or in a quoted string, whatever it was."""
    return re.sub(r"[^\w .,:=/+-]|(?<=\*)/|/(?=\*)", "_", text, flags=re.ASCII)


class Writer:
    """Writes the calls of one part of the trace."""

    def __init__(self, firmware: Firmware, arena: Arena, base: int, quantised: Quantised | None = None):
        self.arena = arena
        self.base = base
        self._offsets = parameter_plan(firmware.config).offsets
        self._in_ram = firmware.trains
        self._quantised = quantised
        self._parameters = firmware.size
        self._step = any(placed.call.op == "cross_entropy" for placed in arena.calls)  # not decoding
        self.used: dict[str, tuple[str, str]] = {}  # names of parameters and gradients: place, shape

    def calls(self) -> Iterator[str]:
        for placed in self.arena.calls:
            yield self._call(placed)

    def places(self) -> list[tuple[str, str, str]]:
        shapes = {}
        for call, values in self.arena.calls:
            for name, value in values.items():
                if name != "*":
                    shapes[value.name] = ", ".join(map(str, call.args[name].shape))
        rows = sorted(self.arena.values, key=lambda v: v.first)
        return [
            (identifier(v.name), f"ram + {self.base + v.offset}", shapes.get(v.name, str(v.size)))
            for v in rows
        ]

    def _call(self, placed: Placed) -> str:
        if self._quantised is not None and (int8 := self._int8(placed)):
            return int8
        name, op = placed.call.op, OPS[placed.call.op]
        arguments = ", ".join(self._word(word, placed) for word in op.c.split())
        returned = "loss += " if name == "cross_entropy" else ""
        return f"{returned}tl_{op.name or name}({arguments});"

    def _int8(self, placed: Placed) -> str | None:
        """A product with weights in int8, of one row."""
        op, w = placed.call.op, lambda word: self._word(word, placed)
        if op == "embed_forward":
            wte, wpe = self._scaled("p.wte"), self._scaled("p.wpe")
            return f"tl_embed_int8({w('x')}, {wte}, {wpe}, token, position, {w('wte.1')});"
        if op in ("linear_forward", "linear_add_forward"):
            residual = w("r") if op == "linear_add_forward" else "NULL"
            weight = self._scaled(placed.call.args["w"].name)
            return (
                f"tl_linear_int8({w('y')}, {residual}, {w('x')}, {weight}, {w('b')}, {w('w.0')}, {w('w.1')});"
            )
        if op == "tied_head_forward":
            weight = self._scaled("p.wte")
            return f"tl_tied_head_int8({w('logits')}, {w('x')}, {weight}, {w('wte.0')}, {w('wte.1')});"
        return None

    def _scaled(self, name: str) -> str:
        assert self._quantised is not None
        values, scales, shape = self._quantised.places[name]
        q, s = (identifier(name.replace("p.", kind)) for kind in ("q.", "s."))
        self.used[q] = f"tl_weights_int8 + {values}", shape
        self.used[s] = f"tl_scales + {scales}", shape.split(",")[0]
        return f"{q}, {s}"

    def _word(self, word: str, placed: Placed) -> str:
        call, values = placed
        if word == "*":
            return identifier(values["*"].name)
        if word == "NULL" or word.isdigit():
            return word
        if "*" in word:
            return " * ".join(self._word(part, placed) for part in word.split("*"))
        if "." in word:
            return str(dimension(call, word))
        if word == "n":
            return "n" if self._step else "1"
        value = call.args[word]
        if isinstance(value, Ref):
            return self._address(value, values[word].name if word in values else None)
        if isinstance(value, str):
            here = {"targets": "tokens + 1", "position": "0" if self._step else "position"}
            return here.get(value, value)
        return str(value) if isinstance(value, int) else number(value)

    def _address(self, ref: Ref, held: str | None) -> str:
        if not ref.size:
            return "NULL"
        if held is not None:
            return identifier(held)
        name = identifier(ref.name)
        offset = self._offsets[ref.tensor] // 4 + ref.offset
        if ref.buffer == "g":
            place = f"ram + {self._parameters + offset}"
        elif self._quantised is not None:
            place = f"tl_weights + {self._quantised.others[ref.name]}"
        else:
            place = f"{'ram' if self._in_ram else 'tl_weights'} + {offset}"
        self.used[name] = place, ", ".join(map(str, ref.shape))
        return name


def _optimiser(firmware: Firmware) -> Iterator[str]:
    t, P = firmware.training, firmware.size
    if t.grad_clip:
        clip = number(t.grad_clip)
        yield f"const float norm = tl_global_norm(ram + {P}, {P});"
        yield f"if (norm + 1e-6f > {clip})"
        yield f"    scale = {clip} / (norm + 1e-6f);"
    places = {"params": 0, "grads": P, "m": 2 * P, "v": 3 * P}
    if t.optimiser != "sgd":
        # 1 − βᵗ itself, not βᵗ: near 1 that has no digits left for the difference.
        for i, beta in (1, t.beta1), (2, t.beta2):
            yield f"rest{i} = {number(beta)} * rest{i} + (1.0f - {number(beta)});"
    for call in firmware.trace.optimiser:
        if call.op == "global_norm":
            continue
        words = []
        for word in OPS[call.op].c.split():
            value = call.args.get(word, word)
            if isinstance(value, Ref):
                words.append(f"ram + {places[word] + value.offset}")
            elif word == "grads.0":
                words.append(str(dimension(call, word)))
            else:
                words.append(value if isinstance(value, str) else number(value))
        yield f"tl_{OPS[call.op].name or call.op}({', '.join(words)});"


# ---------------------------------------------------------------- files


def _table(about: str, kind: str, name: str, values: Iterable[str], wide: int) -> dict[str, Any]:
    return {"about": about, "type": kind, "name": name, "numbers": list(values), "wide": wide}


def _tables(firmware: Firmware, quantised: Quantised | None) -> list[dict[str, Any]]:
    """The weights in flash."""
    if quantised is not None:
        tables = [
            _table("Weights, row by row", "int8_t", "tl_weights_int8", map(str, quantised.values), 24),
            _table("A row's scale", "float", "tl_scales", map(number, quantised.scales), 8),
        ]
        others = _table("Other parameters", "float", "tl_weights", map(number, quantised.kept), 8)
        return [*tables, others] if quantised.kept.size else tables
    if firmware.weights is None:
        return []
    return [_table("The weights", "float", "tl_weights", map(number, firmware.weights), 8)]


def _code(firmware: Firmware, quantised: Quantised | None) -> dict[str, Any]:
    """The calls of a step and of decoding, and where everything lies that they name."""
    layout = memory(firmware)
    told = [f"parameters, gradients and moments ({layout.kept:,} numbers)"] if firmware.trains else []
    calls: dict[str, list[str]] = {"step": [], "decode": []}
    used: dict[str, tuple[str, str]] = {}
    parts = []
    for part, what in (("step", "a training step"), ("decode", "generating")):
        arena = getattr(layout, part)
        if arena is None:
            continue
        writer = Writer(firmware, arena, layout.kept, quantised if part == "decode" else None)
        calls[part] = list(writer.calls())
        used |= writer.used
        told.append(f"what {what} works with ({arena.size:,})")
        parts.append({"about": f"What {what} works with", "names": writer.places()})
    parameters = [(name, *place) for name, place in sorted(used.items(), key=lambda item: _place(item[1][0]))]
    about = "Parameters, and their gradients" if firmware.trains else "Parameters"
    places = [{"about": about, "names": parameters}, *parts]
    return {"ram": layout.size, "ram_about": ", ".join(told), "places": places, **calls}


def context(firmware: Firmware, command: str, quantised: Quantised | None = None) -> dict[str, Any]:
    """What the templates are filled with."""
    f = firmware
    held = (["documents"] if f.trains else []) + (["the text of each token"] if f.generates else [])
    text, text_at, _ = _texts(f)
    return {
        "title": comment(f.title),
        "command": comment(command),
        "parameters": f.size,
        "vocab": f.config.vocab,
        "block": f.config.block_size,
        "bos": -1 if f.tokenizer.bos is None else f.tokenizer.bos,
        "start": f.start,
        "tokens": f.tokenizer.vocab_size,
        "eos": " || ".join(f"(token) == {id}" for id in f.eos) or "0",
        "token_type": _token_type(f),
        "seed": f.seed,
        "random": f.random,
        "pcg": _pcg(f.random_state),
        "draws_weights": f.trains and f.weights is None,
        "shuffle_draws": f.shuffle_draws,
        "trains": f.trains,
        "generates": f.generates,
        "training": f.training,
        "samples": f.training.samples or 20,
        "max_tokens": f.training.max_tokens,
        "longest_text": longest_text(f),
        "text": text,
        "text_at": text_at,
        "documents": len(f.documents.starts) if f.documents else 0,
        "places_every": PLACES_EVERY,
        "stream": f.documents.stream.tolist() if f.documents else [],
        "places_of_documents": f.documents.starts[::PLACES_EVERY].tolist() if f.documents else [],
        "tables": _tables(f, quantised),
        "int8": quantised is not None,
        "optimiser": list(_optimiser(f)) if f.trains else [],
        "begin": list(begin(f.config, f.weights is None)) if f.trains else [],
        "logits": identifier("c.logits"),
        **_code(f, quantised),
        "data_about": " and ".join(held),
    }


def _token_type(firmware: Firmware) -> str:
    return next(kind for kind, width in TOKEN_TYPES.items() if firmware.config.vocab <= 256**width)


def _place(place: str) -> tuple[str, int]:
    buffer, _, offset = place.partition(" + ")
    return buffer, int(offset)


def _texts(firmware: Firmware) -> tuple[list[int], list[int], int]:
    """The bytes of all tokens, where each one's begin, and the most that one has."""
    tokenizer = firmware.tokenizer
    if isinstance(tokenizer, Numbers):
        each = [f"{i} ".encode() for i in range(tokenizer.vocab_size)]
    else:
        each = tokenizer.token_bytes()
    lengths = [len(text) for text in each]
    return list(b"".join(each)), np.cumsum([0, *lengths]).tolist(), max(lengths)


def _pcg(words: np.ndarray | None) -> list[str] | None:
    """State and increment, each the upper and the lower 64 bits."""
    if words is None:
        return None
    state, inc = (int(sum(int(w) << (32 * i) for i, w in enumerate(row))) for row in words.reshape(4, 4)[:2])
    return [hex(part) for value in (state, inc) for part in (value >> 64, value & (2**64 - 1))]


# ---------------------------------------------------------------- sizes


def token_width(firmware: Firmware) -> int:
    """Bytes of a token."""
    return TOKEN_TYPES[_token_type(firmware)]


def data_bytes(firmware: Firmware) -> int:
    """Of the documents in flash."""
    if firmware.documents is None:
        return 0
    places = firmware.documents.starts[::PLACES_EVERY]
    return token_width(firmware) * len(firmware.documents.stream) + 4 * len(places)


def weight_bytes(firmware: Firmware, quantised: Quantised | None) -> int:
    """Of the weights in flash."""
    if quantised is not None:
        return quantised.nbytes
    return 0 if firmware.weights is None else 4 * firmware.weights.size


def token_bytes(firmware: Firmware) -> int:
    """Of the tokenizer's table in flash."""
    text, text_at, _ = _texts(firmware)
    return len(text) + 4 * len(text_at)


def longest_text(firmware: Firmware) -> int:
    """Bytes of the longest text that is generated."""
    return _texts(firmware)[2] * firmware.training.max_tokens if firmware.generates else 0
