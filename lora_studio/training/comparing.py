"""The job of a comparison of LoRA and LoRA+: every part of it is a pass of a sweep, or one run of full fine-tuning. It leaves measurements,
no adapters. A part that was measured is never measured again; one that was cut goes on from its checkpoint."""

from dataclasses import replace
from pathlib import Path

import torch

from lora_studio import allotment, durable, runs
from lora_studio.errors import TrainingError
from lora_studio.spec import compare, sweep, to_tree
from lora_studio.training import checkpoint, crew, job, loop, many, methods
from lora_studio.training.lanes import gather


class PartDesk:
    """Where a part reports: the run's desk, with the part's name, and with steps counted over all parts (its own are told as `at`)."""

    def __init__(self, desk: loop.Desk, part: str, number: int, count: int):
        self.desk, self.part, self.number, self.count, self.own = desk, part, number, count, 0

    def emit(self, kind: str, **fields) -> None:
        if "step" in fields:
            fields |= {"at": fields["step"], "step": self.number * self.own + fields["step"]}
        if "steps" in fields:
            fields["steps"] = self.count * self.own
        if "seconds_left" in fields:
            fields["seconds_left"] = round(fields["seconds_left"] * (fields["steps"] - fields["step"]) / max(1, self.own - fields["at"]), 1)
        self.desk.emit(kind, part=self.part, **fields)

    def flush(self) -> None:
        self.desk.flush()

    def asked(self, request: str) -> dict | None:
        return self.desk.asked(request)

    def answered(self, request: str) -> None:
        self.desk.answered(request)


def spec_of(folder: Path) -> compare.CompareSpec:
    """The spec of a run that is a comparison. Raises SpecError."""
    return compare.parse(runs.settings.read_tree(folder / "spec.yaml"))


def run(folder: Path, desk: loop.Desk) -> None:
    """Measure every part that is not measured yet. Raises StudioError."""
    spec = spec_of(folder)
    names, first = compare.parts(spec), True
    for number, part in enumerate(names):
        events = runs.read_all(folder)
        if any(event["kind"] == "measured" and event["part"] == part for event in events):
            _forget(folder, part)
            continue
        torch.set_num_threads(spec.run.compute.threads or allotment.cores())
        trials = compare.trials(spec, part, compare.best(spec, events))
        if not trials and not part.startswith("full"):
            raise TrainingError("compare.failed", method=compare.NAMES[part])
        own = PartDesk(desk, part, number, len(names))
        began_before = any(event["kind"] in runs.PROGRESS and event.get("part") == part for event in events)
        if trials:
            measure = _alone if trials[0].method == "full" else _side_by_side
            seconds = measure(folder, spec, own, [compare.run_of(spec, trial) for trial in trials], began_before=began_before, first=first)
            if seconds is None:
                return
            desk.emit("measured", part=part, own=own.own, seconds=round(seconds, 2))
            first = False
        _forget(folder, part)
    _conclude(folder, desk, spec)


def _forget(folder: Path, part: str) -> None:
    """Delete the checkpoints of a part that is measured."""
    if (folder / "checkpoints" / part).is_dir():
        durable.remove_folder(folder / "checkpoints" / part)


def _started(desk: PartDesk, task, model_words: str, *, first: bool) -> None:
    """Say what is there, once in an attempt: the run is on its way."""
    if first:
        desk.emit(
            "started", steps=desk.own, rows=sum(task.counts), validation_rows=task.held_out, device=str(task.device), unit=task.unit,
            precision=str(task.dtype).removeprefix("torch."), words=f"Comparing on {task.device}: {model_words}.",
        )  # fmt: skip


def _side_by_side(folder: Path, spec: compare.CompareSpec, desk: PartDesk, specs: list, *, began_before: bool, first: bool) -> float | None:
    """Train adapters side by side. Returns the seconds it took, None when someone asked to stop."""
    lanes = [sweep.Lane(number, None, one) for number, one in enumerate(specs)]
    made, how = gather(lanes, desk, device=job.device_of(folder), folder=folder, folds=None)
    team = many.Team(made, desk, folder / "checkpoints" / desk.part, spec.together)
    desk.own = team.steps
    _started(desk, made[0].task, how + team.crew.words, first=first)
    team.go_on(began_before)
    if not team.run():
        many.stop(desk, team)
        return None
    return max(lane.at.seconds for lane in team.lanes)


def _alone(folder: Path, spec: compare.CompareSpec, desk: PartDesk, specs: list, *, began_before: bool, first: bool) -> float | None:
    """Train the base itself. Returns the seconds it took, None when someone asked to stop. One that breaks off is a result too."""
    [one] = specs
    task = job.task_class(one.task.kind)(one, device=job.device_of(folder), note=lambda sentence: None, folder=folder)
    method = methods.METHODS[one.method.kind]
    model = task.load()
    crew.settle(model, one.compute.threads)
    model = method.attach(model, one, task.parts(model))
    fast = task.prepare(model)
    trainer = loop.Trainer(task, method, model, one, _Alone(desk), folder / "checkpoints" / desk.part)
    desk.own = trainer.steps
    _started(desk, task, fast, first=first)
    trainer.at = replace(trainer.at, settings=to_tree(one), prints=dict(task.prints))
    path, _ = checkpoint.newest_whole(trainer.folder)
    if path is not None:
        checkpoint.check_same(checkpoint.read_state(path), trainer.at.settings, trainer.at.prints)
        trainer.at = checkpoint.restore(path, trainer.parameters, trainer.optimizer)
    if path is not None or began_before:
        desk.emit("resumed", step=trainer.at.step, words=f"Restored step {trainer.at.step} of {trainer.steps} of {desk.part}.")
    try:
        outcome = trainer.run()
    except TrainingError as error:
        desk.emit("variant", step=trainer.at.step, variant=0, state="failed", reason=str(error))
        return trainer.at.seconds
    if outcome.state == "stopped":
        kept = "a checkpoint was saved; resume to go on" if outcome.saved else "nothing new was saved"
        desk.emit("stopped", step=trainer.at.step, steps=trainer.steps, saved=outcome.saved, reason=f"Stopped on request; {kept}.")
        desk.answered("stop")
        return None
    return trainer.at.seconds


class _Alone(PartDesk):
    """The desk of the one trial of a part: its number is 0."""

    def __init__(self, desk: PartDesk):
        self.desk = desk

    def emit(self, kind: str, **fields) -> None:
        self.desk.emit(kind, **{"variant": 0, **fields})


def _conclude(folder: Path, desk: loop.Desk, spec: compare.CompareSpec) -> None:
    """Say which rates were best; what follows from the losses is told by whoever reads them (`comparisons.result`)."""
    events = runs.read_all(folder)
    measured = [event for event in events if event["kind"] == "measured"]
    steps = sum(event["own"] for event in measured)
    rates = compare.best(spec, events)
    words = (
        "Best rates: "
        + ", ".join(f"{compare.NAMES[method]} {rate:.2g}" for method, rate in rates.items())
        + f"; {spec.seeds} seeds of each."
    )
    desk.emit("done", step=steps, steps=steps, seconds=round(sum(event["seconds"] for event in measured), 1), reason=words)
    desk.answered("stop")
