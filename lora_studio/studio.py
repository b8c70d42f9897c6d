"""The verbs: one function per thing a user does. The pages and the command line call these and nothing below."""

import importlib.util
import os
import re
import shlex
import time
import zipfile
from dataclasses import replace
from pathlib import Path

from lora_studio import advice, bases, data, durable, fence, presets, runs, settings, visits
from lora_studio.errors import HostError, RunError, SpecError
from lora_studio.home import presets_folder
from lora_studio.jobs import checks, devices, local, queue
from lora_studio.preflight import Report, gigabytes, pinned, preflight
from lora_studio.rates import rates, scale, suggest_lr, suggest_ratio
from lora_studio.spec import TrainSpec, parse
from lora_studio.spec.idle import foreign
from lora_studio.workspace import Workspace

__all__ = ["Report", "gigabytes", "pinned", "preflight", "rates", "scale", "suggest_lr", "suggest_ratio"]

SAMPLE = re.compile(r"[0-9a-f]{16}\.png")


# ---- specs

METHOD_NAMES = {"dylora": "DyLoRA", "adalora": "AdaLoRA", "vera": "VeRA", "loha": "LoHa", "lokr": "LoKr", "miss": "MiSS", "oft": "OFT", "ia3": "IA3", "prompt": "prompt tuning", "prefix": "prefix tuning", "full": "full fine-tuning"}


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
        if leaf.path in values and (not leaf.kinds or kind in leaf.kinds) and leaf.path not in foreign(values.get("task.kind", "chat"), values.get("method.kind", "lora")):
            tree = settings.set_path(tree, leaf.path, values[leaf.path])
    return parse(tree)


def _at(tree: dict, path: str, default):
    here = tree
    for step in path.split("."):
        if not isinstance(here, dict) or step not in here:
            return default
        here = here[step]
    return here


def recommend(workspace: Workspace, spec: TrainSpec) -> advice.Recommendation:
    """Settings for the base, rows, and kinds of task and adapter of a spec on this machine, each with its reason. Raises BaseModelError."""
    info, report = bases.inspect(spec.base), preflight(workspace, spec)
    device = str(report.facts["device"])
    has_bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
    found = advice.Situation(info, int(report.facts.get("rows") or 0), report.rows, device, checks.free_memory(device), has_bitsandbytes)
    return advice.recommend(spec, found)


def with_values(spec: TrainSpec, values: dict[str, object]) -> TrainSpec:
    """The spec with other values by path. Raises SpecError."""
    return spec_of_values({**values_of(spec), **values})


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


# ---- runs


def start(workspace: Workspace, spec: TrainSpec) -> str:
    """Check, write the run folder, queue it and start it when its device is free. Returns the run's id.
    Raises SpecError with every problem that stands in the way."""
    report = preflight(workspace, spec)
    if not report.can_start:
        raise SpecError("spec.problems", problems=[problem for problem in report.problems if problem.level == "error"])
    folder = runs.create(workspace, pinned(spec))
    runs.set_card(folder, base=spec.base.id, method=method_in_words(spec), needs_token=visits.needs_token(workspace, spec))
    queue.add(workspace, folder, device=report.facts["device"])
    pump()
    return folder.name


def pump() -> list[str]:
    """Start what waits and may start."""
    return queue.pump()


def list_runs(workspace: Workspace) -> list[runs.Status]:
    """Every run, newest first."""
    waiting = queue.waiting()
    return [_status(folder, waiting) for folder in workspace.run_folders()]


def _status(folder: Path, waiting: list[Path]) -> runs.Status:
    found = runs.status(folder, place=_place(folder, waiting))
    waits = found.state == "queued" and queue.waits_for_sign_in(folder)
    return replace(found, reason=str(HostError("host.waits"))) if waits else found


def _place(folder: Path, waiting: list[Path]) -> int:
    return waiting.index(folder) + 1 if folder in waiting else 0


def show(workspace: Workspace, id: str) -> runs.Status:
    """What one run is doing. Raises RunError."""
    return _status(workspace.run_folder(id), queue.waiting())


def spec_of(workspace: Workspace, id: str) -> TrainSpec:
    """The spec of a run."""
    return runs.spec_of(workspace.run_folder(id))


def trains(workspace: Workspace, id: str) -> bool:
    """Whether a run trains an adapter; others write captions or search weights."""
    return runs.trains(workspace.run_folder(id))


def events(workspace: Workspace, id: str) -> list[dict]:
    """The whole history of a run, folded."""
    return runs.read_all(workspace.run_folder(id))


def log(workspace: Workspace, id: str, size: int = 16 * 1024) -> str:
    """The end of a run's log."""
    return runs.log_tail(workspace.run_folder(id), size)


def log_size(workspace: Workspace, id: str) -> int:
    """The bytes of a run's log so far."""
    file = workspace.run_folder(id) / "log.txt"
    return file.stat().st_size if file.exists() else 0


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


def save_now(workspace: Workspace, id: str) -> str:
    """Ask a run for a checkpoint after the step it is at. Returns a sentence. Raises RunError when it does not run."""
    return _ask(workspace, id, "save", "writes a checkpoint")


def sample_now(workspace: Workspace, id: str) -> str:
    """Ask a run for samples after the step it is at. Returns a sentence. Raises RunError when it does not run or has no prompts."""
    if not spec_of(workspace, id).output.sample_prompts:
        raise RunError("run.no_prompts", id=id)
    return _ask(workspace, id, "sample", "draws its samples")


def _ask(workspace: Workspace, id: str, request: str, what: str) -> str:
    folder = workspace.run_folder(id)
    status = runs.status(folder)
    if not status.is_live:
        raise RunError("run.not_live", id=folder.name, state=status.state)
    runs.ask(folder, request)
    return f"{folder.name} {what} after this step."


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


