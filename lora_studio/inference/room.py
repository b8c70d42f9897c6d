"""Who needs the device: a run that starts asks for room, and until it has ended no model is loaded there again."""

import time
from collections.abc import Callable
from pathlib import Path

from lora_studio import durable, runs
from lora_studio.errors import BenchError

HOLD_SECONDS, LEAVING_SECONDS = 30.0, 10.0


class Room:
    """The wish that was uttered last (`asked`, from any thread) and the one that was fulfilled (`given`)."""

    def __init__(self):
        self.asked: dict | None = None
        self.given: dict | None = None

    def ask(self, wish: dict, device: str) -> None:
        """Somebody needs the device now; whoever computes there looks up by `look`."""
        self.asked = {**wish, "device": device}

    def look(self) -> None:
        """Raise BenchError when somebody needs the device now."""
        if self.asked is not None:
            raise given_away(self.asked)

    def give(self) -> None:
        """The model is gone. A run has `hold` seconds to start; while it waits for that or works, the room stays its own."""
        wish, self.asked = self.asked, None
        if wish and wish.get("run"):
            self.given = {**wish, "until": time.monotonic() + float(wish.get("hold", HOLD_SECONDS))}

    def refuse(self, device: str) -> None:
        """Raise BenchError while the device is somebody else's."""
        self.look()
        if self.given is not None and self.given["device"] == device:
            if self.is_needed():
                raise given_away(self.given)
            self.given = None

    def is_needed(self) -> bool:
        """Whether the run that was given the room has not started yet, or works."""
        given = self.given
        if given is None:
            return False
        folder = Path(given["run"])
        return not _is_over(folder) and (runs.is_live(folder) or time.monotonic() < given["until"])

    def sentence(self) -> str:
        """Why there is no model; "" when none has to give way."""
        given = self.given
        return str(given_away(given)) if given and self.is_needed() else ""


def given_away(wish: dict) -> BenchError:
    """Why the model is gone: for a run, or because somebody asked."""
    if wish.get("run"):
        return BenchError("bench.made_room", run=Path(wish["run"]).name, device=wish["device"])
    return BenchError("bench.unloaded", reason=wish.get("reason") or "it was asked for")


def _is_over(folder: Path) -> bool:
    return not folder.is_dir() or (runs.ended(folder) is not None and not runs.is_waiting(folder))


def take(lock: durable.Lock, device: str, check: Callable[[], None]) -> None:
    """Take the device's lock. A run that has said its last word is waited for, since its process ends in a moment; `check` may raise
    meanwhile. Raises BenchError naming the run that works there."""
    until = time.monotonic() + LEAVING_SECONDS
    while not lock.take(wait=0.2):
        check()
        folder = _worker_on(device)
        if folder is not None or time.monotonic() > until:
            raise BenchError("bench.device_taken", run=f"The run {folder.name}" if folder else "Another process", device=device)


def _worker_on(device: str) -> Path | None:
    """The run that works on a device and has not ended."""
    return next((folder for folder in runs.live() if not _is_over(folder) and runs.status(folder).device == device), None)
