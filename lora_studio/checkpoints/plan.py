"""What baking writes, planned from headers alone: which tensors change, how head and embedding are untied, which files go along."""

import json
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

from lora_studio import adapters, bases, durable
from lora_studio.adapters import experts
from lora_studio.adapters.checks import EMBEDDINGS, HEADS
from lora_studio.adapters.files import Entry, Header, read_header
from lora_studio.checkpoints.rescaled import Rescaled, Turned, by_rows
from lora_studio.checkpoints.whole import Whole
from lora_studio.errors import AdapterError, BakeError, BaseModelError
from lora_studio.weights import Weight, by_layer

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
WIDTHS = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
CARRIED = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm")
LAW = ("license", "licence", "notice", "use_policy", "copying")


@dataclass(frozen=True)
class Change:
    """One adapter's update of a tensor: the factors, the weight of that layer, whether the tensor lies transposed (fan_in_fan_out, embeddings), and of
    an expert in a stack the row where it begins. A bias is a tensor of one column."""

    module: object
    weight: float
    transposed: bool
    start: int | None = None


@dataclass(frozen=True)
class Out:
    """One tensor of a written file: its name, where its numbers come from, its type, and its changes."""

    name: str
    source: Entry
    dtype: str
    changes: tuple[Change, ...] = ()

    @property
    def bytes(self) -> int:
        return self.source.count * WIDTHS[self.dtype] if self.is_converted else self.source.end - self.source.start

    @property
    def is_converted(self) -> bool:
        return self.dtype != self.source.dtype

    @property
    def rows(self) -> int:
        """The height of the tensor as a matrix: experts in a stack stand below each other."""
        shape = self.source.shape or (1,)
        return shape[0] * shape[1] if any(change.start is not None for change in self.changes) else shape[0]


@dataclass(frozen=True)
class Shard:
    """A weights file of the base, by its path in the folder, and what is written for it."""

    path: str
    outs: tuple[Out, ...]
    metadata: dict[str, str]
    header: bytes
    """The header as it is in the base, to be kept where names and types stay."""


