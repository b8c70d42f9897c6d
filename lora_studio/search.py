"""The verbs of a weight search: start one as a run of the queue, and read what it found. It is followed, stopped and resumed as any run."""

from lora_studio import bases, library, rows, runs, studio, visits
from lora_studio.errors import RunError, SpecError
from lora_studio.jobs import devices, queue
from lora_studio.spec import Base
from lora_studio.spec.search import SearchSpec, parse
from lora_studio.workspace import Workspace

ROWS = 200


def start(workspace: Workspace, ids: list[str], data: list[dict | str], *, base: str | None = None, cap: int = ROWS, **asked) -> str:
    """Queue a search for the weights of these adapters that give the rows of `data` (paths, or sources as a spec has them) the lowest
    loss; of each source at most `cap` rows count. `base` is the adapters' own unless another is named; `asked` are settings of SearchSpec:
    task, low, high, evaluations, batch_size, seed, device, precision. Returns the run's id. Raises StudioError."""
    ids = [library.folder_of(workspace, id).name for id in ids]
    cards = [library.card(workspace, id) for id in ids]
    found = [{"id": id, "name": card["name"], "path": str(library.adapter_folder(workspace, id))} for id, card in zip(ids, cards)]
    on = {"id": base} if base else {"id": cards[0]["base"], "revision": cards[0]["base_revision"]} if cards else {"id": ""}
    sources = [{"cap": cap, **(source if isinstance(source, dict) else {"path": source})} for source in data]
    names = " and ".join(card["name"] for card in cards)
    tree = {
        "name": f"weights of {names}"[:120],
        "base": on,
        "data": sources,
        "adapters": found,
        **{key: value for key, value in asked.items() if value is not None},
    }
    if "task" not in tree and on["id"] and bases.inspect(Base(**on)).pipeline:
        tree["task"] = {"kind": "image"}
    spec = parse(tree)
    _check(spec)
    device = devices.resolve(spec.device)
    run = runs.create(workspace, spec)
    runs.set_card(run, base=spec.base.id, method="search", needs_token=visits.needs_token(workspace, spec.as_training()))
    queue.add(workspace, run, device=device)
    queue.pump()
    return run.name


def _check(spec: SearchSpec) -> None:
    """Raise StudioError for what can be seen before anything is loaded."""
    least = len(spec.adapters) + 3 if len(spec.adapters) > 1 else 3
    if spec.evaluations < least:
        raise SpecError("search.few", evaluations=spec.evaluations, least=least)
    if len({one.id for one in spec.adapters}) < len(spec.adapters):
        raise SpecError("search.twice")
    training = spec.as_training()  # raises when its settings do not go together
    if spec.task.kind != "image":
        rows.collect(training)


def result(workspace: Workspace, id: str) -> dict:
    """What a search has found so far, also while it goes on: `parts` ([id, weight], as a blend takes them) and `loss` of the best weights
    (None before the first try), `marks` (the losses of the base alone, each adapter alone, all, equal parts), `curve` ([try, lowest loss so far]) and `tries`
    (all of them: what, weights, loss). Raises RunError when the run is no search."""
    folder = workspace.run_folder(id)
    if runs.kind_of(folder) != "search":
        raise RunError("search.other", id=folder.name)
    spec, status, events = parse(runs.settings.read_tree(folder / "spec.yaml")), studio.show(workspace, id), studio.events(workspace, id)
    tries = [{"what": event["what"], "weights": event["weights"], "loss": event.get("loss")} for event in events if event["kind"] == "step"]
    judged = [one for one in tries if one["loss"] is not None]
    best = min(judged, key=lambda one: one["loss"], default=None)
    curve, lowest = [], None
    for number, one in enumerate(tries, 1):
        if one["loss"] is not None and (lowest is None or one["loss"] < lowest):
            lowest = one["loss"]
        curve.append([number, lowest])
    started = next((event for event in events if event["kind"] == "started"), {})
    return {
        "id": folder.name, "state": status.state, "reason": status.reason, "base": spec.base.id, "evaluations": spec.evaluations, "rows": started.get("rows"),
        "adapters": [{"id": one.id, "name": one.name} for one in spec.adapters],
        "parts": [[one.id, weight] for one, weight in zip(spec.adapters, best["weights"])] if best else None, "loss": best["loss"] if best else None,
        "marks": [one for one in tries if one["what"] != "search"], "curve": curve, "tries": tries,
    }  # fmt: skip
