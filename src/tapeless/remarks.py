"""What training says of its data before it begins: what is held out, truncated, or left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tapeless.data.documents import Corpus
from tapeless.data.given import FROM_PYTHON
from tapeless.data.sources import Data
from tapeless.errors import argument
from tapeless.presets import FINETUNING
from tapeless.settings import Training

MANY = 0.25  # of the documents truncated: perhaps their lines are no documents


def remarks(data: Data, training: Training, about: Mapping[str, Any], longest: int) -> list[str]:
    """Return a line for each thing that a user may not expect; `about` is what config.json says."""
    lines: list[str] = []
    train, pretrained = data.train, about["pretrained"] is not None
    if not isinstance(train, Corpus):
        return lines
    if pretrained and about["val"] is None and training.val_fraction == FINETUNING.val_fraction:
        if data.val is None:
            lines.append("The text is too short to hold out a part of it for validation.")
        else:
            share = f"{training.val_fraction:.0%} of the text"
            none = argument("set", {"val_fraction": 0})
            lines.append(f"{share} is held out for validation; {none} trains on all of it.")
    if data.lines and train.spans is not None and train.n_cut:
        were = "was" if train.n_cut == 1 else "were"
        what = "truncated" if training.order == "shuffle" else "left out"
        lines.append(
            f"{train.n_cut:,} of {len(train.spans):,} documents {were} longer than the context of {longest} "
            f"tokens and {were} {what}; raise {argument('block_size')}."
        )
        if train.n_cut > MANY * len(train.spans) and not pretrained and about["data"] != FROM_PYTHON:
            lines.append(
                "Each line is a document. If the file is one long text, use "
                f"{argument('preset', 'shakespeare-char')}."
            )
    if train.n_dropped:
        lines.append(
            f"{train.n_dropped:,} characters were dropped: {about['preset']}'s tokenizer has a to z only."
        )
    return lines
