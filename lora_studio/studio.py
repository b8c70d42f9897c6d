"""The verbs: one function per thing a user does. The pages and the command line call these and nothing below."""

import os
import re
import shlex
import shutil
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from lora_studio import bases, durable, presets, rows, runs, settings
from lora_studio.errors import MachineError, Problem, RunError, SpecError, StudioError
from lora_studio.home import presets_folder
from lora_studio.jobs import checks, devices, local, queue
from lora_studio.spec import Base, Source, TrainSpec, parse
from lora_studio.workspace import Workspace

PREVIEW_ROWS = 5
LIGHT_ROWS = 2000


# ---- specs


def compose(preset: str | None = None, tree: dict | None = None, overrides: list[str] = ()) -> TrainSpec:
    """A spec from a preset, settings on top of it, and `path=value` overrides on top of those. Raises SpecError."""
    lower = presets.find(preset).tree() if preset else {}
    return parse(settings.override(settings.overlay(lower, tree or {}), list(overrides)))


def form_values(preset: str | None = None) -> dict[str, object]:
    """The value of every setting as a form shows it: the preset's, else the default."""
    tree = presets.find(preset).tree() if preset else {}
    return {leaf.path: _at(tree, leaf.path, leaf.default) for leaf in settings.leaves()}


def values_of(spec: TrainSpec) -> dict[str, object]:
    """The value of every setting of a spec, for a form."""
    tree = settings.to_tree(spec)
    return {leaf.path: _at(tree, leaf.path, leaf.default) for leaf in settings.leaves()}


def spec_of_values(values: dict[str, object]) -> TrainSpec:
    """The spec a form holds. Settings that its chosen kinds do not have are left out. Raises SpecError with all problems."""
    tree: dict = {}
    for leaf in settings.leaves():
        kind = values.get(f"{leaf.group}.kind")
        if leaf.path in values and (not leaf.kinds or kind in leaf.kinds):
            tree = settings.set_path(tree, leaf.path, values[leaf.path])
    return parse(tree)


def _at(tree: dict, path: str, default):
    here = tree
    for step in path.split("."):
        if not isinstance(here, dict) or step not in here:
            return default
        here = here[step]
    return here


def command(spec: TrainSpec) -> str:
    """The command line that starts exactly this run."""
    plain, words = parse({"data": [{"path": "x"}], "task": {"kind": spec.task.kind}}), ["python -m lora_studio train"]
    default, wanted = values_of(plain), values_of(spec)
    for leaf in settings.leaves():
        if leaf.path == "data":
            for source in settings.to_tree(spec, sparse=True)["data"]:
                words.append("--data " + shlex.quote(source["path"] if len(source) == 1 else settings.inline(source)))
        elif wanted[leaf.path] != default[leaf.path] or (leaf.path == "task.kind" and spec.task.kind != "chat"):
            words.append(f"--{leaf.path} {shlex.quote(settings.inline(wanted[leaf.path]))}")
    return " \\\n  ".join(words)


# ---- before Start


@dataclass
class Report:
    """What is known before a run starts: problems with their fields, facts to show, and the first rows."""

    problems: list[Problem] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)
    preview: list[dict] = field(default_factory=list)

    @property
    def can_start(self) -> bool:
        return not any(problem.level == "error" for problem in self.problems)

    def add(self, path: str, sentence, level: str = "error") -> None:
        """Note a problem with a field."""
        self.problems.append(Problem(path, str(sentence), level))


def preflight(workspace: Workspace, spec: TrainSpec, *, deep: bool = False) -> Report:
    """Everything that can be said before a run starts. `deep` also encodes every row, in a process of its own."""
    report = Report()
    info = _check_base(spec, report)
    _check_data(spec, report)
    device = _check_device(spec, report)
    _check_lora_plus(spec, report)
    if info is not None:
        _size_up(spec, info, device, report)
    _check_disk(workspace, report)
    if deep and report.can_start:
        _merge_deep(spec, report)
    return report


