"""What was done to an album, step by step, so that it can be undone: on disk before the step, and bounded.

    .album/history.json     the steps in order, how many of them are done, and the step that was taken last
    .album/steps/7.json     the rows of the metadata before and after step 7 (null: the picture is not in the album)
    .album/files/7/         the files that step 7 took out, or would bring in
"""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from lora_studio import durable

HIDDEN = ".album"
MOST_STEPS = 100
MOST_BYTES = 64 << 20

Rows = dict[str, dict | None]


@dataclass(frozen=True)
class Step:
    """One thing done: what it is called, and the files that came in or went out with it."""

    serial: int
    words: str
    came: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    bytes: int = 0


@dataclass
class History:
    """The steps of an album. `done` of them are done; the rest were undone. `last` is {from, before, after}: how many were
    done before the newest change, and the hash of the metadata on either side of it."""

    folder: Path
    steps: list[Step] = field(default_factory=list)
    done: int = 0
    last: dict = field(default_factory=dict)

    @property
    def file(self) -> Path:
        return self.folder / HIDDEN / "history.json"

    def store(self, serial: int) -> Path:
        """Where the files of a step lie while they are not in the album."""
        return self.folder / HIDDEN / "files" / str(serial)

    def rows(self, step: Step) -> tuple[Rows, Rows]:
        """The rows before and after a step."""
        found = durable.read_json(self._rows_file(step.serial), {})
        return found.get("before", {}), found.get("after", {})

    def _rows_file(self, serial: int) -> Path:
        return self.folder / HIDDEN / "steps" / f"{serial}.json"

    def next_serial(self) -> int:
        """A number that no step of this album had."""
        return max([step.serial for step in self.steps] + [self.last.get("serial", 0)]) + 1

    def push(self, step: Step, before: Rows, after: Rows) -> None:
        """Put a step, not done yet, in place of those that were undone. Its rows are on disk when this returns."""
        file = self._rows_file(step.serial)
        file.parent.mkdir(parents=True, exist_ok=True)
        durable.write_json(file, {"before": before, "after": after})
        step = Step(step.serial, step.words, step.came, step.gone, file.stat().st_size)
        self.steps[self.done :] = [step]
        while len(self.steps) > MOST_STEPS or (len(self.steps) > 1 and sum(one.bytes for one in self.steps) > MOST_BYTES):
            self.steps.pop(0)
            self.done -= 1

    def move_to(self, done: int, before: str, after: str) -> None:
        """Note, on disk, that `done` steps are done once the metadata is `after`."""
        self.last = {"from": self.done, "before": before, "after": after, "serial": self.next_serial() - 1}
        self.done = done
        self.save()

    def save(self) -> None:
        steps = [{**vars(step), "came": list(step.came), "gone": list(step.gone)} for step in self.steps]
        durable.write_json(self.file, {"steps": steps, "done": self.done, "last": self.last})

    def settle(self, current: str) -> None:
        """Make steps, files and metadata (its hash is `current`) agree, whatever instant the last change was cut off at."""
        if current != self.last.get("after", current):
            if current == self.last.get("before"):
                self.done = self.last["from"]  # the last change never reached the metadata
            else:
                self.steps, self.done = [], 0  # another program wrote the metadata: what came before no longer fits it
            self.last = {**self.last, "before": current, "after": current, "from": self.done}
            self.save()
        for index, step in enumerate(self.steps):
            is_done = index < self.done
            self.bring(step.serial, step.came if is_done else step.gone)
            self.put_away(step.serial, step.gone if is_done else step.came)

    def bring(self, serial: int, names: tuple[str, ...]) -> None:
        """Move files of a step into the album, those that are not there yet."""
        _move([(self.store(serial) / name, self.folder / name) for name in names])

    def put_away(self, serial: int, names: tuple[str, ...]) -> None:
        """Move files of a step out of the album, those that still are there."""
        _move([(self.folder / name, self.store(serial) / name) for name in names])

    def sweep(self) -> None:
        """Delete what no step needs any more."""
        known = {str(step.serial) for step in self.steps}
        for place in (self.folder / HIDDEN / "steps", self.folder / HIDDEN / "files"):
            for entry in place.iterdir() if place.is_dir() else ():
                if entry.name.removesuffix(".json") not in known:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)


def load(folder: Path) -> History:
    """The history of an album; an empty one where it is missing or broken."""
    found = durable.read_json(folder / HIDDEN / "history.json", {})
    try:
        steps = [Step(one["serial"], one["words"], tuple(one["came"]), tuple(one["gone"]), one["bytes"]) for one in found["steps"]]
        return History(folder, steps, min(found["done"], len(steps)), found["last"])
    except (KeyError, TypeError):
        return History(folder)


def _move(pairs: list[tuple[Path, Path]]) -> None:
    """Move each file to its place, where it is here and not there yet."""
    touched = set()
    for here, there in pairs:
        if here.is_file() and not there.exists():
            there.parent.mkdir(parents=True, exist_ok=True)
            os.replace(here, there)
            touched |= {here.parent, there.parent}
    _sync(touched)


def _sync(folders: set[Path]) -> None:
    for folder in folders:
        durable.sync_folder(folder)
