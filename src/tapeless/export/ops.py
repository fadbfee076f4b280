"""Which ops have a C version, what they do to their buffers, and how a call of one is written in C.

The mathematics stands in `tapeless.ops.reference`, whose argument names are used here; the C is
c/tapeless_ops.c.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import NamedTuple

from tapeless.ops import reference


class Op(NamedTuple):
    """`c` is the call in C: an argument's name stands for its address, `x.1` for its second dimension,
    `+x` for the address where the gradient or residual is to be added to, other words for themselves.
    Arguments in neither `writes` nor `updates` are only read."""

    c: str
    writes: str = ""  # what the op overwrites, without reading it
    updates: str = ""  # what it adds to
    in_place: str = ""  # "y x": y may take the place of x, where x is not needed any more
    scratch: str = ""  # numbers to work with, as a dimension: `*` in `c`
    name: str = ""  # of the C function, behind tl_, where it has another one


OPS = {
    "embed_forward": Op("x wte wpe tokens positions n wte.1", "x"),
    "embed_backward": Op("dwte dwpe dx tokens positions n dwte.1", updates="dwte dwpe"),
    "rmsnorm_forward": Op("y rstd x w n x.1 eps", "y rstd"),
    "rmsnorm_backward": Op("dx dw dy x rstd w n x.1", updates="dx dw"),
    "linear_forward": Op("y NULL x w b n w.0 w.1", "y"),
    "linear_backward": Op("dx dw db dy x w n w.0 w.1 0", "dx", "dw db"),
    "tied_head_forward": Op("logits x wte n wte.0 wte.1", "logits"),
    "tied_head_backward": Op("dx dwte dlogits x wte n wte.0 wte.1", "dx", "dwte"),
    "relu_forward": Op("v u n u.1", "v", in_place="v u"),
    "relu_backward": Op("du dv u n u.1", "du", in_place="du dv"),
    "gelu_forward": Op("v u n u.1", "v", in_place="v u"),
    "gelu_backward": Op("du dv u n u.1", "du", in_place="du dv"),
    "attention_forward": Op("out probs qkv n probs.1 probs.2 out.1", "out probs"),
    "attention_backward": Op("dqkv * dout probs qkv n probs.1 probs.2 dout.1", "dqkv", scratch="probs.2"),
    "flash_attention_forward": Op("out lse * qkv n lse.1 out.1 tile", "out lse", scratch="tile"),
    "flash_attention_backward": Op("dqkv dout out lse qkv n lse.1 out.1", "dqkv"),
    "attention_decode": Op("out cache * qkv positions cache.2 out.1", "out", "cache", scratch="cache.0"),
    "sigmoid_matrix_forward": Op("A mix", "A"),
    "sigmoid_matrix_backward": Op("dmix dA A", updates="dmix"),
    "mhc_expand_forward": Op("x emb n x.0 x.1 x.2", "x"),
    "mhc_expand_backward": Op("demb dx n dx.0 dx.1 dx.2", "demb"),
    "mhc_mix_forward": Op("y inp x A alpha n x.0 x.1 x.2", "y inp"),
    "mhc_mix_backward": Op("dx dA dalpha dinp x A alpha n x.0 x.1 x.2", "dA", "dx dalpha"),
    "mhc_distribute_forward": Op("y f beta n y.0 y.1 y.2", updates="y"),
    "mhc_distribute_backward": Op("df dbeta dy f beta n dy.0 dy.1 dy.2", "df", "dbeta"),
    "mhc_contract_forward": Op("out x contract n x.0 x.1 x.2", "out"),
    "mhc_contract_backward": Op("dx dcontract dout x contract n x.0 x.1 x.2", "dx", "dcontract"),
    "zero": Op("x n*x.1", "x"),
    "accumulate": Op("y x n*x.1", updates="y", name="add"),
    "add_forward": Op("", "y"),  # always part of a product: see `fused`
    "cross_entropy_forward": Op("", "loss stats"),  # one with its backward
    "cross_entropy_backward": Op("", "dlogits"),
    # What `trace.fused` makes of two of them:
    "linear_add_forward": Op("y r x w b n w.0 w.1", "y", name="linear_forward"),
    "linear_add_backward": Op("dx dw db dy x w n w.0 w.1 1", updates="dx dw db", name="linear_backward"),
    "cross_entropy": Op("dlogits logits targets weights n logits.1", "dlogits", in_place="dlogits logits"),
    "global_norm": Op("grads grads.0"),
    "sgd": Op("params grads m grads.0 lr momentum scale", updates="params grads m"),
    "adamw": Op(
        "params grads m v grads.0 lr beta1 beta2 rest1 rest2 eps weight_decay scale",
        updates="params grads m v",
        name="adam",
    ),
}


@cache
def arguments(op: str) -> tuple[str, ...]:
    """The names of an op's arguments, in the reference's order."""
    return tuple(inspect.signature(getattr(reference, op)).parameters)
