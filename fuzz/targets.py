"""What is fuzzed: one target for each reader of files, as functions of the bytes that a file holds.

A target writes the bytes where the reader looks for them, and calls it as tapeless does. It may succeed, or
raise one of `tapeless.errors` with one short line of printable text; anything else is a fault: another
exception, an allocation beyond `MEMORY`, an input that takes longer than `SECONDS`.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tapeless import plan
from tapeless.data.documents import Corpus, read_documents
from tapeless.data.shards import Shards
from tapeless.data.table import MAGIC as TABLE
from tapeless.data.tokenizers import CharTokenizer, read_tokenizer
from tapeless.errors import LONGEST, DataError, TapelessError
from tapeless.io import llmc, runs, safetensors, saves
from tapeless.io.checkpoints import open_model
from tapeless.io.lock import LOCK, Lock, Locked
from tapeless.settings import read_toml
from tapeless.train import train

GOLDEN = Path(__file__).parents[1] / "tests" / "golden_files"
MEMORY = 512  # MB of address space, beyond what the process has after reading whole files
SECONDS = 5


class Target(NamedTuple):
    """`read` takes a file's bytes and a folder; `seeds` are whole files to begin with; `kind` says how they
    are changed: "json", "safetensors", "int32", or "bytes"."""

    read: Callable[[bytes, Path], object]
    seeds: Callable[[Path], list[bytes]]
    kind: str = "bytes"


TARGETS: dict[str, Target] = {}


def target(seeds: Callable[[Path], list[bytes]], kind: str = "bytes") -> Callable[[Any], Any]:
    def add(read: Callable[[bytes, Path], object]) -> Any:
        TARGETS[read.__name__] = Target(read, seeds, kind)
        return read

    return add


def check(name: str, data: bytes, folder: Path) -> bool:
    """Give a target its input; whether that was a good file. Raises what is a fault."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            TARGETS[name].read(data, folder)
    except TapelessError as error:
        message = str(error)
        assert message.isprintable(), f"not one line of printable text: {message!r}"
        assert 0 < len(message) <= LONGEST + 1, f"a message of {len(message)} characters"
        return False
    return True


def place() -> Path:
    """A new folder, in memory where the system has one there."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="tapeless-fuzz-", dir=memory if memory.is_dir() else None))


def limit_memory() -> None:
    """Let this process have no more than `MEMORY` from now on: what is asked for counts, used or not."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + (MEMORY << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def golden(*names: str) -> Callable[[Path], list[bytes]]:
    return lambda folder: [(GOLDEN / name).read_bytes() for name in names]


# ---------------------------------------------------------------- runs


def _run(folder: Path, preset: str = "microgpt") -> Path:
    """A complete run, made once."""
    run = folder / f"run-{preset}"
    if not run.exists():
        (folder / "text").write_text("ab\nba\naab\n")
        train(
            folder / "text", preset, engine="reference", dtype="float32", steps=3, samples=0, out=run,
            set={"n_embd": 4, "n_head": 1, "block_size": 4}, progress=False,
        )  # fmt: skip
        shutil.rmtree(run / "checkpoints")  # what lies at the top is read where there is none
    return run


def _of_run(name: str, *presets: str) -> Callable[[Path], list[bytes]]:
    return lambda folder: [(_run(folder, preset) / name).read_bytes() for preset in presets or ("microgpt",)]


def _read_model(source: Path) -> None:
    """All of a model, as `load` reads it into a buffer of its size."""
    checkpoint = open_model(source)
    for name in checkpoint.tensors:
        for _ in checkpoint.blocks(name):
            pass


def _changed(
    folder: Path, name: str, data: bytes, read: Callable[[Path], object], preset: str = "microgpt"
) -> None:
    """Read the run with another file of this name; then it has its own again."""
    path = _run(folder, preset) / name
    before = path.read_bytes()
    try:
        path.write_bytes(data)
        read(path.parent)
    finally:
        path.write_bytes(before)


@target(_of_run("config.json"), "json")
def run_config(data: bytes, folder: Path) -> None:
    def read(run: Path) -> None:
        _read_model(run)
        plan.resumed(run, run, None, None, None, None, {}, None, None, None, None)

    _changed(folder, "config.json", data, read)


@target(_of_run("tokenizer.json"), "json")
def run_tokenizer(data: bytes, folder: Path) -> None:
    _changed(folder, "tokenizer.json", data, lambda run: runs.read_tokenizer(run, 3))


@target(_of_run("model.safetensors"), "safetensors")
def run_model(data: bytes, folder: Path) -> None:
    _changed(folder, "model.safetensors", data, _read_model)


