"""The verbs of a comparison of LoRA and LoRA+: make one of a run, check it, start it as a run of the queue, and read what it found, in numbers
and in plain words, beside what the paper claims."""

from lora_studio import fence, runs, studio, visits
from lora_studio.errors import Problem, RunError, SpecError
from lora_studio.jobs import queue
from lora_studio.preflight import Report, pinned, preflight
from lora_studio.rates import suggest_ratio as usual_ratio
from lora_studio.spec import TrainSpec, compare, sweep, to_tree
from lora_studio.spec.compare import NAMES, CompareSpec
from lora_studio.sweeps import check as check_sweep
from lora_studio.workspace import Workspace

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the run's own rate, where no rates are given
FULL_FACTORS = (0.05, 0.15, 0.5)
CLAIM = "The paper claims up to 2 times as fast, and results that are 1 to 2 % better (Hayou et al. 2024, arXiv 2402.12354)."
OURS = (
    "Our first measurement, at tuned rates: 1.03 times as fast on an easy adaptation and 1.2 times on a hard one; "
    "up to 3.5 times where both had the same rate of A."
)
BETWEEN = 0.02  # of the loss; less is told as no difference


def compose(run: TrainSpec, *, ratio: float | None = None, full: bool = False, **asked) -> CompareSpec:
    """A comparison made of a run, whose own rate (of LoRA+ where it has a ratio, else of LoRA) is the middle of what is tried. `asked`:
    rates, plus_rates, full_rates, seeds, together; `full` adds full fine-tuning at usual rates. Raises SpecError with every problem."""
    ratio = ratio or run.optim.lora_plus_ratio or usual_ratio(run.task.kind)
    # LoRA+ learns best where B's rate is about twice plain LoRA's (`rates.suggest_lr`).
    lora = run.optim.lr * run.optim.lora_plus_ratio / 2 if run.optim.lora_plus_ratio else run.optim.lr
    plain = run.model_copy(update={"optim": run.optim.model_copy(update={"lora_plus_ratio": None, "lr": lora})})
    tree = {
        "name": f"LoRA against LoRA+ on {run.name}"[:120], "run": to_tree(plain), "ratio": ratio,
        "rates": _times(lora, FACTORS), "plus_rates": _times(lora * 2 / ratio, FACTORS), "full_rates": _times(lora, FULL_FACTORS) if full else [],
        **{name: value for name, value in asked.items() if value is not None},
    }  # fmt: skip
    return compare.parse(tree)


def _times(rate: float, factors: tuple[float, ...]) -> list[float]:
    return [float(f"{rate * factor:.2g}") for factor in factors]


def rates_of(text: str) -> list[float]:
    """The rates in a text such as 5e-4,1e-3. Raises SpecError."""
    try:
        return [float(one) for one in text.split(",")]
    except ValueError:
        raise SpecError("compare.rates", text=text) from None


def check(workspace: Workspace, spec: CompareSpec, *, deep: bool = False) -> Report:
    """Everything that can be said before a comparison starts: what is said of a sweep over the rates, and of full fine-tuning."""
    trials = compare.tuning(spec)
    variants = [
        {"optim.lr": one.rate, "optim.lora_plus_ratio": spec.ratio if one.method == "lora_plus" else None}
        for one in trials
        if one.method != "full"
    ]
    tree = {"run": to_tree(compare.run_of(spec, trials[0])), "variants": variants, "keep": "all", "together": spec.together}
    report = check_sweep(workspace, sweep.parse(tree), deep=deep)
    if spec.full_rates:
        whole = preflight(workspace, compare.run_of(spec, trials[-1]))
        said = {problem.sentence for problem in report.problems}
        report.problems += [
            Problem(one.path, f"full fine-tuning: {one.sentence}", one.level) for one in whole.problems if one.sentence not in said
        ]
        report.facts["memory_of_full"] = whole.facts.get("memory")
    report.facts["parts"] = len(compare.parts(spec))
    too_many = fence.too_many(workspace, spec.seeds)
    if too_many:
        report.add("seeds", too_many)
    return report


def start(workspace: Workspace, spec: CompareSpec) -> str:
    """Check a comparison, write its run folder, queue it and start it when its device is free. Returns the run's id. Raises SpecError."""
    report = check(workspace, spec)
    if not report.can_start:
        raise SpecError("spec.problems", problems=[problem for problem in report.problems if problem.level == "error"])
    folder = runs.create(workspace, spec.model_copy(update={"run": pinned(spec.run)}))
    runs.set_card(folder, base=spec.run.base.id, method="LoRA against LoRA+", needs_token=visits.needs_token(workspace, spec.run))
    queue.add(workspace, folder, device=report.facts["device"])
    queue.pump()
    return folder.name


