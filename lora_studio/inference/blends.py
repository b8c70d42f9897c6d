"""Adapters on the bench: read once, checked, previewed as a blend, blended and written."""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

import lora_studio
from lora_studio import adapters, bases, blend, durable
from lora_studio.adapters import files as adapter_files
from lora_studio.adapters import sides
from lora_studio.adapters.files import LINEAGE, reheaded
from lora_studio.checkpoints.numbers import one_thread
from lora_studio.errors import AdapterError, BaseModelError, BenchError, MachineError, Problem, StudioError
from lora_studio.inference.requests import argument, base_of, one_of
from lora_studio.weights import Weight, by_layer, check

KEPT_BYTES = 4 << 30
KEPT_PREVIEWS = 4


@dataclass(frozen=True)
class Part:
    """One adapter of a request, read: `id` changes when its files do."""

    id: str
    path: Path
    name: str
    weight: Weight
    adapter: adapters.Adapter


class Reader:
    """What has been read and measured, kept for the next request. Every verb takes the job it reports to and its arguments."""

    def __init__(self):
        self.read: OrderedDict[str, adapters.Adapter] = OrderedDict()
        self.previews: OrderedDict[tuple, tuple] = OrderedDict()

    def check(self, job, request: dict) -> tuple[str, dict]:
        """Everything wrong with an adapter, in itself and for a base, as sentences."""
        path, config = argument(request, "path", str), request.get("config")
        job.doing, source = "checking the adapter", path
        try:
            source = _whole(path, request.get("base"), config)
            card = adapters.inspect(source, config=config)
            problems = list(card.problems)
            if card.is_usable:
                adapters.read(source, config=config)
        except AdapterError as error:
            card = locals().get("card")
            problems = [*(card.problems if card else ()), Problem("", str(error))]
        if card is not None and card.layers and card.is_usable:
            problems += self._misfits(card, label_of(path), request.get("base"))
        return "result", {
            "card": _plain(card) if card else None,
            "problems": [vars(problem) for problem in problems],
            "usable": card is not None and not any(problem.level == "error" for problem in problems),
            "converts": source is not path or (card is not None and card.format != "peft"),
        }

    def _misfits(self, card, label: str, wanted) -> list[Problem]:
        """How the adapter fits the base that is wanted, or else its own where that is here."""
        if not wanted and not card.base:
            return []
        try:
            base = base_of(wanted or card.base)
            folder = bases.locate(base)
        except BaseModelError as error:
            return [Problem("", str(error), "warning")] if wanted else []
        if folder is None:
            return [Problem("", str(BenchError("bench.not_compared", base=base.id)), "note")]
        return adapters.check(card, adapters.base_shapes(folder), label=label, base=base.id)

    def convert(self, job, request: dict) -> tuple[str, dict]:
        """Write an adapter that is not whole here as a PEFT folder: one by another program for an image model, whose numbers stay and whose
        strengths go into the factors, or one with the widths of its layers noted from its base."""
        path, target = argument(request, "path", str), Path(argument(request, "target", str))
        job.doing = "converting the adapter"
        source = _whole(path, request.get("base"))
        if isinstance(source, dict):
            durable.publish_folder(target, source)
            return "result", {"layers": len(adapters.inspect(source).layers)}
        given = {"base_model_name_or_path": request["base"]} if request.get("base") else None
        found = adapters.read(path, config=given)
        durable.publish_folder(target, adapters.write(adapters.with_modules(found.card, found.modules)))
        return "result", {"layers": len(found.modules)}

    @one_thread()
    def preview(self, job, request: dict) -> tuple[str, dict]:
        """What a blend would be: how large and how alike its parts are (alone, and `sizes` and `acting` with their weights), how large it
        is itself, and its true loss at every rank."""
        parts = self.parts(job, request.get("parts"), least=1)
        key = tuple(part.id for part in parts)
        if key not in self.previews:
            job.doing = "measuring the adapters"
            preview = blend.Preview([part.adapter.modules for part in parts])
            self.previews[key] = (preview, preview.products())
            _forget(self.previews, KEPT_PREVIEWS)
        self.previews.move_to_end(key)
        preview, products = self.previews[key]
        weights = [part.weight for part in parts]
        curve = preview.curve(weights)
        norms, cosines = _angles(preview.weighted(products, [1.0] * len(parts)))
        sizes, acting = _angles(preview.weighted(products, weights))
        found = {"norms": norms, "sizes": sizes, "cosines": cosines, "acting": acting, "norm": curve.norm, "losses": curve.overall}
        return "result", {**found, "rank": len(curve.overall) - 1, "layers": len(curve.layers)}

    @one_thread()
    def blend(self, job, request: dict) -> tuple[str, dict]:
        """Write a blend, exact or of a chosen rank. The loss is that of the very bytes written, against the sum in fp64."""
        target, rank, dtype = Path(argument(request, "target", str)), request.get("rank"), request.get("dtype", "float32")
        one_of("dtype", dtype, ("float32", "float16", "bfloat16"))
        if target.exists() and not request.get("replace"):
            raise BenchError("bench.target", path=target)
        parts = self.parts(job, request.get("parts"), least=1)
        job.doing = "blending"
        wide = [{name: module.cast(torch.float64) for name, module in part.adapter.modules.items()} for part in parts]
        meant = blend.stack(wide, [part.weight for part in parts])
        modules = meant if rank is None else blend.compress(meant, rank)[0]
        job.check()
        files = adapters.write(adapters.with_modules(parts[0].adapter.card, modules), dtype=dtype)
        job.doing = "measuring the loss"
        got = {name: module.cast(torch.float64) for name, module in adapters.read(files).modules.items()}
        loss = blend.difference(got, meant)
        extra, parents = _texts(request.get("files"), files), parents_of(parts)
        files = stamped(files, {"made": "blend", "rank": rank, "loss": loss.overall}, parents)
        job.check()
        put(target, {**files, **extra})
        size = sum(len(data) for data in files.values())
        return "result", {
            "loss": loss.overall, "layers": loss.layers, "rank": max(module.rank for module in got.values()), "bytes": size, "parents": parents,
        }  # fmt: skip

    def parts(self, job, given, *, least: int = 0, takes: Collection[str] = ()) -> list[Part]:
        """The adapters of a request, read or remembered; `takes` are the methods that are welcome beside those that add a product. Raises
        StudioError naming the one that cannot be used."""
        given = [] if given is None else given
        if not isinstance(given, list) or len(given) < least:
            raise BenchError("bench.request", reason="parts must be a list of [path, weight], with at least one")
        found = []
        for row in given:
            if not isinstance(row, list) or len(row) not in (2, 3) or not isinstance(row[0], str):
                raise BenchError("bench.request", reason=f"{str(row)[:60]} is not [path, weight]")
            job.doing = "reading the adapters"
            weight = check(row[1])
            id, adapter = self._adapter(row[0])
            found.append(Part(id, Path(row[0]), str(row[2]) if len(row) == 3 else label_of(row[0]), weight, adapter))
        names = [part.name if [other.name for other in found].count(part.name) == 1 else str(part.path) for part in found]
        cards = {name: part.adapter.card for name, part in zip(names, found)}
        prints = {name: print for name, card in cards.items() if (print := _print_of_base(card.base))}
        adapters.refuse_blend(cards, prints=prints, takes=takes)
        for part in found:
            if part.adapter.modules:  # elsewhere there are no layers to weigh
                by_layer(part.weight, part.adapter.modules, part.name)
        return found

    def _adapter(self, path: str) -> tuple[str, adapters.Adapter]:
        source = adapter_files.locate(path)
        stat = os.stat(source.weights)
        text = f"{Path(source.weights).absolute()}|{stat.st_mtime_ns}|{stat.st_size}|".encode() + (source.config or b"")
        id = hashlib.sha256(text).hexdigest()[:24]
        if id not in self.read:
            self.read[id] = adapters.read(path)
            while len(self.read) > 1 and sum(adapter.card.bytes for adapter in self.read.values()) > KEPT_BYTES:
                self.read.popitem(last=False)
        self.read.move_to_end(id)
        return id, self.read[id]


