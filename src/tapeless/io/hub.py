"""Models by name from the Hugging Face hub, through `huggingface_hub` (the extra `hub`)."""

from __future__ import annotations

import re
from pathlib import Path

from tapeless.errors import RunError
from tapeless.io.huggingface import CONFIG, INDEX, MODEL, TOKENIZER_FILES

BARE = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")  # names without an owner


def is_name(source: str) -> bool:
    """Whether this may be a model's name on the hub: one of the old bare names, or owner/name. It is not
    where a folder here is called as the owner, or where it is the folder that runs are saved in."""
    found = re.fullmatch(r"(\w[\w.-]*)/\w[\w.-]*", source)
    return source in BARE or bool(found and found[1] != "runs" and not Path(found[1]).exists())


def fetch(name: str) -> Path:
    """The folder of a model's files, fetched unless they are in the hub's cache on this machine.

    Raises `RunError` without the extra or without network.
    """
    here = f"there is no file or folder {name!r}"
    try:
        import huggingface_hub
    except ImportError:
        raise RunError(
            f"{here}; to fetch it from the Hugging Face hub: pip install 'tapeless[hub]'."
        ) from None
    patterns = [CONFIG, MODEL, INDEX, "model-*-of-*.safetensors", *TOKENIZER_FILES]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # of any library that lies below
        kind = type(error).__name__
        if kind in ("RepositoryNotFoundError", "GatedRepoError"):
            raise RunError(f"{here}, nor a public model of this name on the Hugging Face hub.") from None
        raise RunError(
            f"{here}, and the Hugging Face hub cannot be reached ({kind}): check the network, or give the "
            "folder of a model fetched elsewhere."
        ) from None
