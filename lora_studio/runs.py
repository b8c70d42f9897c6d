"""A run folder: made, written by its worker, followed by everybody else. The folder is the truth; the state is derived.

    spec.yaml      what was asked for            control/     one small file per request
    events.jsonl   what happened, in order       log.txt      what the process printed
    checkpoints/   whole ones only               samples/     answers while training
    adapter/       the result                    card.json    name and notes
    run.lock       held by the worker while it lives        process.json  who that is
"""

import json
import os
import secrets
import threading
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lora_studio import durable, fence, settings
from lora_studio.errors import HostError, RunError, StudioError
from lora_studio.home import home
from lora_studio.spec import TrainSpec
from lora_studio.spec.captions import CaptionSpec
from lora_studio.spec.compare import CompareSpec
from lora_studio.spec.search import SearchSpec
from lora_studio.spec.sweep import SweepSpec
from lora_studio.workspace import Workspace

LIFE = {"queued", "launched", "started", "resumed", "done", "stopped", "failed"}
ENDED = {"done", "stopped", "failed"}
PROGRESS = {"step", "eval", "sample", "saved", "variant"}
FLUSH_SECONDS = 0.5
TAIL_BYTES = 64 * 1024


def create(workspace: Workspace, spec: TrainSpec | CaptionSpec | SearchSpec | SweepSpec | CompareSpec) -> Path:
    """A new run folder holding `spec`, whole or absent. Returns its path. Raises HostError where a visitor has too much already."""
    refuse_more(workspace)
    workspace.runs.mkdir(parents=True, exist_ok=True)
    folder = workspace.runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    stage = folder.with_name(f"{durable.TEMPORARY}{folder.name}")
    for part in ("control", "checkpoints", "samples"):
        (stage / part).mkdir(parents=True)
    durable.write_json(stage / "card.json", {"name": spec.name, "created": time.time(), "notes": ""})
    durable.write(stage / "spec.yaml", settings.dumps(spec))
    os.replace(stage, folder)
    durable.sync_folder(workspace.runs)
    return folder


def refuse_more(workspace: Workspace) -> None:
    """Raise HostError when a visitor has as many runs that wait or work as they may, or a full workspace."""
    if workspace.limits is None:
        return
    busy = sum(is_live(folder) or is_waiting(folder) for folder in workspace.run_folders())
    if busy >= workspace.limits.runs:
        raise HostError("host.runs", count=busy, most=workspace.limits.runs)
    fence.refuse_bytes(workspace)


def spec_of(folder: Path) -> TrainSpec:
    """The spec of a training run. Raises SpecError when someone broke it, and RunError when the run trains nothing."""
    if not trains(folder):
        raise RunError({"captions": "run.captions", "search": "run.search", "sweep": "run.sweep", "compare": "run.compare"}[kind_of(folder)], id=folder.name)
    return settings.load(folder / "spec.yaml")


@lru_cache(maxsize=1024)
def kind_of(folder: Path) -> str:
    """What a run does: train, captions, search, sweep, or compare. (What was asked for never changes.)"""
    try:
        kind = settings.read_tree(folder / "spec.yaml").get("kind")
    except (StudioError, OSError, ValueError):
        return "train"
    return kind if kind in ("captions", "search", "sweep", "compare") else "train"


def trains(folder: Path) -> bool:
    """Whether a run trains an adapter."""
    return kind_of(folder) == "train"


def writes_captions(folder: Path) -> bool:
    """Whether a run writes captions."""
    return kind_of(folder) == "captions"


