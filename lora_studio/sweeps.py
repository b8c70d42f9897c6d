"""The verbs of a sweep: check one, start one as a run of the queue, and read what it found. It is followed, stopped and resumed as any run."""

import shlex
from functools import lru_cache
from pathlib import Path
from typing import get_args, get_origin

import yaml

from lora_studio import fence, memory, runs, studio, visits
from lora_studio.errors import Problem, RunError, SpecError
from lora_studio.jobs import checks, queue
from lora_studio.preflight import Report, gigabytes, pinned, preflight
from lora_studio.spec import Source, TrainSpec, sweep, to_tree
from lora_studio.spec.sweep import SweepSpec, Variant
from lora_studio.workspace import Workspace

OWN = ("adapter", "gradients", "optimizer")  # what each adapter has for itself
ADAPTERS = "adapters and optimizers"
MORE_MEMORY = 1.15  # what a sweep on a CPU takes of one run's memory, where nobody says how many go through the model at once


def compose(run: TrainSpec, over: list[str] = (), **asked) -> SweepSpec:
    """A sweep of a run: `over` as texts `path=value,value`, `asked` other settings of SweepSpec (variants, folds, together, keep).
    Raises SpecError with every problem."""
    values = {}
    for text in over:
        path, sign, listed = text.partition("=")
        if not sign or not path.strip() or not listed.strip():
            raise SpecError("sweep.over", text=text)
        if path.strip() in values:
            raise SpecError("sweep.twice", words=f"{path.strip()} is given twice")
        values[path.strip()] = _listed(path.strip(), listed)
    tree = {
        "name": f"sweep of {run.name}"[:120],
        "run": to_tree(run),
        **{name: value for name, value in asked.items() if value is not None},
    }
    if values:
        tree["over"] = values
    if not values and not tree.get("variants") and not tree.get("folds"):
        raise SpecError("sweep.what")
    return sweep.parse(_with_numbers(tree))


def _listed(path: str, text: str) -> list:
    """The values in a text: 4,8 or [4, 8]. A setting that is a list itself has each value in brackets: [q_proj],[q_proj, v_proj]."""
    found = runs.settings.read_yaml(f"[{text}]", f"--over {path}")
    leaf = next((one for one in runs.settings.leaves() if one.path == path), None)
    is_list = leaf is not None and list in map(get_origin, (leaf.type, *get_args(leaf.type))) and path != "data"
    inner = found[0] if len(found) == 1 and isinstance(found[0], list) else None
    return inner if inner and (not is_list or any(isinstance(one, list) for one in inner)) else found


def command(spec: SweepSpec) -> str:
    """The command line that starts exactly this sweep."""
    lines = [studio.command(spec.run).replace("lora_studio train", "lora_studio sweep", 1)]
    lines += ["--over " + shlex.quote(f"{path}={runs.settings.inline(values)[1:-1]}") for path, values in spec.over.items()]
    lines += ["--variant " + shlex.quote(runs.settings.inline(one)) for one in spec.variants]
    asked = {"folds": spec.folds, "together": spec.together, "keep": None if spec.keep == "best" else spec.keep}
    return " \\\n  ".join(lines + [f"--{name} {value}" for name, value in asked.items() if value is not None])


def as_yaml(spec: SweepSpec) -> str:
    """The sweep as YAML without what equals the defaults."""
    own = spec.model_dump(mode="json", exclude_defaults=True, exclude={"run", "kind"})
    tree = {"kind": spec.kind, **own, "run": to_tree(spec.run, sparse=True)}
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


def _with_numbers(tree: dict) -> dict:
    """YAML reads 1e-4 as a text; a setting that is a number gets one. Data may be given as paths alone."""
    numbers = {leaf.path for leaf in runs.settings.leaves() if leaf.type in (int, float)}

    def read(path: str, value):
        if path == "data" and isinstance(value, str):
            return [{"path": value}]
        if path not in numbers or not isinstance(value, str):
            return value
        try:
            return float(value)
        except ValueError:
            return value

    over = {path: [read(path, value) for value in values] for path, values in tree.get("over", {}).items()}
    variants = [{path: read(path, value) for path, value in one.items()} for one in tree.get("variants", [])]
    return {**tree, "over": over, "variants": variants}


