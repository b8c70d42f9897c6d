"""Several adapters in one process over one base: what a sweep does. On a GPU they go through it in one pass; a CPU's threads share them.

A lane that breaks or ends leaves the pass; the others do not notice.

    checkpoints/     all lanes in one folder for each step
    adapters/0/      the finished adapter of variant 0
    adapter/         that of the best variant
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from lora_studio import allotment, durable, runs
from lora_studio.errors import MachineError, TrainingError
from lora_studio.spec import sweep
from lora_studio.training import checkpoint, job, loop, methods
from lora_studio.training.crew import Crew, hands, worth
from lora_studio.training.lanes import Lane, gather
from lora_studio.training.order import key


@dataclass
class Team:
    """The lanes of a sweep in motion, all of which that still run at the same step. `together`: how many are on their way through the
    model at once; on a CPU each of its threads takes its part of them."""

    lanes: list[Lane]
    desk: loop.Desk
    folder: Path
    together: int | None = None

    def __post_init__(self):
        output = self.lanes[0].spec.output
        self.steps = max(lane.steps for lane in self.lanes)
        self.save_every = output.checkpoint_every or max(1, -(-self.steps // 10))
        self.at_once = min(self.together or len(self.lanes), len(self.lanes))
        asked = self.lanes[0].spec.compute.threads
        self.crew = Crew(hands(self.model, self.at_once), None if asked else worth(self.model))

    @property
    def model(self) -> torch.nn.Module:
        """The model with all adapters."""
        return self.lanes[0].model.model

    @property
    def running(self) -> list[Lane]:
        """The lanes that have not ended."""
        return [lane for lane in self.lanes if not lane.ended]

    @property
    def step(self) -> int:
        """The step that the sweep stands at."""
        return max(lane.at.step for lane in self.lanes)

    def run(self) -> bool:
        """Train all lanes from where they stand to their end; False when someone asked to stop before. Raises StudioError."""
        try:
            with self.crew:
                return self._run()
        except RuntimeError as error:
            if not loop.is_out_of_memory(error):
                raise
            fewer = f"Set together to {max(1, (self.together or len(self.lanes)) // 2)}"
            raise MachineError(
                "machine.memory", device=loop.device_of(self.lanes[0].model), step=self.step + 1, advice=f"{fewer}, or give fewer values."
            ) from error

    def _run(self) -> bool:
        for lane in self.running:
            lane.began = time.monotonic() - lane.at.seconds
        if self.step == 0:
            self._before()
        while self.running:
            if not self._make_step():
                return False
            self._measure()
            asked = self.desk.asked("sample") is not None
            for lane in self.running:
                self._after_step(lane, asked)
            if asked:
                self.desk.answered("sample")
            if not self.running or self.step % self.save_every == 0 or self.desk.asked("save") is not None:
                self.save()
                self.desk.answered("save")
        return True

    def _before(self) -> None:
        """What the untouched base says and loses: it is the same for lanes that are judged by the same rows."""
        known: dict[tuple, float] = {}
        for lane in self.lanes:
            if lane.lane.fold is None and lane.lane.variant == 0:
                lane._sample(0)
            if lane.task.held_out:
                same = (lane.task.prints["rows"], lane.spec.compute.seed, lane.spec.schedule.batch_size)
                loss = known[same] if same in known else lane.evaluate()
                known[same] = loss
                lane.desk.emit("eval", step=0, loss=loss, best=False)

    def _make_step(self) -> bool:
        """One optimizer step of every lane that runs; False, with nothing changed, when someone asked to stop."""
        started, lanes = time.monotonic(), self.running
        if not self.model.training:
            self.model.train()
        begun = {lane.number: lane.begin() for lane in lanes}
        batches = {lane.number: [lane.task.collate(draws) for draws in begun[lane.number][0] if draws] for lane in lanes}
        units = {lane.number: sum(map(lane.task.units, batches[lane.number])) for lane in lanes}
        losses = dict.fromkeys(units, 0.0)
        for turn in range(max(map(len, batches.values()))):
            here = [lane for lane in lanes if turn < len(batches[lane.number])]
            size = max(1, self.at_once // self.crew.hands)
            groups = [here[start : start + size] for start in range(0, len(here), size)]
            given = {lane.number: batches[lane.number][turn] for lane in here}
            go_through = partial(self._go_through, batches=given, units=units, losses=losses)
            for start in range(0, len(groups), self.crew.hands):
                if self.desk.asked("stop"):
                    for lane in lanes:
                        lane.optimizer.zero_grad(set_to_none=True)
                    return False
                with lanes[0].task.shared(self.model):
                    self.crew.each(go_through, groups[start : start + self.crew.hands])
        for lane in lanes:
            size = sum(map(lane.task.size, batches[lane.number]))
            try:
                lane.take(losses[lane.number], size, begun[lane.number][1], started)
                lane.loss = losses[lane.number]
            except TrainingError as error:
                lane.end("failed", str(error))
        if all(lane.ended == "failed" for lane in self.lanes):
            raise TrainingError("sweep.all_failed", reason=self.lanes[0].reason)
        return True

    def _go_through(self, lanes: list[Lane], batches: dict, units: dict, losses: dict) -> None:
        """The gradients of one batch of each of these lanes, in as few passes as their shapes allow."""
        task, model, router = lanes[0].task, self.model, lanes[0].router
        torch.manual_seed(key(lanes[0].spec.compute.seed, "step", self.step, 0))
        for one in task.passes([batches[lane.number] for lane in lanes]):
            owners = [lanes[number] for number, _ in one.shares]
            with router.over([(lane.adapter, count) for lane, (_, count) in zip(owners, one.shares)]):
                parts = [loss / units[lane.number] for lane, loss in zip(owners, one.losses(model), strict=True)]
                torch.stack(parts).sum().backward()
            for lane, part in zip(owners, parts):
                losses[lane.number] += part.detach().item()

    def _measure(self) -> None:
        """Do the work of the validations that are due, as many at a time as there are threads."""
        due = [lane for lane in self.running if lane.is_due]
        if due and self.crew.hands > 1:
            self.model.eval()
            with due[0].task.shared(self.model):
                self.crew.each(Lane.measure, due)

    def _after_step(self, lane: Lane, asked: bool) -> None:
        """Judge a lane, show what it says, and let it go when it is done."""
        try:
            lane.judge()
            lane.look()
        except TrainingError as error:
            lane.end("failed", str(error))
            return
        if asked:
            lane._sample(lane.at.step)
        if lane.is_over:
            outcome = lane.finish()
            lane.end("done", outcome.reason)

    # ---- checkpoints: one folder holds all lanes, because what goes through the model together must go on together

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one."""
        step = self.step
        if step in checkpoint.steps(self.folder):
            return
        self.desk.flush()
        files = {}
        for lane in self.lanes:
            told = replace(lane.at, settings=lane.at.settings | {"ended": lane.ended, "reason": lane.reason})
            files |= checkpoint.files(lane.parameters, lane.optimizer, told, lane.kept, f"{lane.adapter}.")
        durable.publish_folder(self.folder / f"step-{step:06d}", files)
        checkpoint.prune(self.folder, keep=self.lanes[0].spec.output.keep, best=None)
        self.desk.emit("saved", step=step, what="checkpoint")

    def go_on(self, began_before: bool) -> None:
        """Restore the newest whole checkpoint. Without one the sweep starts from its beginning, which gives the same. Raises TrainingError."""
        path, broken = checkpoint.newest_whole(self.folder)
        for sentence in broken:
            self.desk.emit("note", text=sentence)
        if path is None:
            if began_before:
                self.desk.emit("resumed", step=0, words="There was no whole checkpoint, so the sweep starts again from its beginning.")
            return
        for lane in self.lanes:
            prefix, settings, prints = f"{lane.adapter}.", lane.at.settings, lane.at.prints
            saved = checkpoint.read_state(path, prefix)
            ended, reason = saved.settings.pop("ended"), saved.settings.pop("reason")
            checkpoint.check_same(saved, settings, prints)
            lane.at = replace(checkpoint.restore(path, lane.parameters, lane.optimizer, prefix), settings=settings, prints=prints)
            lane.kept, lane.ended, lane.reason = checkpoint.read_method(path, prefix), ended, reason
        for step in checkpoint.steps(self.folder):
            if step > self.step:
                durable.remove_folder(self.folder / f"step-{step:06d}")
        words = f"Restored step {self.step} of {self.steps}: {len(self.running)} adapters that go on, {len(self.lanes) - len(self.running)} that had ended."
        self.desk.emit("resumed", step=self.step, words=words)


