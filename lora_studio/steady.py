"""Work that a server does over and over in a thread of its own."""

import threading
from collections.abc import Callable

from lora_studio.errors import StudioError


class Steady:
    """Takes turns, `seconds` apart, until it is stopped or the process ends. Trouble in a turn does not end it, and is printed once."""

    def __init__(self, name: str, turn: Callable[[], object], *, seconds: float):
        self.name, self.turn, self.seconds = name, turn, seconds
        self.ended, self.thread, self.trouble = threading.Event(), None, ""

    def start(self) -> None:
        """Take the first turn after `seconds`."""
        self.thread = threading.Thread(target=self._forever, daemon=True, name=self.name)
        self.thread.start()

    def stop(self, *, patience: float = 20.0) -> None:
        """Take no further turn, and wait for the one that is being taken."""
        self.ended.set()
        if self.thread is not None:
            self.thread.join(patience)

    def _forever(self) -> None:
        while not self.ended.wait(self.seconds):
            try:
                self.turn()
                self.trouble = ""
            except (StudioError, OSError) as error:
                if str(error) != self.trouble:
                    print(f"{self.name}: {error}", flush=True)
                self.trouble = str(error)
