"""Where every number lives: the tensors of a model, their shapes, and their places in flat buffers.

A `Tensor` says what one buffer holds; its shape may use the symbols `N` (tokens in the batch), `D`
(documents in the batch) and `W` (threads that share it), which are known only when buffers are
planned. Three lists describe a model completely: `parameters`, `activations` and `activation_grads`.
Everything that stores, prints, counts, saves or compiles goes by them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from math import prod
from typing import Any, NamedTuple

import numpy as np

from tapeless.config import GPTConfig

SINKHORN_ITERATIONS = 20  # as in Xie et al. 2025, arXiv:2512.24880
# Symbolic sizes: tokens and documents of a batch, threads (workers), and numbers of a row in `partial`.
N, D, W, X = "N", "D", "W", "X"
# Bytes: the longest cache line, Apple's, which is two of other processors', and two of the widest vector.
ALIGN = 128


class Tensor(NamedTuple):
    """One named array. A tensor that a config does not have is kept with a size of zero, so that
    every config shares one schedule; such tensors are not listed to users."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float"  # "float" means the engine's own; or a NumPy name

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(sizes[s] if isinstance(s, str) else s for s in self.shape)

    def of_rows(self, rows: int) -> Tensor:
        return self._replace(shape=tuple(rows if s == N else s for s in self.shape))


@cache
def parameters(config: GPTConfig) -> tuple[Tensor, ...]:
    """Every parameter in buffer order (design, section 2). Weights are `[in, out]`: y = x·w + b."""
    c = config
    V, C, T, L, F, S = c.vocab, c.n_embd, c.block_size, c.n_layer, c.n_hidden, c.n_streams
    none = (0,)

    def norm(name: str, here: bool, *shape: int) -> list[Tensor]:
        return [
            Tensor(f"{name}_w", shape if here and c.norm_gain else (*shape[:-1], 0)),
            Tensor(f"{name}_b", shape if here and c.norm_bias else (*shape[:-1], 0)),
        ]

    def bias(name: str, width: int) -> Tensor:
        return Tensor(name, (L, width if c.bias else 0))

    mhc = c.residual == "mhc"
    mix = (L, 1) if S == 2 else (L, S, S)
    streams: list[Tensor] = []
    for i in (1, 2):
        streams += [
            Tensor(f"mix{i}", mix if mhc else none),
            Tensor(f"alpha{i}", (L, S) if mhc else none),
            Tensor(f"beta{i}", (L, S) if mhc else none),
        ]
    return (
        Tensor("wte", (V, C)),
        Tensor("wpe", (T, C)),
        *norm("norme", c.norm_embed, C),
        *norm("norm1", c.norm_attn, L, C),
        Tensor("wqkv", (L, C, 3 * C)),
        bias("bqkv", 3 * C),
        Tensor("wo", (L, C, C)),
        bias("bo", C),
        *norm("norm2", c.norm_mlp, L, C),
        Tensor("w1", (L, C, F)),
        bias("b1", F),
        Tensor("w2", (L, F, C)),
        bias("b2", C),
        *norm("normf", c.norm_final, C),
        Tensor("head", none if c.tied else (C, V)),
        *streams,
        Tensor("contract", (S,) if mhc else none),
    )


# Queries in a tile of attention: whole vectors on every processor.
ATTENTION_QUERIES = 16