# ---- the job


def spec_of(folder: Path) -> sweep.SweepSpec:
    """The spec of a run that is a sweep. Raises SpecError."""
    return sweep.parse(runs.settings.read_tree(folder / "spec.yaml"))


def run(folder: Path, desk: loop.Desk) -> None:
    """Train the sweep in `folder` to its end, from its newest whole checkpoint if it has one. Raises StudioError."""
    spec = spec_of(folder)
    found = sweep.variants(spec)
    lanes = sweep.lanes(spec, found)
    torch.set_num_threads(spec.run.compute.threads or allotment.cores())
    made, how = gather(lanes, desk, device=job.device_of(folder), folder=folder, folds=spec.folds)
    team = Team(made, desk, folder / "checkpoints", spec.together)
    how += team.crew.words
    began_before = any(event["kind"] in runs.PROGRESS for event in runs.read_all(folder))
    task = made[0].task
    desk.emit(
        "started", steps=team.steps, rows=sum(task.counts), validation_rows=task.held_out, device=str(task.device), unit=task.unit, fast=how,
        precision=str(task.dtype).removeprefix("torch."), folds=spec.folds, words=f"Training {len(made)} adapters at once on {task.device}: {how}.",
        trainable=sum(value.numel() for lane in made for value in lane.parameters.values() if value.requires_grad),
        variants=[{"name": one.spec.name, "words": one.words, "changes": one.changes} for one in found],
    )  # fmt: skip
    team.go_on(began_before)
    if team.run():
        conclude(folder, spec, team)
    else:
        stop(desk, team)


