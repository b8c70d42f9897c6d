"""The verbs of keeping work: a workspace goes, every few minutes, to a private repository of its owner's, and comes back from there when its disk was lost.

A token is asked for anew at every turn: that of the sign-in, or the machine's own login for who owns the studio. While there is none it waits.
"""

import contextlib
import hashlib
import hmac
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from lora_studio import durable, fence
from lora_studio.errors import HostError, StudioError
from lora_studio.home import home
from lora_studio.hub import client, own
from lora_studio.jobs import tokens
from lora_studio.steady import Steady
from lora_studio.storage import TURN_BYTES, Storage, contents
from lora_studio.storage.repository import Repository
from lora_studio.workspace import Workspace, local

NAME = "lora-studio-workspace"
SAID = "keep.json"  # in a workspace: whether its owner wants it kept, and where
STAGING = ".keep"  # in the home: what is between here and there
SECONDS = 180.0
AT_ONCE = 4
# What does not pass by itself: it is tried again when somebody says so.
FINAL = {f"keep.{what}" for what in ("foreign", "public", "gone", "read_token", "strange", "broken", "taken", "not_whole")} | {"host.disk"}
OFF = {"state": "off", "sentence": "", "repo": NAME, "url": "", "files": 0, "bytes": 0, "at": 0.0, "notes": []}


@dataclass
class _Room:
    """A workspace that is kept. `state` is busy, waits, kept, trouble, or stopped until somebody says so."""

    workspace: Workspace
    repo: str
    lock: durable.Lock
    make: bool = False
    storage: Storage | None = None
    state: str = "busy"
    sentence: str = ""
    notes: list[str] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    at: float = 0.0
    refused: float = 0.0
    due: float = 0.0
    guard: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class _Kept:
    """What this process keeps, and the secret that a hosted studio signs visitors' manifests with."""

    rooms: dict[Path, _Room] = field(default_factory=dict)
    asked: dict[Path, dict] = field(default_factory=dict)  # what looking for kept work came to, by workspace
    guard: threading.Lock = field(default_factory=threading.Lock)
    secret: str = field(default="", repr=False)
    worker: Steady | None = None


_kept = _Kept()


def state(workspace: Workspace) -> dict:
    """How it stands: {state, sentence, repo, url, files, bytes, at, notes}. `state` is off, there (kept work was found and this workspace is
    not empty), busy, waits (for a sign-in), kept, trouble (tried again by itself) or stopped."""
    room = _kept.rooms.get(workspace.root)
    if room is None:
        return {**OFF, **_kept.asked.get(workspace.root, {})}
    url = own.address(room.repo) if "/" in room.repo else ""
    withheld = list(room.storage.withheld.values()) if room.storage else []
    return {
        "state": room.state, "sentence": room.sentence, "repo": room.repo, "url": url, "files": room.files, "bytes": room.bytes, "at": room.at,
        "notes": [*room.notes, *withheld[:5], *([f"{len(withheld) - 5} more are not kept."] if len(withheld) > 5 else [])],
    }  # fmt: skip


def words(told: dict) -> str:
    """A state as a sentence; empty where nothing is to be said."""
    if told["state"] == "kept":
        when = time.strftime("%H:%M", time.gmtime(told["at"]))
        return f"Kept in {told['repo']}, which only you see: {told['files']} file{'s' * (told['files'] != 1)}, {told['bytes'] / 1e6:.1f} MB, last at {when} UTC."
    if told["state"] == "there":
        return f"Work of yours is kept in {told['repo']}. Keep my work brings what is missing here, and goes on from it."
    return "Looking for work of yours that was kept, and bringing it back." if told["state"] == "busy" else told["sentence"]


