"""Memory and processors that a process may use, from the files of a made-up system: exact values."""

from __future__ import annotations

import os

import pytest

from tapeless.machine import free_memory, processors

GB = 10**9
AVAILABLE = 15_625_000  # kB that the system calls available: 16 GB


@pytest.fixture
def machine(tmp_path):
    """Write files of a system with 16 GB available into a folder, which is its root."""

    def write(files, meminfo=f"MemTotal: 31250000 kB\nMemAvailable:   {AVAILABLE} kB\nHugePages_Total: 0\n"):
        for name, text in {"proc/meminfo": meminfo, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        return tmp_path

    return write


def group(folder, limit, usage, inactive=None):
    """The files of a control group of version 2."""
    files = {f"sys/fs/cgroup/{folder}memory.max": limit, f"sys/fs/cgroup/{folder}memory.current": usage}
    if inactive is not None:
        statistics = f"anon 1\nfile {inactive + 5}\nactive_file 5\ninactive_file {inactive}"
        files[f"sys/fs/cgroup/{folder}memory.stat"] = statistics
    return files


def test_without_a_control_group_it_is_what_the_system_calls_available(machine):
    assert free_memory(machine({})) == 16 * GB


def test_page_cache_of_a_container_counts_as_free(machine):
    """A container of 2 GB that is nearly full: 1.9 GB of it are cache that the system takes back."""
    files = {"proc/self/cgroup": "0::/", **group("", 2 * GB, 1_990_000_000, 1_900_000_000)}
    assert free_memory(machine(files)) == 2 * GB - 90_000_000


@pytest.mark.parametrize(
    ("own", "parent", "expected"),
    [
        (("max", 3 * GB), (4 * GB, 3 * GB), 1 * GB),  # only the parent has a limit
        ((2 * GB, 1 * GB), (8 * GB, 7.5 * GB), 0.5 * GB),  # the parent has less left, others being in it
        ((2 * GB, 1.8 * GB), (8 * GB, 7 * GB), 0.2 * GB),
        ((2 * GB, 2.1 * GB), ("max", 7 * GB), 0),  # over its limit: nothing is free, not less
        (("max", 1 * GB), ("max", 2 * GB), 16 * GB),
        ((64 * GB, 1 * GB), ("max", 2 * GB), 16 * GB),  # more than the machine has
    ],
)
def test_every_group_around_the_process_counts(machine, own, parent, expected):
    def text(values):
        return [v if v == "max" else int(v) for v in values]

    files = {
        "proc/self/cgroup": "0::/user.slice/job.scope",
        **group("user.slice/", *text(parent)),
        **group("user.slice/job.scope/", *text(own)),
        **group("user.slice/other.scope/", 1, 1),  # of others
    }
    assert free_memory(machine(files)) == expected


def test_a_container_that_sees_its_own_group_at_the_top(machine):
    """Where names of groups are the machine's, the path begins with the container's own."""
    files = {
        "proc/self/cgroup": "0::/docker/0123/job",
        **group("", 4 * GB, 1 * GB),
        **group("job/", 2 * GB, 500_000_000),
    }
    assert free_memory(machine(files)) == 1.5 * GB
    assert free_memory(machine({"proc/self/cgroup": "0::/../../elsewhere"})) == 3 * GB


def test_version_1(machine):
    memory = "sys/fs/cgroup/memory"
    files = {
        "proc/self/cgroup": "12:cpu,cpuacct:/docker/0123\n5:memory:/docker/0123/job\n1:name=systemd:/docker",
        f"{memory}/memory.limit_in_bytes": 9223372036854771712,  # none
        f"{memory}/memory.usage_in_bytes": 20 * GB,
        f"{memory}/docker/0123/memory.limit_in_bytes": 3 * GB,
        f"{memory}/docker/0123/memory.usage_in_bytes": 2 * GB,
        f"{memory}/docker/0123/memory.stat": "inactive_file 7\ntotal_inactive_file 400000000",
        f"{memory}/docker/0123/job/memory.limit_in_bytes": 2 * GB,
        f"{memory}/docker/0123/job/memory.usage_in_bytes": 500_000_000,
    }
    root = machine(files)
    assert free_memory(root) == 1_400_000_000
    (root / memory / "docker/0123/job/memory.usage_in_bytes").write_text("1900000000\n")
    assert free_memory(root) == 100_000_000


@pytest.mark.parametrize("damaged", ["", "many", "-"])
def test_files_that_say_nothing_are_no_limit(machine, damaged):
    files = {"proc/self/cgroup": "0::/", **group("", damaged, damaged), "sys/fs/cgroup/cpu.max": damaged}
    root = machine(files)
    assert free_memory(root) == 16 * GB
    assert processors(root) == processors(root / "nothing")


VM_STAT = """#!/bin/sh
cat <<END
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               12000.
Pages active:                            201003.
Pages inactive:                           70000.
Pages speculative:                          500.
Pages throttled:                              0.
Pages wired down:                         98765.
Pages purgeable:                            321.
"Translation faults":                 123456789.
END
"""


def test_macos_counts_pages_that_are_free_or_inactive(machine):
    """What psutil calls available: free and inactive pages, free ones being shown without speculative ones."""
    root = machine({"usr/bin/vm_stat": VM_STAT}, meminfo="nothing of this kind")
    (root / "usr/bin/vm_stat").chmod(0o755)
    assert free_memory(root) == 16384 * (12000 + 500 + 70000)


def test_a_system_that_does_not_tell_has_all_its_memory_free(tmp_path):
    assert free_memory(tmp_path) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="this is no Linux")
