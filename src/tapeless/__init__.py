"""tapeless: GPT training and inference with every gradient written by hand.

    import tapeless as tl

    run = tl.train("names.txt", preset="microgpt", steps=1000)   # run.losses, run.samples, run.model
    model = tl.GPT(tl.GPTConfig(vocab_size=27), seed=0)
    loss = model.loss_and_grad(tokens, targets)                   # model.grads["wqkv"]

Names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "GPT": "tapeless.model",
    "GPTConfig": "tapeless.config",
    "Interrupted": "tapeless.train",
    "Run": "tapeless.train",
    "TapelessError": "tapeless.errors",
    "Tokenizer": "tapeless.tokenizer",
    "evaluate": "tapeless.evaluate",
    "gradcheck": "tapeless.gradcheck",
    "load": "tapeless.model",
    "presets": "tapeless.presets",
    "train": "tapeless.train",
}

__all__ = [
    "GPT",
    "GPTConfig",
    "Interrupted",
    "Run",
    "TapelessError",
    "Tokenizer",
    "evaluate",
    "gradcheck",
    "load",
    "presets",
    "train",
]

if TYPE_CHECKING:
    from tapeless.config import GPTConfig
    from tapeless.errors import TapelessError
    from tapeless.evaluate import evaluate
    from tapeless.gradcheck import gradcheck
    from tapeless.model import GPT, load
    from tapeless.presets import presets
    from tapeless.tokenizer import Tokenizer
    from tapeless.train import Interrupted, Run, train


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'tapeless' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


class _Package(ModuleType):
    """Importing a submodule puts it into the package under its name. Where a public name is the same,
    as with `train`, the public one must stay, whatever is imported first."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
