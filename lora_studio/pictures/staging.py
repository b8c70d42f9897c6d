"""Folders in the cache that are whole or not there: filled beside their place under a lock, listed, then renamed."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from lora_studio import durable
from lora_studio.errors import MachineError

STAGE = f"{durable.TEMPORARY}pictures-"
LIST = "unpacked.json"
MOST_BYTES = 8 << 30
SPARE = 1 << 30
"""What must stay free on the disk."""


def publish(target: Path, fill: Callable[[Path], dict[str, int]]) -> Path:
    """The folder of `target`'s files. Unless it is whole already, `fill` writes them and returns the size of each.

    Processes that want the same folder wait for each other. Raises MachineError, and what `fill` raises.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = durable.Lock(target.parent / "pictures.lock")
    if not lock.take(wait=600):
        raise MachineError("machine.write", path=target.parent, reason="another process has been unpacking there for ten minutes")
    try:
        if not _is_whole(target):
            _fill(target, fill)
    finally:
        lock.release()
    return target / "files"


def _is_whole(target: Path) -> bool:
    """Whether a published folder still has every file at its size."""
    listed = durable.read_json(target / LIST)
    if not isinstance(listed, dict):
        return False
    try:
        return all((target / "files" / name).stat().st_size == size for name, size in listed.items())
    except OSError:
        return False


def _fill(target: Path, fill: Callable[[Path], dict[str, int]]) -> None:
    for left in target.parent.glob(f"{STAGE}*"):
        shutil.rmtree(left)  # of a process that was killed: the lock is ours
    stage = Path(tempfile.mkdtemp(prefix=STAGE, dir=target.parent))
    try:
        (stage / "files").mkdir()
        durable.write(stage / LIST, json.dumps(fill(stage / "files")))
        if target.exists():
            durable.remove_folder(target)
        os.replace(stage, target)
        durable.sync_folder(target.parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def make_sure_it_fits(size: int, folder: Path) -> None:
    """Raise MachineError when `size` more bytes would leave too little of the folder's disk."""
    free = shutil.disk_usage(folder).free
    if size + SPARE > free:
        raise MachineError("machine.disk", path=folder.parents[1], free=f"{free / 1e9:.1f} GB", needed=f"{(size + SPARE) / 1e9:.1f} GB")


def write(path: Path, content: bytes) -> int:
    """Write a file and put it on disk; its size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return len(content)
