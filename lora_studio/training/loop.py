"""The training loop, the only one. It knows steps, rates, checkpoints and requests; what a row is only the task knows."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from lora_studio.errors import MachineError, TrainingError
from lora_studio.spec import TrainSpec
from lora_studio.training import checkpoint, optim, relief
from lora_studio.training.order import Draw, Plan, Stream, key


@dataclass
class Pass:
    """One way through the model for batches of several adapters: (batch, rows or tokens of it) along the leading axis, and what gives the
    summed loss of each of these, with its graph."""

    shares: list[tuple[int, int]]
    losses: Callable[[torch.nn.Module], list[torch.Tensor]]


class Task(Protocol):
    """What the loop asks of a task. A new task or family answers these; the loop does not change.

    `counts` and `weights`: the rows of each source and how often an epoch shows them. `held_out`: how many rows are kept
    for validation. `prints`: fingerprints of base and rows, by name.
    """

    counts: tuple[int, ...]
    weights: tuple[float, ...]
    held_out: int
    prints: dict[str, str]

    def collate(self, draws: list[Draw]) -> Any:
        """A batch of training rows, on the device. Everything random about it comes from the draws' seeds."""

    def collate_held_out(self, indices: list[int]) -> Any:
        """A batch of held-out rows; the same every time."""

    def units(self, batch: Any) -> float:
        """What the loss is averaged over: learnt tokens, or pictures."""

    def size(self, batch: Any) -> int:
        """What goes through the model: tokens, or pictures. Speed is told in these."""

    def loss(self, model, batch: Any) -> torch.Tensor:
        """The loss summed over the batch's units, with its graph."""

    def passes(self, batches: list) -> list[Pass]:
        """Batches, each of another adapter, in as few passes as their shapes allow."""

    def shared(self, model) -> contextlib.AbstractContextManager:
        """A while in which several threads may take passes through the model."""

    def sample(self, model, prompt: str, seed: int) -> str:
        """An answer to a prompt: text, or the name of a picture in samples/."""


class Desk(Protocol):
    """Where the loop reports and what it is told: a run folder, or a list in a test."""

    def emit(self, kind: str, **fields) -> None:
        """Report one event."""

    def flush(self) -> None:
        """See to it that everything reported so far lasts."""

    def asked(self, request: str) -> dict | None:
        """Whether someone asked for something (`stop`, `save`, `sample`)."""

    def answered(self, request: str) -> None:
        """Take a request away."""


@dataclass
class Outcome:
    """How training ended: done, or stopped (saved or not), and where it stands."""

    state: str
    saved: bool
    at: checkpoint.State
    best: bool = False
    reason: str = ""


