"""What a container is allowed, from trees as Linux shows them in both versions of its control groups."""

import os

import psutil
import pytest

from lora_studio import allotment
from lora_studio.jobs import bench, checks, devices

GB = 2**30
NONE = "9223372036854771712"  # what the older version says where nothing is limited


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 64 processors and 256 GB free, with control groups as they are given."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 256 * GB}))
    monkeypatch.setattr(allotment, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(allotment, "OWN", tmp_path / "own")

    def write(own: str, files: dict[str, str]) -> None:
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "groups" / name).write_text(text)

    return write


STAT = "anon 5\ninactive_file {cached}\nactive_file 7\ntotal_inactive_file {cached}\n"
TREES = {
    "a container of today": ("0::/\n", {"cpu.max": "200000 100000\n", "memory.max": f"{16 * GB}\n", "memory.current": f"{6 * GB}\n", "memory.stat": STAT.format(cached=2 * GB)}),
    "a service, limited above it": (
        "0::/a.slice/b.service\n",
        {
            "a.slice/cpu.max": "250000 100000", "a.slice/b.service/cpu.max": "max 100000", "a.slice/memory.max": str(16 * GB), "a.slice/memory.current": str(4 * GB),
            "a.slice/b.service/memory.max": "max", "a.slice/b.service/memory.current": str(3 * GB),
        },
    ),
    "a container of old, which sees only its own": (
        "12:pids:/docker/x\n4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n0::/\n",
        {
            "cpu,cpuacct/cpu.cfs_quota_us": "250000", "cpu,cpuacct/cpu.cfs_period_us": "100000", "memory/memory.limit_in_bytes": str(16 * GB),
            "memory/memory.usage_in_bytes": str(5 * GB), "memory/memory.stat": STAT.format(cached=GB),
        },
    ),
    "an old machine, limited in its own group": (
        "4:memory:/x\n3:cpu,cpuacct:/x\n",
        {
            "cpu/x/cpu.cfs_quota_us": "200000", "cpu/x/cpu.cfs_period_us": "100000", "cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000",
            "memory/x/memory.limit_in_bytes": str(12 * GB), "memory/x/memory.usage_in_bytes": "0", "memory/memory.limit_in_bytes": NONE, "memory/memory.usage_in_bytes": str(50 * GB),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_a_container_uses_what_it_is_allowed(machine, name):
    machine(*TREES[name])
    assert allotment.cores() == 2
    assert allotment.free_memory() == 12 * GB == checks.free_memory("cpu")
    assert devices.describe() == "CPU · 2 cores" or devices.known()[0] != "cpu"
    assert allotment.of_child({"A": "b"}) == {"A": "b", "OMP_NUM_THREADS": "2"}
    assert allotment.of_child({"OMP_NUM_THREADS": "1"}) == {"OMP_NUM_THREADS": "1"}  # somebody said so


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("", {}),
        ("0::/\n", {"cpu.max": "max 100000", "memory.max": "max", "memory.current": "7"}),
        ("3:cpu,cpuacct:/\n4:memory:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000", "memory/memory.limit_in_bytes": NONE, "memory/memory.usage_in_bytes": "5"}),
        ("0::/../../elsewhere\n", {"cpu.max": "what", "memory.max": "", "memory.current": "x"}),
        ("no line at all", {"cpu.max": "100000 0"}),
    ],
)
def test_without_a_limit_it_is_the_machine(machine, own, files):
    machine(own, files)
    assert allotment.cores() == 64 and allotment.free_memory() == 256 * GB and allotment.of_child({"A": "b"}) == {"A": "b"}


def test_a_part_of_a_processor_is_one_and_used_up_memory_is_none(machine):
    machine("0::/\n", {"cpu.max": "20000 100000", "memory.max": str(GB), "memory.current": str(2 * GB)})
    assert allotment.cores() == 1 and allotment.free_memory() == 0


def test_here_it_is_no_more_than_there_is():
    assert 1 <= allotment.cores() <= os.cpu_count()
    assert 0 < allotment.free_memory() <= psutil.virtual_memory().total


def test_the_bench_is_told(machine, workspace):
    machine(*TREES["a container of today"])
    try:
        process = psutil.Process(bench.ask("ping")["pid"])
        assert process.environ()["OMP_NUM_THREADS"] == "2"
    finally:
        bench.stop()
