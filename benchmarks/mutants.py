"""Plant mistakes in the source, one at a time, and see whether the tests notice.

    python benchmarks/mutants.py                  every mistake; prints those that no test noticed
    python benchmarks/mutants.py --only export    those whose file or number matches

Each mistake is a change of a few characters that a tired person could make. It is made in a copy of the
source, never in the checkout, and only the tests named beside it run: the first failure ends them.
`tests/test_mutants.py` checks that every mistake still fits the source.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "src/tapeless"


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
        "tests/test_gradients.py tests/test_architectures.py tests/test_family.py",
    ),
    # ---- the compiled ops
    Mutant(
        "ops/cpu/norm.py",
        "store(fma(load(dy, t, c), load(x, t, c) * rstd[t], load(dw, c)), dw, c)\n        meet(rows)",
        "store(fma(load(dy, t, c), load(x, t, c) * rstd[t], load(dw, c)), dw, c)",
        "tests/test_races.py",
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
        "tests/test_precision.py tests/test_product.py tests/test_bfloat16.py",
    ),
    Mutant(
        "ops/cpu/optim.py",
        "quiet = (word >> np.uint32(16)) | np.uint32(0x40)",
        "quiet = word >> np.uint32(16)",
        "tests/test_precision.py tests/test_bfloat16.py",
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
        "tests/test_threads.py",
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
        "tests/test_promises.py tests/test_supervised.py tests/test_numbers.py",
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
        "tests/test_numbers.py",
    ),
    # ---- random numbers, learning rates, first weights
    Mutant(
        "rng.py", '"has_uint32": has,', '"has_uint32": 0,', "tests/test_rng.py tests/test_random_state.py"
    ),
    Mutant(
        "rng.py",
        'self._x = x\n        self._spare = float(state["spare"][0])',
        "self._x = x",
        "tests/test_rng.py tests/test_random_state.py",
    ),
    Mutant("rng.py", "while u1 <= 1e-10:", "while u1 <= 0:", "tests/test_rng.py tests/test_random_state.py"),
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
        "tests/test_api.py tests/test_family.py tests/test_layout.py",
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
    Mutant("io/saves.py", "files.flush(file.fileno())", "pass", "tests/test_saves.py tests/test_flush.py"),
    Mutant(
        "io/saves.py",
        "files.replace(aside, place)\n            files.flush_folder(store)",
        "files.replace(aside, place)",
        "tests/test_saves.py tests/test_flush.py",
    ),
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
        "tests/test_supervised.py",
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
]


def survivors(mutants: list[tuple[int, Mutant]]) -> list[int]:
    """Run the tests against each mistake; the numbers of those that no test noticed."""
    alive = []
    for number, mutant in mutants:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder)
            for name in ("src", "tests", "benchmarks", "fuzz", "docs", "pyproject.toml", "README.md"):
                path = ROOT / name
                if path.is_dir():
                    shutil.copytree(path, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(path, copy / name)
            mutant.apply(copy)
            tests = [test for test in mutant.tests.split() if (copy / test).exists()]
            began = time.monotonic()
            code = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
                cwd=copy,
                env=os.environ | {"PYTHONPATH": str(copy / "src")},
                capture_output=True,
                check=False,
            ).returncode
        noticed = code == 1
        alive += [] if noticed else [number]
        seconds = time.monotonic() - began
        verdict = "noticed" if noticed else f"NOT NOTICED (exit code {code})"
        print(
            f"{number:3} {mutant.file}: {mutant.new.splitlines()[0].strip()!r}: {verdict}, {seconds:.0f} s",
            flush=True,
        )
    return alive


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a part of the file's name, or a number")
    only = parser.parse_args().only
    chosen = [(i, m) for i, m in enumerate(MUTANTS, 1) if only in m.file or only == str(i)]
    alive = survivors(chosen)
    print(f"{len(chosen) - len(alive)} of {len(chosen)} noticed.")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