class Events:
    """The writer of a run's events: numbered, appended, on disk within a second. One writer at a time (the lock's holder)."""

    def __init__(self, folder: Path):
        self.path = folder / "events.jsonl"
        self.file = open(self.path, "ab")
        self.buffer: list[bytes] = []
        self.guard, self.timer, self.flushed = threading.Lock(), None, 0.0
        self.seq = self._repair()

    def _repair(self) -> int:
        """Cut a half-written last line off; the number of the next event."""
        size = self.path.stat().st_size
        if not size:
            return 0
        with open(self.path, "rb+") as file:
            file.seek(max(0, size - TAIL_BYTES))
            tail = file.read()
            whole = tail.rfind(b"\n") + 1
            if whole != len(tail):
                file.truncate(size - (len(tail) - whole))
        last = [line for line in tail[:whole].splitlines() if line][-1:]
        return json.loads(last[0])["seq"] + 1 if last else 0

    def emit(self, kind: str, **fields) -> None:
        """Append one event. Progress is batched; anything else is on disk when this returns."""
        with self.guard:
            row = {"seq": self.seq, "time": round(time.time(), 3), "kind": kind, **fields}
            self.buffer.append(json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
            self.seq += 1
            if kind != "step" or time.monotonic() - self.flushed >= FLUSH_SECONDS:
                self._flush()
            elif self.timer is None:
                self.timer = threading.Timer(FLUSH_SECONDS, self.flush)
                self.timer.daemon = True
                self.timer.start()

    def flush(self) -> None:
        """Put everything emitted so far on disk."""
        with self.guard:
            self._flush()

    def _flush(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.buffer and not self.file.closed:
            self.file.write(b"".join(self.buffer))
            self.file.flush()
            os.fsync(self.file.fileno())
            self.buffer.clear()
        self.flushed = time.monotonic()

    def close(self) -> None:
        """Flush and let go of the file."""
        with self.guard:
            self._flush()
            self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def note(folder: Path, kind: str, **fields) -> None:
    """Append one event and close the file (for writers that live shortly)."""
    with Events(folder) as events:
        events.emit(kind, **fields)


def read(folder: Path, offset: int = 0, limit: int = 8 << 20) -> tuple[list[dict], int]:
    """The events from a byte offset on, and the offset to go on from. A half-written last line waits for next time."""
    try:
        with open(folder / "events.jsonl", "rb") as file:
            file.seek(offset)
            block = file.read(limit)
    except FileNotFoundError:
        return [], offset
    whole = block.rfind(b"\n") + 1
    return [json.loads(line) for line in block[:whole].splitlines() if line], offset + whole


def read_all(folder: Path) -> list[dict]:
    """All events of a run, folded."""
    found, offset = [], 0
    while True:
        events, after = read(folder, offset)
        if after == offset:
            return fold(found)
        found, offset = found + events, after


def fold(events: list[dict]) -> list[dict]:
    """The events as one history: a `resumed {step}` voids the progress of the cut attempt after that step."""
    kept: list[dict] = []
    for event in events:
        if event["kind"] == "resumed":
            kept = [row for row in kept if row["kind"] not in PROGRESS or is_kept(row["step"], event)]
        kept.append(event)
    return kept


def is_kept(step: int, resumed: dict) -> bool:
    """Whether progress of that step stands after a `resumed`. Resumed at 0 is started again: nothing stands, not even what
    was said before the first step."""
    return resumed["step"] > 0 and step <= resumed["step"]


@dataclass(frozen=True)
class Status:
    """What a run is doing, derived from its folder. `reason` says in words why it ended, `place` its place in the queue
    (1 is next)."""

    id: str
    name: str
    state: str
    step: int = 0
    steps: int = 0
    loss: float | None = None
    validation: float | None = None
    seconds_left: float | None = None
    device: str = ""
    base: str = ""
    created: float = 0.0
    changed: float = 0.0
    reason: str = ""
    place: int = 0
    step_event: dict | None = None

    @property
    def is_live(self) -> bool:
        return self.state in ("starting", "running", "stopping")


def status(folder: Path, *, place: int = 0) -> Status:
    """The state of a run: its last event, checked against the lock its worker holds while it lives. `place` is its place
    in the queue, if it waits."""
    card = durable.read_json(folder / "card.json", {})
    events = _tail(folder)
    life = next((event for event in reversed(events) if event["kind"] in LIFE), None)
    step = next((event for event in reversed(events) if event["kind"] == "step"), {})
    judged = next((event for event in reversed(events) if event["kind"] == "eval"), {})
    state, reason = _state(folder, life, bool(step), place > 0)
    started = life or {}
    return Status(
        id=folder.name,
        name=card.get("name", folder.name),
        state=state,
        step=max(step.get("step", 0), started.get("step", 0) if started.get("kind") in ENDED else 0),
        steps=step.get("steps", started.get("steps", 0)),
        loss=step.get("loss"),
        validation=judged.get("loss"),
        seconds_left=step.get("seconds_left") if state == "running" else None,
        device=card.get("device", ""),
        base=card.get("base", ""),
        created=card.get("created", 0.0),
        changed=events[-1]["time"] if events else card.get("created", 0.0),
        reason=reason,
        place=place if state == "queued" else 0,
        step_event=step or None,
    )


def _state(folder: Path, life: dict | None, stepped: bool, queued: bool) -> tuple[str, str]:
    kind = life["kind"] if life else ("started" if stepped else None)
    if kind == "queued" and queued:
        return "queued", ""  # though the worker of an earlier attempt may be just about to end
    if kind in ENDED:
        return kind, life.get("reason", "")
    if is_live(folder):
        if (folder / "control" / "stop.json").exists():
            return "stopping", ""
        return ("running" if kind in ("started", "resumed") else "starting"), ""
    # The worker may have ended between reading the event and asking for the lock.
    again = next((event for event in reversed(_tail(folder)) if event["kind"] in LIFE), None)
    if again and again["kind"] in ENDED:
        return again["kind"], again.get("reason", "")
    if kind in (None, "queued", "launched"):
        return "failed", "It never started: the process ended before its first word. Its last log line: " + last_line(folder)
    return "failed", str(StudioError("run.vanished", line=last_line(folder)))


def ended(folder: Path) -> str | None:
    """How the run's last attempt ended (done, stopped, failed); None while it has not, whether or not it waits again."""
    kind = next((event["kind"] for event in reversed(_tail(folder)) if event["kind"] in LIFE - {"queued"}), None)
    return kind if kind in ENDED else None


def is_waiting(folder: Path) -> bool:
    """Whether the last that happened to the run is that it was queued."""
    return next((event["kind"] for event in reversed(_tail(folder)) if event["kind"] in LIFE), None) == "queued"


def is_live(folder: Path) -> bool:
    """Whether a worker of this run lives."""
    return durable.is_locked(folder / "run.lock")


def live() -> list[Path]:
    """The folders of everybody's runs in which a worker lives."""
    locks = (lock for pattern in ("runs/*/run.lock", "users/*/runs/*/run.lock") for lock in home().glob(pattern))
    return sorted(lock.parent for lock in locks if is_live(lock.parent))


def _tail(folder: Path) -> tuple[dict, ...]:
    """The last events of a run, enough to know its state. Read again only when the file has changed."""
    try:
        found = (folder / "events.jsonl").stat()
    except FileNotFoundError:
        return ()
    return _tail_of(folder, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=1024)
def _tail_of(folder: Path, size: int, changed: int) -> tuple[dict, ...]:
    start = max(0, size - TAIL_BYTES)
    with open(folder / "events.jsonl", "rb") as file:
        file.seek(start)
        block = file.read(size - start)
    lines = block[: block.rfind(b"\n") + 1].splitlines()
    return tuple(fold([json.loads(line) for line in lines[1 if start else 0 :] if line]))


def log_tail(folder: Path, size: int = 16 * 1024) -> str:
    """The end of what the run's process printed; of a progress bar only its last state."""
    try:
        with open(folder / "log.txt", "rb") as file:
            file.seek(0, os.SEEK_END)
            start = max(0, file.tell() - size)
            file.seek(start)
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    lines = text.split("\n")[1 if start else 0 :]
    return "\n".join(line.rsplit("\r", 1)[-1] for line in lines)


def last_line(folder: Path) -> str:
    """The last line the run's process printed, or a word that there is none."""
    lines = [line.strip() for line in log_tail(folder).splitlines() if line.strip()]
    return lines[-1][:300] if lines else "(nothing was printed)"


def ask(folder: Path, request: str, **fields) -> None:
    """Leave a request for the worker (`stop`, `save`, `sample`)."""
    (folder / "control").mkdir(exist_ok=True)
    durable.write_json(folder / "control" / f"{request}.json", {"time": time.time(), **fields})


def asked(folder: Path, request: str) -> dict | None:
    """The request of that name, if someone left one."""
    return durable.read_json(folder / "control" / f"{request}.json")


def answered(folder: Path, request: str) -> None:
    """Take a request away."""
    (folder / "control" / f"{request}.json").unlink(missing_ok=True)


def set_card(folder: Path, **fields) -> dict:
    """Set fields of the run's card. Returns the card."""
    card = {**durable.read_json(folder / "card.json", {}), **fields}
    durable.write_json(folder / "card.json", card)
    return card
