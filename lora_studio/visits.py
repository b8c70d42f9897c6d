"""What a visitor's run may be: bases, rows and adapters that are theirs to use, no more steps and no more runs than the owner allows."""

import time
from pathlib import Path

from lora_studio import adapters, bases, data, library, runs
from lora_studio.errors import AdapterError, HostError, StudioError
from lora_studio.fence import Limits
from lora_studio.home import home
from lora_studio.spec import TrainSpec
from lora_studio.workspace import Workspace


def check(workspace: Workspace, spec: TrainSpec, report) -> None:
    """Note in a preflight's report what a visitor may not do; for everybody else nothing. Bases and rows are looked at where they are
    found (bases.locate, data.locate)."""
    if workspace.limits is None:
        return
    for path, named in (("method.start", getattr(spec.method, "start", None)), ("base.assistant", spec.base.assistant)):
        if named and not _is_own(workspace, named):
            report.add(path, AdapterError("adapter.missing", path=adapters.shown(named, 100)))
    if spec.schedule.steps and spec.schedule.steps > workspace.limits.steps:
        report.add("schedule.steps", HostError("host.steps", steps=spec.schedule.steps, most=workspace.limits.steps))
    try:
        runs.refuse_more(workspace)
    except HostError as error:
        report.add("", error)


def needs_token(workspace: Workspace, spec: TrainSpec) -> bool:
    """Whether a visitor's run has to fetch a base or rows, for which their own token is used and nobody else's."""
    if workspace.limits is None:
        return False
    return bases.locate(spec.base) is None or any(isinstance(data.locate(source.path), str) and not source.path.startswith("demo/") for source in spec.data)


def end_overlong(limits: Limits) -> None:
    """Ask visitors' runs that have worked longer than they may to stop and save."""
    for folder in runs.live():
        if not folder.is_relative_to(home() / "users") or runs.asked(folder, "stop"):
            continue
        begun = next((event["time"] for event in reversed(runs.read(folder)[0]) if event["kind"] in ("launched", "started")), time.time())
        if time.time() - begun > limits.seconds:
            runs.ask(folder, "stop", save=True)


def check_length(workspace: Workspace, spec: TrainSpec, report) -> None:
    """Note it when epochs over the rows that were counted make more steps than a visitor's run may take."""
    rows = report.facts.get("rows", 0)
    if workspace.limits is None or spec.schedule.steps or not rows:
        return
    steps = -(-int(rows * spec.schedule.epochs) // (spec.schedule.batch_size * spec.schedule.accumulate))
    if steps > workspace.limits.steps:
        report.add("schedule.epochs", HostError("host.steps", steps=steps, most=workspace.limits.steps))


def _is_own(workspace: Workspace, named: str) -> bool:
    """Whether a text is the id of an adapter of the workspace's library, and not a place on this machine."""
    try:
        return "/" not in named and "\\" not in named and not Path(named).exists() and library.folder_of(workspace, named).is_dir()
    except StudioError:
        return False