def _check_base(spec: TrainSpec, report: Report) -> bases.BaseInfo | None:
    try:
        info = bases.inspect(spec.base)
    except StudioError as error:
        report.add("base.id", error)
        return None
    if info.folder is None:
        size = f" (about {info.parameters * 2 / 1e9:.1f} GB)" if info.parameters else ""
        report.add("base.id", f"{spec.base.id} will be fetched from the Hub{size} when the run starts.", "note")
    elif info.linears:
        found = info.targets(spec.method.targets)
        if not found:
            known = sorted({name.rsplit(".", 1)[-1] for name, *_ in info.linears})
            wanted = ", ".join(spec.method.targets) if spec.method.targets != "auto" else "auto"
            report.add("method.targets", StudioError("base.targets", id=spec.base.id, targets=wanted, known=", ".join(known)))
        missing = [] if spec.method.targets == "auto" else [name for name in spec.method.targets if name not in found]
        if found and missing:
            report.add("method.targets", f"No layer of {spec.base.id} is called {', '.join(missing)}. Remove it from method.targets.")
        report.facts["targets"] = found
    return info


def _check_data(spec: TrainSpec, report: Report) -> None:
    total = 0
    for index, source in enumerate(spec.data):
        try:
            found = rows.collect(spec.model_copy(update={"data": [source]}), limit=LIGHT_ROWS)[0] if _is_here(source) else None
        except StudioError as error:
            report.add(f"data.{index}", error)
            continue
        if found is None:
            report.add(f"data.{index}", f"{source.path} will be fetched from the Hub when the run starts.", "note")
            continue
        total += len(found.items)
        report.preview += found.items[: PREVIEW_ROWS - len(report.preview)]
        report.facts.setdefault("shapes", []).append(found.shape)
        if found.skipped:
            report.add(f"data.{index}", f"{source.path}: left out are {found.skipped_in_words()}.", "warning")
    report.facts["rows"] = total


def _is_here(source: Source) -> bool:
    from lora_studio import data

    return isinstance(data.locate(source.path), Path)


def _check_device(spec: TrainSpec, report: Report) -> str:
    try:
        device = devices.resolve(spec.compute.device)
    except MachineError as error:
        report.add("compute.device", error)
        device = "cpu"
    report.facts["device"] = device
    if spec.optim.kind == "adamw_8bit":
        import importlib.util

        if importlib.util.find_spec("bitsandbytes") is None:
            report.add("optim.kind", MachineError("machine.package", name="bitsandbytes", use="optim.kind adamw_8bit"))
    return device


def _check_lora_plus(spec: TrainSpec, report: Report) -> None:
    """LoRA+ moves the best base rate down; a rate of B far above what trains well is worth a word."""
    ratio = spec.optim.lora_plus_ratio
    report.facts["rates"] = rates(spec)
    if ratio and spec.optim.kind.startswith("adam") and spec.optim.lr * ratio * scale(spec) > 0.1:
        report.add(
            "optim.lr",
            f"With LoRA+ B learns at {spec.optim.lr * ratio:.2g}, which is high for scale {scale(spec):.2g}. "
            f"Try optim.lr {suggest_lr(spec.optim.lr):.1g}.",
            "warning",
        )


def rates(spec: TrainSpec) -> dict[str, float]:
    """The learning rate of each role at its highest."""
    return {"A": spec.optim.lr, "B": spec.optim.lr * (spec.optim.lora_plus_ratio or 1.0)}


def suggest_lr(lr: float) -> float:
    """The base rate to try when LoRA+ is switched on: best rates were seen to move down about eightfold."""
    return float(f"{lr / 8:.1g}")


def scale(spec: TrainSpec) -> float:
    """The factor of B·A: alpha / rank, or alpha / sqrt(rank) when rank-stabilised."""
    method = spec.method
    return method.alpha / (method.rank**0.5 if method.rslora else method.rank)


def _size_up(spec: TrainSpec, info: bases.BaseInfo, device: str, report: Report) -> None:
    """Trainable parameters from the headers, and memory from a rough formula, to compare with what is free."""
    if info.linears and report.facts.get("targets"):
        report.facts["trainable"] = info.trainable(report.facts["targets"], spec.method.rank)
        top = max(min(rows_, columns) for _, rows_, columns in info.linears)
        if spec.method.rank > top:
            report.add("method.rank", f"method.rank is {spec.method.rank}, but no layer has a rank above {top}. Lower it.")
    if info.parameters is None:
        return
    wide = 4 if spec.compute.precision == "fp32" or (spec.compute.precision == "auto" and not device.startswith("cuda")) else 2
    needed = info.parameters * wide + report.facts.get("trainable", 0) * 16
    if info.layers and info.hidden and info.intermediate:
        tokens = spec.schedule.batch_size * spec.task.max_length
        kept = 2 * info.hidden if spec.compute.checkpointing else 16 * info.hidden + 6 * info.intermediate
        report.facts["memory_rows_full"] = int(needed + tokens * info.layers * kept * wide)
    report.facts["memory"] = int(needed)
    free = checks.free_memory(device)
    if free is not None and needed > free:
        report.add(
            "base.id",
            f"{spec.base.id} needs about {gigabytes(needed)} and {device} has {gigabytes(free)} free. "
            "Choose a smaller base, or compute.precision bf16.",
            "warning",
        )