def result(workspace: Workspace, id: str) -> dict:
    """What a comparison has found so far, also while it goes on. `methods`, by lora, lora_plus and full, each with `rate` (its best, None until
    known), `tried` ([rate, final loss] of each; None broke off), `curve` ([step, mean, lowest, highest] of the validation losses of its seeds),
    `seeds` (how many came to their end), `final` (their mean last loss), `spread` (the lowest and the highest), `seconds` (of a training,
    `seeds` of them at once), and `reach` (for lora and lora_plus: the step at which its mean curve comes to the other's final loss; None: never).
    `same`: [rate of A, times as fast] where both were tried at one rate. `speedup`: the steps of LoRA to its own final loss as a multiple of those LoRA+ takes to it. `words`: all of it in sentences. Raises
    RunError when the run is no comparison."""
    folder = workspace.run_folder(id)
    if runs.kind_of(folder) != "compare":
        raise RunError("compare.other", id=folder.name)
    spec = compare.parse(runs.settings.read_tree(folder / "spec.yaml"))
    status, events = studio.show(workspace, id), studio.events(workspace, id)
    told = {
        "id": folder.name, "state": status.state, "reason": status.reason, "base": spec.run.base.id, "ratio": spec.ratio, "seeds": spec.seeds,
        "step": status.step, "steps": status.steps, "methods": methods_of(spec, events), "speedup": None, "same": same_rate(spec, events), "claim": CLAIM, "ours": OURS,
    }  # fmt: skip
    lora, plus = (told["methods"][name] for name in ("lora", "lora_plus"))
    for one, other in ((lora, plus), (plus, lora)):
        one["reach"] = reach(one["curve"], other["final"])
    if lora["final"] is not None and plus["reach"]:
        told["speedup"] = lora["steps"] / plus["reach"]
    return told | {"words": sentences(told)}


def methods_of(spec: CompareSpec, events: list[dict]) -> dict[str, dict]:
    """What the events say of each method."""
    rates, tried, known = compare.best(spec, events), compare.tried(spec, events), compare.curves(events)
    ended = {event["part"]: event for event in events if event["kind"] == "measured"}
    found = {}
    for method in NAMES if spec.full_rates else ("lora", "lora_plus"):
        own = [
            part for part in compare.parts(spec) if part == method or (method == "full" and part.startswith("full ") and "rate" not in part)
        ]
        curves = [known.get((part, number), {}) for part in own for number in range(len(compare.trials(spec, part, rates)))]
        steps = max((ended[part]["own"] for part in own if part in ended), default=0)
        whole = [curve for curve in curves if steps in curve]
        last = [curve[steps] for curve in whole]
        is_over = all(part in ended for part in own)
        seconds = sum(ended[part]["seconds"] for part in own if part in ended)
        found[method] = {
            "name": NAMES[method], "rate": rates.get(method), "tried": [list(row) for row in tried.get(method, [])], "seeds": len(whole), "steps": steps,
            "curve": band(whole or [curve for curve in curves if curve]), "final": sum(last) / len(last) if last and is_over else None,
            "spread": [min(last), max(last)] if last and is_over else None, "seconds": round(seconds / spec.seeds, 2) if is_over else None,
        }  # fmt: skip
    return found


def same_rate(spec: CompareSpec, events: list[dict]) -> list[list[float]]:
    """[rate of A, steps of LoRA over those that LoRA+ takes to its final loss] at every rate at which both were tuned; one that never comes
    to it is left out."""
    known = compare.curves(events)
    end = next((event["own"] for event in events if event["kind"] == "measured" and event["part"] == "tuning"), None)
    trials = [one for one in compare.tuning(spec) if one.method != "full"]
    curve_of = {(one.method, one.rate): known.get(("tuning", number), {}) for number, one in enumerate(trials)}
    found = []
    for rate in sorted(set(spec.rates) & set(spec.plus_rates)) if end else ():
        at = reach(band([curve_of["lora_plus", rate]]), curve_of["lora", rate].get(end))
        found += [[rate, end / at]] if at else []
    return found


