"""A model from one format to another: what `tapeless convert` does."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

from tapeless import files
from tapeless.data.bpe import BPETokenizer
from tapeless.data.table import GPT2_END, GPT2_TOKENS, TableTokenizer
from tapeless.data.tokenizers import find_tokenizer
from tapeless.errors import ConfigError, RunError, argument, did_you_mean
from tapeless.io import gguf, gpt2, huggingface, llmc, runs
from tapeless.io.checkpoints import open_model, with_tokenizer
from tapeless.io.tensors import Checkpoint
from tapeless.layout import n_params

FOLDERS = {"hf": "a Hugging Face folder", "run": "a run folder"}
FILES = {".bin": "an llm.c file", ".gguf": "a GGUF file"}
NO_FORMAT = (".safetensors", ".pt", ".pth", ".h5", ".npz", ".onnx", ".json")  # of no DST
MODEL_FILES = (*runs.FILES, huggingface.INDEX, *huggingface.TOKENIZER_FILES)


def convert(
    source: str | Path,
    target: Path,
    to: str | None = None,
    dtype: str = "f32",
    overwrite: bool = False,
    say: Callable[[str], object] = lambda line: None,
) -> None:
    """Write the model at `source` to `target`, in the format of its name: `.bin`, `.gguf`, or a folder,
    which is Hugging Face's or, with `to="run"`, a run's. `dtype` is "f32" or "bf16"; `say` is told what
    is done. Raises `ConfigError`, or `RunError` where `source` is no whole
    model or `target` is in the way or cannot be written; then nothing is changed.
    """
    if dtype not in llmc.DTYPES:
        raise ConfigError(f"dtype cannot be {dtype!r}.{did_you_mean(dtype, llmc.DTYPES)}")
    if to not in (None, *FOLDERS):
        raise ConfigError(f"to cannot be {to!r}.{did_you_mean(to, FOLDERS)}")
    suffix = target.suffix.lower()
    if suffix in NO_FORMAT:
        raise ConfigError(f"{target} cannot be written: give a .bin or .gguf file, or a folder.")
    if suffix in FILES and to is not None:
        raise ConfigError(f"to={to} is the format of a folder, but {target} is to be {FILES[suffix]}.")
    if to == "run" and dtype != "f32":
        raise ConfigError("a run folder keeps its weights in float32: leave dtype out.")
    refuse(target, suffix not in FILES, overwrite)

    model = open_model(source)
    say(f"{model.path}: {model.format}, {', '.join(model.dtypes)}, {n_params(model.config):,} parameters")
    format, numbers = FILES.get(suffix) or FOLDERS[to or "hf"], llmc.DTYPES[dtype][1]
    _tell_of_ends(model, format, say)
    if suffix != ".bin":
        model = with_tokenizer(model)
        if to != "run" and isinstance(model.tokenizer, TableTokenizer) and model.tokenizer.merges is not None:
            model = dataclasses.replace(model, tokenizer=model.tokenizer.bpe)
    elif find_tokenizer(model.folder) and model.folder.resolve() != target.parent.resolve():
        say(f"An llm.c file holds no tokenizer: that in {model.folder} stays there.")
    if "float64" in model.dtypes:
        say(f"Its numbers of float64 are rounded to {numbers.name}.")
    if to == "run":
        _write_folder(target, lambda folder: runs.write_model(folder, model))
    else:
        whole = gpt2.as_gpt2(model, format)
        if len(whole.tensors) > len(model.tensors):
            say(f"It has no biases: {format} gets biases of zero.")
        if suffix == ".bin":
            llmc.write_model(target, whole, dtype)
        elif suffix == ".gguf":
            gguf.write_model(target, whole, numbers, say)
        else:
            if not isinstance(model.tokenizer, BPETokenizer | None):
                say(f"The tokenizer of {model.path} is no BPE, so {format} has no place for it.")
            _write_folder(target, lambda folder: huggingface.write_model(folder, whole, numbers))
    say(f"Saved in {target}, {format} of {numbers.name}.")


def _tell_of_ends(model: Checkpoint, format: str, say: Callable[[str], object]) -> None:
    """Say which tokens that begin or end a text cannot come along."""
    V = model.config.vocab
    within = model.ends.within(V)
    if within != model.ends and format != FOLDERS["hf"]:
        names = [f"{name} {value}" for name, value in model.ends.to_dict().items()]
        say(f"Tokens beyond the {V:,} of {model.path} begin or end no text: of {', '.join(names)}, left out.")
    usual = V == GPT2_TOKENS and {*(within.bos or ()), *(within.eos or ())} <= {GPT2_END}
    names = [f"{name} {value}" for name, value in within.to_dict().items() if value is not None]
    if format == FILES[".bin"] and names and not usual:
        say(f"An llm.c file does not name the tokens that begin and end a text: {', '.join(names)} left out.")


def refuse(target: Path, folder: bool, overwrite: bool) -> None:
    """Raise `RunError` if a file, or a `folder`, must not be written there."""
    if folder:
        there = [target / name for name in MODEL_FILES if (target / name).exists()]
        if target.exists() and not target.is_dir():
            raise RunError(f"{target} is a file; expected a folder for the model, or a .bin or .gguf file.")
    else:
        there = [target] if target.exists() else []
        if target.is_dir():
            raise RunError(f"{target} is a folder; expected the name of a file.")
    if there and not overwrite:
        raise RunError(
            f"{there[0]} already exists: replace it with {argument('overwrite', True)}, or choose another "
            "name."
        )


def _write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder aside, then put its files in the place of the model that may be there."""
    folder = target.resolve()
    aside = folder.with_name(f".{folder.name}.part")
    with runs.writing(target):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            write(aside)
            folder.mkdir(exist_ok=True)
            new = {path.name for path in aside.iterdir()}
            for name in new:
                files.replace(aside / name, folder / name)
            files.flush_folder(folder)
            old = [folder / name for name in MODEL_FILES if name not in new]
            runs.remove([*old, *folder.glob("model-*-of-*.safetensors")])
            runs.remove_checkpoints(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