def test_this_machine_has_less_free_than_in_all():
    with open("/proc/meminfo") as file:
        total = 1024 * int(next(line for line in file if line.startswith("MemTotal")).split()[1])
    assert 0 < free_memory() < total


# ---------------------------------------------------------------- processors


@pytest.fixture(autouse=True)
def eight_processors(monkeypatch):
    for name in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("max 100000", 8),
        ("100000 100000", 1),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("600000 200000", 3),
        ("3200000 100000", 8),
    ],
)
def test_time_that_a_container_is_given(machine, limit, expected):
    assert processors(machine({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": limit})) == expected


def test_time_that_the_groups_around_it_are_given(machine):
    files = {
        "proc/self/cgroup": "0::/a/b",
        "sys/fs/cgroup/a/cpu.max": "300000 100000",
        "sys/fs/cgroup/a/b/cpu.max": "max 100000",
    }
    assert processors(machine(files)) == 3


@pytest.mark.parametrize(("quota", "expected"), [(-1, 8), (150_000, 1), (400_000, 4)])
@pytest.mark.parametrize("mounted", ["cpu,cpuacct", "cpu"])
def test_time_in_version_1(machine, quota, expected, mounted):
    files = {
        "proc/self/cgroup": "4:cpu,cpuacct:/docker/0123",
        f"sys/fs/cgroup/{mounted}/cpu.cfs_quota_us": quota,
        f"sys/fs/cgroup/{mounted}/cpu.cfs_period_us": 100_000,
    }
    assert processors(machine(files)) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [("4,2", 4), (" 3 , 2 ", 3), ("5", 5), ("64", 8), ("4,", 8), ("4,x", 8), ("0,4", 8), ("", 8), (",", 8)],
)
def test_lists_of_numbers_of_threads_are_read_as_openmp_reads_them(machine, monkeypatch, value, expected):
    """The first number is that of the outer level; libgomp and libomp leave an invalid list out."""
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert processors(machine({})) == expected


def test_the_least_of_all_counts(machine, monkeypatch):
    root = machine({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "500000 100000"})
    assert processors(root) == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert processors(root) == 3
    monkeypatch.setenv("NUMBA_NUM_THREADS", "2")
    assert processors(root) == 2
