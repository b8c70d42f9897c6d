"""What of the machine this process may use: processors and memory. A container is often allowed far less than the machine has, and neither
Python nor torch look at that: on two of 64 processors they start 64 threads, and free memory is that of the host.

The limits are those of Linux' control groups, of both versions, on every level from this process's own up; elsewhere the machine is the limit.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

GROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def cores() -> int:
    """Processors that this process may use, at least 1: those that it may run on, and no more than its groups have time for."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([there, *(int(share) for share in _shares())]))


def free_memory() -> int:
    """Bytes that can still be used: what the machine has free, and no more than the groups leave."""
    return max(0, min([psutil.virtual_memory().available, *_left()]))


def of_child(environment: dict[str, str]) -> dict[str, str]:
    """An environment for a process that computes: where the groups allow fewer processors than there are, it is told how many."""
    count = cores()
    return environment if count >= (os.cpu_count() or 1) else {"OMP_NUM_THREADS": str(count), **environment}


def _shares() -> Iterator[float]:
    """How many processors' time each group has, where that is limited."""
    for place in _places("cpu"):
        told = _words(place / "cpu.max") or _words(place / "cpu.cfs_quota_us") + _words(place / "cpu.cfs_period_us")
        quota, period = (_number(word) for word in told) if len(told) == 2 else (math.inf, 1)
        if 0 < quota < math.inf and period > 0:
            yield quota / period


def _left() -> Iterator[int]:
    """The bytes each group has left, where they are limited. Cached files give way to what needs room, and count as free."""
    for place in _places("memory"):
        for most, used, cached in (("memory.max", "memory.current", "inactive_file"), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")):
            limit, taken = (_number(" ".join(_words(place / name))) for name in (most, used))
            if limit < math.inf and taken < math.inf:
                table = _words(place / "memory.stat")
                known = dict(zip(table[::2], table[1::2]))
                yield int(limit - taken) + int(known.get(cached, 0))


def _places(controller: str) -> Iterator[Path]:
    """The folders of this process's groups, its own first. Where only its own part of the tree is to be seen, the top is its own."""
    for line in _text(OWN).splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if controller not in names.split(",") and (number, names) != ("0", ""):
            continue
        top = GROUPS if not names else GROUPS / names if (GROUPS / names).is_dir() else GROUPS / controller
        own = PurePosixPath("/" if ".." in path else path)
        yield from (top.joinpath(*one.parts[1:]) for one in (own, *own.parents))


def _number(word: str) -> float:
    """A number of a limit; `max`, and what is none, is no limit."""
    return float(word) if word.lstrip("-").isdigit() else math.inf


def _words(path: Path) -> list[str]:
    return _text(path).split()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