def check(workspace: Workspace, spec: SweepSpec, *, deep: bool = False) -> Report:
    """Everything that can be said before a sweep starts: of each variant what is said of a run, and whether all fit into the memory
    together. `deep` also encodes the rows of the first variant, in a process of its own."""
    found, report, said, adapters = sweep.variants(spec), Report(), set(), 0
    for one in found:
        own = preflight(workspace, one.spec, deep=deep and one.number == 0)
        if one.number == 0:
            report = Report(facts=dict(own.facts), preview=own.preview)
        parts = own.facts.get("memory_parts", {})
        # The best weights are kept beside the adapter.
        adapters += ((spec.folds or 0) + 1) * (parts.get("adapter", 0) + sum(parts.get(name, 0) for name in OWN))
        for problem in own.problems:
            if (problem.path, problem.sentence) not in said:
                words = problem.sentence if one.number == 0 else f"{one.words}: {problem.sentence}"
                report.problems.append(Problem(problem.path, words, problem.level))
            said.add((problem.path, problem.sentence))
    report.facts |= {"variants": len(found), "adapters": len(sweep.lanes(spec, found))}
    visited = fence.too_many(workspace, report.facts["adapters"])
    if visited:
        report.add("over", visited)
    if "memory_parts" in report.facts:
        _size_up(spec, adapters, report)
    return report


