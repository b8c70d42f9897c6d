"""The lanes of a sweep: adapters over one base, each a Trainer with a data order, rates, validation and best weights of its own, which only
leaves the way through the model to all of them together (`many.py`)."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from lora_studio.errors import TrainingError
from lora_studio.spec import sweep, to_tree
from lora_studio.training import fused, job, loop, methods, optim, routed
from lora_studio.training.text import CLOSE_ENOUGH


class LaneDesk:
    """Where a lane reports: the sweep's desk, with its own number. What somebody asks for is for the sweep to answer."""

    def __init__(self, desk: loop.Desk, lane: sweep.Lane):
        self.desk, self.whose = desk, whose(lane)

    def emit(self, kind: str, **fields) -> None:
        self.desk.emit(kind, **self.whose, **fields)

    def flush(self) -> None:
        self.desk.flush()

    def asked(self, request: str) -> None:
        """Nothing is asked of one lane."""

    def answered(self, request: str) -> None:
        """Nothing was asked."""


def whose(lane: sweep.Lane) -> dict:
    """The fields by which a lane's events are known."""
    return {"variant": lane.variant} | ({} if lane.fold is None else {"fold": lane.fold})


class Own:
    """One adapter of a model with several, as what a Trainer asks a model for: its parameters only, under the names they have alone."""

    def __init__(self, model: torch.nn.Module, adapter: str):
        self.model, self.adapter = model, adapter

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            parts = name.split(".")
            if self.adapter in parts:
                yield ".".join(methods.ADAPTER if part == self.adapter else part for part in parts), parameter

    def __call__(self, *given, **more):
        return self.model(*given, **more)

    def train(self, mode: bool = True) -> None:
        """Leave the mode of training. It is entered again by the next step of all lanes, because each walk over the layers takes
        milliseconds, and one lane after another is judged."""
        if not mode and self.model.training:
            self.model.train(False)

    def eval(self) -> None:
        """The other mode."""
        self.train(False)

    def __getattr__(self, name: str):
        return getattr(self.model, name)


@dataclass
class Lane(loop.Trainer):
    """An adapter among others. `ended` is how it ended, with the reason; `kept` its best weights so far."""

    number: int = 0
    lane: sweep.Lane | None = None
    router: routed.Router | None = None
    ended: str = ""
    reason: str = ""
    loss: float | None = None
    measured: float | None = None  # what the next validation finds, where that is known
    kept: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def adapter(self) -> str:
        """Its name among the model's adapters."""
        return adapter_name(self.number)

    @property
    def folder_name(self) -> str:
        """The name of its folder in adapters/."""
        return str(self.lane.variant) if self.lane.fold is None else f"{self.lane.variant}-{self.lane.fold}"

    @property
    def score(self) -> float | None:
        """The validation loss of what it gives: the lowest, or the last where the last weights are taken."""
        return self.at.best_loss if self.spec.validation.keep_best else self.at.validation

    def evaluate(self) -> float:
        if self.measured is None:
            self.measure()
        found, self.measured = self.measured, None
        return found

    def measure(self) -> None:
        """Do the work of the next validation."""
        with self.router.only(self.adapter):
            self.measured = super().evaluate()

    def _sample(self, step: int) -> None:
        with self.router.only(self.adapter):
            super()._sample(step)

    def judge(self) -> bool:
        """Validate when it is time and keep the best weights; whether they are new. Raises TrainingError."""
        best = self._judge()
        if best and self.spec.validation.keep_best:
            with optim.averaged(self.optimizer):
                self.kept = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.show()
        return best

    def _load_best(self) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.kept[name])

    def end(self, state: str, reason: str) -> None:
        """Leave the pass."""
        self.ended, self.reason = state, reason
        self.optimizer.zero_grad(set_to_none=True)
        self.desk.emit("variant", step=self.at.step, state=state, reason=reason, loss=self.score)


def adapter_name(number: int) -> str:
    """What a lane's adapter is called in the model."""
    return f"v{number}"