GENERATORS = ("microgpt", "esp32gpt", "transformerlm")  # a preset of each kind of random numbers


@target(_of_run("state.safetensors", *GENERATORS), "safetensors")
def run_state(data: bytes, folder: Path) -> None:
    # Which one follows from the length, so that changed numbers alone stay with their generator.
    preset = next((p for p in GENERATORS if len(data) == _state_size(folder, p)), GENERATORS[len(data) % 3])
    _changed(folder, "state.safetensors", data, lambda run: _job(run).restore(run), preset)


@cache
def _state_size(folder: Path, preset: str) -> int:
    return (_run(folder, preset) / "state.safetensors").stat().st_size


@cache
def _job(run: Path) -> Any:
    """The run as it is resumed, before its state is read."""
    what = plan.resumed(run, run, None, None, None, None, {"steps": 9}, None, None, None, None)
    return plan.prepare(what._replace(saved=None), Lock(run))


@target(lambda folder: [b'{"step": 1, "loss": 1.5, "lr": 0.1}\n{"step": 2, "loss": 1.25, "lr": 0.1}\n'])
def run_metrics(data: bytes, folder: Path) -> None:
    path = folder / "metrics.jsonl"
    path.write_bytes(data)
    runs.cut_log(path, 1)


def _manifest(folder: Path) -> list[bytes]:
    about = {"bytes": 2, "sha256": sha256(b"{}").hexdigest()}
    return [json.dumps({"step": 1, "files": {"config.json": about}, "logs": {}}).encode()]


@target(lambda folder: [b"process 4711 on host"])
def run_lock(data: bytes, folder: Path) -> None:
    run = folder / "locked"
    run.mkdir(exist_ok=True)
    with Lock(run):
        (run / LOCK).write_bytes(data)
        with suppress(Locked):
            Lock(run).take()
            raise AssertionError("two have the lock")


@target(_manifest, "json")
def run_manifest(data: bytes, folder: Path) -> None:
    place = folder / "kept" / "checkpoints" / "0001-step-1"
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text("{}")
    (place / "manifest.json").write_bytes(data)
    saves.damage(place, ("config.json",))
    saves.logged(place)
    saves.newest(folder / "kept", "config.json")


# ---------------------------------------------------------------- models and states of others


@target(golden("llmc_v1.bin", "llmc_v3.bin", "llmc_v5.bin"), "int32")
def llmc_model(data: bytes, folder: Path) -> None:
    (folder / "model.bin").write_bytes(data)
    _read_model(folder / "model.bin")


@target(golden("llmc_state.bin", "llmc_state_v1.bin"), "int32")
def llmc_state(data: bytes, folder: Path) -> None:
    (folder / "state.bin").write_bytes(data)
    config = llmc.open_model(GOLDEN / "llmc_v3.bin").config
    state = llmc.open_state(folder / "state.bin", config)
    for name in state.grads.tensors:
        for part in state.grads.tensors[name]:
            for _ in part.blocks():
                pass


@target(golden("huggingface/config.json"), "json")
def huggingface_config(data: bytes, folder: Path) -> None:
    model = folder / "hf"
    if not model.exists():
        shutil.copytree(GOLDEN / "huggingface", model)
    (model / "config.json").write_bytes(data)
    _read_model(model)


@target(lambda folder: [b'{"bos_token_id": 10, "eos_token_id": [10, 3], "temperature": 0.5}'], "json")
def generation_config(data: bytes, folder: Path) -> None:
    model = folder / "hf3"
    if not model.exists():
        shutil.copytree(GOLDEN / "huggingface", model)
    (model / "generation_config.json").write_bytes(data)
    open_model(model).ends.within(11).to_dict()


@target(golden("huggingface/model.safetensors", "huggingface_bf16/model.safetensors"), "safetensors")
def huggingface_model(data: bytes, folder: Path) -> None:
    model = folder / "hf2"
    if not model.exists():
        shutil.copytree(GOLDEN / "huggingface", model)
    (model / "model.safetensors").write_bytes(data)
    _read_model(model)


def _index(folder: Path) -> list[bytes]:
    homes = {name: file.name for file in _sharded(folder) for name in safetensors.open_file(file)}
    return [json.dumps({"metadata": {"total_size": 7584}, "weight_map": homes}).encode()]


