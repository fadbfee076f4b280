"""`tapeless bench`: how fast this machine trains and generates, and how near that is to what it can do.

A figure is only given for a run that did the right thing: the losses of each timed training run are
compared with the reference engine's, from the same weights on the same batches; generated texts with
the reference's texts.
"""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from tapeless.bench.cases import CASES, TRAINING, Say, Session
from tapeless.bench.workload import Differs
from tapeless.errors import ConfigError, did_you_mean
from tapeless.machine import processors


def bench(
    names: Sequence[str] = (), *, profile: bool = False, seconds: float = 1.5, say: Say = lambda line: None
) -> dict[str, Any]:
    """Measure the cases of these names, or all (with `profile`, all that train), each for about
    `seconds`; `say` hears what is being done. Returns what `tapeless bench --json` prints.

    Raises `ConfigError` for an unknown case, or one that `profile` cannot look into.
    """
    from tapeless.ops.cpu.profile import check_clock

    for name in names:
        if name not in CASES:
            raise ConfigError(f"no benchmark is called {name!r}.{did_you_mean(name, CASES)}")
        if profile and name not in TRAINING:
            raise ConfigError(f"only training can be profiled, not {name!r}. Known: {', '.join(TRAINING)}.")
    if profile:
        check_clock()
    session, peaks, results = Session(seconds, say), Peaks(), []
    for name in dict.fromkeys(names or (TRAINING if profile else CASES)):
        say(name)
        peaks.measure()
        results.append({"case": name, "work": CASES[name].work} | _measured(CASES[name], session, profile))
    for result in results:
        if "gflops" in result:
            result["fraction_of_peak"] = result["gflops"] / peaks.gflops[result["threads"]]
    return about() | {"peak_gflops": peaks.gflops, "cases": results}


class Peaks:
    """GFLOP/s that one core and all cores can do: the best of all measurements, since what else the
    machine does in the meantime takes some away."""

    def __init__(self) -> None:
        threads = {1, processors(), *(case.threads for case in TRAINING.values())}
        self.gflops = dict.fromkeys(sorted(threads), 0.0)

    def measure(self) -> None:
        from tapeless.ops.cpu.peak import peak_gflops

        for threads, best in self.gflops.items():
            self.gflops[threads] = max(best, peak_gflops(threads))


def _measured(case: Any, session: Session, profile: bool) -> dict[str, Any]:
    result: dict[str, Any] = {"threads": getattr(case, "threads", 1)}
    try:
        result |= case.measure(session)
        if profile:
            result["profile"] = case.profile(session)
    except Differs as reason:
        return {"threads": result["threads"], "refused": str(reason)}
    return result


def about() -> dict[str, Any]:
    """The machine, the date and the versions that figures hold for."""
    from tapeless.ops.cpu import native

    return {
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "system": platform.system(),
            "architecture": platform.machine(),
        },
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("tapeless", "numpy", "numba", "llvmlite")},
        "simd": native.simd(),
        "dtype": "float32",
    }


def _processor() -> str:
    """The processor's name: the system's, or, since Linux has none on ARM, LLVM's."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    if sys.platform == "darwin":
        ask = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        with suppress(OSError):
            if name := subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip():
                return name
    name = llvm.get_host_cpu_name()
    return name if name not in ("", "generic") else platform.processor() or platform.machine()