def _check_disk(workspace: Workspace, report: Report) -> None:
    needed = 200 * 1024**2 + 5 * 12 * report.facts.get("trainable", 0)
    free = shutil.disk_usage(workspace.root).free
    if free < needed:
        report.add("", MachineError("machine.disk", path=workspace.root, free=gigabytes(free), needed=gigabytes(needed)))
    if not os.access(workspace.root, os.W_OK):
        report.add("", MachineError("machine.write", path=workspace.root, reason="permission denied"))


def _merge_deep(spec: TrainSpec, report: Report) -> None:
    answer = checks.encode_all(pinned(spec))
    report.facts.update(answer.get("facts", {}))
    report.problems += [Problem(**item) for item in answer.get("problems", [])]


def gigabytes(count: float) -> str:
    """A number of bytes in words."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


# ---- runs


def pinned(spec: TrainSpec) -> TrainSpec:
    """The spec with local paths made absolute, so that a worker finds them wherever it runs."""
    sources = []
    for source in spec.data:
        here = Path(source.path).expanduser()
        bundled = source.path.startswith("demo/") and (presets_folder() / f"{source.path}.jsonl").is_file()
        sources.append(source.model_copy(update={"path": str(here.absolute())}) if here.exists() and not bundled else source)
    base, folder = spec.base, Path(spec.base.id).expanduser()
    if folder.is_dir() and not spec.base.id.startswith("demo-"):
        base = Base(id=str(folder.absolute()))
    return spec.model_copy(update={"data": sources, "base": base})


def start(workspace: Workspace, spec: TrainSpec) -> str:
    """Check, write the run folder, queue it and start it when its device is free. Returns the run's id.
    Raises SpecError with every problem that stands in the way."""
    report = preflight(workspace, spec)
    if not report.can_start:
        raise SpecError("spec.problems", problems=[problem for problem in report.problems if problem.level == "error"])
    folder = runs.create(workspace, pinned(spec))
    runs.set_card(folder, base=spec.base.id, method=method_in_words(spec))
    queue.add(workspace, folder, device=report.facts["device"])
    pump()
    return folder.name


def pump() -> list[str]:
    """Start what waits and may start."""
    return queue.pump()


def list_runs(workspace: Workspace) -> list[runs.Status]:
    """Every run, newest first."""
    waits = {folder.name for folder in queue.waiting()}
    return [runs.status(folder, queued=folder.name in waits) for folder in workspace.run_folders()]


def show(workspace: Workspace, id: str) -> runs.Status:
    """What one run is doing. Raises RunError."""
    folder = workspace.run_folder(id)
    return runs.status(folder, queued=folder in queue.waiting())


def spec_of(workspace: Workspace, id: str) -> TrainSpec:
    """The spec of a run."""
    return runs.spec_of(workspace.run_folder(id))


def events(workspace: Workspace, id: str) -> list[dict]:
    """The whole history of a run, folded."""
    return runs.read_all(workspace.run_folder(id))


def log(workspace: Workspace, id: str, size: int = 16 * 1024) -> str:
    """The end of a run's log."""
    return runs.log_tail(workspace.run_folder(id), size)


def samples(workspace: Workspace, id: str) -> list[dict]:
    """The sample answers of a run: {step, prompt, answer}, oldest first."""
    return [event for event in events(workspace, id) if event["kind"] == "sample"]


def stop(workspace: Workspace, id: str, *, save: bool = True) -> str:
    """Ask a run to stop; with `save` it writes a checkpoint and an adapter first. A waiting run leaves the queue.
    Returns a sentence. Raises RunError when there is nothing to stop."""
    folder = workspace.run_folder(id)
    if queue.remove(folder):
        runs.note(folder, "stopped", reason="Taken out of the queue.", saved=False)
        return f"{folder.name} was taken out of the queue."
    status = runs.status(folder)
    if not status.is_live:
        raise RunError("run.not_running", id=folder.name, state=status.state)
    runs.ask(folder, "stop", save=save)
    return f"{folder.name} will stop {'and save' if save else 'without saving'}."