def _sharded(folder: Path) -> list[Path]:
    """The files of a model that lies in two, made once."""
    model = folder / "shards"
    files = [model / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    if not model.exists():
        model.mkdir()
        shutil.copy(GOLDEN / "huggingface" / "config.json", model)
        tensors = safetensors.open_file(GOLDEN / "huggingface" / "model.safetensors")
        for i, file in enumerate(files):
            part = {name: tensors[name].map() for name in sorted(tensors)[i::2]}
            runs.write_content(file, runs.content_of_tensors(part))
    return files


@target(_index, "json")
def huggingface_index(data: bytes, folder: Path) -> None:
    model = _sharded(folder)[0].parent
    (model / "model.safetensors.index.json").write_bytes(data)
    _read_model(model)


# ---------------------------------------------------------------- tokens, tokenizers, texts, settings


@target(golden("llmc_tokens_v1.bin", "llmc_tokens_v7.bin"), "int32")
def shard(data: bytes, folder: Path) -> None:
    path = folder / "tokens.bin"
    path.write_bytes(data)
    shards = Shards([path], 50257)
    assert shards.digest
    n = int(shards.pieces[-1])
    if n > 1:
        shards.take(np.array([[0, min(n - 1, 64)], [n - 2, 1]]))


def arrays(folder: Path) -> list[bytes]:
    """Files of NumPy's, and of integers alone."""
    ids = np.arange(300, dtype=np.uint16) * 7 % 500
    for dtype in ("u2", "i8", ">i4"):
        np.save(folder / f"{np.dtype(dtype).name}.npy", ids.astype(dtype))
    saved = [path.read_bytes() for path in sorted(folder.glob("*.npy"))]
    return [*saved, ids.tobytes(), ids.astype("<i8").tobytes()]


@target(arrays)
def array(data: bytes, folder: Path) -> None:
    shard(data, folder)


def _use(path: Path) -> None:
    tokenizer = read_tokenizer(path)
    if tokenizer.vocab_size < 2**20:
        tokenizer.token_bytes()
    tokenizer.to_dict()
    tokens: list[int] = []
    with suppress(DataError):  # not every one has every character
        tokens = tokenizer.encode("ab a")
        assert tokenizer.start >= 0
    tokenizer.decode([*tokens, 0, tokenizer.vocab_size, -1])


def _bpe(folder: Path) -> list[bytes]:
    vocab = {chr(c): i for i, c in enumerate(range(0x21, 0x7F))} | {"Ġ": 94, "ab": 95, "Ġa": 96}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"], ["Ġ", "a"]]}
    added = [{"id": 97, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True}]  # fmt: skip
    about = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": level,
        "decoder": level,
        "model": model,
    }
    split = {"type": "Split", "pattern": {"Regex": "a+"}, "behavior": "Isolated", "invert": False}
    parts = {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": "a"}],
        },
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": level,
    }
    char = {"type": "char", "chars": "ab ", "bos": 3, "fold": False}
    table = {"type": "table", "tokens": [*map(chr, range(256)), "ab"], "bos": None}
    return [json.dumps(each).encode() for each in (about, about | parts, char, table)]


