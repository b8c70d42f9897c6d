"""A planned bake on disk: staged beside its target, streamed, every file fsynced, then renamed."""

import contextlib
import json
import os
import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lora_studio import durable
from lora_studio.adapters.files import Entry
from lora_studio.checkpoints import numbers
from lora_studio.checkpoints.plan import Out, Plan, Shard
from lora_studio.errors import BakeError, MachineError

CHUNK = 4 << 20
WORKERS = 2
FLUSH_SECONDS = 0.05
SPARE = 64 << 20
_own = threading.local()


def apply(plan: Plan, target: Path, *, report: Callable[[int, int], None] = lambda done, total: None, texts: dict[str, bytes] | None = None) -> int:
    """Write what was planned as the new folder `target`, whole or not at all: staged beside it, every file fsynced, then renamed. `report`
    is told bytes done of all, and may raise to stop. `texts` are written beside the weights. Returns the bytes. Raises BakeError when it exists, MachineError when the disk is full."""
    if target.exists():
        raise BakeError("bake.target", path=target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < plan.bytes + SPARE:
            raise BakeError("bake.disk", path=target.parent, free=f"{free / 1e9:.1f}", needed=f"{(plan.bytes + SPARE) / 1e9:.1f}")
        stage = target.with_name(f"{durable.TEMPORARY}{os.getpid()}-{target.name}")
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
        try:
            done = _Done(plan.bytes, report)
            for shard in plan.shards:
                _write_shard(plan.base, shard, stage, done)
            for name in plan.copied:
                _copy_file(plan.base / name, stage / name, done)
            for name, data in {**plan.texts, **(texts or {})}.items():
                durable.write(_room(stage / name), data)
            for folder in {file.parent for file in stage.rglob("*")}:
                durable.sync_folder(folder)
            os.replace(stage, target)
            durable.sync_folder(target.parent)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise
    except OSError as error:
        raise MachineError("machine.write", path=target, reason=error.strerror or str(error)) from None
    return plan.bytes


class _Done:
    """Bytes done, told from several threads."""

    def __init__(self, total: int, report):
        self.total, self.report, self.bytes, self.guard = total, report, 0, threading.Lock()

    def add(self, count: int) -> None:
        with self.guard:
            self.bytes += count
            self.report(self.bytes, self.total)


def _room(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _copy_file(source: Path, target: Path, done: _Done) -> None:
    with open(source, "rb") as given, open(_room(target), "wb") as made:
        _copy_range(given.fileno(), made.fileno(), 0, 0, os.fstat(given.fileno()).st_size, done)
        os.fsync(made.fileno())


def _copy_range(given: int, made: int, start: int, at: int, count: int, done: _Done) -> None:
    """Copy bytes from one open file to another, within the kernel where it can."""
    while count:
        wanted = min(count, 64 << 20)
        try:
            moved = os.copy_file_range(given, made, wanted, start, at)
        except OSError:
            moved = 0
        if not moved:
            data = os.pread(given, min(wanted, CHUNK), start)
            if not data:
                raise OSError("the base became shorter while it was read")
            moved = _put(made, data, at)
        start, at, count = start + moved, at + moved, count - moved
        done.add(moved)


def _put(made: int, data, at: int) -> int:
    view = memoryview(data)
    while view:
        moved = os.pwrite(made, view, at)
        view, at = view[moved:], at + moved
    return len(data)


def _header_of(shard: Shard) -> bytes:
    """The base's own header where names and types stay, byte for byte; else a new one with the same order."""
    if len({out.name for out in shard.outs}) == shard.header.count(b'"data_offsets"') and not any(out.is_converted for out in shard.outs):
        return struct.pack("<Q", len(shard.header)) + shard.header
    entries, at = {}, 0
    for out in shard.outs:
        entries[out.name] = {"dtype": out.dtype, "shape": list(out.source.shape), "data_offsets": [at, at + out.bytes]}
        at += out.bytes
    head = {"__metadata__": shard.metadata, **entries} if shard.metadata else entries
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_shard(base: Path, shard: Shard, stage: Path, done: _Done) -> None:
    head = _header_of(shard)
    with open(base / shard.path, "rb") as given, open(_room(stage / shard.path), "wb") as made:
        _put(made.fileno(), head, 0)
        at, jobs = len(head), []
        for out in shard.outs:
            jobs.append((out, at))
            at += out.bytes
        _allocate(made.fileno(), at)
        plain = [(out, place) for out, place in jobs if not out.changes and not out.is_converted]
        _each(lambda job: _copy_range(given.fileno(), made.fileno(), job[0].source.start, job[1], job[0].bytes, done), _runs(plain))
        with numbers.one_thread(), _flushing(made.fileno()):
            blocks = [(out, place, rows) for out, place in jobs if out.changes or out.is_converted for rows in numbers.blocks(out)]
            _each(lambda block: _write_rows(given.fileno(), made.fileno(), *block, done), blocks)
        os.fsync(made.fileno())


@contextlib.contextmanager
def _flushing(file: int) -> Iterator[None]:
    """Let what is written reach the disk while the rest is summed, so that the fsync at the end finds little to do. Raises OSError: a system
    tells of a failed write once, and whoever asks later hears nothing of it."""
    over, failed = threading.Event(), []
    sync = getattr(os, "fdatasync", os.fsync)

    def flush() -> None:
        while not over.wait(FLUSH_SECONDS):
            try:
                sync(file)
            except OSError as error:
                failed.append(error)
                return

    helper = threading.Thread(target=flush, daemon=True)
    helper.start()
    try:
        yield
    finally:
        over.set()
        helper.join()
    if failed:
        raise failed[0]


def _runs(plain: list[tuple[Out, int]]) -> list[tuple[Out, int]]:
    """Neighbours among what is only copied, as one."""
    found: list[tuple[Out, int]] = []
    for out, at in plain:
        if found and found[-1][0].source.end == out.source.start and found[-1][1] + found[-1][0].bytes == at:
            last, place = found[-1]
            size = out.source.end - last.source.start
            found[-1] = (Out(last.name, Entry("U8", (size,), last.source.start, out.source.end), "U8"), place)
        else:
            found.append((out, at))
    return found


def _allocate(file: int, size: int) -> None:
    """Take the room now: a full disk is found before the work."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)


def _each(work, jobs: list) -> None:
    """All jobs, by a few threads; the first error stops the rest."""
    with ThreadPoolExecutor(WORKERS) as pool:
        waiting = [pool.submit(work, job) for job in jobs]
        try:
            for job in waiting:
                job.result()
        except BaseException:
            for job in waiting:
                job.cancel()
            raise


def _write_rows(given: int, made: int, out: Out, at: int, rows: range, done: _Done) -> None:
    if not hasattr(_own, "scratch"):
        _own.scratch = numbers.Scratch()
    data, offset = numbers.rewritten(given, out, rows, _own.scratch)
    done.add(_put(made, data, at + offset))