@dataclass
class Trainer:
    """A run in motion. `world` speaks for several processes (an accelerate.Accelerator), or is None for one."""

    task: Task
    method: Any
    model: torch.nn.Module
    spec: TrainSpec
    desk: Desk
    folder: Any
    world: Any = None
    at: checkpoint.State = field(default_factory=checkpoint.State)
    began: float = 0.0
    recent: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self):
        spec = self.spec
        self.plan = Plan(self.task.counts, self.task.weights, spec.schedule.batch_size, spec.schedule.accumulate, spec.compute.seed)
        self.stream = Stream(self.plan)
        self.steps = spec.schedule.steps or self.plan.steps(spec.schedule.epochs)
        self.parameters = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        self.optimizer = optim.OPTIMIZERS[spec.optim.kind](self.method.groups(self.model, spec), spec.optim)
        self.eval_every = spec.validation.every or max(1, math.ceil(self.steps / 10))
        self.save_every = spec.output.checkpoint_every or max(1, math.ceil(self.steps / 10))
        self.sample_every = spec.output.sample_every or max(1, math.ceil(self.steps / 4))
        self.first = self.world is None or self.world.is_main_process

    # ---- the loop

    def run(self) -> Outcome:
        """Train from wherever the run stands to its end, or until someone asks to stop."""
        try:
            return self._run()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            step = self.at.step + 1
            raise MachineError("machine.memory", device=device_of(self.model), step=step, advice=relief.advice(self)) from error

    def _run(self) -> Outcome:
        self.began = time.monotonic() - self.at.seconds
        if self.at.step == 0:
            self._before()
        while not self.is_over:
            outcome = self._step()
            if outcome is not None:
                return outcome
            best = self._judge()
            self._keep(best)
        return self.finish()

    def _before(self) -> None:
        """What the untouched base says and loses: the mark that training is measured against."""
        self._sample(0)
        if self.task.held_out:
            loss = self.evaluate()
            if self.first:
                self.desk.emit("eval", step=0, loss=loss, best=False)

    def _step(self) -> Outcome | None:
        """One optimizer step; an Outcome when someone asked to stop before it was complete."""
        started, step = time.monotonic(), self.at.step
        batches, rates = self.begin()
        loss, size = self._gradients(batches, step)
        if loss is None:
            self.method.abandon(self.model, step, self.steps)
            return self._stop()
        self.take(loss, size, rates, started)
        return None

    def begin(self) -> tuple[list[list[Draw]], dict[str, float]]:
        """Get ready for a step: its rows batch by batch, and the rate of each role."""
        step = self.at.step
        batches = [self._share(draws) for draws in self.stream.step(step)]
        self.model.train()
        self.method.before_step(self.model, step, self.steps)
        factor = optim.factor(self.spec.schedule, step, self.steps)
        return batches, optim.set_rates(self.optimizer, factor)

    def take(self, loss: float, size: int, rates: dict[str, float], started: float) -> None:
        """The step itself, with the gradients of `loss` that are there. Raises TrainingError before a broken number reaches the weights."""
        step = self.at.step
        penalty = self.method.penalty(self.model, self.spec)
        if penalty is not None:
            penalty.backward()
        norm = self._clip()
        self._guard(step, loss=loss, gradient=norm)
        self.optimizer.step()
        self.method.after_step(self.model, step, self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        self.at.step, self.at.tokens = step + 1, self.at.tokens + size
        self._report(loss, norm, rates, size, time.monotonic() - started)

    def _gradients(self, batches: list, step: int) -> tuple[float | None, int]:
        """Add up the gradients of a step, weighted by units over all its batches. Returns the loss per unit and the size of
        the step; (None, 0) when asked to stop."""
        prepared = [self.task.collate(draws) for draws in batches if draws]
        units = self._sum(sum(self.task.units(batch) for batch in prepared))
        total = 0.0
        for number, batch in enumerate(prepared):
            if self.world is None and self._asked("stop"):
                self.optimizer.zero_grad(set_to_none=True)
                return None, 0
            torch.manual_seed(key(self.spec.compute.seed, "step", step, number))
            loss = self.task.loss(self.model, batch) / units
            loss.backward()
            total += loss.detach().item()
        if self.world is not None:
            if self._sum(float(self._asked("stop"))):
                self.optimizer.zero_grad(set_to_none=True)
                return None, 0
            for parameter in self.parameters.values():
                parameter.grad = self.world.reduce(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad, "sum")
        return self._sum(total), int(self._sum(sum(self.task.size(batch) for batch in prepared)))

    def _share(self, draws: list[Draw]) -> list[Draw]:
        """The rows of a batch that fall to this process."""
        return draws if self.world is None else draws[self.world.process_index :: self.world.num_processes]

    def _sum(self, value: float) -> float:
        """A number summed over the processes."""
        if self.world is None:
            return value
        return self.world.reduce(torch.tensor(value, dtype=torch.float64, device=self.world.device), "sum").item()

    def _asked(self, request: str) -> bool:
        return self.first and self.desk.asked(request) is not None

    def _clip(self) -> float:
        limit = self.spec.optim.clip
        return float(torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), math.inf if limit is None else limit))

    def _guard(self, step: int, **values: float) -> None:
        """Stop before a number that is not one reaches the weights."""
        for what, value in values.items():
            if not math.isfinite(value):
                raise TrainingError("training.not_finite", what=what, value=value, step=step + 1, good=step, lr=self.spec.optim.lr)

    def _report(self, loss: float, norm: float, rates: dict, size: int, seconds: float) -> None:
        self.recent = [*self.recent[-19:], (seconds, size)]
        per_step = sum(second for second, _ in self.recent) / len(self.recent)
        self.at.seconds = time.monotonic() - self.began
        if self.first:
            self.desk.emit(
                "step",
                step=self.at.step,
                steps=self.steps,
                loss=loss,
                grad_norm=norm,
                **{f"lr_{role}": rate for role, rate in rates.items()},
                tokens_per_second=round(sum(tokens for _, tokens in self.recent) / max(1e-9, per_step * len(self.recent)), 1),
                memory=memory_used(device_of(self.model)),
                seconds_left=round((self.steps - self.at.step) * per_step, 1),
                epoch=round(self.stream.epoch_at(self.at.step), 3),
            )

    # ---- around the steps

    def _judge(self) -> bool:
        """Validate when it is time; True when the loss is the lowest so far."""
        if not self.is_due:
            return False
        step, loss = self.at.step, self.evaluate()
        self._guard(step - 1, validation_loss=loss)
        best = self.at.best_loss is None or loss < self.at.best_loss
        self.at.validation = loss
        self.at.waited = 0 if best else self.at.waited + 1
        if best:
            self.at.best_step, self.at.best_loss = step, loss
        if self.first:
            self.desk.emit("eval", step=step, loss=loss, best=best)
        return best

    @property
    def is_due(self) -> bool:
        """Whether it is time to validate."""
        step = self.at.step
        return bool(self.task.held_out) and (step % self.eval_every == 0 or step == self.steps)

    @property
    def is_over(self) -> bool:
        """Whether the last step is made, or patience has run out."""
        patience = self.spec.validation.patience
        return self.at.step >= self.steps or (patience is not None and self.at.waited >= patience)

    def evaluate(self) -> float:
        """The mean loss per unit over the held-out rows. Touches neither weights nor the draws of training."""
        self.model.eval()
        with optim.averaged(self.optimizer):
            loss = evaluate(self.task, self.model, batch_size=self.spec.schedule.batch_size, seed=self.spec.compute.seed)
        self.model.train()
        return loss

    def _keep(self, best: bool) -> None:
        """Write the samples and the checkpoint that are due, or were asked for. The checkpoint comes last: what a run
        reported before it is never reported again by the run that goes on from it."""
        step, last = self.at.step, self.is_over
        self.show()
        if last or step % self.save_every == 0 or (best and self.spec.validation.keep_best) or self._asked("save"):
            self.save()
            self.desk.answered("save")

    def show(self) -> None:
        """Write the samples that are due, or were asked for."""
        if self.is_over or self.at.step % self.sample_every == 0 or self._asked("sample"):
            self._sample(self.at.step)
            self.desk.answered("sample")

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one. Refuses weights that are not finite."""
        if not self.first or self.at.step in checkpoint.steps(self.folder):
            return
        self.look()
        self.desk.flush()
        checkpoint.write(self.folder, self.parameters, self.optimizer, self.at, self.method.state(self.model))
        checkpoint.prune(self.folder, keep=self.spec.output.keep, best=self.at.best_step or None)
        self.desk.emit("saved", step=self.at.step, what="checkpoint")

    def look(self) -> None:
        """Raise TrainingError where a weight is not finite."""
        bad = [name for name, value in self.parameters.items() if not bool(torch.isfinite(value).all())]
        if bad:
            self._guard(self.at.step - 1, **{f"weight {bad[0]}": math.nan})

    @torch.no_grad()
    def _sample(self, step: int) -> None:
        if not self.first:
            return
        self.model.eval()
        for number, prompt in enumerate(self.spec.output.sample_prompts):
            seed = key(self.spec.compute.seed, "sample", number)
            torch.manual_seed(seed)
            with optim.averaged(self.optimizer):
                answer = self.task.sample(self.model, prompt, seed)
            self.desk.emit("sample", step=step, prompt=prompt, answer=answer)
        self.model.train()

    def finish(self) -> Outcome:
        """The end of the run, and why it came."""
        early = f"Stopped early: no better validation loss for {self.spec.validation.patience} validations."
        return self._finish(early if self.at.step < self.steps else "")

    def _finish(self, reason: str) -> Outcome:
        """The best weights where they are wanted."""
        wanted = self.spec.validation.keep_best and self.task.held_out and self.at.best_step not in (0, self.at.step)
        optim.settle(self.optimizer)
        if wanted:
            self._load_best()
        return Outcome("done", True, self.at, best=bool(wanted), reason=reason)

    def _load_best(self) -> None:
        best = checkpoint.read_parameters(self.folder / f"step-{self.at.best_step:06d}")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(best[name])

    def _stop(self) -> Outcome:
        """Someone asked to stop: save first where that was wanted."""
        request = (self.desk.asked("stop") if self.first else None) or {}
        save = bool(request.get("save", True))
        if save:
            self.save()
        optim.settle(self.optimizer)
        return Outcome("stopped", save, self.at)


@torch.no_grad()
def evaluate(task: Task, model: torch.nn.Module, *, batch_size: int, seed: int, look=lambda: None) -> float:
    """The mean loss per unit over a task's held-out rows; the same every time. `look` is called before each batch and may raise to stop."""
    total, units = 0.0, 0.0
    for number, start in enumerate(range(0, task.held_out, batch_size)):
        look()
        batch = task.collate_held_out(list(range(start, min(start + batch_size, task.held_out))))
        torch.manual_seed(key(seed, "validation", number))
        total += task.loss(model, batch).item()
        units += task.units(batch)
    return total / units


def device_of(model: torch.nn.Module) -> str:
    """Where a model's numbers are."""
    return str(next(model.parameters()).device)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory, on a GPU or in its allocator for the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def memory_used(device: str) -> int:
    """Bytes in use at the worst moment so far: what torch held on a GPU, what was resident of the whole process on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    try:  # getrusage would tell the peak of whoever started this process too, where that was higher
        status = open("/proc/self/status", encoding="ascii")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    with status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
