"""What the server does by itself, every other second: start what waits, stop what works too long, and keep what must outlive the machine."""

import os
import threading
import time
from pathlib import Path

from lora_studio import caches, runs, studio, visits
from lora_studio.errors import HostError, StudioError
from lora_studio.home import home
from lora_studio.hosting import Hosting
from lora_studio.jobs import bench
from lora_studio.steady import Steady
from lora_studio.storage import Storage

SECONDS = 2.0
KEEP_SECONDS = 15.0
TRIM_SECONDS = 600.0


class Pump:
    """The server's own work. Made before anything is served: files that the disk lost come back first. Raises HostError where the storage
    that was named cannot be used."""

    def __init__(self, hosting: Hosting):
        self.hosting, self.guard = hosting, threading.Lock()
        self.storage = Storage(home(), Path(hosting.storage)) if hosting.storage else None
        self.bounds = caches.bounds(os.environ, is_hosted=hosting.kind != "local")
        self.kept, self.trimmed, self.live, self.trouble = 0.0, 0.0, set(), ""
        # Two of them: a slow bucket must not keep runs waiting.
        self.workers = [Steady("Starting what waits", self._start_what_waits, seconds=SECONDS), Steady("Keeping", self._keep_and_trim, seconds=SECONDS)]
        for sentence in self.storage.restore() if self.storage else ():
            print(sentence, flush=True)

    def start(self) -> None:
        """Work from now on, in threads; the runs themselves do not need the server."""
        studio.pump()
        for worker in self.workers:
            worker.start()

    def stop(self) -> None:
        """Work no more; the runs go on."""
        for worker in self.workers:
            worker.stop()

    def _start_what_waits(self) -> None:
        studio.pump()
        visits.end_overlong(self.hosting.limits)

    def _keep_and_trim(self) -> None:
        self._keep_in_time()
        if time.monotonic() - self.trimmed > TRIM_SECONDS:
            self.trim()
            self.trimmed = time.monotonic()

    def trim(self) -> None:
        """Remove from the caches what is over their bounds, but not what the bench has loaded."""
        if self.bounds == caches.Bounds():
            return
        try:
            held = bench.status().get("base") if bench.is_running() else None
            gone = caches.trim(self.bounds, kept=[held] if held else [])
        except (StudioError, OSError) as error:
            print(f"The caches were not looked through: {error}", flush=True)
            return
        for entry in gone:
            print(f"{entry.name} was removed from the cache ({entry.bytes / 1e9:.2f} GB).", flush=True)

    def _keep_in_time(self) -> None:
        """Copy what is new every few seconds, and as soon as a run has ended."""
        if self.storage is None:
            return
        live = set(runs.live())
        has_ended, self.live = bool(self.live - live), live
        if has_ended or time.monotonic() - self.kept > KEEP_SECONDS:
            self.keep()
            is_cut_short = self.storage.left <= 0 and not self.trouble
            self.kept = 0.0 if is_cut_short else time.monotonic()

    def keep(self, *, everything: bool = False) -> bool:
        """Copy what is new to the storage; with `everything` however much it is. Returns whether all is there. Trouble is printed once."""
        if self.storage is None:
            return False
        with self.guard:
            try:
                whole = self.storage.save(at_most=None, settled=0.0) if everything else self.storage.save()
                self.trouble = ""
                return whole
            except HostError as error:
                if str(error) != self.trouble:
                    print(error, flush=True)
                self.trouble = str(error)
                return False
