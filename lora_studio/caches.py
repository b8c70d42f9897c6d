"""What may be fetched or made again is bounded where many share a disk: bases and data of the Hub, latents, unpacked archives.

What was not used for long goes first, and nothing that a run or the bench needs. When something was last used is what the file system says of
its files, which is right to about a day.
"""

import os
import shutil
import stat
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_studio import durable, runs, settings
from lora_studio.errors import HostError, StudioError
from lora_studio.fence import GB
from lora_studio.home import home

HOSTED_GB, HOSTED_DAYS = 30.0, 14.0
DAY = 86400.0
# Somebody may be fetching it, or about to load what was just fetched.
YOUNG_SECONDS = 3600.0


@dataclass(frozen=True)
class Entry:
    """One thing in a cache: its folder or file, what it is called (a repository's id, or a path), its bytes, and when it was last used."""

    path: Path
    name: str
    bytes: int
    used: float


@dataclass(frozen=True)
class Bounds:
    """How much the caches may hold, in bytes, and for how many seconds unused; None where nothing was said."""

    bytes: int | None = None
    seconds: float | None = None


def bounds(environment, *, is_hosted: bool) -> Bounds:
    """What LORA_STUDIO_CACHE_GB and LORA_STUDIO_CACHE_DAYS say; where many share the disk there is a bound in any case. Raises HostError."""
    found = []
    for variable, hosted, unit in (("LORA_STUDIO_CACHE_GB", HOSTED_GB, GB), ("LORA_STUDIO_CACHE_DAYS", HOSTED_DAYS, DAY)):
        text = environment.get(variable, "").strip()
        try:
            number = float(text) if text else (hosted if is_hosted else None)
        except ValueError:
            number = 0.0
        if number is not None and not number > 0:
            raise HostError("host.number", variable=variable, text=text[:40])
        found.append(None if number is None else number * unit)
    return Bounds(None if found[0] is None else int(found[0]), found[1])


def entries() -> list[Entry]:
    """Everything in the caches, what was unused longest first."""
    return sorted((entry for place in (_hub(), _own()) for entry in place), key=lambda entry: (entry.used, entry.name))


def size() -> int:
    """The bytes of all caches."""
    return sum(entry.bytes for entry in entries())


def trim(limit: Bounds, *, kept: Collection[str] = (), now: float | None = None) -> list[Entry]:
    """Remove what was unused for too long, then what was unused longest until the rest fits. Never a repository that is named in `kept` or by a run
    that waits or works, nothing of ours while one works on pictures, and nothing that is fetched just now. Returns what went."""
    now = time.time() if now is None else now
    found, gone = entries(), []
    busy, since = _needed()
    needed = {*busy, *kept}
    left = sum(entry.bytes for entry in found)
    for entry in found:
        is_old = limit.seconds is not None and now - entry.used > limit.seconds
        is_much = limit.bytes is not None and left > limit.bytes
        if not (is_old or is_much) or entry.name in needed or now - entry.used < YOUNG_SECONDS or _is_fetched(entry):
            continue
        if since is not None and entry.path.is_relative_to(home()) and entry.used > since - DAY:
            continue
        _remove(entry.path)
        gone, left = [*gone, entry], left - entry.bytes
    return gone


def _needed() -> tuple[set[str], float | None]:
    """Every text in the specs of runs that wait or work, and since when the oldest of them is there."""
    texts, since = set(), None
    for pattern in ("runs/*/spec.yaml", "users/*/runs/*/spec.yaml"):
        for spec in home().glob(pattern):
            if not (runs.is_live(spec.parent) or runs.is_waiting(spec.parent)):
                continue
            since = min(since or time.time(), durable.read_json(spec.parent / "card.json", {}).get("created", time.time()))
            try:
                texts |= set(_texts(settings.read_tree(spec)))
            except (StudioError, OSError):
                continue
    return texts, since


def _texts(tree) -> Iterator[str]:
    if isinstance(tree, dict | list):
        for inner in tree.values() if isinstance(tree, dict) else tree:
            yield from _texts(inner)
    elif isinstance(tree, str):
        yield tree


def _hub() -> Iterator[Entry]:
    """The repositories of the Hub's cache."""
    for path in sorted(_cache().glob("*--*")):
        kind, _, id = path.name.partition("--")
        if kind in ("models", "datasets", "spaces") and path.is_dir():
            yield _entry(path, id.replace("--", "/"))


def _own() -> Iterator[Entry]:
    """What the studio made itself: home/cache/<kind>/<one>."""
    for path in sorted((home() / "cache").glob("*/*")):
        if not path.name.startswith((durable.TEMPORARY, durable.TRASH)):
            yield _entry(path, str(path))


def _entry(path: Path, name: str) -> Entry:
    total, used = 0, 0.0
    places = [path] if path.is_file() else [Path(folder) / file for folder, _, files in os.walk(path) for file in files]
    for place in places:
        try:
            found = place.lstat()
        except OSError:
            continue
        if not stat.S_ISLNK(found.st_mode):  # following a link is a use of the link, and looking here follows it
            total, used = total + found.st_size, max(used, found.st_atime, found.st_mtime)
    return Entry(path, name, total, used or path.lstat().st_mtime)


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _is_fetched(entry: Entry) -> bool:
    """Whether somebody fetches a repository: the Hub's client locks its files meanwhile."""
    return any(durable.is_locked(lock) for lock in (_cache() / ".locks" / entry.path.name).glob("*.lock"))


def _remove(path: Path) -> None:
    """Remove an entry so that nobody takes half of it for whole. One that is mapped stays readable for who has it open."""
    if path.is_dir():
        durable.remove_folder(path)
        shutil.rmtree(_cache() / ".locks" / path.name, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