@dataclass(frozen=True)
class Plan:
    """Everything that will be written, checked. `changed` counts the tensors that adapters touch."""

    base: Path
    shards: tuple[Shard, ...]
    copied: tuple[str, ...]
    texts: dict[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def changed(self) -> int:
        return sum(bool(out.changes) for shard in self.shards for out in shard.outs)

    @property
    def bytes(self) -> int:
        weights = sum(out.bytes for shard in self.shards for out in shard.outs)
        return weights + sum((self.base / name).stat().st_size for name in self.copied)


def plan(base: Path, parts: list[tuple[adapters.Adapter, Weight]], *, dtype: str | None = None, labels: list[str] | None = None) -> Plan:
    """What baking weighted adapters into the base in a folder will write, in the base's own precision or bf16, fp16, fp32. Reads headers
    only. `labels` are what the adapters are called. Raises StudioError for whatever would stop it: layers that are not there, other shapes, packed weights, files that are no whole."""
    if base.is_file() or not base.is_dir():
        raise BakeError("bake.folder", path=base)
    if dtype is not None and dtype not in DTYPES:
        raise BakeError("bake.dtype", dtype=dtype, known=", ".join(DTYPES))
    groups = _groups(base)
    headers = {path: header_of(base, path) for _, paths in groups for path in paths}
    names = {(prefix, name): path for prefix, paths in groups for path in paths for name in headers[path][0].tensors}
    changes = _changes(names, headers, list(zip(parts, labels or ["The adapter"] * len(parts))), base)
    tied = _tied(base, names, changes)
    texts = dict(tied.texts)
    shards = []
    for prefix, paths in groups:
        for path in paths:
            header, raw = headers[path]
            outs = []
            for name, entry in sorted(header.tensors.items(), key=lambda item: item[1].start):
                outs.append(_out(path, name, entry, changes.get((prefix, name), ()), dtype))
                if (prefix, name) == tied.of:
                    outs.append(_out(path, tied.name, entry, tied.changes, dtype))
            shards.append(Shard(path, tuple(outs), header.metadata, raw))
    texts |= _rewritten(base, shards, dtype, texts)
    written = {shard.path for shard in shards} | set(texts)
    copied = tuple(name for name in others(base) if name not in written)
    found = Plan(base, tuple(shards), copied, texts, tied.notes)
    if not found.changed:
        raise BakeError("bake.nothing", base=base.name)
    return found


def _groups(base: Path) -> list[tuple[str, list[str]]]:
    """The weights files that adapters may go on, by the words that stand before the names of their layers: none for a language model and
    an image model's main part, the encoder's name and a dot for its text encoders. Raises BaseModelError."""
    main = bases.weights_folder(base)
    groups = [("", weights_of(base, main))]
    if main != base:
        groups += [(f"{folder.name}.", weights_of(base, folder)) for folder in sorted(base.glob("text_encoder*")) if any(folder.glob("*.safetensors"))]
    return groups


def weights_of(base: Path, folder: Path) -> list[str]:
    """The files that an index names, or all; copies in other precisions beside them are left out. Raises BaseModelError."""
    found = sorted(file.name for file in folder.glob("*.safetensors"))
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    if index is not None:
        try:
            named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise BaseModelError("base.broken", id=base.name, reason=f"{index.name} cannot be read") from None
        missing = [name for name in named if name not in found]
        if missing:
            raise BaseModelError("base.broken", id=base.name, reason=f"{missing[0]} is named in {index.name} and not there")
        found = named
    else:
        plain = [name for name in found if name.count(".") == 1]
        found = plain or found
    if not found:
        raise BaseModelError("base.no_weights", id=base.name)
    return [str((folder / name).relative_to(base)) for name in found]


def header_of(base: Path, path: str) -> tuple[Header, bytes]:
    """A weights file's header, checked by the rules of the format, and its bytes. Raises BaseModelError."""
    try:
        with open(base / path, "rb") as file:
            header = read_header(path, file, os.fstat(file.fileno()).st_size)
            file.seek(0)
            (length,) = struct.unpack("<Q", file.read(8))
            return header, file.read(length)
    except (AdapterError, OSError) as error:
        raise BaseModelError("base.broken", id=base.name, reason=str(error)) from None


def _changes(names: dict, headers: dict, parts: list, base: Path) -> dict[tuple[str, str], tuple[Change, ...]]:
    """The changes of each tensor. Raises AdapterError naming the first layer of an adapter that is not there or has another shape."""
    layers = {f"{prefix}{_layer(prefix, name)}": (prefix, name) for prefix, name in names if name.endswith(".weight")}
    stacks = {place[1]: place for place, path in names.items() if experts.is_stack(place[1], headers[path][0].tensors[place[1]].shape)}
    layers |= stacks
    model = str(_json(base / "config.json").get("model_type"))
    shapes = {layer: headers[names[place]][0].tensors[place[1]].shape for layer, place in layers.items()}
    found: dict[tuple[str, str], list[Change]] = {}
    for (adapter, given), label in parts:
        own = adapter.card.base or "an unknown base"
        strangers, factors = [], by_layer(given, adapter.modules, label)
        for name, module in adapter.modules.items():
            weight, module = factors[name], by_rows(module, name, label)
            slots = experts.slots(name, module.shape, shapes, model=model) if not getattr(module, "of_outputs", False) else ()  # their biases lie apart
            for slot in slots if weight else ():
                part = module.part(*slot.rows) if isinstance(module, Whole | Rescaled) else module.with_blocks([(module.B[slice(*slot.rows)], module.A)], module.scale)
                start = slot.start if slot.layer in stacks else None
                found.setdefault(layers[slot.layer], []).append(Change(part, weight, slot.transposed, start))
            if slots:
                continue
            place = adapters.place(name, shapes)
            if place is None:
                strangers.append(name)
                continue
            turned = module.kind == "embedding" or bool(adapter.card.fan_in_fan_out)
            wanted = module.shape[::-1] if adapter.card.fan_in_fan_out and module.kind == "linear" else module.shape
            there = shapes[place]
            if len(there) == 2 and there[1] == 1 and wanted != there:
                raise BakeError("bake.packed", name=name)
            if tuple(wanted) != tuple(there) or getattr(module, "groups", 1) != 1:
                raise AdapterError("adapter.other_shapes", path=label, name=name, here=list(wanted), there=list(there), base=base.name, count=1, own=own)
            if weight:
                found.setdefault(layers[place], []).append(Change(module, weight, turned))
            if weight and (bias := _bias(module, layers[place], names)):
                found.setdefault(bias, []).append(Change(module, weight, False))
        if strangers:
            count, total = len(strangers), len(adapter.modules)
            raise AdapterError("adapter.unknown_layers", path=label, count=count, total=total, base=base.name, name=strangers[0])
    return {place: tuple(changes) for place, changes in found.items()}


def _bias(module, place: tuple[str, str], names: dict) -> tuple[str, str] | None:
    """The bias of a layer whose outputs an update multiplies; None where there is none or it stays."""
    bias = (place[0], f"{place[1].removesuffix('.weight')}.bias")
    return bias if isinstance(module, Turned) and module.of_outputs and bias in names else None


def _layer(prefix: str, name: str) -> str:
    name = name.removesuffix(".weight")
    return name.removeprefix("text_model.") if prefix else name


@dataclass(frozen=True)
class _Tied:
    """A head that shares the embedding's numbers and no longer may: the tensor it is made `of`, its name, its changes, and what is told."""

    of: tuple[str, str] | None = None
    name: str = ""
    changes: tuple[Change, ...] = ()
    texts: dict[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def _tied(base: Path, names: dict, changes: dict) -> _Tied:
    """Where head and embedding share one tensor and an adapter changes only one of them, both are written. An adapter's head was placed
    on the embedding, so what was meant is told by the layer's own kind: an embedding's update is one of `embedding`, a head's is linear."""
    config = _json(base / "config.json")
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    embedding = next((place for place in names if place[0] == "" and place[1].removesuffix(".weight").rsplit(".", 1)[-1] in EMBEDDINGS), None)
    has_head = any(name.removesuffix(".weight").rsplit(".", 1)[-1] in HEADS for _, name in names)
    if embedding is None or has_head or not text.get("tie_word_embeddings", config.get("tie_word_embeddings", True)) or embedding not in changes:
        return _Tied()
    head = tuple(change for change in changes[embedding] if change.module.kind != "embedding")
    changes[embedding] = tuple(change for change in changes[embedding] if change.module.kind == "embedding")
    changed = {**config, "tie_word_embeddings": False}
    if isinstance(config.get("text_config"), dict):
        changed["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    texts = {"config.json": (json.dumps(changed, indent=2) + "\n").encode()}
    return _Tied(embedding, "lm_head.weight", head, texts, ("Head and embedding shared their numbers; they are written apart, because only one is adapted.",))


def _out(path: str, name: str, entry: Entry, changes: tuple[Change, ...], dtype: str | None) -> Out:
    """What is written for a tensor. Raises BakeError where an adapter would change numbers that are packed."""
    if changes and entry.dtype not in WIDTHS:
        raise BakeError("bake.packed", name=name)
    wanted = DTYPES[dtype] if dtype and entry.dtype in ("BF16", "F16", "F32") else entry.dtype
    return Out(name, entry, wanted, changes)


def _rewritten(base: Path, shards: list[Shard], dtype: str | None, texts: dict[str, bytes]) -> dict[str, bytes]:
    """The small files that must say what the new weights are: indexes, where names or sizes changed, and the precision in config.json."""
    found = {}
    for index in sorted((*base.glob("*.safetensors.index.json"), *base.glob("*/*.safetensors.index.json"))):
        known = _json(index)
        own = [shard for shard in shards if (base / shard.path).parent == index.parent]
        if not own or not isinstance(known.get("weight_map"), dict):
            continue
        places = {out.name: Path(shard.path).name for shard in own for out in shard.outs}
        size = sum(out.bytes for shard in own for out in shard.outs)
        if places == known["weight_map"] and not dtype:
            continue
        changed = {**known, "metadata": {**(known.get("metadata") or {}), "total_size": size}, "weight_map": dict(sorted(places.items()))}
        found[str(index.relative_to(base))] = (json.dumps(changed, indent=2) + "\n").encode()
    if dtype and (base / "config.json").is_file():
        config = json.loads(texts["config.json"]) if "config.json" in texts else _json(base / "config.json")
        name = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype]
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        found["config.json"] = (json.dumps({**config, key: name}, indent=2) + "\n").encode()
    return found


def others(base: Path) -> list[str]:
    """The files that belong to the model besides the weights that are baked: configurations, tokenizers, licences, and of an image model
    its other parts whole."""
    pipeline = (base / "model_index.json").is_file()
    found = []
    for file in sorted(base.rglob("*") if pipeline else base.iterdir()):
        name, parts = file.name.lower(), file.relative_to(base).parts
        if not file.is_file() or any(part.startswith(".") for part in parts):
            continue
        in_part = pipeline and len(parts) == 2
        weights = in_part and name.endswith(".safetensors") and name.count(".") == 1
        if (len(parts) == 1 or in_part) and (name.endswith(CARRIED) or name.startswith(LAW) or weights) and name != durable.MARKER:
            found.append("/".join(parts))
    return found


def _json(path: Path) -> dict:
    found = durable.read_json(path, {})
    return found if isinstance(found, dict) else {}