def begin(workspace: Workspace, token: str | None = None, *, repo: str = "") -> dict:
    """Keep a workspace from now on, as its owner wants it: what was kept before comes back, and what is here is sent. The repository is made,
    private, where it is not there. Returns the state. Raises StudioError; then nothing is kept that was not kept before."""
    token = client.token_of(token)
    room = _joined(workspace, repo or (durable.read_json(workspace.root / SAID) or {}).get("repo") or NAME, make=True)
    try:
        _turn(room, token, everything=False)
    except StudioError:
        if room.storage is None:
            _leave(workspace)
        raise
    durable.write_json(workspace.root / SAID, {"repo": room.repo, "on": True})
    return state(workspace)


def stop(workspace: Workspace) -> dict:
    """Send nothing from now on; the repository stays as it is. Returns the state."""
    said = durable.read_json(workspace.root / SAID) or {}
    _leave(workspace)
    _kept.asked.pop(workspace.root, None)
    if said:
        durable.write_json(workspace.root / SAID, {**said, "on": False})
    return state(workspace)


def arrive(workspace: Workspace, token: str | None = None) -> dict:
    """Whoever owns the workspace is here, signed in: go on keeping it where they want that. An empty workspace, of whom kept work is on the
    Hub, gets it back. Returns the state; what the Hub does not allow is a sentence in it."""
    said = durable.read_json(workspace.root / SAID) or {}
    if workspace.root in _kept.rooms or said.get("on") is False:
        return state(workspace)
    try:
        if said:
            _joined(workspace, said["repo"])
            return turn(workspace, token)
        if workspace.root not in _kept.asked:
            _look(workspace, client.token_of(token))
    except StudioError as error:
        if error.key == "hub.bad_token":
            error = HostError("keep.waits", id=NAME)
        if error.key not in ("hub.no_token", "hub.offline"):
            return {**OFF, "sentence": str(error)}
    return state(workspace)


def _look(workspace: Workspace, token: str) -> None:
    """Look for kept work of whoever has the token. Raises HubError when the Hub does not answer."""
    try:
        talk, remote = own.open_own(NAME, token, make=False)
    except HostError:  # none, or one that is not to be used
        _kept.asked[workspace.root] = {}
        return
    is_empty = next(contents.all_in(workspace.root, others=False), None) is None
    if not any(path.startswith("manifests/") for path in remote.files):
        _kept.asked[workspace.root] = {}
    elif is_empty:
        _joined(workspace, talk.id)
        turn(workspace, token)
        if _kept.rooms[workspace.root].storage is not None:
            durable.write_json(workspace.root / SAID, {"repo": talk.id, "on": True})
    else:
        _kept.asked[workspace.root] = {"state": "there", "repo": talk.id, "url": own.address(talk.id)}


def turn(workspace: Workspace, token: str | None = None, *, everything: bool = False) -> dict:
    """Send what is new of a workspace that is kept; with `everything` however much it is. Returns the state, with what went wrong."""
    room = _kept.rooms.get(workspace.root)
    if room is not None:
        with contextlib.suppress(StudioError):  # it is in the state
            _turn(room, token or _token_of(room), everything=everything)
    return state(workspace)


def start(secret: str = "") -> None:
    """Keep what is to be kept, in threads of this process, from now on; `secret` outlives the machine and signs what visitors keep."""
    _kept.secret = secret
    shutil.rmtree(home() / STAGING, ignore_errors=True)  # of a studio that was cut off
    owners = local()
    _kept.worker = Steady("Keeping in repositories", lambda: _pass(owners), seconds=2.0)
    _kept.worker.start()


def rest() -> None:
    """Begin no further turn in this process."""
    if _kept.worker is not None:
        _kept.worker.stop()


def last(*, seconds: float) -> tuple[int, int]:
    """A last turn for every workspace that is kept, because the machine goes, within so many seconds: how many are whole, of how many."""
    rooms = [room for room in _kept.rooms.values() if room.state != "stopped"]
    threads = [threading.Thread(target=turn, args=(room.workspace,), kwargs={"everything": True}, daemon=True) for room in rooms]
    began, until = time.time(), time.monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return sum(room.state == "kept" and room.at >= began for room in rooms), len(rooms)


