"""A training run from its spec to its adapter: put task, method and loop together, go on from a checkpoint, write the result."""

import os
from dataclasses import replace
from pathlib import Path

import torch

from lora_studio import allotment, durable, library, runs
from lora_studio.errors import TrainingError
from lora_studio.spec import methods, to_tree
from lora_studio.training import checkpoint, crew, loop, starts
from lora_studio.training.methods import METHODS
from lora_studio.workspace import Workspace


def task_class(kind: str):
    """The task of that kind. Loaded when it is needed: language and image models have large libraries of their own."""
    if kind == "image":
        from lora_studio.training.image import ImageTask as found
    else:
        from lora_studio.training.text import TextTask as found
    return found


def train(folder: Path, desk: loop.Desk) -> None:
    """Train the run in `folder` to its end, from its newest whole checkpoint if it has one. Raises StudioError."""
    spec = runs.spec_of(folder)
    torch.set_num_threads(spec.compute.threads or allotment.cores())
    world = _world()
    first = world is None or world.is_main_process
    device = str(world.device) if world else device_of(folder)

    def note(sentence: str) -> None:
        if first:
            desk.emit("note", text=sentence)

    task = task_class(spec.task.kind)(spec, device=device, note=note, folder=folder)
    model = task.load()
    crew.settle(model, spec.compute.threads)
    method = METHODS[spec.method.kind]
    targets = task.parts(model)
    model = method.attach(model, starts.placed(spec, Workspace(folder.parent.parent)), targets)
    method.begin(model, task, spec, folder, world)
    fast = task.prepare(model)
    trainer = loop.Trainer(task, method, model, spec, desk, folder / "checkpoints", world=world)
    trainer.at = replace(trainer.at, settings=to_tree(spec), prints=dict(task.prints))
    if first:
        desk.emit("started", **_start_facts(trainer, task, targets, fast, device))
    _go_on(trainer, folder, note if first else lambda sentence: None)
    outcome = trainer.run()
    if world is not None:
        world.wait_for_everyone()
    if first:
        _conclude(folder, desk, trainer, outcome)