def _whole(path: str, wanted, config: dict | None = None) -> str | dict[str, bytes]:
    """An adapter's path, or, where its file leaves out how wide its layers are and the base that is wanted, or else its own, is here, its
    files with that noted."""
    named = sides.base_to_ask(path, config=config)
    if named is None or not (wanted or named):
        return path
    try:
        folder = bases.locate(base_of(wanted or named))
    except BaseModelError:
        return path
    return sides.noted(path, adapters.base_shapes(folder), config=config) if folder else path


def put(target: Path, files: dict[str, bytes]) -> None:
    """A folder with these files, whole or not there. Raises MachineError."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        durable.publish_folder(target, files)
    except OSError as error:
        durable.sweep(target.parent)
        raise MachineError("machine.write", path=target, reason=error.strerror or str(error)) from None


def _angles(products: torch.Tensor) -> tuple[list[float], list[list[float]]]:
    """The norms of adapters and the cosines between them, from their inner products."""
    norms = products.diagonal().clamp_min(0).sqrt()
    size = norms[:, None] * norms
    cosines = torch.where(size > 0, (products / size).clamp(-1, 1), torch.zeros_like(size)).fill_diagonal_(1.0)
    return norms.tolist(), cosines.tolist()


def label_of(path: str) -> str:
    """What to call an adapter that was given no name: its folder, or for `adapter` the folder above."""
    place = Path(path)
    return place.parent.name if place.name == "adapter" and place.parent.name else place.name


def _plain(card) -> dict:
    """A card as JSON: what is shown of it."""
    names = ("format", "method", "base", "revision", "family", "task_type", "rslora", "fan_in_fan_out", "mutates", "parameters", "bytes", "rank", "alpha")
    lists = ("ranks", "targets", "variants", "dtypes")
    return {name: getattr(card, name) for name in names} | {name: list(getattr(card, name)) for name in lists} | {"layers": len(card.layers)}


@lru_cache(maxsize=32)
def _print_of_base(id: str) -> str:
    """A hash of a base's weights where they are here; "" elsewhere."""
    from lora_studio.training import latents
    from lora_studio.training.text import base_print

    try:
        folder = bases.locate(base_of(id)) if id else None
        if folder and (folder.is_file() or (folder / "model_index.json").is_file()):
            return latents.print_of(folder, ("",))
        return base_print(folder) if folder else ""
    except (StudioError, OSError):
        return ""


