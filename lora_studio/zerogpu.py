"""ZeroGPU: a GPU that a hosted server is lent for one call at a time. The bench's work on models is done in such a call, in a child of the
server that Hugging Face's `spaces` package forks; training stays in processes of its own, on the CPU.

app.py imports this only where SPACES_ZERO_GPU is set, after `spaces` itself, which must come before torch.
"""

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

from lora_studio.errors import StudioError

VERBS = ("answer", "draw", "preview")
SECONDS = 60  # of a call: longer ones wait longer for a GPU


class Job:
    """A request as the desk sees it; what it sends is put into a line."""

    def __init__(self, request: dict, line: queue.Queue):
        self.request, self.line = request, line
        self.doing, self.cancelled, self.is_over = "", False, False

    def send(self, event: str, **fields) -> None:
        """Put an event into the line."""
        self.line.put({"event": event, **fields})

    def check(self) -> None:
        """Nobody cancels: who is gone is noticed as the call ends."""


def events(verb: str, arguments: dict, lock: Path) -> Iterator[dict]:
    """The events of one request, done by a desk of its own that is gone afterwards, as the bench would give them. An error is the event
    `error` with its key, kind and sentence."""
    import torch

    from lora_studio.inference.desk import Desk

    line: queue.Queue = queue.Queue()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on = {"device": device, "lock": str(lock)} if verb != "preview" else {}
    job = Job({"verb": verb, **arguments, **on}, line)

    def work() -> None:
        desk = Desk()
        try:
            last, fields = desk.do(job)
            line.put({"event": last, **fields})
        except StudioError as error:
            line.put({"event": "error", "error": error.key, "kind": type(error).__name__, "sentence": str(error)})
        except BaseException as error:  # noqa: BLE001 (told to whoever waits, in the process that serves them)
            line.put({"event": "error", "error": "bench.bug", "kind": "BenchError", "sentence": f"{type(error).__name__} in {verb}: {error}"})
        finally:
            desk.close()
            line.put(None)

    threading.Thread(target=work, daemon=True).start()
    while (event := line.get()) is not None:
        yield event


def serve(spaces, lock: Path):
    """The function that serves `VERBS` on a GPU that is lent for the call: (verb, arguments) to events."""

    @spaces.GPU(duration=SECONDS)
    def on_gpu(verb: str, arguments: dict) -> Iterator[dict]:
        yield from events(verb, arguments, lock)

    return on_gpu