@target(_bpe, "json")
def tokenizer(data: bytes, folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(data)
    _use(folder / "tokenizer.json")


@target(golden("llmc_tokenizer.bin"), "int32")
def llmc_tokenizer(data: bytes, folder: Path) -> None:
    (folder / "gpt2_tokenizer.bin").write_bytes(data)
    _use(folder / "gpt2_tokenizer.bin")


@target(lambda folder: [b'{"a": 0, "b": 1, "\xc4\xa0": 2, "ab": 3}\0#version: 0.2\na b\n'])
def vocab_and_merges(data: bytes, folder: Path) -> None:
    vocab, _, merges = data.partition(b"\0")
    (folder / "vocab.json").write_bytes(vocab)
    (folder / "merges.txt").write_bytes(merges)
    _use(folder / "vocab.json")


def _added(folder: Path) -> list[bytes]:
    flags = {"single_word": False, "lstrip": True, "rstrip": False, "normalized": False, "special": True}
    listed = {"4": {"content": "<a>"} | flags, "5": {"content": "<b>"} | flags}
    older = {
        "added_tokens.json": {"<a>": 4, "<b>": 5},
        "special_tokens_map.json": {"pad_token": "<a>", "eos_token": {"content": "<b>"} | flags},
        "tokenizer_config.json": {"add_prefix_space": True, "additional_special_tokens": ["<c>"]},
    }
    newer = {"added_tokens_decoder": listed, "bos_token": "ab", "extra_special_tokens": {"i": "<i>"}}
    return [json.dumps(each).encode() for each in (older, {"tokenizer_config.json": newer})]


@target(_added, "json")
def added_tokens(data: bytes, folder: Path) -> None:
    """What lies beside vocab.json and merges.txt: files by name in a JSON object, or one that is not JSON."""
    here = folder / "added"
    here.mkdir(exist_ok=True)
    (here / "vocab.json").write_bytes(b'{"a": 0, "b": 1, "\xc4\xa0": 2, "ab": 3}')
    (here / "merges.txt").write_bytes(b"#version: 0.2\na b\n")
    names = ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        content = {names[len(data) % 3]: None}
    for name in names:
        (here / name).unlink(missing_ok=True)
        if isinstance(content, dict) and name in content:
            value = content[name]
            (here / name).write_bytes(data if value is None else json.dumps(value).encode())
    _use(here / "vocab.json")


@target(
    lambda folder: [
        b"seed = 1\nn_embd = 32\n[training]\nlr = 0.1\norder = 'draw'\n[model]\nnorm = 'rms'\n",
        b"steps = 0xff\nmodel.n_embd = 32\n",
    ]
)
def toml(data: bytes, folder: Path) -> None:
    (folder / "set.toml").write_bytes(data)
    settings = read_toml(folder / "set.toml")
    settings.pop("seed", None)
    plan.fresh(None, None, None, None, settings, None, None, None, None)


@target(lambda folder: [b"emma\nolivia\n", "\ufeffZoë\r\n\n  José \n".encode()])
def text(data: bytes, folder: Path) -> None:
    (folder / "text.txt").write_bytes(data)
    documents = read_documents(folder / "text.txt")
    Corpus.from_documents(documents, CharTokenizer.from_documents(documents), 8)
    whole = read_documents(folder / "text.txt", whole=True)
    Corpus.from_documents(whole, CharTokenizer.from_text(whole), 8)
    Corpus.from_documents(documents, CharTokenizer.letters(), 8)


# ---------------------------------------------------------------- changing them


VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 2**31 - 1, 2**31, 2**40, 2**63, 2**64, -(2**63), 10**30, 0.5, 1e308,
    -1e-9, float("nan"), float("inf"), "", "a", "\0", "\x1b[31m", "\ud800", "x" * 3000, "F32", "I64", [], {},
    [0], [0, 0], [[]], {"a": 1}, "../../etc/passwd",
]  # fmt: skip
WORDS = [0, 1, 2, 3, 4, 7, 127, 128, 1024, 50257, 65536, 2**31 - 1, -1, -(2**31), 20240326, 20240520, TABLE]


def _nodes(value: Any, out: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        out.append((value, key))
        _nodes(value[key], out)
    return out


def _change_json(content: Any, chance: random.Random) -> Any:
    nodes = _nodes(content, [])
    if not nodes or chance.random() < 0.02:
        return deepcopy(chance.choice(VALUES))
    holder, key = chance.choice(nodes)
    what = chance.random()
    if what < 0.15:
        del holder[key]
    elif what < 0.25 and isinstance(holder, dict):
        holder[chance.choice(["a", "", "\x1b", "wte", "é\n"])] = holder[key]
    elif what < 0.35:
        other = chance.choice(nodes)
        holder[key] = json.loads(json.dumps(other[0].get(other[1]) if isinstance(other[0], dict) else None))
    elif what < 0.5 and isinstance(holder[key], int):
        holder[key] += chance.choice([-1, 1, 4, 1 << chance.randrange(64)])
    else:
        holder[key] = deepcopy(chance.choice(VALUES))  # what is changed next may be within it
    return content


def _as_json(content: Any) -> bytes:
    return json.dumps(content).encode()


def change(kind: str, data: bytes, chance: random.Random) -> bytes:
    """A file that is another, but keeps to its format so far that readers look into it."""
    try:
        if kind == "json":
            content = json.loads(data)
            for _ in range(chance.randrange(1, 4)):
                content = _change_json(content, chance)
            return _as_json(content)
        if kind == "safetensors":
            length = int.from_bytes(data[:8], "little")
            header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
            for _ in range(chance.randrange(1, 3)):
                header = _change_json(header, chance)
            text = _as_json(header)
            return len(text).to_bytes(8, "little") + text + rest
        if kind == "int32" and len(data) >= 64:
            words = bytearray(data)
            for _ in range(chance.randrange(1, 3)):
                at = 4 * chance.randrange(16)
                words[at : at + 4] = (chance.choice(WORDS) % 2**32).to_bytes(4, "little")
            return bytes(words)
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        pass
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 5)):
        at = chance.randrange(len(changed) + 1)
        if chance.random() < 0.3:
            del changed[at : at + chance.randrange(1, 9)]
        elif chance.random() < 0.5:
            changed[at:at] = bytes([chance.randrange(256)]) * chance.choice([1, 1, 1, 8, 1000])
        elif at < len(changed):
            changed[at] ^= 1 << chance.randrange(8)
    return bytes(changed)
