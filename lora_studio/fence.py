"""What the person who asks may name and use: everything at their own machine; as a visitor of a hosted studio what is theirs, what comes
along, and what the owner allows.

Whoever serves people says who asks (`watch`); bases, data, runs and the bench's client ask here before they look at a path or a name.
"""

import contextlib
import fnmatch
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from lora_studio.errors import BaseModelError, DataError, HostError
from lora_studio.home import PACKAGE, presets_folder

GB = 1_000_000_000


@dataclass(frozen=True)
class Limits:
    """What one visitor may use: `bases` and data sets of the Hub (`data`) by name or pattern, bytes on disk and in one upload, runs that wait or work at once, steps of a
    run, adapters that one run trains side by side, and seconds it may work."""

    bases: tuple[str, ...] = ("demo-text", "demo-image")
    data: tuple[str, ...] = ()
    disk: int = 5 * GB
    upload: int = GB // 2
    runs: int = 3
    steps: int = 2000
    adapters: int = 16
    seconds: float = 2 * 3600.0


@dataclass
class _Watch:
    """Who asks, as far as this process serves people."""

    asks: Callable[[], object] = field(default=lambda: None)
    token: str = field(default="", repr=False)


@dataclass(frozen=True)
class Asker:
    """A visitor as far as a process that works for everybody has to know them."""

    root: Path
    limits: Limits


_watch = _Watch()
_asker: ContextVar[Asker | None] = ContextVar("asker", default=None)


def watch(asks: Callable[[], object]) -> None:
    """From now on `asks()` gives the workspace of whoever is being served, or None."""
    _watch.asks = asks


def lend(token: str) -> None:
    """From now on this process, which works for one visitor, fetches with their token."""
    _watch.token = token


def lent() -> str | None:
    """The token of the visitor this process works for, if it was handed one."""
    return _watch.token or None


def asker() -> dict | None:
    """Who asks, in words for a process that works for everybody; None for everybody who is not fenced in."""
    own = visitor()
    return None if own is None else {"root": str(own.root), "bases": list(own.limits.bases)}


@contextlib.contextmanager
def working_for(asker: dict | None) -> Iterator[None]:
    """Within it this thread may look at what the `asker` may: what is in an adapter's file is a visitor's word, too."""
    found = _asker.set(None if asker is None else Asker(Path(asker["root"]), Limits(bases=tuple(asker["bases"]))))
    try:
        yield
    finally:
        _asker.reset(found)


def visitor():
    """The workspace of the visitor who is being served, or an `Asker`; None for everybody who is not fenced in."""
    found = _asker.get() or _watch.asks()
    return found if found is not None and found.limits is not None else None


def may_read(place: Path) -> bool:
    """Whether a path may be looked at: a visitor's lies in their workspace, or comes along with the studio."""
    own = visitor()
    return own is None or any(_inside(place, top) for top in (own.root, presets_folder(), PACKAGE / "demo"))


def place(text: str) -> Path | None:
    """What a text names on this machine, if it is there and whoever asks may look at it; None for everything else, and so for a text that no
    file system could hold."""
    try:
        here = Path(text).expanduser()
        is_there = here.exists()
    except (OSError, RuntimeError, ValueError):  # too long, the home of somebody who is not there, half a character
        return None
    return here.absolute() if is_there and may_read(here) else None


def _inside(place: Path, top: Path) -> bool:
    return Path(os.path.realpath(place)).is_relative_to(os.path.realpath(top))


def refuse_base(id: str) -> None:
    """Raise BaseModelError for a base that the visitor who asks may not use."""
    own = visitor()
    if own is None or any(fnmatch.fnmatchcase(id, pattern) for pattern in own.limits.bases):
        return
    here = place(id) if id.startswith(("/", "~")) else None
    if here is not None and _inside(here, own.root):
        return
    raise BaseModelError("base.not_allowed", id=id[:100], known=", ".join(own.limits.bases))


def refuse_data(id: str) -> None:
    """Raise DataError for a data set of the Hub that the visitor who asks may not use."""
    own = visitor()
    if own is not None and not any(fnmatch.fnmatchcase(id, pattern) for pattern in own.limits.data):
        raise DataError("data.not_allowed", id=id[:100])


def used(root: Path) -> int:
    """The bytes of all files below a folder; what vanishes meanwhile does not count."""
    total, waiting = 0, [root]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
                    elif entry.is_file(follow_symlinks=False):
                        total += entry.stat(follow_symlinks=False).st_size
        except OSError:
            continue
    return total


def refuse_bytes(workspace, more: int = 0) -> None:
    """Raise HostError when a visitor's workspace would hold more than it may."""
    if workspace.limits is None:
        return
    here = used(workspace.root)
    if here + more > workspace.limits.disk:
        raise HostError("host.disk", used=_gb(here + more), most=_gb(workspace.limits.disk))


def too_many(workspace, count: int) -> HostError | None:
    """What is wrong when one run of a visitor would train this many adapters; None when nothing is."""
    limits = workspace.limits
    return None if limits is None or count <= limits.adapters else HostError("host.adapters", count=count, most=limits.adapters)


def _gb(size: int) -> str:
    return f"{size / GB:.2f} GB"
