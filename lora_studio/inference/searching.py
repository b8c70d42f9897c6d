"""A search for the weights of adapters: a run like any other. The base is loaded once; between two tries only the weights of hooks change.

Every try is a `step` event with its weights and its loss, written before the next one begins; from these a cut run goes on, and what it
tries afterwards is what it would have tried. `eval` events tell the lowest loss so far, each time there is a lower one.
"""

import time
from math import inf, isfinite
from pathlib import Path
from types import SimpleNamespace

import torch

from lora_studio import allotment, durable, runs
from lora_studio.errors import MachineError, RunError, TrainingError
from lora_studio.inference.blends import Part, Reader, other_base, parents_of
from lora_studio.inference.hooks import Hooks
from lora_studio.inference.proposals import proposals
from lora_studio.spec.search import SearchSpec, parse
from lora_studio.training import crew, job, loop, text_encoders


class Stopped(Exception):
    """Somebody asked to stop while rows were judged."""


def run(folder: Path, desk) -> None:
    """Search the weights of the run in `folder`, from where it was cut off. Raises StudioError."""
    spec = spec_of(folder)
    torch.set_num_threads(spec.threads or allotment.cores())
    parts = Reader().parts(SimpleNamespace(doing=""), [[one.path, 1.0, one.name] for one in spec.adapters])
    judge = Judge(spec, parts, folder, note=lambda sentence: desk.emit("note", text=sentence))
    prints = {**judge.task.prints, "adapters": [parent["sha256"] for parent in parents_of(parts)]}
    history = runs.read_all(folder)
    known = [event for event in history if event["kind"] == "step"]
    before = next((event for event in history if event["kind"] == "started"), None)
    if before and before["prints"] != prints:
        changed = next(name for name in prints if before["prints"].get(name) != prints[name])
        raise RunError("search.changed", id=folder.name, what={"base": "the base", "rows": "the rows"}.get(changed, "an adapter"))
    desk.emit(
        "started", steps=spec.evaluations, rows=judge.task.held_out, device=str(judge.task.device), unit="tries", prints=prints,
        precision=str(judge.task.dtype).removeprefix("torch."),
    )  # fmt: skip
    if before:
        desk.emit("resumed", step=len(known), words=f"{len(known)} of {spec.evaluations} tries were there already.")
    tries = [(tuple(event["weights"]), event.get("loss")) for event in known]
    stopped = _try_all(spec, judge, tries, desk, folder.name)
    weights, loss = best(tries)
    told = ", ".join(f"{part.name} {weight:g}" for part, weight in zip(parts, weights))
    words = (
        f"The best weights of {len(tries)} tries: {told}; loss {loss:.4f}, against {tries[0][1]:.4f} of the base alone."
        if tries
        else "Nothing was tried."
    )
    if stopped:
        words = f"Stopped on request. {words}"
    elif len(tries) < spec.evaluations:
        words += " Another try would change next to nothing, so it ended early."
    last = {"step": len(tries), "steps": spec.evaluations, "loss": loss if tries else None}
    desk.emit("stopped" if stopped else "done", **last, saved=bool(tries), reason=words)
    desk.answered("stop")


def spec_of(folder: Path) -> SearchSpec:
    """The spec of a run that searches weights. Raises SpecError."""
    return parse(runs.settings.read_tree(folder / "spec.yaml"))


def best(tries: list[tuple[tuple[float, ...], float | None]]) -> tuple[tuple[float, ...], float]:
    """The weights with the lowest loss, the earlier of two alike; ((), inf) before the first try."""
    return min(((weights, inf if loss is None else loss) for weights, loss in tries), key=lambda one: one[1], default=((), inf))


