"""What of a home outlives the machine: its items, what stands in each, and what is left out."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from lora_studio import durable

SECTIONS = ("runs", "library", "data", "pictures", "models")
QUEUE = "queue.json"
# What is made anew at will, belongs to a living process, or was asked of one.
LEFT = re.compile(r"\.part-.*|\.trash-.*|.*\.lock")
LEFT_IN = {"runs": ("process.json", "control"), "library": (".index",)}
EVENTS, LOG = "events.jsonl", "log.txt"


def all_in(home: Path, *, others: bool = True) -> Iterator[tuple[str, Path]]:
    """Each item of a home with its place, and of the homes of its users with `others`. A checkpoint comes before the run it belongs to, so that events are
    never older than it."""
    for top in (home, *(sorted((home / "users").glob("*")) if others else ())):
        for section in SECTIONS:
            for entry in sorted((top / section).iterdir()) if (top / section).is_dir() else ():
                if _is_left(entry.name, section, 0) or entry.is_symlink():
                    continue
                for folder, names, files in os.walk(entry):
                    depth = len(Path(folder).relative_to(entry).parts) + 1
                    names[:] = sorted(name for name in names if not _is_left(name, section, depth))
                    if durable.MARKER in files and Path(folder) != entry:
                        yield Path(folder).relative_to(home).as_posix(), Path(folder)
                yield entry.relative_to(home).as_posix(), entry
    if (home / QUEUE).is_file():
        yield QUEUE, home / QUEUE


def _is_left(name: str, section: str, depth: int) -> bool:
    return bool(LEFT.fullmatch(name)) or (depth <= 1 and name in LEFT_IN.get(section, ()))


def stamps(item: str, path: Path) -> dict:
    """The files of an item with what changes when they do, and its folders. Other items inside are not of it. Raises FileNotFoundError."""
    if not path.is_dir():
        return {"files": {"": stamp(path)}, "folders": []}
    parts, found, folders = item.split("/"), {}, []
    section = parts[2] if parts[0] == "users" else parts[0]
    for folder, names, files in os.walk(path):
        here = Path(folder)
        depth = 1 + len(here.relative_to(path).parts) + len(parts) - len(root(item).split("/"))
        names[:] = sorted(
            name
            for name in names
            if not _is_left(name, section, depth) and not (here / name).is_symlink() and not (here / name / durable.MARKER).is_file()
        )
        folders += [(here / name).relative_to(path).as_posix() for name in names]
        for name in sorted(files):
            if not _is_left(name, section, depth) and not (here / name).is_symlink():
                found[(here / name).relative_to(path).as_posix()] = stamp(here / name)
    return {"files": found, "folders": folders}


def steady(found: dict) -> dict:
    """Stamps without those of the files that only grow."""
    return {**found, "files": {name: None if name in (EVENTS, LOG) else seen for name, seen in found["files"].items()}}


def stamp(file: Path) -> tuple[int, int, int]:
    """What changes when a file does: bytes, nanoseconds, inode. Raises FileNotFoundError."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def root(item: str) -> str:
    """The thing an item is part of: a run, an adapter, an album."""
    return "/".join(item.split("/")[: 4 if item.startswith("users/") else 2])


def is_run(item: str) -> bool:
    """Whether an item is a run (without its checkpoints)."""
    return re.fullmatch(r"(users/[^/]+/)?runs/[^/]+", item) is not None


def is_item(name: str) -> bool:
    """Whether an item of a manifest may be one of a home."""
    return is_inside(name) and name.split("/")[0] in (*SECTIONS, "users", QUEUE)


def is_inside(name: str) -> bool:
    """Whether a relative path of a manifest stays inside."""
    return not name.startswith("/") and ".." not in name.split("/") and "\0" not in name
