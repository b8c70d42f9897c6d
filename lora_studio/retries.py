"""A run that ended for want of memory, started again with settings that take less."""

from lora_studio import bases, memory, runs, studio
from lora_studio.errors import RunError, StudioError
from lora_studio.jobs import devices
from lora_studio.preflight import trainable_of
from lora_studio.spec import TrainSpec
from lora_studio.workspace import Workspace

KILLED = "SIGKILL"


def ran_out(events: list[dict]) -> bool:
    """Whether a run's last word is that memory ran out, or that the system killed it, which it does then."""
    last = next((event for event in reversed(events) if event["kind"] in ("failed", "done", "stopped", "started", "queued")), {})
    return last.get("kind") == "failed" and (last.get("key") == "machine.memory" or KILLED in str(last.get("reason", "")))


def offer(workspace: Workspace, id: str) -> dict[str, object]:
    """The settings to try a run again with, by path; none where it did not run out of memory, or where nothing is known that saves some."""
    folder = workspace.run_folder(id)
    if not runs.trains(folder) or not ran_out(runs.read_all(folder)):
        return {}
    spec = runs.spec_of(folder)
    try:
        info = bases.inspect(spec.base)
        device = devices.resolve(spec.compute.device)
    except StudioError:
        return _halved(spec)
    # The rows were not counted here; the longest that there may be are what a batch is made for.
    longest = 0 if spec.task.kind == "image" else spec.task.max_length
    rows = memory.Rows(mean=longest, longest=longest)
    ways = memory.after_running_out(spec, info, rows, trainable=trainable_of(spec, info), device=device)
    return ways[0].values if ways else _halved(spec)


def again(workspace: Workspace, id: str) -> str:
    """Start the run once more, from its beginning, with the settings of `offer`. Returns the new run's id. Raises RunError and SpecError."""
    values = offer(workspace, id)
    if not values:
        raise RunError("run.no_less", id=id[:60])
    return studio.start(workspace, memory.changed(studio.spec_of(workspace, id), values))


def _halved(spec: TrainSpec) -> dict[str, object]:
    """Half the batch twice as often, which gives the same steps."""
    batch = spec.schedule.batch_size
    if batch > 1:
        return {"schedule.batch_size": batch // 2, "schedule.accumulate": spec.schedule.accumulate * 2}
    return {} if spec.compute.checkpointing else {"compute.checkpointing": True}
