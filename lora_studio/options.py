"""Choices that make no sense where a form stands: with this base, on this machine, or beside the other choices; each with the sentence that says so.

Nothing is decided here: every choice is tried on the spec itself, and what it, the families and the machine say of it is passed on."""

from lora_studio import bases, families, settings, studio
from lora_studio.errors import BaseModelError, SpecError, StudioError
from lora_studio.preflight import Report, check_device
from lora_studio.settings import Leaf
from lora_studio.spec import Base, TrainSpec, methods

Reasons = dict[str, dict[object, str]]


def choosable() -> list[Leaf]:
    """The settings whose values are a few: kinds, ways, and switches."""
    return [leaf for leaf in settings.leaves() if len(leaf.choices) > 1 or leaf.type is bool]


def impossible(values: dict[str, object]) -> Reasons:
    """The choices that cannot be, by path and value, of a form's `values` by path; those that are chosen are judged elsewhere (preflight).
    A choice cannot be when it brings a problem with it that lies in one of these settings: numbers can be mended after."""
    known, here = {leaf.path: leaf for leaf in choosable()}, _here(values)
    kind_of_model = _model_of(here)
    now, found = _said(here, kind_of_model), {}
    for path, leaf in known.items():
        if leaf.kinds and here.get(f"{leaf.group}.kind") not in leaf.kinds:
            continue
        for option in leaf.choices or (False, True):
            if option == here.get(path):
                continue
            own = methods.defaults(option) if path == "method.kind" else {}
            brought = [sentence for where, sentence in _said(here | own | {path: option}, kind_of_model) - now if where in known]
            if brought:
                found.setdefault(path, {})[option] = min(brought)
    return found


def clash(values: dict[str, object]) -> bool:
    """Whether the choices of a form cannot be beside each other, or not here."""
    here, known = _here(values), {leaf.path for leaf in choosable()}
    return any(path in known for path, _ in _said(here, _model_of(here)))


def _here(values: dict[str, object]) -> dict[str, object]:
    """Of a form's values the choices and the base."""
    return {leaf.path: values[leaf.path] for leaf in choosable() if leaf.path in values} | {path: values.get(path) or None for path in ("base.id", "base.revision")}


def _model_of(here: dict) -> tuple[bool, str, bool] | None:
    """Whether the base draws, its pipeline, and whether it may have experts; None where that is not known yet."""
    id = str(here["base.id"] or "").strip()
    try:
        info = bases.inspect(Base(id=id, revision=here["base.revision"]))
    except (StudioError, ValueError):
        return None
    if info.folder is not None:
        return bool(info.pipeline), info.pipeline, bool(info.experts)
    family = next((family for family in families.IMAGE_FAMILIES if id in family.sizes), None)
    return (True, family.pipeline, False) if family else (False, "", True) if families.edge(id) == 0 else None


def _said(here: dict, model: tuple[bool, str, bool] | None) -> set[tuple[str, str]]:
    """Every problem of a form's choices, as (path, sentence)."""
    try:
        spec = studio.spec_of_values({path: value for path, value in here.items() if path != "base.id" or value} | {"data": [{"path": "x"}]})
    except SpecError as error:
        return {(problem.path, problem.sentence) for problem in error.problems}
    report = Report()
    check_device(spec, report)
    return {(problem.path, problem.sentence) for problem in report.problems} | _of_base(spec, model)


def _of_base(spec: TrainSpec, model: tuple[bool, str, bool] | None) -> set[tuple[str, str]]:
    if model is None:
        return set()
    draws, pipeline, has_experts = model
    if draws != (spec.task.kind == "image"):
        error = BaseModelError("base.not_text", id=spec.base.id, kind=spec.task.kind) if draws else BaseModelError("base.not_image", id=spec.base.id)
        return {("task.kind", str(error))}
    if not draws:
        return {("method.experts", str(BaseModelError("base.no_experts", id=spec.base.id)))} if getattr(spec.method, "experts", False) and not has_experts else set()
    return {(path, str(error)) for path, error in families.misfits(pipeline, spec)}
