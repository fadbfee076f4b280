"""Models of every format, recognised by what their files hold: `open_model`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tapeless import hub
from tapeless.data import shards
from tapeless.data.tokenizers import find_tokenizer, is_padded, read_tokenizer
from tapeless.errors import RunError
from tapeless.io import folders, huggingface, llmc, runs, saves
from tapeless.io.tensors import Checkpoint

READ = "a run folder, a Hugging Face folder of GPT-2, or a model file of llm.c"
OTHERS = {  # the first four bytes of files that are something else
    llmc.STATE: "is a debug state of llm.c: compare a model with it by tapeless check --state",
    **dict.fromkeys(shards.FORMATS, "holds tokens"),
    int.from_bytes(b"GGUF", "little"): "is a GGUF file, which tapeless can only write",
    int.from_bytes(b"PK\3\4", "little"): "is a file of PyTorch's: save the model as safetensors",
}


def open_model(source: str | Path) -> Checkpoint:
    """The model that lies at `source`: a run folder, a Hugging Face folder, a model file of llm.c, or
    else a name on the Hugging Face hub ("gpt2", "owner/name").

    Raises `RunError` where there is none, two, or a damaged one.
    """
    path = Path(source)
    if path.is_dir():
        return _open_folder(path)
    if path.exists():
        return _open_file(path)
    if hub.is_name(str(source)):
        missing, instead = f"there is no file or folder {str(source)!r}", "the folder of a model"
        return huggingface.open_model(hub.fetch(str(source), huggingface.FILES, missing, instead))
    raise RunError(f"no run folder or model {str(source)!r}.")


def with_tokenizer(model: Checkpoint) -> Checkpoint:
    """The model with the tokenizer that lies in its folder, or beside its file and fits.

    A tokenizer fits if it has no more tokens than the model has rows: vocabularies are padded. What lies
    beside a file fits only if that is all that can differ.

    Raises `DataError` for a damaged one, `RunError` if it is the model's and does not fit.
    """
    path = find_tokenizer(model.folder)
    if model.tokenizer is not None or path is None:
        return model
    tokenizer, rows = read_tokenizer(path), model.config.vocab
    if tokenizer.vocab_size <= rows if model.own_folder else is_padded(rows, tokenizer.vocab_size):
        return dataclasses.replace(model, tokenizer=tokenizer)
    if not model.own_folder:
        return model
    raise RunError(
        f"{path} has {tokenizer.vocab_size:,} tokens but the model of {model.path} has "
        f"{model.config.vocab:,}: they do not belong together."
    )


def _open_folder(folder: Path) -> Checkpoint:
    folders.await_settled(folder)
    config = folder / runs.CONFIG
    files = [path for path in sorted(folder.glob("*.bin")) if _is_llmc(path)]
    if runs.saved(folder) and not files:
        return saves.open_model(folder)
    if config.exists():
        about = runs.read_json(config)
        keys = about.keys() if isinstance(about, dict) else set()
        if not {"tapeless", "model_type", "architectures"} & keys:
            raise RunError(f"{config} is damaged: it describes neither a run nor GPT-2.")
        if files:
            raise RunError(
                f"{folder} holds two models, that of {runs.CONFIG} and {files[0].name}: "
                "move one of them away."
            )
        return saves.open_model(folder) if "tapeless" in keys else huggingface.open_model(folder)
    if len(files) == 1:
        return llmc.open_model(files[0])
    if files:
        raise RunError(f"{folder} holds {len(files)} models: name one of them, e.g. {files[0]}.")
    raise RunError(
        f"{folder} has no {runs.CONFIG}, nor a model file of llm.c: it is not a run folder or model."
    )


def _is_llmc(path: Path) -> bool:
    return path.is_file() and llmc.magic(path) == llmc.MODEL


def _open_file(path: Path) -> Checkpoint:
    if path.suffix == ".safetensors":
        raise RunError(f"{path} is only a part of a model: give its folder, {path.parent}.")
    if not path.is_file():
        raise RunError(f"{path} is no file; expected {READ}.")
    if not path.stat().st_size:
        raise RunError(f"{path} is empty; expected {READ}.")
    magic = llmc.magic(path)
    if magic == llmc.MODEL:
        return llmc.open_model(path)
    if magic in OTHERS:
        raise RunError(f"{path} {OTHERS[magic]}; expected {READ}.")
    raise RunError(f"{path} is no model: it begins with {magic}; expected {READ}.")
