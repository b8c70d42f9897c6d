"""Before a run starts: everything that can be said of a spec, its base, its rows and this machine, as sentences and numbers."""

import base64
import importlib.util
import io
import math
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from lora_studio import adapters, bases, continuing, data, families, fence, memory, pictures, rates, rows, visits
from lora_studio.adapters import assistant
from lora_studio.errors import BaseModelError, DataError, MachineError, Problem, StudioError, TrainingError
from lora_studio.home import home, presets_folder
from lora_studio.jobs import checks, devices
from lora_studio.memory import blocks_of
from lora_studio.spec import Source, TrainSpec, methods
from lora_studio.spec.idle import changed, needs_gpu
from lora_studio.weights import blocks
from lora_studio.workspace import Workspace

PREVIEW_ROWS, PREVIEW_PICTURES, THUMBNAIL = 5, 12, 128
LIGHT_ROWS = 2000


@dataclass
class Report:
    """What is known before a run starts: problems with their fields, facts to show, the first rows, and how long rows are."""

    problems: list[Problem] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)
    preview: list[dict] = field(default_factory=list)
    rows: memory.Rows = field(default_factory=memory.Rows)

    @property
    def can_start(self) -> bool:
        return not any(problem.level == "error" for problem in self.problems)

    def add(self, path: str, sentence, level: str = "error") -> None:
        """Note a problem with a field."""
        self.problems.append(Problem(path, str(sentence), level))


def preflight(workspace: Workspace, spec: TrainSpec, *, deep: bool = False) -> Report:
    """Everything that can be said before a run starts. `deep` also encodes every row, in a process of its own."""
    report = Report()
    visits.check(workspace, spec, report)
    info = _check_base(spec, report)
    _check_data(spec, report, info.vocabulary if info else None)
    check_device(spec, report)
    report.facts["rates"] = rates.rates(spec)
    report.problems += rates.problems(spec)
    _check_assistant(workspace, spec, info, report)
    report.problems += continuing.problems(workspace, spec, info)
    if info is not None:
        _size_up(spec, info, report)
    _check_disk(workspace, report)
    visits.check_length(workspace, spec, report)
    if deep and report.can_start:
        _merge_deep(spec, report)
    if info is not None:
        _check_context(spec, info, report)
        _foresee(spec, info, report)
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
    elif bool(info.pipeline) != (spec.task.kind == "image"):
        report.add("task.kind", BaseModelError("base.not_text" if info.pipeline else "base.not_image", id=spec.base.id, **({"kind": spec.task.kind} if info.pipeline else {})))
    elif info.linears:
        found = info.targets(spec.method.targets)
        if not found:
            known = sorted({name.rsplit(".", 1)[-1] for name, *_ in info.adaptable})
            wanted = ", ".join(spec.method.targets) if spec.method.targets != "auto" else "auto"
            report.add("method.targets", StudioError("base.targets", id=spec.base.id, targets=wanted, known=", ".join(known)))
        missing = [] if spec.method.targets == "auto" else [name for name in spec.method.targets if name not in found]
        if found and missing:
            report.add("method.targets", f"No layer of {spec.base.id} is called {', '.join(missing)}. Remove it from method.targets.")
        report.facts["targets"] = found
        if getattr(spec.method, "experts", False) and not info.experts:
            report.add("method.experts", BaseModelError("base.no_experts", id=spec.base.id))
        elif info.is_mixture and found and spec.method.kind not in methods.LAYERLESS and not getattr(spec.method, "experts", False):
            report.add("method.targets", str(StudioError("base.mixture", id=spec.base.id, targets=", ".join(found))), "note")
        if info.note:
            report.add("base.id", info.note, "note")
        if info.folder.is_file() and (spec.compute.quantize != "none" or spec.compute.encoders == "4bit"):
            report.add("compute.quantize", BaseModelError("image.one_file", id=spec.base.id))
        for path, error in families.misfits(info.pipeline, spec) if info.pipeline else []:
            report.add(path, error)
    return info


