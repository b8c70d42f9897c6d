"""Baking on the bench: what it would write and lose, the writing itself, and an adapter taken out of a fine-tuned model."""

import json
from pathlib import Path

from lora_studio import adapters, bases, checkpoints
from lora_studio.adapters import multiplying
from lora_studio.adapters.files import LINEAGE
from lora_studio.errors import BenchError
from lora_studio.inference import reshaping
from lora_studio.inference.blends import lineage, parents_of, put, stamped
from lora_studio.inference.requests import argument, base_of

RECIPE = "lora_studio.json"
EVERY = 1 << 26  # bytes between two reports
BAKED = ("dora", *multiplying.METHODS.values())  # methods that are baked beside those that add a product


def bake(reader, job, request: dict) -> tuple[str, dict]:
    """Weighted adapters in the weights of a base, as their sum or put together as `merge` says ({how, density, ...}), which keeps its full
    rank here. Without a target nothing is written: only what it would be, and what the precision takes."""
    base, dtype, target = base_of(request.get("base")), request.get("dtype"), request.get("target")
    how = reshaping.how_of(request["merge"]) if request.get("merge") else None
    parts = reader.parts(job, request.get("parts"), least=2 if how else 1, takes=() if how else BAKED)
    job.doing = f"fetching {base.id}"
    folder = bases.fetch(base)
    job.check()
    job.doing = "planning"
    weighted, labels = [(part.adapter, part.weight) for part in parts], [part.name for part in parts]
    if how:
        weighted, labels = [(adapters.Adapter(reshaping.merged(parts, *how), {}, parts[0].adapter.card), 1.0)], ["The merge"]
    plan = checkpoints.plan(folder, weighted, dtype=dtype, labels=labels)
    job.doing = "measuring what the precision takes"
    lost = checkpoints.loss(plan)
    worst = sorted(lost.layers.items(), key=lambda item: -item[1])[:8]
    told = {
        "bytes": plan.bytes, "changed": plan.changed, "notes": list(plan.notes), "loss": lost.overall, "worst": worst, "share": lost.share,
        "parents": parents_of(parts),
    }  # fmt: skip
    if target is None:
        return "result", told
    job.check()
    job.doing, last = "baking", 0

    def report(done: int, total: int) -> None:
        nonlocal last
        job.check()
        if done - last >= EVERY or done == total:
            last = done
            job.send("progress", done=done, total=total)

    checkpoints.apply(plan, Path(argument(request, "target", str)), report=report, texts=_with_lineage(_texts(request.get("files")), dtype, told))
    return "done", told


def extract(reader, job, request: dict) -> tuple[str, dict]:
    """The adapter between a fine-tuned model and its base, as a PEFT folder at the target."""
    target, base = Path(argument(request, "target", str)), base_of(request.get("base"))
    if target.exists():
        raise BenchError("bench.target", path=target)
    job.doing = "reading the two models"
    tuned, before = bases.fetch(base_of(request.get("tuned"))), bases.fetch(base)
    job.doing = "extracting"

    def report(done: int, total: int) -> None:
        job.check()
        job.send("progress", done=done, total=total)

    found = checkpoints.extract(tuned, before, rank=request.get("rank"), loss=request.get("loss"), report=report)
    files = adapters.write(adapters.with_modules(adapters.Card("peft", base=base.id, revision=base.revision), found.modules))
    files = stamped(files, {"made": "extract", "rank": request.get("rank"), "allowed": request.get("loss"), "loss": found.loss}, [])
    put(target, files)
    ranks = sorted(module.rank for module in found.modules.values())
    told = {"loss": found.loss, "layers": len(ranks), "ranks": [ranks[0], ranks[-1]], "left_out": list(found.left_out)}
    return "done", {**told, "bytes": sum(map(len, files.values()))}


def _with_lineage(texts: dict[str, bytes], dtype: str | None, told: dict) -> dict[str, bytes]:
    """The recipe that is written beside a model, with the parents' content hashes, the error and the versions: the headers of the weights stay the base's own."""
    if RECIPE not in texts:
        return texts
    own = lineage({"made": "bake", "dtype": dtype, "loss": told["loss"]}, told["parents"])
    recipe = {**json.loads(texts[RECIPE]), "lineage": json.loads(own[LINEAGE])}
    return {**texts, RECIPE: (json.dumps(recipe, indent=2, ensure_ascii=False) + "\n").encode()}


def _texts(given) -> dict[str, bytes]:
    """Texts to be written into the model's folder, by their plain names. Raises BenchError."""
    given = {} if given is None else given
    if not isinstance(given, dict) or not all(isinstance(text, str) and "/" not in name and not name.startswith(".") for name, text in given.items()):
        raise BenchError("bench.request", reason="files must be texts by plain names")
    return {name: text.encode() for name, text in given.items()}
