"""The spec of a comparison of LoRA and LoRA+: one run's data and budget, each method at its best of a few rates, over several seeds; full
fine-tuning as the reference where it is wanted.

It is measured part by part, one after another, so that the time of each method is its own: first every rate of both side by side
("tuning"), then the seeds of LoRA, the seeds of LoRA+, then the rates and the seeds of full fine-tuning one by one.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from lora_studio import problems
from lora_studio.errors import Problem, SpecError
from lora_studio.spec import TrainSpec, to_tree
from lora_studio.spec import parse as parse_run
from lora_studio.spec.sweep import MOST, only_alone
from lora_studio.spec.tasks import Part

NAMES = {"lora": "LoRA", "lora_plus": "LoRA+", "full": "full fine-tuning"}
Rates = list[Annotated[float, Field(gt=0, le=100)]]


class CompareSpec(Part):
    """Everything that makes a comparison."""

    kind: Literal["compare"] = "compare"
    """What tells this spec from that of a training run."""
    name: Annotated[str, Field(min_length=1, max_length=120)] = "LoRA against LoRA+"
    """What the job is called."""
    run: TrainSpec
    """The run that both are: its rows, steps, rank and first seed. Its rate is not used."""
    ratio: Annotated[float, Field(gt=1, le=1000)] = 16.0
    """LoRA+: B learns at this multiple of A's rate."""
    rates: Annotated[Rates, Field(min_length=1)]
    """The rates that LoRA is tried at."""
    plus_rates: Annotated[Rates, Field(min_length=1)]
    """The rates of A that LoRA+ is tried at."""
    full_rates: Rates = []
    """The rates that full fine-tuning is tried at, as the reference; none leaves it out."""
    seeds: Annotated[int, Field(ge=1, le=20)] = 3
    """How often each is trained at its best rate, each time with another seed."""
    together: Annotated[int, Field(ge=1, le=MOST)] | None = None
    """How many adapters go through the model at once at most. null takes all."""


@dataclass(frozen=True)
class Trial:
    """One training: lora, lora_plus or full, at a rate, with the seed that is so many after the run's."""

    method: str
    rate: float
    seed: int = 0


def parse(tree: dict) -> CompareSpec:
    """The spec of a nested dict. Raises SpecError with every problem at once."""
    try:
        spec = CompareSpec.model_validate(tree)
    except ValidationError as error:
        raise SpecError("spec.problems", problems=problems.of_validation(error, CompareSpec, tree)) from None
    found = [Problem(path, sentence) for path, sentence in only_alone(spec.run)]
    if not spec.run.validation.size:
        found.append(Problem("validation.size", "The methods are compared by their loss on held-out rows. Set validation.size."))
    for name in ("rates", "plus_rates", "full_rates"):
        if len(set(getattr(spec, name))) < len(getattr(spec, name)):
            found.append(Problem(name, f"{name} gives a rate twice. Give each once."))
    if max(len(spec.rates) + len(spec.plus_rates), spec.seeds) > MOST:
        raise SpecError("sweep.many", count=len(spec.rates) + len(spec.plus_rates), most=MOST)
    if not found:
        try:
            for trial in {one.method: one for one in tuning(spec)}.values():
                run_of(spec, trial)
        except SpecError as error:
            found += error.problems
    if found:
        raise SpecError("spec.problems", problems=found)
    return spec


def run_of(spec: CompareSpec, trial: Trial) -> TrainSpec:
    """The run of a trial: the same in everything but method, rate and seed. Nothing stops it early, and its last weights count.
    Raises SpecError."""
    tree = to_tree(spec.run)
    ratio = spec.ratio if trial.method == "lora_plus" else None
    tree["optim"] |= {"lr": trial.rate, "lora_plus_ratio": ratio}
    tree["compute"] |= {"seed": spec.run.compute.seed + trial.seed}
    every = spec.run.validation.every or (max(1, spec.run.schedule.steps // 25) if spec.run.schedule.steps else None)
    tree["validation"] |= {"patience": None, "keep_best": False, "every": every}
    tree["output"] |= {"sample_prompts": [], "sample_every": None}
    if trial.method == "full":
        tree |= {
            "method": {"kind": "full"},
            "compute": tree["compute"] | {"precision": "auto" if spec.run.compute.precision == "bf16" else spec.run.compute.precision},
        }
    return parse_run(tree)


def tuning(spec: CompareSpec) -> list[Trial]:
    """Every rate of every method, with the first seed."""
    tried = (("lora", spec.rates), ("lora_plus", spec.plus_rates), ("full", spec.full_rates))
    return [Trial(method, rate) for method, rates in tried for rate in rates]


def parts(spec: CompareSpec) -> list[str]:
    """The names of what is measured one after another."""
    full = [f"full rate {number + 1}" for number in range(len(spec.full_rates))]
    return ["tuning", "lora", "lora_plus", *full, *(f"full {number + 1}" for number in range(spec.seeds if full else 0))]


def trials(spec: CompareSpec, part: str, best: dict[str, float]) -> list[Trial]:
    """What is trained in a part, `best` being the rate of each method. Empty where a method has none, because it broke off at every rate."""
    if part == "tuning":
        return [one for one in tuning(spec) if one.method != "full"]
    if part.startswith("full rate "):
        return [Trial("full", spec.full_rates[int(part.rpartition(" ")[2]) - 1])]
    method = part.partition(" ")[0]
    seeds = range(spec.seeds) if method != "full" else [int(part.rpartition(" ")[2]) - 1]
    return [Trial(method, best[method], seed) for seed in seeds if method in best]


# ---- what the events of a comparison say


def curves(events: list[dict]) -> dict[tuple[str, int], dict[int, float]]:
    """The validation losses by step of each (part, number of the trial in it)."""
    found: dict[tuple[str, int], dict[int, float]] = {}
    for event in events:
        if event["kind"] == "eval" and "part" in event:
            found.setdefault((event["part"], event["variant"]), {})[event["at"]] = event["loss"]
    return found


def tried(spec: CompareSpec, events: list[dict]) -> dict[str, list[tuple[float, float | None]]]:
    """(rate, final validation loss) of each method's trials so far; None where one broke off. Only parts that came to their end count."""
    known, ended = curves(events), {event["part"]: event["own"] for event in events if event["kind"] == "measured"}
    found: dict[str, list[tuple[float, float | None]]] = {}
    for part in parts(spec):
        if part in ended and (part == "tuning" or part.startswith("full rate")):
            for number, trial in enumerate(trials(spec, part, {})):
                found.setdefault(trial.method, []).append((trial.rate, known.get((part, number), {}).get(ended[part])))
    return found


def best(spec: CompareSpec, events: list[dict]) -> dict[str, float]:
    """The rate with the lowest final validation loss, of each method that came to its end at one."""
    found = {method: [(loss, rate) for rate, loss in rows if loss is not None] for method, rows in tried(spec, events).items()}
    return {method: min(rows)[1] for method, rows in found.items() if rows}