def keep_going(workspace: Workspace, id: str) -> None:
    """Take a request to stop back, if the run has not acted on it yet."""
    runs.answered(workspace.run_folder(id), "stop")


def wait_until_ended(workspace: Workspace, id: str, *, seconds: float) -> runs.Status:
    """Wait for a run to end; after `seconds` every process of it is ended by force."""
    folder, until = workspace.run_folder(id), time.monotonic() + seconds
    while time.monotonic() < until:
        pump()
        status = show(workspace, folder.name)
        if not status.is_live and status.state != "queued":
            return status
        time.sleep(0.1)
    if not queue.remove(folder):
        force_stop(workspace, id)
    return show(workspace, folder.name)


def force_stop(workspace: Workspace, id: str) -> None:
    """End every process of a run now."""
    folder = workspace.run_folder(id)
    local.end(folder)
    with durable.Lock(folder / "run.lock"):
        if runs.ended(folder) is None:
            runs.note(folder, "failed", reason="Ended by force: it did not react to the request to stop.")
    pump()


def resume(workspace: Workspace, id: str) -> str:
    """Queue a run to go on from its newest whole checkpoint. Raises RunError. Returns its id."""
    folder = workspace.run_folder(id)
    status = show(workspace, id)
    if status.is_live or status.state == "queued":
        raise RunError("run.live", id=folder.name, state=status.state)
    if status.state == "done":
        raise RunError("run.finished", id=folder.name)
    device = devices.resolve(runs.spec_of(folder).compute.device)
    runs.answered(folder, "stop")
    queue.add(workspace, folder, device=device)
    pump()
    return folder.name


def adapter_folder(workspace: Workspace, id: str) -> Path:
    """The PEFT folder a run made. Raises RunError while there is none."""
    folder = workspace.run_folder(id)
    if durable.damage(folder / "adapter"):
        raise RunError("run.no_adapter", id=folder.name, state=show(workspace, id).state)
    return folder / "adapter"


def adapter_archive(workspace: Workspace, id: str) -> Path:
    """The PEFT folder of a run as one .zip beside it, for download."""
    source = adapter_folder(workspace, id)
    target = source.with_name(f"{_file_name(show(workspace, id).name)}.zip")
    part = target.with_name(durable.TEMPORARY + target.name)
    with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(source.iterdir()):
            if file.name != durable.MARKER:
                archive.write(file, f"{target.stem}/{file.name}")
    os.replace(part, target)
    return target


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "adapter"


def method_in_words(spec: TrainSpec) -> str:
    """The method of a run in a few words."""
    plus = f"LoRA+ ×{spec.optim.lora_plus_ratio:g}" if spec.optim.lora_plus_ratio else "LoRA"
    return f"{'rank-stabilised ' if spec.method.rslora else ''}{plus}, rank {spec.method.rank}, alpha {spec.method.alpha:g}"


# ---- data


def data_choices(workspace: Workspace) -> list[tuple[str, str]]:
    """Data at hand, as (label, path): the demos and what was uploaded."""
    demos = sorted((presets_folder() / "demo").glob("*.jsonl"))
    uploads = sorted(path for path in workspace.data.iterdir() if not path.name.startswith(".")) if workspace.data.is_dir() else []
    return [(f"demo: {path.stem}", f"demo/{path.stem}") for path in demos] + [(path.name, str(path)) for path in uploads]


def upload(workspace: Workspace, file: Path, name: str) -> str:
    """Keep an uploaded file under its own name in the workspace. Returns the path for a source. Raises DataError."""
    from lora_studio import data

    safe = re.sub(r"[^\w.-]+", "-", Path(name).name).lstrip(".-") or "data"
    target = workspace.data / safe
    data.files_of(Path(file).with_name(safe) if Path(safe).suffix else Path(safe))
    workspace.data.mkdir(parents=True, exist_ok=True)
    number = 1
    while target.exists() and target.read_bytes() != Path(file).read_bytes():
        number += 1
        target = workspace.data / f"{Path(safe).stem}-{number}{Path(safe).suffix}"
    durable.write(target, Path(file).read_bytes())
    return str(target)


def hardware() -> str:
    """The machine in a few words."""
    return devices.describe()
