"""Plant mistakes in the source, one at a time, and see whether the tests notice.

    python benchmarks/mutants.py                  every mistake, and for each the test that noticed it
    python benchmarks/mutants.py --only export    those in files with this in their name
    python benchmarks/mutants.py --only 3,7-9     those of these numbers

Each mistake is a change of a few characters that a tired person could make. It is made in a copy of the
source, never in the checkout, and only the tests named beside it run, up to the first that fails. A mistake
that no test fails at within 15 minutes has hung, and counts as not noticed. `tests/test_mutants.py` checks
that every mistake still fits the source.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "src/tapeless"
COPIED = ("src", "tests", "benchmarks", "fuzz", "docs", "pyproject.toml", "README.md", "Makefile", "LICENSE")
LIMIT = 900  # seconds
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)


class Mutant(NamedTuple):
    """A mistake: in `file`, `old`, which stands there once, becomes `new`. `tests` are to notice."""

    file: str
    old: str
    new: str
    tests: str

    def apply(self, root: Path) -> None:
        path = root / SOURCE / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} has {self.old!r} {text.count(self.old)} times; expected once")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


MUTANTS = [
    # ---- the mathematics
    Mutant(
        "ops/reference.py",
        "dx[:n] += r * (g - xhat * np.mean(g * xhat, axis=-1, keepdims=True))",
        "dx[:n] += r * (g - xhat * np.mean(g * xhat))",
        "tests/test_gradients.py",
    ),
    Mutant(
        "ops/reference.py",
        "dx[:n] += r * (g - along_mean - xhat * along_x)",
        "dx[:n] += r * (g - xhat * along_x)",
        "tests/test_gradients.py",
    ),
    Mutant(
        "ops/reference.py",
        "slope = GELU_SCALE * (1 + 3 * GELU_CUBIC * z**2)",
        "slope = GELU_SCALE * (1 + 2 * GELU_CUBIC * z**2)",
        "tests/test_gradients.py",
    ),
    Mutant(
        "ops/reference.py",
        "dS[:, 0] = 0",
        "pass",
        "tests/test_gradients.py tests/test_attention.py tests/test_engines.py",
    ),
    Mutant(
        "ops/reference.py",
        "params[run] -= lr * (weight_decay * decays * params[run] + step)",
        "params[run] -= lr * (weight_decay * params[run] + step)",
        "tests/test_optim.py",
    ),
    Mutant(
        "ops/reference.py",
        "probs[probs < probs[order[min(enough, len(z) - 1)]]] = 0",
        "probs[probs <= probs[order[min(enough, len(z) - 1)]]] = 0",
        "tests/test_engines.py tests/test_family.py tests/test_api.py",
    ),
    Mutant(
        "ops/reference.py",
        "dcontract += np.tensordot(x[:, :n], dout[:n], axes=2)",
        "dcontract[:] = np.tensordot(x[:, :n], dout[:n], axes=2)",
        "tests/test_training.py::test_a_step_is_the_mean_over_all_its_tokens tests/test_family.py",
    ),
    # ---- the compiled ops
    Mutant(
        "ops/cpu/norm.py",
        "store(fma(load(dy, t, c), load(x, t, c) * rstd[t], load(dw, c)), dw, c)\n        meet(rows)",
        "store(fma(load(dy, t, c), load(x, t, c) * rstd[t], load(dw, c)), dw, c)",
        "tests/test_threads.py tests/test_races.py",
    ),
    Mutant(
        "ops/cpu/norm.py",
        "return _f32(1 / np.sqrt(np.float64(squares) / C + eps))",
        "return _f32(1 / np.sqrt(np.float64(squares) / C))",
        "tests/test_engines.py tests/test_family.py",
    ),
    Mutant(
        "ops/cpu/attention.py",
        "slope = scale if earlier else _f32(0)",
        "slope = scale",
        "tests/test_attention.py tests/test_engines.py tests/test_family.py",
    ),
    Mutant(
        "ops/cpu/optim.py",
        " + ((word >> np.uint32(16)) & np.uint32(1))",
        "",
        "tests/test_bfloat16.py tests/test_precision.py",
    ),
    Mutant(
        "ops/cpu/optim.py",
        "quiet = (word >> np.uint32(16)) | np.uint32(0x40)",
        "quiet = word >> np.uint32(16)",
        "tests/test_bfloat16.py tests/test_precision.py",
    ),
    Mutant(
        "ops/cpu/loss.py",
        "if running > aim:",
        "if running >= aim:",
        "tests/test_engines.py tests/test_api.py",
    ),
    Mutant(
        "ops/cpu/linear.py",
        "for t in range(rows.n):\n                for o in range(begin, end, LANES):",
        "for t in range(rows.begin, rows.end):\n                for o in range(begin, end, LANES):",
        "tests/test_races.py tests/test_threads.py",
    ),
    Mutant(
        "ops/cpu/mhc.py",
        "if rows.me == 0:\n        dmix[0] +=",
        "if True:\n        dmix[0] +=",
        "tests/test_threads.py tests/test_family.py",
    ),
    # ---- schedule, layout, programs
    Mutant(
        "schedule.py", "zero(dout, rows)\n", "pass\n", "tests/test_gradients.py tests/test_architectures.py"
    ),
    Mutant(
        "layout.py",
        'DECAYED = ("wte", "wpe",',
        'DECAYED = ("wte",',
        "tests/test_optim.py tests/test_layout.py",
    ),
    Mutant(
        "layout.py",
        "segments[:, :2].clip(first, end) - first",
        "segments[:, :2].clip(first, end)",
        "tests/test_threads.py tests/test_optim.py",
    ),
    Mutant(
        "programs.py",
        "MEAN_OVER, MEAN_FROM = 100, 20",
        "MEAN_OVER, MEAN_FROM = 100, 21",
        "tests/test_promises.py tests/test_numbers.py",
    ),
    Mutant(
        "programs.py",
        "scale = min(1.0, clip / (norm + 1e-6))",
        "scale = min(1.0, clip / norm)",
        "tests/test_optim.py tests/test_engines.py",
    ),
    Mutant(
        "programs.py",
        "cached = 0 if first else length\n",
        "cached = length\n",
        "tests/test_engines.py tests/test_api.py",
    ),
    Mutant(
        "programs.py",
        "opt.means[3] = 0 if wrong == GOOD else opt.means[3] + 1",
        "opt.means[3] = opt.means[3] if wrong == GOOD else opt.means[3] + 1",
        "tests/test_promises.py tests/test_supervised.py tests/test_numbers.py",
    ),
    # ---- random numbers, learning rates, first weights
    Mutant(
        "rng.py", '"has_uint32": has,', '"has_uint32": 0,', "tests/test_random_state.py tests/test_rng.py"
    ),
    Mutant(
        "rng.py",
        'self._x = x\n        self._spare = float(state["spare"][0])',
        "self._x = x",
        "tests/test_rng.py",
    ),
    Mutant(
        "rng.py",
        "self._spare = _f32(r * _f32(math.sin(angle)))",
        "self._spare = _f32(r * _f32(math.cos(angle)))",
        "tests/test_rng.py",
    ),
    Mutant(
        "optim.py",
        "rising = t.lr * (i + 1) / max(t.warmup_steps, 1)",
        "rising = t.lr * i / max(t.warmup_steps, 1)",
        "tests/test_optim.py",
    ),
    Mutant(
        "init.py",
        "residual_std = std / (2 * config.n_layer) ** 0.5",
        "residual_std = std / config.n_layer**0.5",
        "tests/test_layout.py tests/test_api.py",
    ),
    # ---- data
    Mutant(
        "data/orders.py",
        "self.counts = (np.diff(data.pieces) - 1) // self._step",
        "self.counts = np.diff(data.pieces) // self._step",
        "tests/test_orders.py tests/test_shards.py",
    ),
    Mutant("data/orders.py", "(r % (i + 1)).tolist()", "(r % i).tolist()", "tests/test_orders.py"),
    Mutant(
        "data/orders.py",
        "while not self._fits[i]:",
        "if not self._fits[i]:",
        "tests/test_orders.py tests/test_training.py tests/test_data.py",
    ),
    Mutant(
        "data/documents.py",
        "np.minimum(lengths, block_size)",
        "np.minimum(lengths, block_size + 1)",
        "tests/test_data.py",
    ),
    Mutant(
        "data/shards.py",
        "stops = starts + flat[:, 1] + 1",
        "stops = starts + flat[:, 1]",
        "tests/test_shards.py",
    ),
    Mutant(
        "data/tokenizers.py",
        "for c in text.lower() if c in ids",
        "for c in text if c in ids",
        "tests/test_data.py",
    ),
    Mutant("data/texts.py", '"utf-8-sig"', '"utf-8"', "tests/test_tokenize.py"),
    # ---- files
    Mutant("io/saves.py", "discard(before[keep - 1 :])", "discard(before[keep:])", "tests/test_saves.py"),
    Mutant(
        "io/llmc.py",
        "return -(-vocab_size // 128) * 128",
        "return -(-vocab_size // 64) * 64",
        "tests/test_formats.py tests/test_convert.py",
    ),
    Mutant(
        "io/tensors.py",
        "if not np.isfinite(block).all():",
        "if np.isnan(block).any():",
        "tests/test_formats.py tests/test_convert.py tests/test_hostile.py",
    ),
    Mutant(
        "io/safetensors.py",
        "if stored.offset != end:",
        "if stored.offset < end:",
        "tests/test_hostile.py tests/test_formats.py tests/test_saves.py",
    ),
    Mutant(
        "io/runs.py",
        'if json.loads(line)["step"] <= steps:',
        'if json.loads(line)["step"] < steps:',
        "tests/test_runs.py tests/test_resume.py",
    ),
    # ---- training
    Mutant(
        "job.py",
        "self.step, before = self._before\n        self.rng.restore(before)",
        "self.step, before = self._before",
        "tests/test_supervised.py tests/test_numbers.py",
    ),
    Mutant(
        "job.py",
        "better = loss < self.best[0]",
        "better = loss <= self.best[0]",
        "tests/test_evaluate.py tests/test_runs.py tests/test_training.py",
    ),
    Mutant("guard.py", "MOST_SKIPPED = 100", "MOST_SKIPPED = 101", "tests/test_numbers.py"),
    Mutant(
        "evaluate.py",
        "beyond = np.maximum(self._lengths - size, 0)",
        "beyond = np.maximum(self._lengths - size - 1, 0)",
        "tests/test_evaluate.py",
    ),
    Mutant("flops.py", "(n * (n + 1) // 2)", "(n * n // 2)", "tests/test_bench.py tests/test_memory.py"),
    Mutant(
        "team.py",
        "(min(line * a, size), min(line * b, size))",
        "(min(line * a, size), min(line * b + 1, size))",
        "tests/test_threads.py",
    ),
    Mutant("gradcheck.py", "worst <= TOLERANCE and (", "True and (", "tests/test_check.py"),
    # ---- export
    Mutant(
        "export/int8.py",
        "np.rint(numbers / np.where(scale > 0, scale, 1))",
        "np.trunc(numbers / np.where(scale > 0, scale, 1))",
        "tests/test_export.py",
    ),
    Mutant(
        "export/lifetimes.py",
        "if offsets[j] >= 0 and spans[j][1] <= last and first <= spans[j][2]",
        "if offsets[j] >= 0 and spans[j][1] < last and first < spans[j][2]",
        "tests/test_export_trace.py tests/test_export.py",
    ),
    Mutant(
        "export/c/tapeless_ops.c",
        "y[i + 3] = add ? y[i + 3] + s3 : s3;",
        "y[i + 3] = s3;",
        "tests/test_export.py",
    ),
    Mutant(
        "export/c/tapeless_ops.c",
        "shrink = first ? expf(top - new_top) : 0.0f;",
        "shrink = first ? 1.0f : 0.0f;",
        "tests/test_export.py",
    ),
    # ---- files, locks, signals, streams, machine
    Mutant(
        "files.py", "            return\n    os.fsync(handle)", "            return", "tests/test_flush.py"
    ),
    Mutant(
        "files.py",
        "errno.EPERM, errno.EINVAL, errno.ENOTSUP):",
        "errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.EIO):",
        "tests/test_flush.py tests/test_saves.py",
    ),
    Mutant("files.py", "flush_folder(path.parent)", "flush_folder(path)", "tests/test_flush.py"),
    Mutant(
        "files.py",
        "        file.flush()\n        flush(file.fileno())",
        "        flush(file.fileno())",
        "tests/test_flush.py",
    ),
    Mutant("files.py", "time.sleep(PAUSE)", "return", "tests/test_flush.py"),
    Mutant(
        "signals.py",
        "return handler is None or (number == HANGUP and handler == signal.SIG_IGN)",
        "return handler is None",
        "tests/test_display.py tests/test_runs.py",
    ),
    Mutant(
        "signals.py",
        "signal.signal(number, before[number])",
        "signal.signal(number, signal.SIG_DFL)",
        "tests/test_display.py tests/test_runs.py",
    ),
    Mutant(
        "machine.py",
        'most - used + _statistics(group / "memory.stat").get(cached, 0)',
        "most - used",
        "tests/test_machine.py",
    ),
    Mutant(
        "machine.py",
        "count = max(1, quota // period)",
        "count = -(-quota // period)",
        "tests/test_machine.py",
    ),
    Mutant(
        "machine.py",
        "for count in range(len(names), -1, -1):",
        "for count in range(len(names), 0, -1):",
        "tests/test_machine.py",
    ),
    Mutant(
        "machine.py",
        "count = min(count, int(values[0]))",
        "count = min(count, int(values[-1]))",
        "tests/test_machine.py",
    ),
    Mutant(
        "streams.py",
        "FAILURES = (OSError, ValueError, RuntimeError)",
        "FAILURES = (OSError, RuntimeError)",
        "tests/test_display.py tests/test_cli.py",
    ),
    Mutant(
        "streams.py", "os.dup2(handle, stream.fileno())", "pass", "tests/test_display.py tests/test_cli.py"
    ),
    Mutant(
        "regular.py",
        "    if stat.S_ISREG(mode):\n        return open",
        "    if not stat.S_ISDIR(mode):\n        return open",
        "tests/test_hostile.py tests/test_saves.py",
    ),
    Mutant(
        "io/lock.py",
        "if msvcrt is None and not os.path.samestat(os.fstat(file), os.stat(path)):",
        "if False:",
        "tests/test_flush.py tests/test_runs.py",
    ),
    Mutant(
        "io/lock.py",
        "with suppress(OSError):  # while it is still locked",
        "with suppress(AttributeError):\n            fcntl.flock(self._file, fcntl.LOCK_UN)\n"
        "        with suppress(OSError):  # while it is still locked",
        "tests/test_flush.py tests/test_runs.py",
    ),
    Mutant(
        "io/lock.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        "tests/test_flush.py tests/test_runs.py",
    ),
    Mutant(
        "io/lock.py",
        'os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)',
        "os.O_RDWR | os.O_CREAT",
        "tests/test_hostile.py tests/test_flush.py tests/test_runs.py",
    ),
    Mutant(
        "io/saves.py",
        "file.flush()\n        files.flush(file.fileno())",
        "file.flush()",
        "tests/test_flush.py",
    ),
    Mutant(
        "io/saves.py",
        "files.replace(aside, place)\n            files.flush_folder(store)",
        "files.replace(aside, place)",
        "tests/test_flush.py",
    ),
    Mutant(
        "io/folders.py",
        "{max(numbered_runs(preset, base), default=0) + 1}",
        "{len(numbered_runs(preset, base)) + 1}",
        "tests/test_runs.py tests/test_cli.py",
    ),
    Mutant(
        "io/folders.py",
        "if (new / CONFIG).exists():  # it moves first",
        "if True:  # it moves first",
        "tests/test_runs.py tests/test_saves.py tests/test_resume.py",
    ),
    Mutant(
        "io/folders.py",
        "if free < nbytes:",
        "if free < 0:",
        "tests/test_training.py",
    ),
    Mutant(
        "io/checkpoints.py",
        "if tokenizer.vocab_size <= rows if model.own_folder",
        "if tokenizer.vocab_size == rows if model.own_folder",
        "tests/test_convert.py tests/test_huggingface.py tests/test_vocabularies.py",
    ),
    # ---- tokens that end a text, tokenizers
    Mutant(
        "ends.py", "new if new or not old else None for old, new", "new for old, new", "tests/test_ends.py"
    ),
    Mutant(
        "ends.py",
        "id for id in ids if id < vocab_size",
        "id for id in ids if id <= vocab_size",
        "tests/test_ends.py",
    ),
    Mutant("ends.py", "ours if ours is not None else theirs", "ours or theirs", "tests/test_ends.py"),
    Mutant(
        "ends.py", "dict.fromkeys(id for id in ids if id >= 0)", "dict.fromkeys(ids)", "tests/test_ends.py"
    ),
    Mutant(
        "data/headerless.py", 'byte not in b"\\t\\n\\f\\r"', 'byte not in b"\\t\\n"', "tests/test_shards.py"
    ),
    Mutant(
        "data/headerless.py",
        "return len(np.unique(ids)) >= DIFFERENT",
        "return len(np.unique(ids)) >= 2",
        "tests/test_shards.py",
    ),
    Mutant(
        "data/headerless.py",
        "(ids < 0) | (ids >= vocab_size)",
        "(ids < 0) | (ids > vocab_size)",
        "tests/test_shards.py",
    ),
    Mutant(
        "data/headerless.py",
        "/ 2**16) ** len(ids) < PROOF",
        "/ 2**16) ** len(ids) < 1",
        "tests/test_shards.py",
    ),
    Mutant(
        "data/seams.py",
        'if token["lstrip"] or token["rstrip"] or any',
        'if token["lstrip"] or any',
        "tests/test_seams.py",
    ),
    Mutant(
        "data/seams.py", 'words = words or part.get("use_regex", True)', "words = True", "tests/test_seams.py"
    ),
    Mutant(
        "data/seams.py",
        'return (Cuts.SEAMS if tokenizer.fold else Cuts.ANYWHERE), ""',
        'return Cuts.ANYWHERE, ""',
        "tests/test_seams.py tests/test_tokenize.py",
    ),
    Mutant(
        "data/added.py",
        "    if listed is None:\n        config = config | roles",
        "    if True:\n        config = config | roles",
        "tests/test_added_tokens.py",
    ),
    Mutant("data/added.py", "free += name not in vocab", "free += 1", "tests/test_added_tokens.py"),
    Mutant(
        "data/added.py",
        'normalized = bool(about.get("normalized", not special))',
        'normalized = bool(about.get("normalized", False))',
        "tests/test_added_tokens.py",
    ),
    Mutant(
        "data/bpe.py",
        "if not {letter, unknown} & vocab.keys()",
        "if letter not in vocab.keys()",
        "tests/test_bpe.py tests/test_vocabularies.py",
    ),
    Mutant("data/bpe.py", 'lines[lines[0].startswith("#version") :]', "lines[1:]", "tests/test_bpe.py"),
    Mutant(
        "data/table.py",
        "            if best == last:\n                return None\n",
        "            if best == last:\n                break\n",
        "tests/test_vocabularies.py tests/test_bpe.py tests/test_tokenize.py",
    ),
    Mutant(
        "data/workers.py",
        "connection, earlier = busy.popleft()",
        "connection, earlier = busy.pop()",
        "tests/test_tokenize.py",
    ),
    Mutant(
        "data/workers.py",
        "bytes([block.opens]) + block.text.encode()",
        'b"\\1" + block.text.encode()',
        "tests/test_tokenize.py tests/test_seams.py",
    ),
    Mutant(
        "data/tokenize.py",
        "self._writers[-1].count < self._most // 10",
        "self._writers[-1].count < self._most // 100",
        "tests/test_tokenize.py",
    ),
    Mutant(
        "data/sources.py",
        "held = np.floor(share[1:]) > np.floor(share[:-1])",
        "held = np.floor(share[1:]) >= np.floor(share[:-1]) + 2",
        "tests/test_data.py tests/test_training.py",
    ),
    Mutant(
        "data/sources.py",
        "same = theirs.token_bytes() == tokenizer.token_bytes()",
        "same = theirs.vocab_size == tokenizer.vocab_size",
        "tests/test_shards.py tests/test_tokenize.py tests/test_fine_tuning.py tests/test_vocabularies.py",
    ),
    Mutant(
        "data/given.py",
        "if items and all(isinstance(item, str) for item in items):",
        "if items and isinstance(items[0], str):",
        "tests/test_from_python.py",
    ),
    Mutant(
        "data/given.py",
        "if path in BUILT_IN and os.path.lexists(path):",
        "if False:",
        "tests/test_from_python.py tests/test_data.py tests/test_cli.py",
    ),
    Mutant(
        "data/files.py",
        "train, val or _beside(train))",
        "train, val)",
        "tests/test_shards.py tests/test_tokenize.py",
    ),
    # ---- other programs' formats
    Mutant(
        "io/pretokenizers.py",
        '((LLAMA3, BYTES), False): "smaug-bpe"',
        '((LLAMA3, BYTES), False): "llama-bpe"',
        "tests/test_gguf.py tests/test_added_tokens.py",
    ),
    Mutant(
        "io/pretokenizers.py",
        '("lstrip", "rstrip", "single_word") if token',
        '("lstrip", "rstrip") if token',
        "tests/test_gguf.py tests/test_added_tokens.py",
    ),
    Mutant(
        "io/pretokenizers.py",
        "(token in normalized) == last",
        "(token in normalized) != last",
        "tests/test_gguf.py tests/test_added_tokens.py",
    ),
    Mutant("io/gguf.py", "shape = shape[::-1] if names.turned else shape", "pass", "tests/test_gguf.py"),
    Mutant(
        "io/gguf.py",
        'kind.CONTROL if token["special"] else kind.USER_DEFINED',
        "kind.CONTROL",
        "tests/test_gguf.py tests/test_added_tokens.py",
    ),
    Mutant("io/gguf.py", "PLACES = 3 ", "PLACES = 2 ", "tests/test_gguf.py tests/test_ends.py"),
    Mutant(
        "io/huggingface.py", "config = config.replace(tied=True)\n", "pass\n", "tests/test_huggingface.py"
    ),
    Mutant(
        "io/huggingface.py",
        "return ends_of(path, settings).or_else(ends)",
        "return ends.or_else(ends_of(path, settings))",
        "tests/test_ends.py tests/test_huggingface.py",
    ),
    Mutant(
        "io/huggingface.py",
        '"model_max_length": model.config.block_size,',
        '"model_max_length": 1024,',
        "tests/test_convert.py",
    ),
    Mutant(
        "convert.py",
        "[folder / name for name in MODEL_FILES if name not in new]",
        "[]",
        "tests/test_convert.py",
    ),
    Mutant(
        "convert.py",
        "if len(whole.tensors) > len(model.tensors):",
        "if len(whole.tensors) < len(model.tensors):",
        "tests/test_convert.py",
    ),
    Mutant("debugstate.py", "first += len(block)", "pass", "tests/test_state.py"),
    Mutant("debugstate.py", "nan=np.inf", "nan=0.0", "tests/test_state.py"),
    Mutant("hub.py", 'found[1] != "runs" and ', "", "tests/test_convert.py"),
    # ---- threads
    Mutant(
        "ops/cpu/barrier.py",
        "with cgutils.for_range(builder, threads) as loop:",
        "with cgutils.for_range(builder, index) as loop:",
        "tests/test_races.py tests/test_threads.py",
    ),
    Mutant(
        "ops/cpu/share.py",
        "    meet(rows(batch))\n    batch.sizes[0] = n",
        "    batch.sizes[0] = n",
        "tests/test_races.py",
    ),
    Mutant(
        "ops/cpu/streams.py",
        "for thread in range(1, rows.threads):",
        "for thread in range(2, rows.threads):",
        "tests/test_precision.py tests/test_threads.py",
    ),
    Mutant(
        "ops/cpu/streams.py",
        "for j in range(i + STREAMS * step, end):\n        _sweep_one",
        "for j in range(i + STREAMS * step + 1, end):\n        _sweep_one",
        "tests/test_precision.py tests/test_engines.py tests/test_api.py",
    ),
    Mutant(
        "ops/cpu/embed.py",
        "    meet(rows)\n    begin, end = part(rows, dx.shape[1])",
        "    begin, end = part(rows, dx.shape[1])",
        "tests/test_races.py",
    ),
    Mutant(
        "ops/cpu/activation.py",
        "where(load(u, t, f) > 0.0,",
        "where(load(u, t, f) >= 0.0,",
        "tests/test_engines.py tests/test_family.py",
    ),
    Mutant(
        "ops/cpu/bfloat.py",
        "builder.add(bits, word(0x7FFF)), odd)",
        "builder.add(bits, word(0x8000)), word(0))",
        "tests/test_bfloat16.py tests/test_precision.py",
    ),
    Mutant(
        "ops/cpu/pairs.py",
        "done += rows\n",
        "done += most\n",
        "tests/test_precision.py tests/test_product.py",
    ),
    Mutant("ops/cpu/profile.py", '"norms": ("norm",),', '"norms": ("rmsnorm",),', "tests/test_bench.py"),
    Mutant("team.py", "line = ALIGN // 4", "line = 4", "tests/test_threads.py"),
    Mutant(
        "team.py",
        "_idle.extend(workers)\n    failure = failure or",
        "failure = failure or",
        "tests/test_threads.py",
    ),
    Mutant(
        "engine.py",
        "n, d, w = (max(pair) for pair in zip(self._capacity, wanted, strict=True))",
        "n, d, w = wanted",
        "tests/test_engines.py tests/test_api.py tests/test_threads.py tests/test_memory.py",
    ),
    # ---- training
    Mutant(
        "guard.py",
        "if len(self._good) == 2 else None",
        "if len(self._good) == 1 else None",
        "tests/test_numbers.py tests/test_supervised.py tests/test_runs.py",
    ),
    Mutant(
        "guard.py",
        'state.keys() & {"params", "m", "v"}',
        '{"params"}',
        "tests/test_numbers.py tests/test_supervised.py tests/test_runs.py",
    ),
    Mutant(
        "guard.py",
        "job.forget(end - job.step)\n",
        "pass\n",
        "tests/test_numbers.py tests/test_supervised.py tests/test_runs.py",
    ),
    Mutant(
        "guard.py",
        "job.record(steps.losses[:-1])",
        "job.record(steps.losses)",
        "tests/test_numbers.py tests/test_supervised.py tests/test_runs.py",
    ),
    Mutant(
        "replay.py",
        'np.searchsorted(tokens.spans[:, 0], start, side="right")',
        "np.searchsorted(tokens.spans[:, 0], start)",
        "tests/test_numbers.py",
    ),
    Mutant(
        "replay.py", "first = start - int(tokens.pieces[piece])", "first = start", "tests/test_numbers.py"
    ),
    Mutant(
        "remarks.py",
        '"truncated" if training.order == "shuffle" else "left out"',
        '"left out" if training.order == "shuffle" else "truncated"',
        "tests/test_training.py tests/test_data.py tests/test_cli.py",
    ),
    Mutant(
        "remarks.py",
        "MANY = 0.25",
        "MANY = 0.75",
        "tests/test_training.py tests/test_data.py tests/test_cli.py",
    ),
    Mutant(
        "meter.py",
        "self._seconds, self._tokens, self._flops = 0.0, 0, 0\n        return",
        "self._seconds, self._tokens = 0.0, 0\n        return",
        "tests/test_bench.py tests/test_display.py tests/test_training.py",
    ),
    Mutant(
        "memory.py",
        "Tensor(name, (2, size)) for name",
        "Tensor(name, (1, size)) for name",
        "tests/test_memory.py",
    ),
    Mutant(
        "memory.py",
        "if needed <= free:\n        return",
        "if needed <= 2 * free:\n        return",
        "tests/test_memory.py",
    ),
    Mutant(
        "progress.py",
        "np.concatenate([self._recent, losses])[-200:]",
        "np.concatenate([self._recent, losses])[-100:]",
        "tests/test_display.py tests/test_training.py",
    ),
    Mutant(
        "progress.py",
        "said, self._unsaid = np.split(self._unsaid, [due - self._shown])",
        "said, self._unsaid = self._unsaid, self._unsaid[:0]",
        "tests/test_display.py tests/test_training.py",
    ),
    Mutant(
        "train.py",
        "if stop.asked and job.step < t.steps:",
        "if stop.asked:",
        "tests/test_display.py tests/test_runs.py",
    ),
    Mutant(
        "plan.py",
        'settings = settings | {"order": "sequence"}',
        'settings = settings | {"order": "windows"}',
        "tests/test_shards.py tests/test_training.py",
    ),
    Mutant(
        "plan.py",
        'if saved["tokenizer"] == SAVED else None',
        "if False else None",
        "tests/test_vocabularies.py tests/test_fine_tuning.py",
    ),
    Mutant(
        "generate.py",
        "rng.uniforms(used)\n",
        "pass\n",
        "tests/test_api.py tests/test_random_state.py tests/test_engines.py",
    ),
    Mutant(
        "generate.py",
        "drawn=min(tokenizer.vocab_size, model.config.vocab)",
        "drawn=model.config.vocab",
        "tests/test_api.py tests/test_vocabularies.py",
    ),
    Mutant(
        "evaluate.py",
        "sizes[targets[counted]].sum(axis=0)",
        "sizes[targets].sum(axis=0)",
        "tests/test_evaluate.py",
    ),
    Mutant("evaluate.py", "byte & 0xC0 != 0x80", "byte & 0x80 != 0x80", "tests/test_evaluate.py"),
    Mutant("model.py", "weights / weights.sum()", "weights", "tests/test_api.py tests/test_evaluate.py"),
    Mutant(
        "settings.py",
        "if name in settings:\n                    raise",
        "if False:\n                    raise",
        "tests/test_settings.py",
    ),
    Mutant(
        "config.py",
        "not isinstance(value, bool)\n    if not ok or not least",
        "True\n    if not ok or not least",
        "tests/test_settings.py tests/test_api.py",
    ),
    Mutant(
        "errors.py",
        "cutoff=0.65 if few else 0.5",
        "cutoff=0.3 if few else 0.5",
        "tests/test_settings.py tests/test_cli.py",
    ),
    Mutant(
        "certificate.py",
        "for row in result.rows)\n    lines",
        "for row in result.rows if row.ok)\n    lines",
        "tests/test_check.py",
    ),
    # ---- the command line
    Mutant(
        "cli/runs.py",
        '"eval_every": eval_every, ',
        "",
        "tests/test_cli.py tests/test_evaluate.py tests/test_runs.py",
    ),
    Mutant(
        "cli/runs.py",
        '"sample_every": sample_every,\n',
        "\n",
        "tests/test_cli.py tests/test_runs.py tests/test_training.py",
    ),
    Mutant("cli/runs.py", "log_every=log_every,", "log_every=1,", "tests/test_cli.py tests/test_runs.py"),
    Mutant("cli/runs.py", "            keep=keep,\n", "", "tests/test_saves.py tests/test_cli.py"),
    Mutant(
        "cli/runs.py",
        "temperature, rng, top_k, top_p, max_tokens)",
        "temperature, rng, top_k, 1.0, max_tokens)",
        "tests/test_cli.py tests/test_api.py",
    ),
    Mutant(
        "cli/runs.py",
        "raise typer.Exit(128 + stopped.signal) from None",
        "raise typer.Exit(130) from None",
        "tests/test_display.py tests/test_saves.py",
    ),
    Mutant(
        "cli/runs.py",
        "loaded, what, stride, block_size=block_size,",
        "loaded, what, stride,",
        "tests/test_evaluate.py tests/test_cli.py",
    ),
    Mutant("cli/data.py", "shard_tokens=shard_tokens, ", "", "tests/test_tokenize.py"),
    Mutant("cli/data.py", "lines=lines,\n", "\n", "tests/test_tokenize.py"),
    Mutant(
        "cli/convert.py",
        "batch_size, block_size, seed)\n\n\ndef _write",
        "batch_size, block_size, 42)\n\n\ndef _write",
        "tests/test_check.py tests/test_convert.py",
    ),
    Mutant(
        "cli/models.py",
        'entries="all" if all_ else entries, seed=seed,',
        'entries="all" if all_ else entries,',
        "tests/test_check.py",
    ),
    Mutant(
        "cli/models.py",
        'given.add("window")',
        "pass",
        "tests/test_check.py tests/test_memory.py",
    ),
    Mutant(
        "cli/models.py",
        'if any("refused" in case for case in report["cases"]):',
        "if False:",
        "tests/test_bench.py",
    ),
    Mutant(
        "cli/export.py",
        ' and not word.startswith("--out=")',
        "",
        "tests/test_export.py tests/test_export_projects.py",
    ),
    Mutant(
        "cli/export.py",
        "settings=settings, seed=seed,",
        "settings=settings, seed=None,",
        "tests/test_export.py tests/test_export_projects.py",
    ),
    Mutant(
        "cli/options.py",
        'may_be_empty = ("prompt",)',
        'may_be_empty = ("prompt", "out")',
        "tests/test_cli.py",
    ),
    Mutant(
        "__main__.py",
        "return 128 + (stop.args[0] if stop.args else signal.SIGINT)",
        "return 130",
        "tests/test_display.py tests/test_tokenize.py",
    ),
    # ---- bench
    Mutant(
        "bench/cases.py",
        "lengths = [min(1 + len(text), model.config.block_size) for text in texts]",
        "lengths = [len(text) for text in texts]",
        "tests/test_bench.py",
    ),
    Mutant("bench/cases.py", "while len(results) < 3 or ", "while ", "tests/test_bench.py"),
    Mutant(
        "bench/workload.py",
        "if not difference <= TOLERANCE:",
        "if difference > TOLERANCE:",
        "tests/test_bench.py",
    ),
    Mutant(
        "bench/workload.py",
        "opt.m[:], opt.v[:], opt.powers[:] = 0, 0, 1",
        "opt.m[:], opt.v[:] = 0, 0",
        "tests/test_bench.py",
    ),
    Mutant(
        "bench/__init__.py",
        'result["gflops"] / peaks.gflops[result["threads"]]',
        'result["gflops"] / peaks.gflops[1]',
        "tests/test_bench.py",
    ),
    # ---- export
    Mutant(
        "export/budget.py",
        "moments = layout.kept * 4 // P - 2",
        "moments = layout.kept * 4 // P - 1",
        "tests/test_export.py tests/test_memory.py",
    ),
    Mutant(
        "export/budget.py",
        "if needed > most:",
        "if needed > 2 * most:",
        "tests/test_export.py tests/test_export_projects.py",
    ),
    Mutant(
        "export/weights.py",
        "across = places[1] - places[0] if count > 1 else 1",
        "across = 1",
        "tests/test_export.py tests/test_export_trace.py",
    ),
    Mutant(
        "export/firmware.py",
        "lengths = np.minimum(ends - spans[:, 0], longest)",
        "lengths = np.minimum(ends - spans[:, 0], longest - 1)",
        "tests/test_export.py",
    ),
    Mutant(
        "export/files.py",
        "(folder / name).resolve().is_relative_to(folder)",
        "True",
        "tests/test_export.py tests/test_export_projects.py tests/test_hostile.py",
    ),
    Mutant(
        "export/c/tapeless_run.c",
        "r = random_word() >> shift;\n    return r;",
        "r = random_word() % n;\n    return r;",
        "tests/test_export.py",
    ),
    Mutant(
        "export/c/tapeless_run.c",
        "return (high << 26) | (random_word() >> 6);",
        "return (high << 26) | (random_word() >> 5);",
        "tests/test_export.py",
    ),
    Mutant("export/host/main.c", "if (several && i)", "if (several)", "tests/test_export.py"),
    Mutant(
        "export/esp_idf/main/main.c",
        "i == 0 || (i + 1) % TL_LOG_EVERY == 0",
        "i % TL_LOG_EVERY == 0",
        "tests/test_export_projects.py",
    ),
]


class Outcome(NamedTuple):
    """What the tests said of a mistake, the first test that failed, and after how many seconds."""

    verdict: str
    test: str
    seconds: float


NOTICED = "noticed by"


def copied(to: Path) -> Path:
    """Copy what the tests need of the checkout."""
    for name in COPIED:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, to / name)
    return to


def run_tests(copy: Path, tests: Sequence[str], cache: Path, *options: str) -> tuple[int | None, list[str]]:
    """Run tests. Returns pytest's exit code, None if it hung, and what failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", *options, *tests]
    environment = os.environ | {"PYTHONPATH": str(copy / "src"), "TAPELESS_CACHE_DIR": str(cache)}
    process = subprocess.Popen(
        command, cwd=copy, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        shown, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None, []
    return process.returncode, re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", shown, re.MULTILINE)


def outcome(mutant: Mutant, cache: Path) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(Path(folder))
        mutant.apply(copy)
        began = time.monotonic()
        code, failed = run_tests(copy, mutant.tests.split(), cache, "-x")
        seconds = time.monotonic() - began
    if code is None:
        return Outcome("HUNG", "", seconds)
    if code == 1 and failed:
        return Outcome(NOTICED, failed[0], seconds)
    if code == 2:  # what a test raised, KeyboardInterrupt for instance, ended pytest
        return Outcome(NOTICED, "the end of all tests", seconds)
    if -code in CRASHES:
        return Outcome(NOTICED, f"a crash, signal {-code}", seconds)
    return Outcome("NOT NOTICED" if code == 0 else f"PYTEST FAILED ({code})", "", seconds)


def fail_anyway(tests: set[str], cache: Path) -> set[str]:
    """Which of these tests fail without any mistake, too, and so notice none."""
    if not tests:
        return set()
    with tempfile.TemporaryDirectory() as folder:
        code, failed = run_tests(copied(Path(folder)), sorted(tests), cache)
    return set() if code == 0 else set(failed) or tests


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a part of the file's name, or numbers: 3,7-9")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    given = parser.parse_args()
    if re.fullmatch(r"[\d,-]+", given.only):
        ranges = [part.partition("-") for part in given.only.split(",")]
        numbers = {n for first, _, last in ranges for n in range(int(first), int(last or first) + 1)}
        chosen = [(n, mutant) for n, mutant in enumerate(MUTANTS, 1) if n in numbers]
    else:
        chosen = [(n, mutant) for n, mutant in enumerate(MUTANTS, 1) if given.only in mutant.file]
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(given.jobs) as pool:
        results = pool.map(lambda item: outcome(item[1], Path(cache)), chosen)
        for (number, mutant), result in zip(chosen, results, strict=True):
            outcomes.append(result)
            what = " ".join((mutant.new.strip() or f"without {mutant.old.strip()}").split())
            print(f"{number:3} {mutant.file}: {what:.60}", flush=True)
            print(f"    {result.verdict} {result.test} ({result.seconds:.0f} s)", flush=True)
        tests = {result.test for result in outcomes if "::" in result.test}
        wrong = fail_anyway(tests, Path(cache))
    alive = [
        number
        for (number, _), result in zip(chosen, outcomes, strict=True)
        if result.verdict != NOTICED or result.test in wrong
    ]
    for test in sorted(wrong):
        print(f"Fails without any mistake, too: {test}")
    print(f"{len(chosen) - len(alive)} of {len(chosen)} noticed." + (f" Not: {alive}" if alive else ""))
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