def band(curves: list[dict[int, float]]) -> list[list[float]]:
    """[step, mean, lowest, highest] at the steps that all curves have."""
    shared = sorted(set.intersection(*map(set, curves))) if curves else []
    rows = [(step, [curve[step] for curve in curves]) for step in shared]
    return [[step, sum(losses) / len(losses), min(losses), max(losses)] for step, losses in rows]


def reach(curve: list[list[float]], loss: float | None) -> float | None:
    """The step at which a mean curve first comes down to a loss, on the line between two validations; None where it never does."""
    if loss is None:
        return None
    before = None
    for step, mean, *_ in curve:
        if mean <= loss:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - mean)
        before = step, mean
    return None


# ---- in words


def sentences(told: dict) -> list[str]:
    """What was found, in plain sentences; only what is known by now."""
    lora, plus = told["methods"]["lora"], told["methods"]["lora_plus"]
    said = [sentence for one in told["methods"].values() for sentence in _edges(one)]
    if lora["final"] is None or plus["final"] is None:
        return said
    return [*_speed(told, lora, plus), *_same(told), *_losses(lora, plus, told["seeds"]), *_time(lora, plus), *_reference(told), *said]


def _speed(told: dict, lora: dict, plus: dict) -> list[str]:
    """Steps to the other's final loss, both ways."""
    if plus["reach"] is None:
        return [f"LoRA+ (ratio {told['ratio']:g}) did not reach LoRA's final loss in {plus['steps']} steps."]
    first = f"LoRA+ (ratio {told['ratio']:g}) reached LoRA's final loss after {plus['reach']:.0f} of {lora['steps']} steps: {told['speedup']:.2f} times as fast."
    if lora["reach"] is None:
        return [first, "LoRA did not reach the final loss of LoRA+."]
    return [first, f"LoRA reached the final loss of LoRA+ after {lora['reach']:.0f} steps."]


def _same(told: dict) -> list[str]:
    """What LoRA+ does at LoRA's rate of A, which is the rate of somebody who only switches it on."""
    if not told["same"]:
        return []
    return [
        "At the same rate of A LoRA+ reached LoRA's loss "
        + ", ".join(f"{times:.2f} times as fast at {rate:.2g}" for rate, times in told["same"])
        + " (one seed)."
    ]


def _losses(lora: dict, plus: dict, seeds: int) -> list[str]:
    """The final losses, and whether the seeds tell them apart."""
    share = 1 - plus["final"] / lora["final"]
    spread = [f"{one['final']:.4f} ({one['spread'][0]:.4f} to {one['spread'][1]:.4f})" for one in (lora, plus)]
    said = f"Final validation loss: LoRA {spread[0]}, LoRA+ {spread[1]}"
    if abs(share) >= BETWEEN:
        said += f", {abs(share):.1%} {'lower' if share > 0 else 'higher'} with LoRA+"
    apart = plus["spread"][1] < lora["spread"][0] or lora["spread"][1] < plus["spread"][0]
    return [said + ".", "" if apart else f"The bands of the {seeds} seeds overlap at the end, so this difference may be chance."][
        : 1 if apart else 2
    ]


def _time(lora: dict, plus: dict) -> list[str]:
    if not lora["seconds"] or not plus["seconds"]:
        return []
    return [
        f"A training took {lora['seconds']:.1f} s with LoRA and {plus['seconds']:.1f} s with LoRA+: a step costs the same, but for what else the machine did."
    ]


def _reference(told: dict) -> list[str]:
    """Full fine-tuning beside both."""
    full = told["methods"].get("full")
    if full is None or full["final"] is None:
        return []
    return [f"Full fine-tuning at its best rate ends at {full['final']:.4f} ({full['spread'][0]:.4f} to {full['spread'][1]:.4f})."]


def _edges(one: dict) -> list[str]:
    """A best rate at the edge of what was tried may not be the best; a seed that broke off is told."""
    rates = sorted(rate for rate, _ in one["tried"])
    said = []
    if one["rate"] is not None and len(rates) > 1 and one["rate"] in (rates[0], rates[-1]):
        side = "lowest" if one["rate"] == rates[0] else "highest"
        said.append(f"The best rate of {one['name']}, {one['rate']:.2g}, is the {side} that was tried: a {side[:-3]}er one may be better.")
    broken = [rate for rate, loss in one["tried"] if loss is None]
    if broken:
        said.append(f"{one['name']} broke off at {', '.join(f'{rate:.2g}' for rate in broken)}.")
    return said