def stop(desk: loop.Desk, team: Team) -> None:
    """Someone asked to stop: save first where that was wanted. No adapter is finished."""
    save = bool((desk.asked("stop") or {}).get("save", True))
    if save:
        team.save()
    kept = "a checkpoint was saved; resume to go on" if save else "nothing new was saved"
    desk.emit("stopped", step=team.step, steps=team.steps, saved=save, reason=f"Stopped on request at step {team.step}; {kept}.")
    desk.answered("stop")


def scores(spec: sweep.SweepSpec, lanes: list[Lane]) -> dict[int, float]:
    """The validation loss of each variant that came to its end in all its lanes; with folds the mean over them."""
    found = {}
    for variant in sorted({lane.lane.variant for lane in lanes}):
        own = [lane for lane in lanes if lane.lane.variant == variant]
        judged = [lane.score for lane in own if (lane.lane.fold is not None or not spec.folds)]
        if all(lane.ended == "done" for lane in own) and all(score is not None for score in judged):
            found[variant] = sum(judged) / len(judged)
    return found


def conclude(folder: Path, spec: sweep.SweepSpec, team: Team) -> None:
    """Write the adapters, whole or not at all, shelve those that are wanted, and only then say so."""
    found = scores(spec, team.lanes)
    done = [lane for lane in team.lanes if lane.ended == "done" and lane.lane.fold is None]
    best = min(found, key=found.get) if found else done[0].lane.variant if len(done) == 1 else None
    (folder / "adapters").mkdir(exist_ok=True)
    for lane in done:
        files = {**methods.finish_peft(lane.model.model, lane.spec, lane.adapter), **lane.task.extras()}
        durable.publish_folder(folder / "adapters" / lane.folder_name, files)
        if lane.lane.variant == best:
            durable.publish_folder(folder / "adapter", files)
            team.desk.emit("saved", step=lane.at.step, variant=best, what=f"adapter of {lane.spec.name}")
        if spec.keep == "all" or lane.lane.variant == best:
            taken = bool(lane.kept) and lane.spec.validation.keep_best
            outcome = loop.Outcome("done", True, lane.at, best=taken)
            id = job.shelve(folder, lane, outcome, folder / "adapters" / lane.folder_name)
            team.desk.emit("note", text=f"{lane.spec.name} is in the library as {id}.", variant=lane.lane.variant, library=id)
    failed = sum(lane.ended == "failed" for lane in team.lanes)
    if best in found:
        name = next(lane.spec.name for lane in done if lane.lane.variant == best)
        words = f"The best of {len({lane.lane.variant for lane in team.lanes})} is {name}, validation loss {found[best]:.4f}."
    else:
        words = f"{len(done)} adapters were trained; no validation loss says which is best."
    words += f" {failed} broke off." if failed else ""
    seconds = round(max(lane.at.seconds for lane in team.lanes), 1)
    team.desk.emit("done", step=team.step, steps=team.steps, loss=found.get(best), best=best, seconds=seconds, reason=words)
    team.desk.answered("stop")