def attention_keys(block_size: int) -> int:
    """Keys in a tile of attention's backward pass."""
    return min(64, -(-block_size // ATTENTION_QUERIES) * ATTENTION_QUERIES)


def attention_scratch(config: GPTConfig) -> tuple[int, int]:
    """Numbers that attention works with, forward and backward: one head's keys and values, transposed
    or padded, a tile of scores, and a tile's results."""
    Q, K = ATTENTION_QUERIES, attention_keys(config.block_size)
    room, width = (-(-n // Q) * Q for n in (config.block_size, config.head_dim))
    return (2 * width + Q) * room + Q * width, (5 * K + 3 * Q) * width + 2 * Q * K


@cache
def activations(config: GPTConfig) -> tuple[Tensor, ...]:
    """What the forward pass keeps for the backward pass, and its scratch: `f`, what a sublayer adds to
    the residual stream, and `scratch`, for attention."""
    c = config
    V, C, T, F, H = c.vocab, c.n_embd, c.block_size, c.n_hidden, c.n_head
    L, K = c.n_layer, 1 if c.recompute else c.n_layer  # layers, and those whose insides are kept

    def norm(number: str, here: bool, *shape: int | str) -> list[Tensor]:
        return [
            Tensor(f"h{number}", (*shape, C) if here else (0,)),
            Tensor(f"mean{number}", shape if here and c.norm == "layer" else (*shape[:-1], 0)),
            Tensor(f"rstd{number}", shape if here else (0,)),
        ]

    def mixing(number: str) -> list[Tensor]:
        return [
            Tensor(f"A{number}", (K, S, S) if mhc else (0,)),
            Tensor(f"sinkhorn{number}", trace),
            Tensor(f"in{number}", (K, N, C) if mhc else (0,)),
            Tensor(f"f{number}", (L, N, C) if mhc else (0,)),
        ]

    mhc, full, S = c.residual == "mhc", c.attention == "full", c.n_streams
    streams = (S, N, C) if mhc else (N, C)
    trace = (K, 2 * SINKHORN_ITERATIONS + 1, S, S) if mhc and S > 2 else (K, 0)
    return (
        Tensor("emb", (N, C) if c.norm_embed or mhc else (0,)),
        Tensor("he", (N, C) if c.norm_embed and mhc else (0,)),
        *norm("e", c.norm_embed, N)[1:],
        Tensor("x", (L + 1, *streams)),
        *mixing("1"),
        *norm("1", c.norm_attn, K, N),
        Tensor("qkv", (K, N, 3 * C)),
        Tensor("probs", (K, N, H, T) if full else (0,)),
        Tensor("lse", (0,) if full else (K, N, H)),
        Tensor("att", (K, N, C)),
        Tensor("y", (K, *streams)),
        *mixing("2"),
        *norm("2", c.norm_mlp, K, N),
        Tensor("u", (K, N, F)),
        Tensor("v", (K, N, F)),
        Tensor("f", (0,) if mhc else (N, C)),
        Tensor("out", (N, C) if mhc else (0,)),
        *norm("f", c.norm_final, N),
        Tensor("scratch", (W, attention_scratch(c)[0])),
        Tensor("logits", (N, V)),
        Tensor("logits_stats", (N, 2)),
        Tensor("loss", (N,)),
    )


@cache
def activation_grads(config: GPTConfig) -> tuple[Tensor, ...]:
    """Gradients of activations. One buffer a kind serves every layer: only the running gradient of
    the residual stream, `x`, outlives a sublayer."""
    c = config
    mhc, S, rows = c.residual == "mhc", c.n_streams, (N, c.n_embd)
    return (
        Tensor("emb", rows if c.norm_embed or mhc else (0,)),
        Tensor("he", rows if c.norm_embed and mhc else (0,)),
        Tensor("x", (S, *rows) if mhc else rows),
        Tensor("inp", rows if mhc else (0,)),
        Tensor("f", rows if mhc else (0,)),
        Tensor("A", (S, S) if mhc else (0,)),
        Tensor("out", rows if mhc else (0,)),
        Tensor("h", rows),
        Tensor("qkv", (N, 3 * c.n_embd)),
        Tensor("sums", (W, S * S if mhc else 0)),
        Tensor("scratch", (W, attention_scratch(c)[1])),
        Tensor("att", (N, c.n_embd)),
        Tensor("u", (N, c.n_hidden)),
        Tensor("v", (N, c.n_hidden)),
        Tensor("logits", (N, c.vocab)),
    )


@cache
def decoding(config: GPTConfig, rows: int | None = None) -> tuple[Tensor, ...]:
    """What generating needs: the present layer's activations of up to `rows` tokens (a piece of a prompt),
    the logits of one and, in place of attention's probabilities, every layer's keys and values so far."""
    c, rows = config, piece(config) if rows is None else rows
    cache_ = Tensor("cache", (c.n_layer, c.block_size, 2, c.n_head, c.head_dim))
    return tuple(
        cache_ if t.name == "probs" else t.of_rows(1 if t.name == "logits" else rows)
        for t in activations(c.replace(recompute=True))
    )


# Tokens of a prompt that are read at once: large enough to be compute-bound.
PIECE = 64


def piece(config: GPTConfig) -> int:
    """How many tokens of a prompt are read at once."""
    return min(PIECE, config.block_size)


# Numbers of a matrix from which reading it is what takes the time of a product with one row.
LARGE = 1 << 16


def streamed_width(config: GPTConfig) -> int:
    """The widest row that a generating model streams its weights into, or 0 if it is small, or its rows
    are no whole vectors."""
    C, F = config.n_embd, config.n_hidden
    return max(3 * C, F) if C * C >= LARGE and C % 16 == F % 16 == 0 else 0


def decoding_sizes(config: GPTConfig, threads: int) -> dict[str, int]:
    """The sizes of the buffers that so many threads generate texts with."""
    return {N: piece(config), D: 1, W: threads, X: streamed_width(config)}


BATCH = (
    Tensor("tokens", (N,), "int32"),
    Tensor("targets", (N,), "int32"),
    Tensor("positions", (N,), "int32"),
    Tensor("weights", (N,)),  # of each token in the loss; they sum to one
    Tensor("starts", ("D+1",), "int32"),  # document s is tokens starts[s] to starts[s+1]
    Tensor("sizes", (2,), "int32"),  # tokens and documents really in the batch
    # A thread's share of it: rows first and end of so many, which thread this is, of how many
    Tensor("share", (5,), "int64"),
    # Of each thread, a cache line apart, so that nobody waits for a line that another one writes:
    Tensor("arrivals", (W, 16), "int64"),  # how often it has come to a place where all meet
    Tensor("sums", (W, 16), "float64"),  # the loss of its share, the squared norm of its part of the gradient
    Tensor("partial", (W, X)),  # its part of a sum, where a row is read from memory by all: see streams.py
)
ME = 3  # where in `share` a thread finds its own number; the number of threads stands after it


@cache
def group(name: str, fields: tuple[str, ...]) -> Any:
    """A NamedTuple class with these fields: how the schedule sees a group of tensors."""
    return NamedTuple(name, [(f, np.ndarray) for f in fields])


def view_class(name: str, tensors: Sequence[Tensor]) -> Any:
    return group(name, tuple(t.name for t in tensors))


class Plan:
    """A list of tensors laid out in one flat buffer: offsets, total size, and views.

    `aligned` starts each tensor on a cache line; parameters are packed without gaps instead, so
    that the buffer's length is the parameter count.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        dtype: Any,
        sizes: Mapping[str, int] | None = None,
        *,
        aligned: bool = True,
    ):
        sizes = dict(sizes or {})
        if D in sizes:
            sizes["D+1"] = sizes[D] + 1
        self.tensors = tuple(tensors)
        self.dtype = np.dtype(dtype)
        self.shapes = {t.name: t.resolve(sizes) for t in tensors}
        self.dtypes = {t.name: self.dtype if t.dtype == "float" else np.dtype(t.dtype) for t in tensors}
        self.offsets: dict[str, int] = {}  # in bytes
        end = 0
        for t in tensors:
            if aligned:
                end = -(-end // ALIGN) * ALIGN
            self.offsets[t.name] = end
            end += prod(self.shapes[t.name]) * self.dtypes[t.name].itemsize
        self.nbytes = end  # the buffer's length

    @property
    def size(self) -> int:
        """Numbers in all (for a plan of one dtype without gaps)."""
        return self.nbytes // self.dtype.itemsize

    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor."""
        return {name: prod(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items()}

    def allocate(self) -> np.ndarray:
        """A zeroed flat buffer of bytes for this plan, on a cache-line boundary."""
        return aligned_zeros(self.nbytes)

    def views(self, name: str, buffer: np.ndarray) -> Any:
        """The tensors as a NamedTuple of arrays over `buffer` (bytes)."""
        return view_class(name, self.tensors)(
            *(
                buffer[self.offsets[t.name] :][: prod(self.shapes[t.name]) * self.dtypes[t.name].itemsize]
                .view(self.dtypes[t.name])
                .reshape(self.shapes[t.name])
                for t in self.tensors
            )
        )


def aligned_zeros(nbytes: int) -> np.ndarray:
    """Zeroed bytes whose address is a multiple of `ALIGN`."""
    raw = np.zeros(nbytes + ALIGN, np.uint8)
    start = -raw.ctypes.data % ALIGN
    return raw[start : start + nbytes]


def parameter_plan(config: GPTConfig, dtype: Any = np.float32) -> Plan:
    return Plan(parameters(config), dtype, aligned=False)


def n_params(config: GPTConfig) -> int:
    """Number of parameters: 4,192 for microgpt on 26 letters and BOS."""
    return sum(prod(t.resolve({})) for t in parameters(config))


def param_views(config: GPTConfig, group: Any) -> dict[str, np.ndarray]:
    """The tensors a config really has, by name: what users see and files hold."""
    return {t.name: v for t, v in zip(parameters(config), group, strict=True) if v.size}


# The weights that weight decay shrinks: matrices and embeddings, not gains, biases or scalars.
DECAYED = ("wte", "wpe", "wqkv", "wo", "w1", "w2", "head")


def stored_parameters(config: GPTConfig) -> tuple[Tensor, ...]:
    """The parameters as a model reads them that generates in bfloat16: matrices of the layers and a tied
    head as the upper halves of float32s, and the rest as they are."""
    stored = ("wqkv", "wo", "w1", "w2", *(("wte",) if config.tied else ()))
    return tuple(t._replace(dtype="uint16") if t.name in stored else t for t in parameters(config))


def decay_segments(config: GPTConfig) -> np.ndarray:
    """The flat buffer as runs (first, end, 1 where weights decay) [R, 3]: matrices and embeddings
    decay; gains, biases and hyper-connection scalars do not."""
    segments: list[list[int]] = []
    end = 0
    for tensor in parameters(config):
        shape = tensor.resolve({})
        first, end = end, end + prod(shape)
        decays = int(tensor.name in DECAYED)
        if first == end:
            continue
        if segments and segments[-1][2] == decays:
            segments[-1][1] = end
        else:
            segments.append([first, end, decays])
    return np.array(segments, np.int64)


def cut_segments(segments: np.ndarray, first: int, end: int) -> np.ndarray:
    """The segments of the part of the buffer between these bounds, counted from its beginning."""
    inside = segments.copy()
    inside[:, :2] = segments[:, :2].clip(first, end) - first
    return inside[inside[:, 0] < inside[:, 1]]


def memory(
    config: GPTConfig, dtype: Any, tokens: int, documents: int, threads: int, moments: Sequence[str]
) -> dict[str, Plan]:
    """The buffers of an engine that trains on batches of up to `tokens` in `documents`: a plan for each,
    exact to the byte, before anything is allocated. `moments` are those of the optimiser, "m" and "v"."""
    sizes = {N: tokens, D: documents, W: threads, X: 0}
    flat = parameter_plan(config, dtype)
    return {
        "parameters": flat,
        "gradients": flat,
        **{f"optimiser {moment}": flat for moment in moments},
        "activations": Plan(activations(config), dtype, sizes),
        "activation gradients": Plan(activation_grads(config), dtype, sizes),
        "batch": Plan(BATCH, dtype, sizes),
    }
