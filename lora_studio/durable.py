"""Files that survive a crash: whole or absent, and on disk before anything says so; locks that end with their holder."""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import time
from pathlib import Path

TEMPORARY = ".part-"
TRASH = ".trash-"
MARKER = "manifest.json"
PORTION = 1 << 22


def write(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content` in one step: temporary file, fsync, rename, fsync of the folder."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_json(path: Path, value) -> None:
    """Replace `path` by `value` as JSON."""
    write(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path, default=None):
    """The JSON in `path`, or `default` when it is absent or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default


def sync_folder(folder: Path) -> None:
    """Put a folder's names on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish_folder(target: Path, files: dict[str, bytes | Path]) -> None:
    """Make `target` a folder with exactly these files (a Path is copied from there; names may have folders before them): staged beside it,
    each fsynced, a manifest of sizes and hashes last, then renamed. An older `target` is moved away first and then deleted. Either folder is whole at any instant."""
    stage = target.with_name(f"{TEMPORARY}{os.getpid()}-{target.name}")
    if stage.exists():
        shutil.rmtree(stage)
    stage.mkdir(parents=True)
    manifest = {}
    for name, data in files.items():
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        digest, size = hashlib.sha256(), 0
        with open(data, "rb") if isinstance(data, Path) else io.BytesIO(data) as source, open(stage / name, "wb") as file:
            while portion := source.read(PORTION):
                file.write(portion)
                digest.update(portion)
                size += len(portion)
            file.flush()
            os.fsync(file.fileno())
        manifest[name] = {"bytes": size, "sha256": digest.hexdigest()}
    for inner in {(stage / name).parent for name in files} - {stage}:
        sync_folder(inner)
    write_json(stage / MARKER, manifest)
    if target.exists():
        remove_folder(target)
    os.replace(stage, target)
    sync_folder(target.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder so that nobody ever sees half of it: rename it to trash, then delete the trash."""
    trash = folder.with_name(f"{TRASH}{os.getpid()}-{folder.name}")
    if trash.exists():
        shutil.rmtree(trash)
    os.replace(folder, trash)
    shutil.rmtree(trash)


def damage(folder: Path) -> str | None:
    """What is wrong with a published folder, in words; None when every file has the size and hash of the manifest."""
    manifest = read_json(folder / MARKER)
    if not isinstance(manifest, dict):
        return f"{MARKER} is missing or broken"
    for name, known in manifest.items():
        try:
            data = (folder / name).read_bytes()
        except OSError:
            return f"{name} is missing"
        if len(data) != known["bytes"]:
            return f"{name} has {len(data)} bytes instead of {known['bytes']}"
        if hashlib.sha256(data).hexdigest() != known["sha256"]:
            return f"{name} has changed since it was written"
    return None


def sweep(folder: Path) -> None:
    """Delete what a crash left behind in `folder`: temporary files and trash."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name.startswith((TEMPORARY, TRASH)):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)


class Lock:
    """An exclusive lock on a file (flock): held until released, or until every process that inherited it has ended."""

    def __init__(self, path: Path):
        self.path, self.handle = path, None

    def take(self, *, wait: float = 0.0) -> bool:
        """Try for `wait` seconds; True when the lock is held."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        end = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.handle = handle
                return True
            except BlockingIOError:
                if time.monotonic() >= end:
                    os.close(handle)
                    return False
                time.sleep(0.01)

    def release(self) -> None:
        """Let go of this process's hold; a child that inherited the lock keeps it."""
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None

    def __enter__(self):
        if not self.take(wait=30.0):
            raise TimeoutError(f"{self.path} was locked for 30 seconds")
        return self

    def __exit__(self, *_):
        self.release()


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock on `path`."""
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    with contextlib.closing(os.fdopen(handle, "r+b")) as file:
        try:
            # Shared, so that two askers never take each other for a holder.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
