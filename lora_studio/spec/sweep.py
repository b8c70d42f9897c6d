"""The spec of a sweep: one training run, the settings that vary, and what becomes of the adapters, which are trained side by side."""

import itertools
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from lora_studio import problems, settings
from lora_studio.errors import Problem, SpecError
from lora_studio.spec import TrainSpec, to_tree
from lora_studio.spec import parse as parse_run
from lora_studio.spec.methods import FROM_SOMETHING
from lora_studio.spec.tasks import Part

MOST = 64  # adapters in one process
# What may differ between adapters over one base in one pass: the rest is the base's, or decides which rows fit together.
FREE = ("data", "method", "optim", "schedule", "compute.seed")
LONGEST_NAME = 80
# (path, what it must be, the value that is fine): what a pass with several adapters does not do.
ONLY_ALONE = (
    ("method.dora", "DoRA", False),
    ("method.dropout", "dropout", 0.0),
    ("method.experts", "an adapter of the experts", False),
    ("method.start", "an adapter to go on from", None),
    ("task.text_encoder", "training text encoders", False),
    ("base.assistant", "an assistant", None),
    ("compute.quantize", "a quantized base", "none"),
    ("compute.block_swap", "block swap", 0),
    ("compute.compile", "compiling", False),
)


class SweepSpec(Part):
    """Everything that makes a sweep."""

    kind: Literal["sweep"] = "sweep"
    """What tells this spec from that of a training run."""
    name: Annotated[str, Field(min_length=1, max_length=120)] = "sweep"
    """What the job is called."""
    run: TrainSpec
    """The run that the variants are variants of."""
    over: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    """The values of each setting that varies, by its path: {optim.lr: [1e-4, 3e-4], method.rank: [4, 8]}. Every combination is a variant."""
    variants: list[dict[str, Any]] = []
    """Variants one by one, each as the settings in which it differs: [{optim.lr: 1e-4, method.rank: 4}]. With `over`, each in every combination."""
    folds: Annotated[int, Field(ge=2, le=20)] | None = None
    """Cross-validation: each variant is trained this many times, each time without another part of the rows, and judged by the mean loss on
    these parts; and once with all rows, which gives its adapter. For few rows."""
    together: Annotated[int, Field(ge=1, le=MOST)] | None = None
    """How many adapters go through the model at once at most: fewer take less memory and more time. On a GPU these are one pass; a CPU's
    threads share them. null takes all on a GPU, and on a CPU as many as keep the memory within 15 % of one run's."""
    keep: Literal["best", "all"] = "best"
    """Which adapters enter the library: that of the variant with the lowest validation loss, or all."""


@dataclass(frozen=True)
class Variant:
    """One variant: its number from 0, the settings in which it differs by path, those in words, and its run."""

    number: int
    changes: dict[str, Any]
    words: str
    spec: TrainSpec


@dataclass(frozen=True)
class Lane:
    """One adapter that is trained: of which variant, without which part of the rows (None: of the run's own choice, or of none where
    there are folds), and with which settings."""

    variant: int
    fold: int | None
    spec: TrainSpec


def parse(tree: dict) -> SweepSpec:
    """The spec of a nested dict, every variant checked. Raises SpecError with every problem at once."""
    try:
        spec = SweepSpec.model_validate(tree)
    except ValidationError as error:
        raise SpecError("spec.problems", problems=problems.of_validation(error, SweepSpec, tree)) from None
    asked = math.prod(map(len, spec.over.values())) * max(1, len(spec.variants)) * ((spec.folds or 0) + 1)
    if asked > MOST:  # before the first of them is made
        raise SpecError("sweep.many", count=asked, most=MOST)
    found = variants(spec)
    if spec.keep == "best" and not spec.folds and not spec.run.validation.size and len(found) > 1:
        raise SpecError("sweep.unjudged")
    return spec


