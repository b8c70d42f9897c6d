"""The queue: which runs wait, and who may start next. One run per device; pumping is idempotent and anybody may do it."""

from pathlib import Path

from lora_studio import durable, runs
from lora_studio.errors import StudioError
from lora_studio.home import home
from lora_studio.jobs import bench, local, tokens
from lora_studio.jobs.devices import device_lock
from lora_studio.workspace import Workspace


def waiting() -> list[Path]:
    """The run folders that wait, first come first."""
    return [home() / entry for entry in durable.read_json(home() / "queue.json", [])]


def add(workspace: Workspace, folder: Path, *, device: str) -> None:
    """Queue a run for a device; it is on disk when this returns. A run that waits already is not queued twice."""
    entry = str(folder.relative_to(home()))
    with durable.Lock(home() / "queue.lock"):
        entries = durable.read_json(home() / "queue.json", [])
        if entry in entries or (runs.is_live(folder) and runs.ended(folder) is None):
            return
        runs.set_card(folder, device=device)
        runs.note(folder, "queued", device=device)
        durable.write_json(home() / "queue.json", [*entries, entry])


def remove(folder: Path) -> bool:
    """Take a run out of the queue; False when it did not wait (any more)."""
    entry = str(folder.relative_to(home()))
    with durable.Lock(home() / "queue.lock"):
        entries = durable.read_json(home() / "queue.json", [])
        if entry not in entries:
            return False
        durable.write_json(home() / "queue.json", [other for other in entries if other != entry])
        return True


def pump() -> list[str]:
    """Start every waiting run whose device is free, in order. Returns the ids of those started."""
    local.reap()
    started = []
    if not durable.read_json(home() / "queue.json", []):
        return started
    with durable.Lock(home() / "queue.lock"):
        left = []
        for entry in durable.read_json(home() / "queue.json", []):
            folder = home() / entry
            if not (folder / "spec.yaml").is_file():
                continue
            if _start(folder):
                started.append(folder.name)
            elif runs.is_waiting(folder):
                left.append(entry)
        durable.write_json(home() / "queue.json", left)
    return started


def waits_for_sign_in(folder: Path) -> bool:
    """Whether a run has to fetch something for a visitor who is not signed in, or whose token was refused since."""
    return _token_for(durable.read_json(folder / "card.json", {}), folder) is None


def _token_for(card: dict, folder: Path) -> str | None:
    """The token that a run starts with: "" where it needs none, None while it needs one that is not there."""
    return tokens.of(folder, after=card.get("refused", 0.0)) if card.get("needs_token") else ""


def _start(folder: Path) -> bool:
    """Start one run if its device is free. Both locks are taken here and inherited by the worker, so there is no gap
    in which the run could be started twice."""
    card = durable.read_json(folder / "card.json", {})
    device, token = card.get("device", "cpu"), _token_for(card, folder)
    if token is None:
        return False
    place = durable.Lock(device_lock(device))
    if not place.take(wait=0.05) and not (bench.make_room(folder, device=device) and place.take(wait=0.5)):
        return False
    run = durable.Lock(folder / "run.lock")
    try:
        if not run.take(wait=0.05):
            return False
        runs.note(folder, "launched", device=device)
        local.spawn(folder, device=device, locks=[place, run], token=token)
        return True
    except (OSError, StudioError) as error:
        runs.note(folder, "failed", reason=f"The process could not be started: {error}")
        return False
    finally:
        run.release()
        place.release()