def _size_up(spec: SweepSpec, adapters: int, report: Report) -> None:
    """Compare what all adapters need together with what is free: the base is there once, `adapters` are the bytes of all of them with
    their optimizers, and what the backward pass needs counts for each that goes through the model at once."""
    parts, device, count = report.facts["memory_parts"], report.facts["device"], report.facts["adapters"]
    batch = parts.get("activations", 0) + (0 if spec.run.compute.packing else parts.get("logits", 0))
    shared = report.facts["memory"] - sum(parts.get(name, 0) for name in OWN) - batch
    at_once = min(spec.together or count, count)
    if spec.together is None and batch and not device.startswith("cuda"):
        at_once = int(min(max((MORE_MEMORY * report.facts["memory"] - shared - adapters) // batch, 1), count))
    needed = shared + adapters + at_once * batch
    free = checks.free_memory(device)
    report.facts |= {
        "memory": needed,
        "memory_of_a_batch": batch,
        "memory_free": free,
        "memory_badge": _badge(needed, free),
        "at_once": at_once,
    }
    report.facts["memory_parts"] = _parts_of_all(parts, adapters, at_once, with_logits=not spec.run.compute.packing)
    report.facts["memory_together"] = (*report.facts.get("memory_together", ()), ADAPTERS)
    if free is None or needed <= memory.TIGHT * free:
        return
    limit = free if needed > free else memory.TIGHT * free
    room = int((limit - shared - adapters) // batch) if batch else 0
    advice = f"Set together to {room}." if 0 < room < at_once else "Give fewer values, or lower schedule.batch_size."
    told = SpecError("sweep.memory", needed=gigabytes(needed), count=count, device=device, free=gigabytes(free), advice=advice)
    report.add("together", told, "error" if needed > free else "note")


def _badge(needed: int, free: int | None) -> str:
    return "unknown" if free is None else "too big" if needed > free else "tight" if needed > memory.TIGHT * free else "fits"


def _parts_of_all(parts: dict[str, int], adapters: int, at_once: int, *, with_logits: bool) -> dict[str, int]:
    """The parts of one run's memory as all adapters have them: what is the base's once, what is theirs as often as it is there."""
    times = {"activations": at_once, "logits": at_once if with_logits else 1}
    shared = {name: size * times.get(name, 1) for name, size in parts.items() if name not in OWN}
    return {**shared, ADAPTERS: adapters}


def start(workspace: Workspace, spec: SweepSpec) -> str:
    """Check a sweep, write its run folder, queue it and start it when its device is free. Returns the run's id. Raises SpecError with
    every problem that stands in the way, before anything is loaded."""
    report = check(workspace, spec)
    if not report.can_start:
        raise SpecError("spec.problems", problems=[problem for problem in report.problems if problem.level == "error"])
    if report.facts.get("at_once", report.facts["adapters"]) < report.facts["adapters"]:
        spec = spec.model_copy(update={"together": report.facts["at_once"]})  # a run that goes on does so in the same passes
    folder = runs.create(workspace, _pinned(spec))
    needs = any(visits.needs_token(workspace, one.spec) for one in sweep.variants(spec))
    runs.set_card(folder, base=spec.run.base.id, method="sweep", needs_token=needs)
    queue.add(workspace, folder, device=report.facts["device"])
    queue.pump()
    return folder.name


def _pinned(spec: SweepSpec) -> SweepSpec:
    """The sweep with local paths made absolute, so that a worker finds them wherever it runs."""

    def here(path: str, value):
        if path != "data":
            return value
        run = spec.run.model_copy(update={"data": [Source.model_validate(one) for one in value]})
        return [one.model_dump(mode="json", exclude_defaults=True) for one in pinned(run).data]

    over = {path: [here(path, value) for value in values] for path, values in spec.over.items()}
    listed = [{path: here(path, value) for path, value in one.items()} for one in spec.variants]
    return spec.model_copy(update={"run": pinned(spec.run), "over": over, "variants": listed})


@lru_cache(maxsize=64)
def read(folder: Path) -> tuple[SweepSpec, tuple[Variant, ...]]:
    """The sweep in a run folder with its variants. (What was asked for never changes.) Raises RunError when the run is no sweep."""
    if runs.kind_of(folder) != "sweep":
        raise RunError("sweep.other", id=folder.name)
    spec = sweep.parse(runs.settings.read_tree(folder / "spec.yaml"))
    return spec, tuple(sweep.variants(spec))


def result(workspace: Workspace, id: str) -> dict:
    """What a sweep has found so far, also while it goes on (see `summary`). Raises RunError when the run is no sweep."""
    folder = workspace.run_folder(id)
    read(folder)
    return summary(folder, studio.show(workspace, id), studio.events(workspace, id))


def summary(folder: Path, status: runs.Status, events: list[dict]) -> dict:
    """What the events of a sweep say. `variants`, each with name, words, changes, state, reason, step and steps,
    `validation` (its lowest loss; with folds the mean over them, None until each has one), `folds` (the lowest loss of each), `library`
    (the id of its adapter, once shelved), and curves of [step, loss]: `train` and `judged` (with folds of the adapter of all rows, and
    the mean over the folds). `best` is the number of the variant with the lowest validation loss so far, and `kept` the one that the
    finished sweep chose."""
    spec, variants = read(folder)
    told = [_told(one, spec, [event for event in events if event.get("variant") == one.number]) for one in variants]
    judged = [one for one in told if one["validation"] is not None and one["state"] != "failed"]
    done = next((event for event in reversed(events) if event["kind"] == "done"), {})
    return {
        "id": folder.name, "state": status.state, "reason": status.reason, "base": spec.run.base.id, "folds": spec.folds,
        "step": status.step, "steps": status.steps, "variants": told, "kept": done.get("best"),
        "best": min(judged, key=lambda one: one["validation"])["number"] if judged else None,
    }  # fmt: skip


def _told(one: Variant, spec: SweepSpec, events: list[dict]) -> dict:
    """What the events say of one variant."""
    steps = [event for event in events if event["kind"] == "step" and "fold" not in event]
    evals = [event for event in events if event["kind"] == "eval"]
    ends = [event for event in events if event["kind"] == "variant"]
    whole = next((event for event in ends if "fold" not in event), None)
    broken = next((event for event in ends if event["state"] == "failed"), None)
    by_fold = [[event for event in evals if event.get("fold") == fold] for fold in (range(spec.folds) if spec.folds else [None])]
    lowest = [_score(one.spec, found) for found in by_fold]
    known = all(loss is not None for loss in lowest)
    return {
        "number": one.number, "name": one.spec.name, "words": one.words, "changes": one.changes,
        "state": broken["state"] if broken else whole["state"] if whole else "running" if steps else "waiting",
        "reason": (broken or whole or {}).get("reason", ""), "step": steps[-1]["step"] if steps else 0, "steps": steps[-1]["steps"] if steps else 0,
        "loss": steps[-1]["loss"] if steps else None, "validation": sum(lowest) / len(lowest) if known else None, "folds": lowest if spec.folds else [],
        "library": next((event["library"] for event in events if event["kind"] == "note" and "library" in event), None),
        "train": [[event["step"], event["loss"]] for event in steps], "judged": _mean_curve(by_fold),
    }  # fmt: skip


def _score(spec: TrainSpec, evals: list[dict]) -> float | None:
    """The validation loss of what a run gives: the lowest after its first step, or the last where the last weights are taken."""
    losses = [event["loss"] for event in evals if event["step"]]
    return (min(losses) if spec.validation.keep_best else losses[-1]) if losses else None


def _mean_curve(by_fold: list[list[dict]]) -> list[list[float]]:
    """[step, mean validation loss] where every fold has one."""
    tables = [{event["step"]: event["loss"] for event in found} for found in by_fold]
    shared = sorted(set.intersection(*map(set, tables))) if tables else []
    return [[step, sum(table[step] for table in tables) / len(tables)] for step in shared]