def save_all(*, seconds: float) -> int:
    """Ask every run of everybody to stop and save, because the machine goes, and wait for them. Returns how many ended."""
    live = runs.live()
    for folder in live:
        runs.ask(folder, "stop", save=True)
    until = time.monotonic() + seconds
    while any(runs.is_live(folder) for folder in live) and time.monotonic() < until:
        time.sleep(0.1)
    return sum(not runs.is_live(folder) for folder in live)


def resume(workspace: Workspace, id: str) -> str:
    """Queue a run to go on from its newest whole checkpoint. Raises RunError. Returns its id."""
    folder = workspace.run_folder(id)
    status = show(workspace, id)
    if status.is_live or status.state == "queued":
        raise RunError("run.live", id=folder.name, state=status.state)
    if status.state == "done":
        raise RunError("run.finished", id=folder.name)
    device = devices.resolve(durable.read_json(folder / "card.json", {}).get("device", "auto") if not runs.trains(folder) else runs.spec_of(folder).compute.device)
    for request in ("stop", "save", "sample"):
        runs.answered(folder, request)
    queue.add(workspace, folder, device=device)
    pump()
    return folder.name


def adapter_folder(workspace: Workspace, id: str) -> Path:
    """The PEFT folder a run made. Raises RunError while there is none."""
    folder = workspace.run_folder(id)
    if durable.damage(folder / "adapter"):
        raise RunError("run.no_adapter", id=folder.name, state=show(workspace, id).state)
    return folder / "adapter"


def sample(workspace: Workspace, id: str, name: str) -> Path:
    """A sample picture of a run. Raises RunError."""
    file = workspace.run_folder(id) / "samples" / name
    if not SAMPLE.fullmatch(name) or not file.is_file():
        raise RunError("run.no_sample", id=id[:60], name=name[:60])
    return file


def picture(workspace: Workspace, name: str) -> Path:
    """A picture that was drawn in the Playground. Raises RunError."""
    file = workspace.root / "pictures" / name
    if not SAMPLE.fullmatch(name) or not file.is_file():
        raise RunError("run.no_picture", name=name[:60])
    return file


def adapter_archive(workspace: Workspace, id: str, folder: Path) -> Path:
    """The PEFT folder of a run as one .zip in `folder`, for download. Raises RunError."""
    return pack(adapter_folder(workspace, id), folder, show(workspace, id).name)


def pack(source: Path, folder: Path, name: str, *, more: dict[str, bytes] | None = None) -> Path:
    """A published folder as `folder/<name>.zip`, with `more` files in it, whole or absent."""
    target = folder / f"{_file_name(name)}.zip"
    part = target.with_name(durable.TEMPORARY + target.name)
    with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(source.iterdir()):
            if file.name != durable.MARKER:
                archive.write(file, f"{target.stem}/{file.name}")
        for name, data in (more or {}).items():
            archive.writestr(f"{target.stem}/{name}", data)
    os.replace(part, target)
    return target


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "adapter"


def method_in_words(spec: TrainSpec) -> str:
    """The method of a run in a few words."""
    method = spec.method
    if method.kind == "full":
        layers = "" if method.layers == "all" else f" of {', '.join(method.layers)}"
        return f"full fine-tuning{layers}" + (f", as a LoRA of rank {method.rank}" if method.save == "lora" else "")
    if method.kind != "lora":
        own = f", blocks of {method.block}" if method.kind == "oft" else f", {method.tokens} virtual tokens" if hasattr(method, "tokens") else ""
        own = f", rank {method.rank}" if hasattr(method, "rank") else own
        return f"{METHOD_NAMES[method.kind]}{own}" + (f", alpha {method.alpha:g}" if hasattr(method, "alpha") else "")
    plus = f"LoRA+ ×{spec.optim.lora_plus_ratio:g}" if spec.optim.lora_plus_ratio else "LoRA"
    plus = ("DoRA" + plus.removeprefix("LoRA")) if method.dora else plus
    words = ", ".join(([f"from {method.start}"] if method.start else []) + ([method.init] if method.init not in ("kaiming", "gaussian") else []) + (["A frozen"] if method.freeze_a else []) + (["experts too"] if method.experts else []))
    return f"{'rank-stabilised ' if method.rslora else ''}{plus}, rank {method.rank}, alpha {method.alpha:g}" + (f", {words}" if words else "")


# ---- data


def data_choices(workspace: Workspace) -> list[tuple[str, str]]:
    """Data at hand, as (label, path): the demos and what was uploaded."""
    demos = sorted((presets_folder() / "demo").glob("*.jsonl"))
    demos += sorted(path.parent for path in (presets_folder() / "demo").glob("*/metadata.jsonl"))
    uploads = sorted(path for path in workspace.data.iterdir() if not path.name.startswith(".")) if workspace.data.is_dir() else []
    return [(f"demo: {path.stem}", f"demo/{path.stem}") for path in demos] + [(path.name, str(path)) for path in uploads]


def upload(workspace: Workspace, file: Path, name: str) -> str:
    """Keep an uploaded file under its own name in the workspace. Returns the path for a source. Raises DataError."""
    fence.refuse_bytes(workspace, Path(file).stat().st_size)
    safe = re.sub(r"[^\w.-]+", "-", Path(name).name).lstrip(".-") or "data"
    safe = Path(safe).stem[:80] + Path(safe).suffix[:20]
    target = workspace.data / safe
    if Path(safe).suffix.lower() != ".zip":  # an archive of pictures is looked into when it is used
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
