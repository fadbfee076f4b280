"""Memory and processors that this process may use, on the machine or in a container on it.

`root` is where the system's files are found; tests give a folder that has some of them.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

ROOT = Path("/")

# A control group's memory limit, its usage, and in `memory.stat` the part of that usage which is page cache
# the system reclaims before it refuses memory: version 2, then version 1.
MEMORY = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory(root: Path = ROOT) -> float:
    """Bytes of memory that this process may still take.

    This is what the system calls available (Linux: MemAvailable; macOS: free, speculative and inactive
    pages), at most what the process's control group and each group around it have left of their limits.
    Page cache that can be reclaimed counts as free. Elsewhere it is all physical memory, or infinity
    where the system does not tell.
    """
    free = _available(root)
    for group in _control_groups(root, "memory"):
        for limit, usage, cached in MEMORY:
            try:
                most, used = int((group / limit).read_text()), int((group / usage).read_text())
            except (OSError, ValueError):
                continue  # no such file, or no limit: "max"
            free = min(free, most - used + _statistics(group / "memory.stat").get(cached, 0))
    return max(free, 0)


def processors(root: Path = ROOT) -> int:
    """How many processors this process may use: those it may run on, at most what its control groups give
    it time for (1.5 processors' time is that of 1), and at most NUMBA_NUM_THREADS and OMP_NUM_THREADS."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows have no such call
        count = os.cpu_count() or 1
    count = min(count, _processors_paid_for(root) or count)
    numba, openmp = (os.environ.get(name, "").strip() for name in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS"))
    # OpenMP takes a list, "4,2": threads of the outer parallel regions, then of those inside them.
    for values in ([numba], [value.strip() for value in openmp.split(",")]):
        if all(value.isdecimal() and int(value) > 0 for value in values):
            count = min(count, int(values[0]))
    return count


# ---------------------------------------------------------------- memory


def _available(root: Path) -> float:
    try:
        [count] = re.findall(r"^MemAvailable:\s*(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE)
        return 1024 * int(count)
    except (OSError, ValueError):
        pass
    try:  # macOS
        shown = subprocess.run([root / "usr/bin/vm_stat"], capture_output=True, text=True, check=True).stdout
        page = int(re.findall(r"page size of (\d+) bytes", shown)[0])
        pages = {name: int(count) for name, count in re.findall(r"Pages (\w+):\s*(\d+)", shown)}
        return page * (pages["free"] + pages["speculative"] + pages["inactive"])
    except (OSError, subprocess.SubprocessError, KeyError, IndexError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return float("inf")


def _statistics(path: Path) -> dict[str, int]:
    try:
        return {name: int(value) for name, value in map(str.split, path.read_text().splitlines())}
    except (OSError, ValueError):
        return {}


# ---------------------------------------------------------------- control groups


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control groups under this controller, from its own to the topmost; of
    version 2 and of version 1, since a system may have both."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = ["0::/", f"1:{controller}:/"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        top = root / "sys/fs/cgroup"
        if controllers:
            if controller not in controllers.split(","):
                continue
            top /= controllers if (top / controllers).is_dir() else controller
        yield from _upwards(top, path)


def _upwards(top: Path, path: str) -> Iterator[Path]:
    """The folder of the group `path` and those around it, up to `top`. Inside a container `top` may be that
    of the container's own group, which the path begins with all the same."""
    names = list(PurePosixPath(path).parts[1:])
    while names and (".." in names or not top.joinpath(*names).is_dir()):
        del names[0]
    for count in range(len(names), -1, -1):
        yield top.joinpath(*names[:count])


@cache
def _processors_paid_for(root: Path) -> int | None:
    """Whole processors that the process's control groups have time for, at least 1; None without a limit."""
    least: int | None = None
    for group in _control_groups(root, "cpu"):
        for files in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
            try:
                quota, period = (int(word) for file in files for word in (group / file).read_text().split())
            except (OSError, ValueError):
                continue
            if quota > 0 and period > 0:  # version 1 has -1 for no limit
                count = max(1, quota // period)
                least = count if least is None else min(least, count)
    return least
