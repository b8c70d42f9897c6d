"""What can be said of a run's rows before it starts: as tokens, against the limits, under the chat template; of pictures, whether each
can be decoded to its last byte. Loads no weights."""

from lora_studio import pictures, rows
from lora_studio.bases import fetch, inspect
from lora_studio.errors import Problem, StudioError
from lora_studio.home import home
from lora_studio.spec import TrainSpec, methods
from lora_studio.training import encode, order


def check(spec: TrainSpec) -> dict:
    """What the rows of a spec look like as tokens, and what stands in the way: {facts, problems}. Loads no weights."""
    if spec.task.kind == "image":
        return check_pictures(spec)
    problems: list[Problem] = []
    facts: dict[str, object] = {}
    try:
        folder, info = fetch(spec.base), inspect(spec.base)
        encoder = encode.Encoder(encode.load_tokenizer(folder, spec.base.id), spec)
        encoded = encode.encode_all(spec, encoder, rows.collect(spec))
        plan = order.Plan(
            tuple(map(len, encoded.train)), tuple(source.weight for source in spec.data),
            spec.schedule.batch_size, spec.schedule.accumulate, spec.compute.seed,
        )  # fmt: skip
        facts = {**encoded.facts, "steps": spec.schedule.steps or plan.steps(spec.schedule.epochs)}
        facts["targets"] = [] if spec.method.kind in methods.LAYERLESS else info.targets(spec.method.targets)
        if encoder.template is not None:
            facts["template"] = encoder.template.origin
        problems += [Problem("data", sentence, "warning") for sentence in encode.losses_in_words(encoded)]
    except StudioError as error:
        problems.append(Problem(_field_of(error.key), str(error)))
    return {"facts": facts, "problems": [vars(problem) for problem in problems]}


def check_pictures(spec: TrainSpec) -> dict:
    """Decode every picture of a spec: {facts, problems}."""
    from lora_studio.training.showing import Show

    problems: list[Problem] = []
    facts: dict[str, object] = {}
    try:
        info = inspect(spec.base)
        found = pictures.collect(spec, cache=home() / "cache" / "archives")
        show = Show(spec, found)
        steps = spec.schedule.steps or show.plan(more=spec.task.prior_pictures).steps(spec.schedule.epochs)
        facts = {"rows_train": sum(show.counts), "rows_validation": len(show.judged), "steps": steps, "targets": info.targets(spec.method.targets)}
        for one in found:
            if one.skipped:
                problems.append(Problem("data", f"{one.source.path}: left out are {one.skipped_in_words()}.", "warning"))
    except StudioError as error:
        problems.append(Problem(_field_of(error.key), str(error)))
    return {"facts": facts, "problems": [vars(problem) for problem in problems]}


def _field_of(key: str) -> str:
    return {"base": "base.id", "data": "data", "picture": "data"}.get(key.partition(".")[0], "")