def _check_data(spec: TrainSpec, report: Report, vocabulary: int | None) -> None:
    if spec.task.kind == "image":
        return _check_pictures(spec, report)
    total, sizes = 0, []
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
        sizes += [_size(item) for item in found.items]
        report.preview += found.items[: max(1, PREVIEW_ROWS // len(spec.data))]
        report.facts.setdefault("shapes", []).append(found.shape)
        if found.skipped:
            report.add(f"data.{index}", f"{source.path}: left out are {found.skipped_in_words()}.", "warning")
    report.facts["rows"], report.rows = total, memory.rows_of_sizes(sizes, spec, vocabulary)


def _size(row: dict) -> int:
    """Bytes of a row's texts."""
    texts = [turn["content"] for turn in row["messages"]] if "messages" in row else row.values()
    return sum(len(str(text).encode()) for text in texts)


def _check_pictures(spec: TrainSpec, report: Report) -> None:
    """What the files say: how many pictures, of which sizes, with which captions. They are decoded later."""
    total, sizes, masked, unknown, halves = 0, Counter(), 0, False, []
    for index, source in enumerate(spec.data):
        try:
            if not isinstance(pictures.locate(source.path), Path):
                report.add(f"data.{index}", f"{source.path} will be fetched from the Hub when the run starts.", "note")
                unknown = True
                continue
            found = pictures.collect(spec.model_copy(update={"data": [source]}), cache=home() / "cache" / "archives", limit=LIGHT_ROWS, decode=False)
        except StudioError as error:
            report.add(f"data.{index}", error)
            continue
        for part in found:
            total += len(part.items)
            masked += sum(one.mask is not None for one in part.items)
            report.facts["pairs"] = report.facts.get("pairs", 0) + sum(one.source is not None for one in part.items)
            halves += [(source.path, one.name) for one in part.items if one.source is None]
            if source.prior:
                report.facts["prior"] = report.facts.get("prior", 0) + len(part.items)
            for one in part.items:
                sizes.update(pictures.bucket(one.width, one.height, spec.task, edge=edge) for edge in pictures.edges(one.width, one.height, spec.task))
            for one in part.items[: max(1, PREVIEW_PICTURES // len(spec.data))]:
                caption = pictures.caption(one, spec.task, trigger=part.trigger, prior=source.prior, dropped=False)
                report.preview.append({"picture": one.name, "caption": caption, "thumbnail": _thumbnail(one)})
            for sentence in part.notes:
                report.add(f"data.{index}", sentence, "warning")
            if part.skipped:
                report.add(f"data.{index}", f"{source.path}: left out are {part.skipped_in_words()}.", "warning")
    report.facts["rows"], report.rows = total, memory.Rows(count=sum(sizes.values()))
    if spec.task.prior_pictures:
        report.facts["prior"] = spec.task.prior_pictures
    _check_masks(spec, report, masked, total, unknown)
    _check_pairs(spec, report, halves)
    if sizes:
        report.facts["sizes"] = {f"{width}×{height}": count for (width, height), count in sizes.most_common()}


def _check_pairs(spec: TrainSpec, report: Report, halves: list[tuple[str, str]]) -> None:
    """Say which pictures lack the source that an editing model makes them of; for other models sources are idle."""
    try:
        family = families.of_pipeline(bases.inspect(spec.base).pipeline)
    except StudioError:
        return  # said of base.id already
    if family and family.edits and halves:
        path, name = halves[0]
        report.add("data", DataError("image.no_source", id=spec.base.id, count=len(halves), total=report.facts["rows"], path=path, name=name))
    elif family and not family.edits and report.facts.get("pairs"):
        report.add("data", f"{report.facts['pairs']} pictures have a source, which only editing models look at; {spec.base.id} is none.", "warning")


def _check_masks(spec: TrainSpec, report: Report, masked: int, total: int, unknown: bool) -> None:
    """Say how many pictures have masks, and that task.outside_mask does nothing without them."""
    if masked:
        report.facts["masks"] = masked
        report.add("task.outside_mask", f"{masked} of {total} pictures have a mask. What is black in it counts {spec.task.outside_mask:g} in the loss.", "note")
    elif total and not unknown and changed(spec.task, "outside_mask"):
        report.add("task.outside_mask", "task.outside_mask has no effect: no picture has a mask. Add masks, or remove it.")


def _thumbnail(picture: pictures.Picture) -> str:
    """A small copy of a picture as a data address; empty when it cannot be decoded."""
    zoom = THUMBNAIL / max(picture.width, picture.height)
    size = max(1, round(picture.width * zoom)), max(1, round(picture.height * zoom))
    try:
        found, out = pictures.load(picture, size=size), io.BytesIO()
    except (OSError, ValueError, StudioError):
        return ""
    found.save(out, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _is_here(source: Source) -> bool:
    return isinstance(data.locate(source.path), Path)


def check_device(spec: TrainSpec, report: Report) -> None:
    """Whether the device is there, and has what the settings need."""
    try:
        device = devices.resolve(spec.compute.device)
    except MachineError as error:
        report.add("compute.device", error)
        device = "cpu"
    report.facts["device"] = device
    _check_compute(spec, device, report)
    if "8bit" in spec.optim.kind and importlib.util.find_spec("bitsandbytes") is None:
        report.add("optim.kind", MachineError("machine.package", name="bitsandbytes", use=f"optim.kind {spec.optim.kind}"))


def _check_compute(spec: TrainSpec, device: str, report: Report) -> None:
    """What the settings of compute need besides the device."""
    if not device.startswith("cuda"):
        for field in needs_gpu(spec):
            report.add(field, MachineError("machine.needs_gpu", field=field, device=device))
    if spec.compute.quantize != "none" or spec.compute.encoders == "4bit":
        if importlib.util.find_spec("bitsandbytes") is None:
            report.add("compute.quantize", MachineError("machine.package", name="bitsandbytes", use="compute.quantize"))
    if device == "cpu" and spec.compute.encoders == "cpu":
        report.add("compute.encoders", "compute.encoders cpu has no effect: the whole run is on the processor. Remove it.")
    if spec.compute.compile and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        report.add("compute.compile", MachineError("machine.compiler"))


def _check_assistant(workspace: Workspace, spec: TrainSpec, info: bases.BaseInfo | None, report: Report) -> None:
    """Whether the assistant is there and fits the base; a distilled base without one is worth a word."""
    wanted = spec.base.assistant
    if wanted is None:
        usual = families.ASSISTANTS.get(spec.base.id)
        if usual and spec.task.kind == "image":
            report.add("base.assistant", f"{spec.base.id} is distilled to a few steps, and training undoes that. Set base.assistant to {usual}.", "warning")
        return
    try:
        path = assistant.locate(wanted, workspace)
        if path is None:
            report.add("base.assistant", f"{wanted} will be fetched from the Hub when the run starts.", "note")
            return
        card = adapters.inspect(path)
        problems = list(card.problems)
        if card.is_usable and info is not None and info.folder is not None and info.pipeline:
            problems += adapters.check(card, adapters.base_shapes(info.folder), label="The assistant", base=spec.base.id)
    except StudioError as error:
        problems = [Problem("", str(error))]
    for problem in problems:
        if problem.level == "error":
            report.add("base.assistant", problem.sentence)


def _check_context(spec: TrainSpec, info: bases.BaseInfo, report: Report) -> None:
    """Whether the longest row, with what virtual tokens stand before it, has room in what the base reads at once."""
    rows = memory.rows_of_facts(report.facts) or report.rows
    longest = int(min(rows.longest, getattr(spec.task, "max_length", 0))) + getattr(spec.method, "tokens", 0)
    if info.context and longest > info.context:
        most = info.context - getattr(spec.method, "tokens", 0)
        report.add("task.max_length", f"Rows have up to {longest} tokens and {spec.base.id} reads {info.context} at once: what comes later it may not understand, or the run breaks off there. Set task.max_length to {most}.", "warning")


def trainable_of(spec: TrainSpec, info: bases.BaseInfo) -> int:
    """How many numbers a spec learns, from the base's headers; 0 while these are not here."""
    if spec.method.kind == "full":
        return sum(math.prod(shape) for name, shape in _shapes(info).items() if methods.learns(spec.method, name, shape))
    return info.trainable(info.targets(spec.method.targets), spec.method) + _trainable_texts(spec, info)


def _shapes(info: bases.BaseInfo) -> dict[str, list[int]]:
    return {name: shape for name, shape in bases.adaptable(info.folder).items() if not name.startswith("text_encoder")} if info.folder is not None else {}


def _check_layers(spec: TrainSpec, info: bases.BaseInfo, report: Report) -> None:
    """What learns where no layer is chosen for an adapter, and whether every pattern of full fine-tuning means something that does."""
    report.facts["targets"], layers = [], getattr(spec.method, "layers", "all")
    if info.folder is not None and info.folder.is_file():
        report.add("base.id", BaseModelError("base.full_file", id=spec.base.id))
    for pattern in layers if layers != "all" and info.folder is not None else ():
        if not trainable_of(memory.changed(spec, {"method.layers": [pattern]}), info):
            known = ", ".join(blocks(_shapes(info))[:6])
            report.add("method.layers", TrainingError("training.layers", pattern=pattern, id=spec.base.id, known=known))
    report.facts["trainable"] = trainable_of(spec, info)


def _trainable_texts(spec: TrainSpec, info: bases.BaseInfo) -> int:
    """Parameters of the adapters on text encoders."""
    if spec.task.kind != "image" or not spec.task.text_encoder or info.folder is None:
        return 0
    ends = tuple(f".{end}.weight" for end in families.CLIP_LINEARS)
    shapes = [shape for name, shape in bases.adaptable(info.folder).items() if name.startswith("text_encoder") and name.endswith(ends)]
    return sum(methods.parameters(spec.method, *shape[:2]) for shape in shapes)


def _size_up(spec: TrainSpec, info: bases.BaseInfo, report: Report) -> None:
    """Trainable parameters and blocks, from the headers."""
    if spec.method.kind in methods.LAYERLESS:
        _check_layers(spec, info, report)
    elif info.linears and report.facts.get("targets"):
        report.facts["trainable"] = trainable_of(spec, info)
        ends = report.facts["targets"]
        shapes = {name: shape for name, *shape in info.adaptable if any(name == end or name.endswith("." + end) for end in ends)}
        rank, top = getattr(spec.method, "rank", 0), max(map(min, shapes.values()))
        most, name = min((methods.directions(spec.method, *shape), name) for name, shape in shapes.items())
        if rank > most:
            report.add("method.rank", TrainingError("training.start_small", init=spec.method.init, name=name, most=most, rank=rank))
        elif rank > top:
            report.add("method.rank", f"method.rank is {spec.method.rank}, but no layer has a rank above {top}. Lower it.")
    known = blocks_of(info.linears)
    if spec.compute.block_swap > len(known) > 0:
        report.add("compute.block_swap", BaseModelError("image.blocks", id=spec.base.id, count=len(known), value=spec.compute.block_swap))


def _foresee(spec: TrainSpec, info: bases.BaseInfo, report: Report) -> None:
    """What the run takes of the memory, part by part, beside what is free; what to change where that is too much."""
    is_misfit = info.folder is not None and bool(info.pipeline) != (spec.task.kind == "image")  # which is said already
    if info.parameters is None or is_misfit:
        return
    device, trainable = report.facts["device"], report.facts.get("trainable", 0)
    rows = memory.rows_of_facts(report.facts) or report.rows

    def peak(one: TrainSpec) -> int:
        return memory.estimate(one, info, rows, trainable=trainable, device=device).needed

    found, free = memory.estimate(spec, info, rows, trainable=trainable, device=device), checks.free_memory(device)
    badge = "unknown" if found.unknown and found.needed <= (free or 0) else found.badge(free)
    report.facts |= {"memory": found.needed, "memory_peak": found.peak, "memory_parts": found.parts, "memory_phase": found.worst, "memory_together": found.phases[found.worst], "memory_free": free, "memory_badge": badge}
    if free is None or badge in ("fits", "unknown") or (spec.compute.block_swap and not blocks_of(info.linears)):
        return  # how large the blocks of a base are is known once it has been fetched
    changes = memory.lighter(spec, peak, memory.TIGHT * free, on_gpu=device.startswith("cuda")) if info.folder is not None else []
    report.facts["memory_changes"] = [vars(change) for change in changes]
    if badge == "too big" and not changes:
        fewer = "name fewer method.layers" if spec.method.kind == "full" else "compute.precision bf16"
        out = "set compute.quantize or compute.block_swap" if spec.task.kind == "image" and device.startswith("cuda") else fewer
        report.add("base.id", f"{spec.base.id} needs about {gigabytes(found.needed)} and {device} has {gigabytes(free)} free. Choose a smaller base, or {out}.", "warning")
    elif changes:
        ways = "; or ".join(f"{memory.in_words(change.values)} (about {gigabytes(change.peak)})" for change in changes)
        much = "more than" if badge == "too big" else "nearly all of"
        report.add("", f"The run needs about {gigabytes(found.needed)} while {found.worst}, {much} the {gigabytes(free)} free on {device}. To be safe, set {ways}.", "warning" if badge == "too big" else "note")


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


def pinned(spec: TrainSpec) -> TrainSpec:
    """The spec with local paths made absolute, so that a worker finds them wherever it runs."""
    sources = []
    for source in spec.data:
        here = fence.place(source.path)
        bundled = source.path.startswith("demo/") and (presets_folder() / f"{source.path}.jsonl").is_file()
        sources.append(source.model_copy(update={"path": str(here)}) if here is not None and not bundled else source)
    base, folder = spec.base, fence.place(spec.base.id)
    if folder is not None and not spec.base.id.startswith("demo-"):
        base = base.model_copy(update={"id": str(folder), "revision": None})
    assistant = base.assistant and fence.place(base.assistant)
    base = base.model_copy(update={"assistant": str(assistant)}) if assistant else base
    return spec.model_copy(update={"data": sources, "base": base})