def _world():
    """An accelerate.Accelerator when there are several processes, else None."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate import Accelerator

    return Accelerator(cpu=not torch.cuda.is_available())


def device_of(folder: Path) -> str:
    """The device the queue gave this run; it made a single GPU visible, so that one is `cuda:0` here."""
    given = durable.read_json(folder / "card.json", {}).get("device", "cpu")
    return "cuda:0" if given.startswith("cuda") else given


def _start_facts(trainer: loop.Trainer, task, targets: list[str], fast: str, device: str) -> dict:
    own = {}
    if trainer.spec.method.kind == "full":
        own = {"targets": [], "words": f"Training on {device} in float32: {fast}. {len(trainer.parameters)} tensors of the base itself learn."}
    elif trainer.spec.method.kind in methods.VIRTUAL:
        precision, count = str(task.dtype).removeprefix("torch."), trainer.spec.method.tokens
        own = {"targets": [], "words": f"Training on {device} in {precision}: {fast}. {count} virtual tokens before the input learn; no weight of the base does."}
    return {
        "steps": trainer.steps,
        "rows": sum(task.counts),
        "validation_rows": task.held_out,
        "trainable": sum(parameter.numel() for parameter in trainer.parameters.values()),
        "device": device,
        "precision": str(task.dtype).removeprefix("torch."),
        "targets": targets,
        "fast": fast,
        "unit": task.unit,
        "memory": loop.memory_used(device),
        **own,
    }


def _go_on(trainer: loop.Trainer, folder: Path, note) -> None:
    """Restore the newest whole checkpoint. Without one the run starts from its beginning, which gives the same result."""
    path, broken = checkpoint.newest_whole(folder / "checkpoints")
    for sentence in broken:
        note(sentence)
    began_before = any(event["kind"] in runs.PROGRESS for event in runs.read_all(folder))
    if path is None:
        if began_before and trainer.first:
            trainer.desk.emit("resumed", step=0, words="There was no whole checkpoint, so the run starts again from its beginning.")
        return
    checkpoint.check_same(checkpoint.read_state(path), trainer.at.settings, trainer.at.prints)
    trainer.at = checkpoint.restore(path, trainer.parameters, trainer.optimizer)
    trainer.method.restore(trainer.model, checkpoint.read_method(path))
    best = f"; best validation loss {trainer.at.best_loss:.4f} at step {trainer.at.best_step}" if trainer.at.best_loss is not None else ""
    words = f"Restored step {trainer.at.step} of {trainer.steps}: adapter, optimizer, rates, the order of the rows{best}."
    for step in checkpoint.steps(folder / "checkpoints"):
        if step > trainer.at.step:
            durable.remove_folder(folder / "checkpoints" / f"step-{step:06d}")
    if trainer.first:
        trainer.desk.emit("resumed", step=trainer.at.step, words=words)


def _conclude(folder: Path, desk: loop.Desk, trainer: loop.Trainer, outcome: loop.Outcome) -> None:
    """Write the adapter or the model, whole or not at all, and only then say so."""
    at, place = outcome.at, trainer.method.place(trainer.spec)
    if outcome.saved:
        bad = [name for name, value in trainer.parameters.items() if not bool(torch.isfinite(value).all())]
        if bad:
            raise TrainingError("training.not_finite", what=bad[0], value="nan", step=at.step, good=at.step - 1, lr=trainer.spec.optim.lr)
        _judge_ranks(desk, trainer)
        files = {**trainer.method.finish(trainer.model, trainer.spec), **trainer.task.extras()}
        durable.publish_folder(folder / place, files)
        what = f"{place} of step {at.best_step}, the best one" if outcome.best else place
        desk.emit("saved", step=at.step, what=what)
    last = {"step": at.step, "steps": trainer.steps, "loss": at.best_loss if outcome.best else at.validation, "memory": loop.memory_used(loop.device_of(trainer.model))}
    if outcome.state == "done":
        if place == "adapter":
            desk.emit("note", text=f"It is in the library as {shelve(folder, trainer, outcome, folder / place)}.")
        words = trainer.method.words(folder / place, trainer.spec)
        if words:
            desk.emit("note", text=words)
        desk.emit("done", **last, adapter_step=at.best_step if outcome.best else at.step, seconds=round(at.seconds, 1), reason=outcome.reason)
    else:
        kept = "saved" if outcome.saved else "nothing new was saved"
        desk.emit("stopped", **last, saved=outcome.saved, reason=f"Stopped on request at step {at.step}; {kept}.")
    desk.answered("stop")


def _judge_ranks(desk: loop.Desk, trainer: loop.Trainer) -> None:
    """Tell the ranks that are left in each layer, and the validation loss at every rank that the adapter also works at."""
    told = dict(trainer.method.facts(trainer.model))
    ranks = trainer.method.ranks(trainer.model) if trainer.task.held_out else ()
    for rank in ranks:
        with trainer.method.at_rank(trainer.model, rank):
            told.setdefault("losses", {})[str(rank)] = trainer.evaluate()
    if told:
        desk.emit("ranks", step=trainer.at.step, **told)


def shelve(folder: Path, trainer: loop.Trainer, outcome: loop.Outcome, adapter: Path) -> str:
    """Put the finished adapter in a folder into the library of the run's workspace. Returns its id."""
    spec, at = trainer.spec, outcome.at
    facts = {
        "name": spec.name,
        "base": spec.base.id,
        "base_revision": spec.base.revision,
        "base_print": trainer.task.prints["base"],
        "data": {"print": trainer.task.prints["rows"], "sources": [source.path for source in spec.data]},
        "metrics": {"step": at.best_step if outcome.best else at.step, "validation_loss": at.best_loss if outcome.best else at.validation},
        "run": folder.name,
    }
    return library.add(Workspace(folder.parent.parent), adapter, facts)
