"""Tokens of visitors who are signed in, for the runs that have to fetch something with them: in this process's memory, and nowhere else."""

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

# What the studio was started with and no process that it starts needs in its environment.
STUDIO = ("OAUTH_CLIENT_SECRET", "LORA_STUDIO_PASSWORD")
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", *STUDIO)


@dataclass(frozen=True)
class _Lent:
    token: str = field(repr=False)
    since: float = 0.0
    until: float = 0.0


_guard = threading.Lock()
_lent: dict[Path, _Lent] = {}


def lend(root: Path, token: str, *, until: float) -> None:
    """Note the token of a visitor whose workspace is at `root`, while their sign-in holds. One that was refused is not taken for a new one."""
    with _guard:
        for place in [place for place, one in _lent.items() if one.until < time.time()]:
            del _lent[place]
        before = _lent.get(root)
        if token and (before is None or before.token != token):
            _lent[root] = _Lent(token, time.time(), until)


def take_back(root: Path) -> None:
    """Forget a visitor's token, as they sign out."""
    with _guard:
        _lent.pop(root, None)


def of(folder: Path, *, after: float = 0.0) -> str | None:
    """The token for a run's folder, if its owner is signed in, and signed in later than `after`."""
    return at(folder.parent.parent, after=after)


def at(root: Path, *, after: float = 0.0) -> str | None:
    """The token of whoever's workspace is at `root`, likewise."""
    with _guard:
        found = _lent.get(root)
    return found.token if found is not None and found.until > time.time() and found.since > after else None