def variants(spec: SweepSpec) -> list[Variant]:
    """Every variant in order: the listed ones, each in every combination of `over`, whose last setting changes fastest.
    Raises SpecError with the problems of all of them."""
    _refuse_paths(spec)
    products = [dict(zip(spec.over, values)) for values in itertools.product(*spec.over.values())]
    asked = [{**listed, **product} for listed in spec.variants or [{}] for product in products]
    made, wrong = [], []
    for number, changes in enumerate(asked):
        words = ", ".join(f"{path.rpartition('.')[2]} {_word(value)}" for path, value in changes.items()) or "as it is"
        tree = to_tree(spec.run)
        for path, value in changes.items():
            group, _, name = path.partition(".")
            # A kind alone: the rest of an optimizer or a schedule stays what the run says.
            tree = {**tree, group: {**tree[group], name: value}} if name == "kind" else settings.set_path(tree, path, value)
        try:
            run = parse_run({**tree, "name": _name(spec.run.name, words if changes else "", number)})
        except SpecError as error:
            wrong += [Problem(one.path, f"{words}: {one.sentence}") for one in error.problems]
            continue
        wrong += [Problem(path, sentence) for path, sentence in only_alone(run)]
        made.append(Variant(number, changes, words, run))
    if wrong:
        raise SpecError("spec.problems", problems=list({(one.path, one.sentence): one for one in wrong}.values()))
    twice = next(
        (one for one in made if [to_tree(other.spec) | {"name": ""} for other in made].count(to_tree(one.spec) | {"name": ""}) > 1), None
    )
    if twice:
        raise SpecError("sweep.twice", words=twice.words)
    return made


def lanes(spec: SweepSpec, found: list[Variant]) -> list[Lane]:
    """The adapters that are trained: one for each variant, or with folds one for each part that is left out and one of all rows."""
    if not spec.folds:
        return [Lane(one.number, None, one.spec) for one in found]
    made = []
    for one in found:
        quiet = one.spec.model_copy(update={"output": one.spec.output.model_copy(update={"sample_prompts": []})})
        whole = one.spec.model_copy(update={"validation": one.spec.validation.model_copy(update={"size": 0.0})})
        made += [*(Lane(one.number, fold, quiet) for fold in range(spec.folds)), Lane(one.number, None, whole)]
    return made


def _refuse_paths(spec: SweepSpec) -> None:
    paths = [*spec.over, *(path for listed in spec.variants for path in listed)]
    for path in paths:
        if not any(path == free or path.startswith(free + ".") for free in FREE):
            raise SpecError("sweep.fixed", path=path, known=", ".join(FREE))


def only_alone(run: TrainSpec):
    """(path, sentence) of each setting that needs a run of its own."""
    if run.method.kind != "lora":
        yield "method.kind", f"A sweep trains adapters of kind lora, and method.kind is {run.method.kind}. Train it by itself."
    elif run.method.init not in ("kaiming", "gaussian", "orthogonal"):
        yield (
            "method.init",
            f"method.init {run.method.init} {'changes' if run.method.init in FROM_SOMETHING else 'makes a pass of its own over'} the base, which all adapters of a sweep share. Take kaiming, gaussian or orthogonal.",
        )
    for path, what, fine in ONLY_ALONE:
        group, name = path.split(".")
        if getattr(getattr(run, group), name, fine) != fine:
            yield path, f"A sweep cannot have {what} ({path}). Remove it, or train the adapter by itself."


def _word(value) -> str:
    if isinstance(value, list) and all(isinstance(one, dict) and "path" in one for one in value):
        return " + ".join(one["path"].rpartition("/")[2] for one in value)
    return f"{value:g}" if isinstance(value, float) else settings.inline(value)


def _name(name: str, words: str, number: int) -> str:
    """The name of a variant's adapter: the run's and what differs, or its number where that is too long."""
    whole = f"{name}, {words}" if words else name
    return whole if len(whole) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 16].rstrip()}, variant {number + 1}"
