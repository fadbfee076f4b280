"""Files of models by name from the Hugging Face hub, through `huggingface_hub` (the extra `hub`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tapeless.errors import RunError, install

BARE = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")  # names without an owner


def is_name(source: str) -> bool:
    """Whether this may be a model's name on the hub: one of the old bare names, or owner/name. It is not
    where a folder here is called as the owner, or where it is the folder that runs are saved in."""
    found = re.fullmatch(r"(\w[\w.-]*)/\w[\w.-]*", source)
    return source in BARE or bool(found and found[1] != "runs" and not Path(found[1]).exists())


def fetch(name: str, files: Sequence[str], missing: str, instead: str) -> Path:
    """The folder of a model's files of these names or patterns, fetched unless they are in the hub's
    cache on this machine.

    Raises `RunError` without the extra or without network; `missing` is the beginning of its message,
    `instead` what a user can give.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise RunError(
            f"{missing}; give {instead}, or to fetch it from the Hugging Face hub: {install('hub')}."
        ) from None
    try:
        # Of all its functions this one fails at once where there is no network.
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # of any library that lies below
        kind = type(error).__name__
        if kind in ("RepositoryNotFoundError", "GatedRepoError"):
            raise RunError(f"{missing}, nor a public model of this name on the Hugging Face hub.") from None
        raise RunError(
            f"{missing}, and the Hugging Face hub cannot be reached ({kind}): check the network, or give "
            f"{instead}."
        ) from None
