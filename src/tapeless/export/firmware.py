"""What is exported: a model, its numbers and its data, from a preset or a trained model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tapeless import plan
from tapeless.config import GPTConfig, from_saved, whole
from tapeless.data.given import source_of
from tapeless.data.tokenizers import Numbers, Tokenizer
from tapeless.errors import ConfigError, RunError, argument, did_you_mean
from tapeless.export.trace import Trace, record
from tapeless.init import generator, generator_name
from tapeless.io import runs
from tapeless.job import Job
from tapeless.layout import n_params
from tapeless.model import GPT, load
from tapeless.presets import FINETUNING, Preset, presets
from tapeless.settings import LATER, Training

MODES = ("train", "generate", "both")
MAX_COUNT = 2**31 - 1
NO_BOS = "chips train on documents, each behind a BOS, and this model has no tokenizer with one."


@dataclass(frozen=True)
class Documents:
    """What is trained on: documents in the order that they are taken in, each with its BOS, those that are
    longer than the block cut behind what still counts."""

    stream: np.ndarray  # the documents, and a last BOS
    starts: np.ndarray  # where each begins


@dataclass(frozen=True)
class Firmware:
    """A model that becomes a C program. `weights` [P] in float32 are those it begins with, or None where it
    draws them itself as training on this machine does."""

    title: str
    config: GPTConfig
    training: Training
    tokenizer: Tokenizer | Numbers
    start: int  # the token that texts begin after
    eos: tuple[int, ...]  # tokens that end a text
    seed: int
    trains: bool
    generates: bool
    weights: np.ndarray | None
    documents: Documents | None
    random: str
    random_state: np.ndarray | None  # of NumPy's generator, once weights and order are drawn
    trace: Trace

    @property
    def size(self) -> int:
        """Number of parameters."""
        return n_params(self.config)

    @property
    def shuffle_draws(self) -> bool:
        """Whether the order of documents took random numbers before the weights did."""
        return self.training.order == "shuffle" and self.random != "numpy"


def prepare(
    source: str, mode: str | None, data: str | Path | None, settings: dict[str, Any], seed: int | None
) -> Firmware:
    """What is to be exported from `source`, a preset or a model.

    A preset is trained from its beginning, on `data` (the built-in names); a model generates, and with
    mode "train" or "both" is trained further as `train --pretrained` does it.

    Raises `ConfigError` for what cannot be exported, and `RunError` or `DataError` where something cannot
    be read.
    """
    if mode is not None and mode not in MODES:
        raise ConfigError(f"mode cannot be {mode!r}.{did_you_mean(mode, MODES)}")
    new = source in presets
    mode = mode or ("both" if new else "generate")
    seed = whole("seed", 42 if seed is None else seed, 0, 2**32 - 1)
    if mode == "generate":
        if new:
            raise ConfigError(f"{source} is a preset: mode=generate needs a trained model. Export a run.")
        if data is not None:
            raise ConfigError("mode=generate reads no data: leave it out.")
        return _generating(source, settings, seed)
    if not new and data is None:
        data = data_of(source)
    what = _plan(source, data, settings, seed)
    training = what.preset.training
    if training.watches:
        raise ConfigError("bad_steps=skip and spike have no C version yet: leave them out.")
    _record(what.preset)  # refuses what has no C version, before anything is read
    if what.checkpoint is not None and (
        what.checkpoint.tokenizer is None or what.checkpoint.tokenizer.bos is None
    ):
        raise ConfigError(NO_BOS)
    if not training.of_documents:
        raise ConfigError(f"chips train on documents, not on order={training.order}: set order=shuffle.")
    job = plan.prepare(what)
    tokenizer, config = job.model.tokenizer, _on_chip(job.model.config)
    if tokenizer is None or tokenizer.bos is None:
        raise ConfigError(NO_BOS)
    random = generator_name(config)
    if training.order == "draw" and random == "numpy":
        raise ConfigError("order=draw needs another random generator than NumPy's: set order=shuffle.")
    documents = _documents(job)
    if training.steps * training.batch_size + len(documents.starts) >= MAX_COUNT:
        raise ConfigError(
            f"steps × batch_size must be below {MAX_COUNT:,} on a chip, not {training.steps:,} × "
            f"{training.batch_size:,}."
        )
    drawn = new and random != "numpy"
    return Firmware(
        title=_title(source),
        config=config,
        training=training,
        tokenizer=tokenizer,
        start=_start(job.model),
        eos=job.model.eos_token_id,
        seed=seed,
        trains=True,
        generates=mode == "both",
        weights=None if drawn else _finite(job.model.engine.params, source),
        documents=documents,
        random=random,
        random_state=job.rng.state()["words"] if random == "numpy" else None,
        trace=record(config, training),
    )


def _generating(source: str, settings: dict[str, Any], seed: int) -> Firmware:
    model = load(source, "reference", dtype="float32")
    training = training_of(source)
    given = {name: settings[name] for name in settings if name in ("temperature", "max_tokens", "samples")}
    if other := sorted(settings.keys() - given.keys()):
        raise ConfigError(f"{other[0]} cannot be changed in a trained model.")
    config = _on_chip(model.config)
    random = generator_name(config)
    return Firmware(
        title=_title(source),
        config=config,
        training=dataclasses.replace(training, **given),
        tokenizer=model.tokenizer or Numbers(config.vocab),
        start=_start(model),
        eos=model.eos_token_id,
        seed=seed,
        trains=False,
        generates=True,
        weights=_finite(model.engine.params, source),
        documents=None,
        random=random,
        # Texts are drawn as `tapeless sample` draws them.
        random_state=generator(config, seed).state()["words"] if random == "numpy" else None,
        trace=record(config, training),
    )


def _start(model: GPT) -> int:
    """The token that texts begin after, as in `tapeless.generate`."""
    tokenizer = model.tokenizer or Numbers(model.config.vocab)
    return tokenizer.start if model.bos_token_id is None else model.bos_token_id


def trace_of(source: str, settings: dict[str, Any]) -> Trace:
    """The trace of a preset, with the vocabulary of the names where it has none, or of a trained model.

    Raises `ConfigError` for ops that have no C version.
    """
    return _record(_plan(source, None, settings, None).preset)


def _record(preset: Preset) -> Trace:
    config = _on_chip(preset.model.replace(vocab_size=preset.model.vocab_size or 27))
    return record(config, preset.training)


def _plan(source: str, data: str | Path | None, settings: dict[str, Any], seed: int | None) -> plan.Plan:
    """How a preset is trained, or a trained model further."""
    preset, pretrained = (source, None) if source in presets else (None, source)
    if pretrained is not None:  # a chip does not validate
        settings = {"val_fraction": 0.0} | settings
    given = None if data is None else source_of(data)
    return plan.fresh(given, None, preset, pretrained, settings, seed, "reference", "float32", None)


def _title(source: str) -> str:
    return source if source in presets else Path(source).resolve().name


def _on_chip(config: GPTConfig) -> GPTConfig:
    """How it is computed there: products of float32."""
    return config.replace(precision="float32")


def _about(source: str) -> dict[str, Any]:
    """What a run folder says of itself; nothing for another model."""
    path = Path(source) / runs.CONFIG
    about = runs.read_json(path) if path.exists() else {}
    return about if isinstance(about, dict) else {}


def training_of(source: str) -> Training:
    """How a run was trained, and so how it generates; of another model, as it would be trained further."""
    about = _about(source)
    if "training" not in about:
        return FINETUNING
    try:
        return from_saved(Training, about["training"], LATER)
    except (TypeError, ConfigError) as error:
        raise RunError(f"{Path(source) / runs.CONFIG} does not describe a training run: {error}") from None


def data_of(source: str) -> str:
    """What a run was trained on."""
    data = _about(source).get("data")
    if not isinstance(data, str):
        raise RunError(f"{source} does not say what it was trained on: give {argument('data')}.")
    return data


def _finite(weights: np.ndarray, source: str) -> np.ndarray:
    if not np.isfinite(weights).all():
        raise RunError(f"the weights of {source} are not all finite numbers: train it again.")
    return weights


def _documents(job: Job) -> Documents:
    stream, longest = job.data.train.take(np.empty((0, 2), np.int64))[0], job.model.config.block_size + 1
    spans = job.data.train.spans
    assert spans is not None
    if job.training.order == "shuffle":
        steps = -(-len(spans) // job.training.batch_size)
        spans = job.order.take(0, steps).reshape(-1, 2)[: len(spans)]
    # A document's own end is not in its span where it was cut: it is the BOS before the next one.
    bos = np.flatnonzero(stream == stream[0])
    ends = bos[np.searchsorted(bos, spans[:, 0], side="right")]
    lengths = np.minimum(ends - spans[:, 0], longest)
    starts = np.cumsum(lengths) - lengths
    inside = np.repeat(spans[:, 0] - starts, lengths) + np.arange(lengths.sum())
    return Documents(np.append(stream[inside], stream[0]), starts)