# ---- turns


def _pass(owners: Workspace) -> None:
    """Begin the turns that are due, a few at a time; what the owner wants kept is known from the last time."""
    said = durable.read_json(owners.root / SAID) or {}
    if said.get("on") and owners.root not in _kept.rooms:
        with contextlib.suppress(HostError):  # another process keeps it
            _joined(owners, said["repo"])
    rooms = list(_kept.rooms.values())
    busy = sum(room.guard.locked() for room in rooms)
    due = [room for room in rooms if room.state != "stopped" and room.due <= time.monotonic() and not room.guard.locked()]
    for room in sorted(due, key=lambda one: one.due)[: max(0, AT_ONCE - busy)]:
        room.due = time.monotonic() + SECONDS
        threading.Thread(target=turn, args=(room.workspace,), daemon=True).start()


def _turn(room: _Room, token: str | None, *, everything: bool) -> None:
    """One turn. Raises StudioError, which is in the room's state too."""
    with room.guard:
        try:
            if not token:
                raise HostError("keep.waits", id=room.repo)
            if room.storage is None:
                _bring_back(room, token)
            room.storage.place.token = token
            room.storage.save(**({"at_most": None, "settled": 0.0} if everything else {"at_most": TURN_BYTES}))
            (room.files, room.bytes), room.at = room.storage.size(), time.time()
            room.state, room.sentence = "kept", ""
        except StudioError as error:
            if error.key in ("hub.bad_token", "hub.no_token"):
                room.refused, error = time.time(), HostError("keep.waits", id=room.repo)
            room.state, room.sentence = "waits" if error.key == "keep.waits" else "stopped" if error.key in FINAL else "trouble", str(error)
            raise error from None
        finally:
            if room.storage is not None:  # a token is here for the turn only
                room.storage.place.forget()
            room.due = time.monotonic() + (SECONDS if room.state != "waits" else 2.0)


def _bring_back(room: _Room, token: str) -> None:
    """Find the repository and bring back what is missing here. Nothing is sent before that was done: what did not come back was not removed."""
    room.state = "busy"
    is_sealed, named = room.workspace.limits is not None, room.workspace.root.name.encode()
    seal = hmac.new(_kept.secret.encode(), named, hashlib.sha256).digest() if is_sealed else b""
    place = Repository(room.repo, token, staging=home() / STAGING, seal=seal, make=room.make)
    storage = Storage(room.workspace.root, place)
    try:
        room.notes = storage.restore(allow=lambda more: fence.refuse_bytes(room.workspace, more))
    except BaseException:
        place.close()
        raise
    room.storage, room.repo = storage, place.name


def _token_of(room: _Room) -> str | None:
    """The token to speak with now: that of the sign-in, or the machine's own where its owner is not fenced in."""
    found = tokens.at(room.workspace.root, after=room.refused)
    if found is None and room.workspace.limits is None:
        try:
            return client.token_of(None)
        except StudioError:
            return None
    return found


def _joined(workspace: Workspace, repo: str, *, make: bool = False) -> _Room:
    """The room of a workspace, made anew. Raises HostError when another process has it."""
    with _kept.guard:
        before = _kept.rooms.get(workspace.root)
        lock = before.lock if before else durable.Lock(workspace.root / "keep.lock")
        if before is None and not lock.take():
            raise HostError("keep.running", path=workspace.root)
        _kept.asked.pop(workspace.root, None)
        room = _kept.rooms[workspace.root] = _Room(workspace, repo, lock, make)
        if before is not None:
            room.guard = before.guard
        return room


def _leave(workspace: Workspace) -> None:
    """Forget a room, once what is being sent has arrived."""
    room = _kept.rooms.get(workspace.root)
    if room is None:
        return
    with room.guard:
        room.lock.release()
        if room.storage is not None:
            room.storage.place.close()
        _kept.rooms.pop(workspace.root, None)