def gather(lanes: list[sweep.Lane], desk: loop.Desk, *, device: str, folder: Path, folds: int | None) -> tuple[list[Lane], str]:
    """One base with an adapter for each lane, ready for the first step, and how it goes in words. Raises StudioError."""
    tasks, model, targets = [], None, []
    told: set[str] = set()

    def note(sentence: str) -> None:
        if sentence not in told:
            desk.emit("note", text=sentence)
        told.add(sentence)

    for lane in lanes:
        twin = next((task for task, other in zip(tasks, lanes) if _same_rows(lane, other)), None)
        if twin is not None:
            task = copy.copy(twin)
            task.spec = lane.spec
        else:
            task = job.task_class(lane.spec.task.kind)(lane.spec, device=device, note=note, folder=folder)
            task.fold = None if lane.fold is None else (lane.fold, folds)
            bare = task.load(model.get_base_model() if model is not None else None)
        targets.append(task.parts(model.get_base_model() if model is not None else bare))
        model = methods.attach_beside(bare if model is None else model, lane.spec, targets[-1], adapter_name(len(tasks)))
        tasks.append(task)
    model.set_adapter(adapter_name(0))
    _set_trained(model, lanes)  # before anything looks for what is frozen
    fast = tasks[0].prepare(model)
    for task in tasks:
        task.fast = getattr(tasks[0], "fast", False)
    router, made = routed.Router(), []
    try:
        routed.install(model, router, fast=tasks[0].fast)
    except routed.Apart as reason:
        raise TrainingError("sweep.route", base=lanes[0].spec.base.id, reason=reason) from None
    for number, (lane, task) in enumerate(zip(lanes, tasks)):
        trainer = Lane(
            task, methods.METHODS["lora"], Own(model, adapter_name(number)), lane.spec, LaneDesk(desk, lane), folder / "checkpoints",
            number=number, lane=lane, router=router,
        )  # fmt: skip
        trainer.at = replace(trainer.at, settings=to_tree(lane.spec), prints=dict(task.prints))
        made.append(trainer)
    off = check(made)
    return made, f"{fast}; {len(made)} adapters side by side, off by {off:.1e} from each alone"


def _same_rows(lane: sweep.Lane, other: sweep.Lane) -> bool:
    """Whether two lanes of a language model have the very same rows. (What is shown of pictures depends on more.)"""
    one, two = lane.spec, other.spec
    alike = (one.data, one.validation, one.compute.seed, lane.fold) == (two.data, two.validation, two.compute.seed, other.fold)
    return alike and one.task.kind != "image"


def _set_trained(model: torch.nn.Module, lanes: list[sweep.Lane]) -> None:
    """Let every adapter learn, and those with a frozen A that was drawn alike share it."""
    for number, lane in enumerate(lanes):
        for name, parameter in Own(model, adapter_name(number)).named_parameters():
            parameter.requires_grad_(not (lane.spec.method.freeze_a and optim.role(name) == "A"))
    for layer in model.modules():
        drawn: list[torch.nn.Parameter] = []
        for down in getattr(layer, "lora_A", {}).values():
            if down.weight.requires_grad:
                continue
            same = next((one for one in drawn if torch.equal(one, down.weight)), None)
            if same is not None:
                down.weight = same
            else:
                drawn.append(down.weight)


@torch.no_grad()
def check(lanes: list[Lane]) -> float:
    """How far the losses of all lanes in one pass are from each lane's alone, relative, on one row of each with random factors. Raises
    TrainingError where the model mixes their rows."""
    task, model = lanes[0].task, lanes[0].model.model
    batches = [lane.task.collate(lane.stream.step(0)[0][:1]) for lane in lanes]
    worst = 0.0
    with fused.stirred(model):
        alone = []
        for lane, batch in zip(lanes, batches):
            with lane.router.only(lane.adapter):
                alone.append(float(lane.task.loss(model, batch)))
        found = [0.0] * len(lanes)
        try:
            for one in task.passes(batches):
                with lanes[0].router.over([(lanes[number].adapter, count) for number, count in one.shares]):
                    for (number, _), loss in zip(one.shares, one.losses(model), strict=True):
                        found[number] += float(loss)
        except routed.Apart as reason:
            raise TrainingError("sweep.route", base=lanes[0].spec.base.id, reason=reason) from None
    for one, other in zip(found, alone):
        worst = max(worst, abs(one - other) / max(abs(other), 1e-12))
    if not worst <= CLOSE_ENOUGH[task.dtype]:
        raise TrainingError("sweep.route", base=lanes[0].spec.base.id, reason=f"the losses differ by {worst:.1e}")
    return worst