def other_base(part: Part, base: str) -> str:
    """A sentence when a part says that it was made for another base than this one; "" otherwise."""
    own = part.adapter.card.base
    if not own or own == base or (_print_of_base(own) and _print_of_base(own) == _print_of_base(base)):
        return ""
    return str(AdapterError("adapter.other_base", path=part.name, own=own, base=base))


def parents_of(parts: list[Part]) -> list[dict]:
    """What is recorded of the adapters that something is made of."""
    return [{"path": str(part.path), "name": part.name, "weight": part.weight, "sha256": digest(part.path)} for part in parts]


def stamped(files: dict[str, bytes], how: dict, parents: list[dict]) -> dict[str, bytes]:
    """An adapter's files with what it was made of in the header of its weights: the recipe, the parents' content hashes and weights, the
    error, and the versions it was made with. No path of this machine is in it."""
    return {**files, adapters.WEIGHTS: reheaded(files[adapters.WEIGHTS], metadata=lineage(how, parents))}


def lineage(how: dict, parents: list[dict]) -> dict[str, str]:
    """What a header says of where its tensors come from."""
    known = [{key: parent[key] for key in ("name", "sha256", "weight")} for parent in parents]
    told = {**how, "parents": known, "versions": {"lora_studio": lora_studio.__version__, "torch": torch.__version__}}
    return {LINEAGE: json.dumps(told, sort_keys=True, ensure_ascii=False)}


def digest(path: Path) -> str:
    """The content hash of an adapter's weights."""
    with open(adapter_files.locate(path).weights, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _texts(given, taken: dict) -> dict[str, bytes]:
    """Texts to be written beside a blend, by their plain names."""
    for name, text in (given or {}).items():
        if Path(name).name != name or name.startswith(".") or name in taken or not isinstance(text, str):
            raise BenchError("bench.request", reason=f"{name[:60]!r} cannot be written beside a blend")
    return {name: text.encode() for name, text in (given or {}).items()}


def _forget(kept: OrderedDict, most: int) -> None:
    while len(kept) > most:
        kept.popitem(last=False)