class Judge:
    """The rows, and the base with the adapters on its layers, loaded once. Raises StudioError."""

    def __init__(self, spec: SearchSpec, parts: list[Part], folder: Path, note):
        given = durable.read_json(folder / "card.json", {}).get("device", "cpu")
        device = "cuda:0" if given.startswith("cuda") else given
        # Texts are read by the encoders once and for all, unless an adapter changes these.
        if spec.task.kind == "image" and any(name.startswith("text_encoder") for part in parts for name in part.adapter.modules):
            spec = spec.model_copy(update={"task": spec.task.model_copy(update={"text_encoder": True})})
        self.spec, self.task = spec, _judging(spec.task.kind)(spec.as_training(), device=device, note=note, folder=folder)
        self.model = self.task.load().eval()
        crew.settle(self.model, spec.threads)
        self.hooks = Places(self.model, spec.base.id, self.task.device)
        for number, part in enumerate(parts):
            if sentence := other_base(part, spec.base.id):
                note(sentence)
            self.hooks.put(str(number), part.adapter.modules, label=part.name)

    def loss(self, weights: tuple[float, ...], look=lambda: None) -> float:
        """The mean loss of the rows under the base with these weights. `look` is called before each batch and may raise to stop."""
        try:
            with self.hooks.using({str(number): weight for number, weight in enumerate(weights)}):
                return loop.evaluate(self.task, self.model, batch_size=self.spec.batch_size, seed=self.spec.seed, look=look)
        except RuntimeError as error:
            if not loop.is_out_of_memory(error):
                raise
            raise MachineError(
                "machine.memory",
                device=self.task.device,
                step=1,
                advice=f"Set the batch size to {max(1, self.spec.batch_size // 2)}, or shorten the rows.",
            ) from error


class Places(Hooks):
    """The layers of the part that is trained, and those of text encoders by the encoder's name and their own."""

    def __init__(self, model: torch.nn.Module, base: str, device: torch.device):
        main, encoders = text_encoders.split(model)
        super().__init__(main, base, device)
        self.encoders = {}
        for name, encoder in encoders.items():
            encoder.get_base_model = lambda encoder=encoder: encoder  # nothing is wrapped around it, as there is in training
            self.encoders |= {f"{name}.{layer.removeprefix('text_model.')}": module for layer, module in encoder.named_modules()}

    def layer_of(self, name: str) -> torch.nn.Module | None:
        return self.encoders.get(name) or super().layer_of(name)


def _judging(kind: str):
    """The task of that kind with every row of it held out, and nothing to train on."""

    class Judging(job.task_class(kind)):
        def load(self) -> torch.nn.Module:
            model = super().load()
            if kind != "image":
                self.encoded.held_out = [example for source in self.encoded.train for example in source]
                self.held_out = len(self.encoded.held_out)
            return model

        def _prepare(self) -> None:
            """Before latents are made: the pictures that are judged are known by then."""
            self.judged = self.show.judged = [(number, picture) for number, items in enumerate(self.train) for picture in items]
            self.held_out = len(self.judged)
            super()._prepare()

    return Judging


def _try_all(spec: SearchSpec, judge: Judge, tries: list, desk, id: str) -> bool:
    """Try what is proposed, into `tries` and the run's events, after what was tried before. Returns whether it was stopped."""
    source, began, fresh = proposals(len(spec.adapters), low=spec.low, high=spec.high, seed=spec.seed), time.monotonic(), 0

    def look() -> None:
        if desk.asked("stop"):
            raise Stopped

    what, weights = next(source)
    for number in range(spec.evaluations):
        if number < len(tries):
            if tries[number][0] != weights:
                raise RunError("search.changed", id=id, what="what is tried (another version of pycma?)")
        else:
            try:
                look()
                loss = judge.loss(weights, look)
            except Stopped:
                return True
            if not number and not isfinite(loss):
                raise TrainingError("search.not_finite", base=spec.base.id, value=loss)
            lowest = best(tries)[1]
            tries.append((weights, loss if isfinite(loss) else None))
            if loss < lowest:  # before its step, so that a cut between them leaves neither
                desk.emit("eval", step=number + 1, loss=loss, best=True)
            fresh += 1
            pace = (time.monotonic() - began) / fresh
            figures = {
                "tokens_per_second": round(1 / pace, 3), "memory": loop.memory_used(str(judge.task.device)),
                "seconds_left": round((spec.evaluations - number - 1) * pace, 1), **({"loss": loss} if isfinite(loss) else {}),
            }  # fmt: skip
            desk.emit("step", step=number + 1, steps=spec.evaluations, what=what, weights=list(weights), **figures)
            desk.flush()
        try:
            what, weights = source.send(inf if tries[number][1] is None else tries[number][1])
        except StopIteration:
            return False
    return False
