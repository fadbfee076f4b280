"""What to train: from what a user asks, or from a saved run, to a `Job` that is ready to begin."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from tapeless import hub
from tapeless.config import COMPUTED, GPTConfig, from_saved, whole
from tapeless.data.documents import BUILT_IN
from tapeless.data.given import FROM_PYTHON, Source, called
from tapeless.data.headerless import AUTO
from tapeless.data.orders import Order, make_order
from tapeless.data.shards import Shards
from tapeless.data.sources import Data, are_tokens, open_data
from tapeless.data.tokenizers import MADE, CharTokenizer, Tokenizer
from tapeless.ends import Ends
from tapeless.engine import check_engine
from tapeless.errors import ConfigError, RunError, argument
from tapeless.init import MAX_SEED, generator
from tapeless.io import runs, saves
from tapeless.io.checkpoints import open_model, with_tokenizer
from tapeless.io.lock import NOWHERE, Lock
from tapeless.io.saves import KEEP, MAX_KEEP
from tapeless.io.tensors import Checkpoint
from tapeless.job import Job
from tapeless.memory import array_bytes, check_memory
from tapeless.model import GPT
from tapeless.presets import FINETUNING, Preset, get_preset
from tapeless.settings import LATER, MAX_STEPS, Training, home
from tapeless.team import check_threads

# What a checkpoint's architecture may differ in from a preset's: it depends on the data, or changes no
# result.
FREE = ("vocab_size", "block_size", "attention", "attention_tile", *COMPUTED, "init")
SAVED = "saved"  # the kind of a tokenizer that cannot be made again from the data: it is the run's own


class Plan(NamedTuple):
    """What to train: new, from a checkpoint, or a saved run."""

    name: str  # of the preset
    preset: Preset
    data: Source
    val: Source | None
    seed: int
    engine: str
    dtype: str | None
    threads: int | None
    tokenizer: Tokenizer | None = None  # in place of the preset's
    vocab_size: int | None = None  # the model's; its tokenizer may have fewer
    ends: Ends = Ends()  # of texts, where not the tokenizer's
    pretrained: str | None = None  # where the weights came from
    checkpoint: Checkpoint | None = None
    folder: Path | None = None  # of the saved run
    saved: Path | None = None  # where its checkpoint lies
    keep: int = KEEP  # checkpoints
    trained_positions: int = 0  # by the saved run so far
    digests: tuple[str, str | None] | None = None  # of the data it was trained and validated on
    sizes: str | None = None  # of that data, for people
    # What was changed when it was resumed: at which steps, and now, each setting's value before and after
    history: Sequence[dict[str, Any]] = ()
    changes: Mapping[str, tuple[Any, Any]] = MappingProxyType({})


def fresh(
    data: Source | None,
    val: Source | None,
    preset: str | None,
    pretrained: str | Path | None,
    settings: dict[str, Any],
    seed: int | None,
    engine: str | None,
    dtype: str | None,
    threads: int | None,
    tokenizer: Tokenizer | None = None,
) -> Plan:
    """A new run. With `pretrained` its model comes from there, and it is trained as `FINETUNING` says;
    a `block_size` in the settings is then the length of what it is trained on.

    Raises `ConfigError` for settings that cannot be used, or that a checkpoint contradicts, and
    `RunError` for a checkpoint that cannot be read.
    """
    name = ("gpt2" if pretrained is not None else "microgpt") if preset is None else preset
    chosen, checkpoint = get_preset(name), None
    data = "names" if data is None else data
    tokens = isinstance(data, np.ndarray) or are_tokens(data, settings.get("token_dtype", AUTO))
    if pretrained is not None:
        checkpoint = with_tokenizer(open_model(pretrained))
        if tokenizer is not None:
            if checkpoint.tokenizer is not None:
                raise ConfigError(f"{checkpoint.path} has its own tokenizer: leave tokenizer out.")
            checkpoint = dataclasses.replace(checkpoint, tokenizer=tokenizer)
        chosen, settings = _finetuning(chosen if preset else None, checkpoint, settings)
        if tokens or val is not None:
            settings.setdefault("val_fraction", 0.0)
    if "order" not in settings and chosen.training.of_documents and tokens:
        settings = settings | {"order": "sequence"}
    chosen = chosen.with_settings(settings)
    seed, engine = 42 if seed is None else seed, "cpu" if engine is None else engine
    plan = Plan(name, chosen, data, val, seed, engine, dtype, threads, tokenizer, settings.get("vocab_size"))
    if checkpoint is None:
        return plan
    vocab_size, path = checkpoint.config.vocab, str(checkpoint.path)
    ends = checkpoint.ends.within(vocab_size)
    return plan._replace(vocab_size=vocab_size, ends=ends, pretrained=path, checkpoint=checkpoint)


def _finetuning(
    preset: Preset | None, checkpoint: Checkpoint, settings: dict[str, Any]
) -> tuple[Preset, dict[str, Any]]:
    """The checkpoint as a preset, and the settings that are left to change in it."""
    model = checkpoint.config
    settings = _with_window(settings, model, checkpoint.path)
    architecture = {name: value for name, value in settings.items() if home(name) is GPTConfig}
    training = {name: value for name, value in settings.items() if name not in architecture}
    wanted = model
    if preset is not None:
        wanted = preset.model.replace(**{name: getattr(model, name) for name in FREE})
    if difference := _difference(model, wanted.replace(**architecture)):
        raise ConfigError(
            f"{checkpoint.path} is another model: {difference}. Leave out what it settles itself."
        )
    model = model.replace(**{name: architecture[name] for name in COMPUTED if name in architecture})
    tokenizer = checkpoint.tokenizer
    lines = isinstance(tokenizer, CharTokenizer) and tokenizer.bos is not None
    defaults = dataclasses.replace(FINETUNING, order="shuffle" if lines else FINETUNING.order)
    return Preset(str(checkpoint.path), model, defaults, SAVED), training


def _with_window(settings: dict[str, Any], model: GPTConfig, source: str | Path) -> dict[str, Any]:
    """The settings with `block_size` as the length of what a model from elsewhere is trained on."""
    settings = dict(settings)
    if (block := settings.pop("block_size", None)) is not None:
        if whole("block_size", block, 1, 2**40) > model.block_size:
            raise ConfigError(
                f"block_size must be at most {model.block_size}, the context of {source}, not {block}."
            )
        settings.setdefault("window", block)
    return settings


def resumed(
    folder: Path,
    place: Path,
    data: Source | None,
    val: Source | None,
    preset: str | None,
    pretrained: str | Path | None,
    settings: dict[str, Any],
    seed: int | None,
    engine: str | None,
    dtype: str | None,
    threads: int | None,
) -> Plan:
    """The run of `folder` as it was saved in `place`, with what is given changed.

    Raises `RunError` where there is none, or it was started with something else that cannot change.
    """
    config, saved = runs.read_config(place)
    try:
        whole("seed", saved["seed"], 0, MAX_SEED)
        strings = [saved[k] for k in ("preset", "tokenizer", "data", "engine", "digest")]
        strings += [saved[k] for k in ("val", "val_digest", "pretrained") if saved[k] is not None]
        if not all(isinstance(value, str) for value in strings):
            raise TypeError
        for was, now in ((saved["data"], data), (saved["val"], val)):
            if was == FROM_PYTHON and now is None:
                raise RunError(
                    f"{folder} was trained on data given in Python, which a run does not keep: give it again."
                )
        if threads is None and engine in (None, saved["engine"]):
            threads = check_threads(saved["engine"], saved.get("threads"))
        plan = Plan(
            saved["preset"],
            Preset(
                saved["preset"], config, from_saved(Training, saved["training"], LATER), saved["tokenizer"]
            ),
            saved["data"] if data is None else data,
            saved["val"] if val is None else val,
            saved["seed"],
            saved["engine"] if engine is None else engine,
            saved["dtype"] if engine is None and dtype is None else dtype,
            threads,
            # A tokenizer made again of other data may have more tokens: the data are then refused.
            vocab_size=config.vocab if saved["tokenizer"] == SAVED else None,
            ends=runs.ends_of(place / runs.CONFIG, saved).within(config.vocab),
            pretrained=saved["pretrained"],
            folder=folder,
            saved=place,
            keep=whole("keep", saved.get("keep", KEEP), 1, MAX_KEEP),
            trained_positions=runs.trained_positions(place, config, saved) or 0,
            digests=(saved["digest"], saved["val_digest"]),
            sizes=str(saved["sizes"]) if "sizes" in saved else None,
            history=list(saved.get("changes", ())),
        )
        before = dataclasses.asdict(plan.preset.training) | {
            name: saved.get(name) for name in ("engine", "dtype", "threads")
        }
    except (KeyError, TypeError, ConfigError) as error:
        reason = f"{error} is missing." if isinstance(error, KeyError) else str(error)
        raise RunError(
            f"{place / runs.CONFIG} does not describe a training run, so it cannot be resumed: {reason}"
        ) from None
    for what, first, given in (("preset", plan.name, preset), ("seed", plan.seed, seed)):
        if given is not None and given != first:
            raise RunError(f"{folder} was started with {what} {first}, not {given}.")
    if pretrained is not None and not _came_from(plan.pretrained, pretrained):
        was = plan.pretrained or "new weights"
        raise RunError(f"{folder} was started from {was}, not from {pretrained}.")
    if plan.pretrained is not None:
        settings = _with_window(settings, config, folder)
    plan = plan._replace(preset=plan.preset.with_settings(settings))
    if difference := _difference(config, plan.preset.model):
        raise RunError(f"{folder} has another model: {difference}. Resume without changing it.")
    after = dataclasses.asdict(plan.preset.training) | {
        name: value for name in ("engine", "dtype", "threads") if (value := getattr(plan, name)) is not None
    }
    # Other orders count in other things, and sgd keeps other moments.
    for name, kind in (("order", str), ("optimiser", lambda optimiser: optimiser == "sgd")):
        if kind(before[name]) != kind(after[name]):
            now = after[name]
            raise RunError(f"{folder} was trained with {name}={before[name]}: it cannot go on with {now}.")
    changes = {name: (before[name], value) for name, value in after.items() if value != before[name]}
    return plan._replace(changes=changes)


def _came_from(path: str | None, source: str | Path) -> bool:
    """Whether `source`, a path or a name on the hub, is the model at `path`; None is no model."""
    if path is None:
        return False
    return Path(path).resolve() == Path(source).resolve() or hub.is_copy(Path(path), str(source))


def _difference(old: GPTConfig, new: GPTConfig) -> str:
    pairs = zip(old.to_dict().items(), new.to_dict().values(), strict=True)
    return ", ".join(
        f"{name} {a!r} is not {b!r}" for (name, a), b in pairs if a != b and name not in COMPUTED
    )


def prepare(plan: Plan, lock: Lock = NOWHERE, log_every: int = 1, overwrite: bool = False) -> Job:
    """Read the data and build the model; everything that can be refused is refused here."""
    chosen, training = plan.preset, plan.preset.training
    check_engine(plan.engine, plan.dtype)
    check_threads(plan.engine, plan.threads)
    longest = _longest(chosen.model, training)
    batches = training.batches(longest)
    sources = [source for source in (plan.data, plan.val) if source is not None]
    if training.token_dtype != AUTO and not any(are_tokens(each, training.token_dtype) for each in sources):
        raise ConfigError(f"token_dtype applies to token files only; {called(plan.data)} is not one.")
    data = _read(plan)
    if training.eval_every and data.val is None:
        raise ConfigError(
            f"eval_every={training.eval_every} needs data to validate on: NAME_val.bin beside "
            f"NAME_train.bin, {argument('val')}, or {argument('set', {'val_fraction': 0.1})} to hold out a "
            "part of a text."
        )
    config = chosen.model
    if plan.saved is None:
        config = config.replace(vocab_size=data.vocab_size)
    else:
        runs.check_state_size(plan.saved, config)
    val_digest = None if data.val is None else data.val.digest
    if plan.digests is not None:
        for source, now, was in (
            (plan.data, data.train.digest, plan.digests[0]),
            (plan.data if plan.val is None else plan.val, val_digest, plan.digests[1]),
        ):
            if now != was:
                size = f" ({plan.sizes})" if plan.sizes else ""
                raise RunError(
                    f"{called(source)} is not the data that {plan.folder} was trained on{size}: it has "
                    f"{data.sizes()}, and the checksum {_short(now)} where that had {_short(was)}."
                )

    rng = generator(config, plan.seed)
    order = make_order(training.order, data.train, rng, training.batch_size, longest)
    # What is trained on may be shorter than the model's block; positions beyond it take no activations.
    check_memory(
        config, plan.engine, plan.dtype, training, plan.threads, longest, **data_memory(data, order)
    )  # fmt: skip
    weights = rng if plan.checkpoint is None else None
    model = GPT(
        config, weights, plan.engine, dtype=plan.dtype, threads=plan.threads, tokenizer=data.tokenizer
    )
    # Training teaches that a document ends with the token between documents.
    model.ends = plan.ends.also(data.tokenizer.bos if data.tokenizer else None)
    if plan.checkpoint is not None:
        plan.checkpoint.read_into(model.params)
    model.trained_positions = max(plan.trained_positions, order.longest)
    tokens = isinstance(plan.data, np.ndarray) or are_tokens(plan.data, training.token_dtype)
    made = chosen.tokenizer in MADE and plan.tokenizer is None and not tokens
    about = {
        "preset": plan.name,
        "tokenizer": chosen.tokenizer if made else SAVED,
        "training": dataclasses.asdict(training),
        "pretrained": plan.pretrained,
        "data": _resolved(plan.data),
        "val": None if plan.val is None else _resolved(plan.val),
        "sizes": data.sizes(),
        "digest": data.train.digest,
        "val_digest": val_digest,
        "seed": plan.seed,
        "engine": plan.engine,
        "dtype": str(model.engine.dtype),
        "threads": model.engine.team(training.batch_size),
        "keep": plan.keep,
        "trained_positions": model.trained_positions,
        "changes": list(plan.history),
    }
    job = Job(model, training, data, order, batches, longest, rng, about, lock, log_every, overwrite)
    if plan.saved is not None:
        job.restore(plan.saved)
        job.change(plan.changes)
    return job


def data_memory(data: Data, order: Order) -> dict[str, Any]:
    """What `training_memory` counts of the data."""
    parts = [part for part in (data.train, data.val) if part is not None]
    spans = None if data.val is None else data.val.spans
    return {
        "held": array_bytes(*parts, order),
        "reads": isinstance(data.train, Shards),
        "scored": 0 if data.val is None else len(data.val.pieces) if spans is None else len(spans),
    }


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]


def _longest(config: GPTConfig, training: Training) -> int:
    """The longest document or window that is trained on."""
    if training.window > config.block_size:
        raise ConfigError(
            f"window must be at most the model's block_size, {config.block_size}, not {training.window}."
        )
    return training.window or config.block_size


def _read(plan: Plan) -> Data:
    chosen, training = plan.preset, plan.preset.training
    tokenizer: Any = chosen.tokenizer
    if plan.tokenizer is not None:
        tokenizer = plan.tokenizer
    elif tokenizer == SAVED and plan.checkpoint is not None:
        tokenizer = plan.checkpoint.tokenizer
    elif tokenizer == SAVED and plan.saved is not None:
        tokenizer = runs.read_tokenizer(plan.saved, runs.tokens_of(*runs.read_config(plan.saved)))
    longest = _longest(chosen.model, training)
    by_default = plan.pretrained is not None and training.val_fraction == FINETUNING.val_fraction
    windows = {"windows": 1, "sequence": training.batch_size, "llmc": training.batch_size}
    least = 1 + longest * windows.get(training.order, 0)
    if plan.digests is not None:  # a saved run goes on as it began, whatever its batches are now
        least = MAX_STEPS if plan.digests[1] is None else 0
    return open_data(
        plan.data,
        plan.val,
        tokenizer,
        plan.vocab_size,
        longest,
        lines=training.of_documents,
        val_fraction=training.val_fraction,
        token_dtype=training.token_dtype,
        least=least if by_default else None,
        usual_vocab=chosen.model.vocab_size,
        owner=plan.folder or plan.pretrained or "the model",
    )


def held_out(folder: Path) -> Data:
    """The data of a saved run; its `val` is what it is validated on. Raises `RunError` if there is none."""
    place = saves.newest(folder, runs.MODEL)  # as for the model itself
    data = _read(resumed(folder, place, None, None, None, None, {}, None, None, None, None))
    if data.val is None:
        raise RunError(f"{folder} has no validation data: pass DATA.")
    return data


def _resolved(source: Source) -> str:
    if not isinstance(source, (str, Path)):
        return FROM_PYTHON
    return str(source) if str(source) in BUILT_IN else str(Path(source).resolve())
