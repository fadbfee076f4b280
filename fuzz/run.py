"""Coverage-guided fuzzing of every reader of files, with atheris.

    python fuzz/run.py TARGET [--runs N] [--seed S]     one target; its name, or "all"
    python fuzz/run.py --list

Needs `pip install '.[fuzz]'`. It begins with whole files, what lies in fuzz/corpus/TARGET, and finds
more by which code of tapeless they reach. An input that is a fault is written to fuzz/corpus/TARGET/fault-*;
tests/test_hostile.py gives all that lies there to the readers again.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
NAMES = (
    "run_config", "run_tokenizer", "run_model", "run_state", "run_metrics", "run_lock", "run_manifest",
    "llmc_model", "llmc_state", "huggingface_config", "huggingface_model", "huggingface_index",
    "generation_config", "shard", "array", "tokenizer", "llmc_tokenizer", "vocab_and_merges", "added_tokens",
    "toml", "text",
)  # fmt: skip


def fuzz(name: str, runs: int, seed: int) -> None:
    """In this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["tapeless"]):
        import targets

    assert set(targets.TARGETS) == set(NAMES)
    where, folder = targets.TARGETS[name], targets.place()
    work = Path(tempfile.mkdtemp(prefix=f"corpus-{name}-"))
    for data in where.seeds(folder):
        (work / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
        targets.check(name, data, folder)
    if sys.platform == "linux":
        targets.limit_memory()
    kept = HERE / "corpus" / name
    kept.mkdir(parents=True, exist_ok=True)

    def one(data: bytes) -> None:
        targets.check(name, data, folder)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        if seed % 3 == 0:
            return atheris.Mutate(data, most)
        return targets.change(where.kind, data, random.Random(seed))[:most]

    arguments = [
        sys.argv[0], f"-runs={runs}", f"-seed={seed}", f"-timeout={targets.SECONDS}", "-max_len=16384",
        "-rss_limit_mb=0", "-print_final_stats=1",
        f"-artifact_prefix={kept}/fault-", str(work), str(kept),
    ]  # fmt: skip
    atheris.Setup(arguments, one, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="?", default="all", choices=("all", *NAMES))
    parser.add_argument("--runs", type=int, default=20_000, help="inputs of each target (20000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="print the targets' names")
    given = parser.parse_args()
    if given.list:
        print(*NAMES, sep="\n")
    elif given.target != "all":
        fuzz(given.target, given.runs, given.seed)
    else:
        for name in NAMES:
            command = [sys.executable, __file__, name, "--runs", str(given.runs), "--seed", str(given.seed)]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            print(f"{name}: {'no fault' if done.returncode == 0 else 'FAULT'}", flush=True)
            if done.returncode:
                sys.exit(done.stderr[-3000:])


if __name__ == "__main__":
    main()
