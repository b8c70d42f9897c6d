"""Read adapters: `inspect` from headers, without torch; `read` with all values, each of them looked at."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_studio.adapters import config as configs
from lora_studio.adapters import dialects, experts, images, lycoris, multiplying, natives, virtual
from lora_studio.adapters.card import Adapter, Card, Layer
from lora_studio.adapters.files import FLOATS, NESTED, Entry, Header, locate, parse_json, read_header, shown
from lora_studio.errors import AdapterError, Problem

if TYPE_CHECKING:
    from torch import Tensor

    from lora_studio.dora import Dora
    from lora_studio.lowrank import LowRank
    from lora_studio.multiplied import Multiplied

# How A and B may start without changing the base; every other way (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ, ...) does or might.
KEEPS_BASE = {True, False, "gaussian", "eva", "orthogonal", "mica"}
# Settings that make the update something else than scale · B @ A on the layers' weights.
VARIANTS = {
    "layer_replication": "repeated layers", "target_parameters": "adapted parameters (target_parameters)", "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA", "kasa_config": "KaSA", "alora_invocation_tokens": "activated LoRA", "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow routing", "trainable_token_indices": "trained tokens",
}  # fmt: skip
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
MOST = 5
ImageParts = tuple[list[lycoris.Product], dict[str, images.Piece]]
Natives = dict[str, natives.Native]


def inspect(source: Path | str | dict[str, bytes], *, config: dict | None = None) -> Card:
    """What an adapter's headers say, with every problem they show. `config` gives or replaces fields of adapter_config.json, such as
    a missing lora_alpha. Raises AdapterError when the file cannot be read as an adapter at all."""
    place = locate(source)
    with place.open() as (file, size):
        header = read_header(place.label, file, size)
    return _card(place.label, header, place.config, config)[0]


def read(source: Path | str | dict[str, bytes], *, config: dict | None = None) -> Adapter:
    """The adapter in a PEFT folder. Raises AdapterError with everything that is wrong with it."""
    place = locate(source)
    with place.open() as (file, size):
        header = read_header(place.label, file, size)
        card, names = _card(place.label, header, place.config, config)
        _refuse([problem.sentence for problem in card.problems if problem.level == "error"])
        tensors = {name: _tensor(file, header.tensors[name]) for name in header.tensors if card.extras.get(name) != "copy"}
    if card.method in natives.METHODS.values() and card.format == "peft":
        modules = natives.modules(names, tensors)
    elif card.method in multiplying.METHODS.values():
        modules = multiplying.modules(place.label, card, tensors)
    elif card.method in virtual.METHODS.values():
        modules = {}
    else:
        modules = _modules(card, names, tensors) if card.format == "peft" else _modules_of_image(card, names, tensors)
    _refuse(_problems_of_values(place.label, tensors, modules, may_hold_more=card.format == "peft"))
    return Adapter(modules, {name: tensors[name] for name in card.extras if name in tensors}, card)


def _refuse(sentences: list[str]) -> None:
    if sentences:
        raise AdapterError("adapter.problems", reason=" ".join(sentences))


# ---- from the header


def _card(label: str, header: Header, raw: bytes | None, given: dict | None) -> tuple[Card, dialects.Names | ImageParts | Natives]:
    """The card, and which tensor is which factor (of an image adapter by another program, its parts). Raises AdapterError when it is no adapter."""
    names = list(header.tensors)
    form = dialects.format_of(names)
    facts = {"bytes": header.size, "dtypes": tuple(sorted({entry.dtype for entry in header.tensors.values()}))}
    facts["parameters"] = sum(entry.count for entry in header.tensors.values())
    if form not in (None, "peft"):
        return _image_card(label, form, header, facts, given)
    if raw is None and given is None:
        if form is None:
            raise _stranger(label, names)
        raise AdapterError("adapter.no_config", path=label)
    config, tree = configs.read(raw, given)
    base = shown(config.base_model_name_or_path, 200)
    if config.peft_type in natives.METHODS:
        return _native_card(label, header, config, tree, facts)
    if config.peft_type in multiplying.METHODS:
        return _multiplying_card(label, header, config, tree, facts)
    if config.peft_type in virtual.METHODS:
        return _virtual_card(label, header, config, tree, facts)
    if config.peft_type != "LORA":
        method = shown(config.peft_type, 40)
        problem = _problem(AdapterError("adapter.method", path=label, method=method))
        return Card("peft", method.lower(), base, config=tree, problems=(problem,), **facts), dialects.Names()
    if form is None:
        raise _stranger(label, names)
    found = dialects.split(names)
    if not found.factors:
        raise AdapterError("adapter.no_factors", path=label, name=shown(names[0]))
    variants = tuple(words for key, words in VARIANTS.items() if tree.get(key))
    shapes = {name: entry.shape for name, entry in header.tensors.items()}
    stacks = experts.sort(found.factors, config, shapes) if config.target_parameters else None
    if stacks is not None:
        found.stacks, variants = stacks, tuple(words for words in variants if words != VARIANTS["target_parameters"])
    layers, problems = _layers(label, header, found, config)
    layers |= experts.layers(found.stacks, config, shapes)
    problems += _problems_of_extras(label, found, config)
    problems += _problems_of_magnitudes(label, header, found, layers) if config.use_dora else []
    card = Card(
        "peft",
        "dora" if config.use_dora else "lora",
        base,
        revision=config.revision,
        task_type=config.task_type,
        rslora=config.use_rslora,
        fan_in_fan_out=config.fan_in_fan_out,
        nested=NESTED in header.metadata,
        layers=layers,
        targets=tuple(sorted({name.rsplit(".", 1)[-1] for name in layers})),
        extras=found.extras,
        mutates="" if config.init_lora_weights in KEEPS_BASE else shown(config.init_lora_weights, 40),
        variants=variants,
        config=tree,
        problems=tuple(problems),
        **facts,
    )
    return card, found


def _native_card(label: str, header: Header, config: configs.PeftConfig, tree: dict, facts: dict) -> tuple[Card, Natives]:
    """A card for an adapter by another of PEFT's additive methods, and its layers."""
    known = {"base": shown(config.base_model_name_or_path, 200), "revision": config.revision, "task_type": config.task_type, "config": tree}
    method = natives.METHODS[config.peft_type]
    try:
        found = natives.sort(label, header, config, tree)
    except AdapterError as error:
        return Card("peft", method, problems=(_problem(error),), **known, **facts), {}
    layers = natives.layers(found)
    targets = tuple(sorted({name.rsplit(".", 1)[-1] for name in layers}))
    return Card("peft", method, layers=layers, targets=targets, **known, **facts), found


def _multiplying_card(label: str, header: Header, config: configs.PeftConfig, tree: dict, facts: dict) -> tuple[Card, dialects.Names]:
    """A card for an adapter that multiplies the weights."""
    known = {"base": shown(config.base_model_name_or_path, 200), "revision": config.revision, "task_type": config.task_type, "config": tree}
    method = multiplying.METHODS[config.peft_type]
    try:
        layers = multiplying.layers(label, header, config)
    except AdapterError as error:
        return Card("peft", method, problems=(_problem(error),), **known, **facts), dialects.Names()
    targets = tuple(sorted({name.rsplit(".", 1)[-1] for name in layers}))
    return Card("peft", method, fan_in_fan_out=config.fan_in_fan_out, layers=layers, targets=targets, **known, **facts), dialects.Names()


def _virtual_card(label: str, header: Header, config: configs.PeftConfig, tree: dict, facts: dict) -> tuple[Card, dialects.Names]:
    """A card for virtual tokens before the input: they are on no layer, and their one tensor is kept as it is."""
    known = {"base": shown(config.base_model_name_or_path, 200), "revision": config.revision, "task_type": config.task_type, "config": tree}
    method = virtual.METHODS[config.peft_type]
    try:
        virtual.sizes(label, header, config, tree)
    except AdapterError as error:
        return Card("peft", method, problems=(_problem(error),), **known, **facts), dialects.Names()
    return Card("peft", method, extras={virtual.TENSOR: "virtual"}, **known, **facts), dialects.Names()


def _stranger(label: str, names: list[str]) -> AdapterError:
    if dialects.is_whole_model(names):
        return AdapterError("adapter.whole_model", path=label)
    return AdapterError("adapter.unknown_names", path=label, name=shown(names[0]))


def _problem(error: AdapterError, level: Literal["error", "warning"] = "error") -> Problem:
    return Problem("", str(error), level)


def _image_card(label: str, form: str, header: Header, facts: dict, given: dict | None) -> tuple[Card, ImageParts]:
    """A card for an adapter of an image model by another program, and where each layer's tensors are. It is named and refused where not
    every layer of it is known here."""
    family = dialects.family_of(list(header.tensors), header.metadata)
    try:
        products, rest = lycoris.sort(label, header) if form == "lycoris" else ([], header.tensors)
        layers = lycoris.layers(label, products)
    except AdapterError as error:
        return Card(form, "lycoris", family=family, problems=(_problem(error),), **facts), ([], {})
    found, strangers = images.pieces(rest)
    if strangers or not (found or products):
        down = {name: entry for name, entry in header.tensors.items() if re.search(r"(lora_down|lora_A|lora\.down|_lora\.down|hada_w1_b)\b.*$", name)}
        layers = {shown(name): Layer("linear", entry.shape[1:], entry.shape[0], None, None) for name, entry in down.items() if entry.shape}
        problem = _problem(AdapterError("adapter.image", path=label, form=form, family=family, name=shown((strangers or ["none"])[0])))
        return Card(form, "lora" if layers else "lycoris", family=family, layers=layers, problems=(problem,), **facts), ([], {})
    main = images.main_part([*layers, *found])
    told = images.settings(header.metadata, lambda text: parse_json(label, text.encode()))
    problems = [_problem(AdapterError("adapter.twice", path=label, name=shown(name))) for name in found if name in layers]
    for name, piece in found.items():
        parts = {"A": piece.A, "B": piece.B}
        sentence = _misfit(label, name, parts, "linear", header.tensors)
        if sentence:
            problems.append(sentence)
            continue
        A, B, rank = header.tensors[piece.A].shape, header.tensors[piece.B].shape, header.tensors[piece.A].shape[0]
        height = B[0] if piece.rows is None else piece.rows[1] - piece.rows[0]
        layers[name] = Layer("conv" if len(A) > 2 else "linear", (height, *A[1:]), rank, *_strength(name, piece, rank, told.get(images.part_of(name, main))))
    config = {"auto_mapping": images.MADE_FOR[main]}
    targets = tuple(sorted({name.rsplit(".", 1)[-1] for name in layers}))
    card = Card(
        form, _method(products), str((given or {}).get("base_model_name_or_path") or ""), family=family, layers=layers, targets=targets, config=config,
        problems=tuple(problems[:MOST]), **facts,
    )  # fmt: skip
    return card, (products, found)


def _method(products: list[lycoris.Product]) -> str:
    """What an image adapter is: lora, loha or lokr; lycoris where it is several."""
    found = {product.method for product in products}
    return "lora" if not found else next(iter(found)) if len(found) == 1 else "lycoris"


def _strength(name: str, piece: images.Piece, rank: int, told: dict | None) -> tuple[float | None, float | None]:
    """Alpha and scale of a layer of another program's adapter: as its header says, as a tensor says (known when it is read), else 1."""
    if told:
        own = images.unencoded(name)
        config, _ = configs.read(None, {key: value for key, value in told.items() if key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")})
        return config.alpha_of(own), config.scale_of(own, rank)
    return (None, None) if piece.alpha else (float(rank), 1.0)


def _layers(label: str, header: Header, found: dialects.Names, config: configs.PeftConfig) -> tuple[dict[str, Layer], list[Problem]]:
    """The layers whose factors fit, and what is wrong with the others, with the strengths and with the targets."""
    layers, problems = {}, [_problem(AdapterError("adapter.twice", path=label, name=shown(name))) for name in found.twice[:MOST]]
    wrong = []
    for name, parts in found.factors.items():
        sentence = _misfit(label, name, parts, found.kinds[name], header.tensors)
        if sentence:
            wrong.append(sentence)
            continue
        A, B = header.tensors[parts["A"]], header.tensors[parts["B"]]
        kind = "conv" if len(A.shape) > 2 else found.kinds[name]
        shape = (A.shape[1], B.shape[0]) if kind == "embedding" else (B.shape[0], *A.shape[1:])
        rank = A.shape[0]
        layers[name] = Layer(kind, shape, rank, config.alpha_of(name), config.scale_of(name, rank))
    problems += wrong[:MOST]
    differ = [(name, layer.rank, config.rank_of(name)) for name, layer in layers.items() if config.rank_of(name) not in (None, layer.rank)]
    if differ:
        name, there, said = differ[0]
        problems.append(
            _problem(AdapterError("adapter.rank_differs", path=label, name=shown(name), there=there, said=said, count=len(differ)))
        )
    if any(layer.alpha is None for layer in layers.values()):
        problems.append(_problem(AdapterError("adapter.no_alpha", path=label)))
    elif layers and not any(layer.scale for layer in layers.values()):
        problems.append(_problem(AdapterError("adapter.no_effect", path=label, reason="lora_alpha is 0")))
    beyond = [name for name in found.factors if not configs.means(config, name)]
    if beyond:
        problems.append(
            _problem(AdapterError("adapter.beyond_targets", path=label, count=len(beyond), total=len(found.factors), name=shown(beyond[0])))
        )
    return layers, problems + _idle_targets(label, found, config)


def _misfit(label: str, name: str, parts: dict[str, str], kind: str, tensors: dict[str, Entry]) -> Problem | None:
    """What is wrong with one layer's factors."""
    if set(parts) != {"A", "B"}:
        have, lack = ("lora_A", "lora_B") if "A" in parts else ("lora_B", "lora_A")
        return _problem(AdapterError("adapter.half", path=label, name=shown(name), have=have, lack=lack))
    A, B = tensors[parts["A"]], tensors[parts["B"]]
    for entry, part in ((A, "A"), (B, "B")):
        if entry.dtype not in FLOATS:
            return _problem(AdapterError("adapter.not_floats", path=label, name=shown(parts[part]), dtype=entry.dtype))
    if len(A.shape) == len(B.shape) == 2:
        fits = A.shape[0] == B.shape[1]
    else:
        fits = kind == "linear" and len(A.shape) == len(B.shape) > 2 and set(B.shape[2:]) == {1} and A.shape[0] % B.shape[1] == 0
        fits = fits and B.shape[0] % (A.shape[0] // B.shape[1]) == 0
    return None if fits else _problem(AdapterError("adapter.shapes", path=label, name=shown(name), A=list(A.shape), B=list(B.shape)))


def _idle_targets(label: str, found: dialects.Names, config: configs.PeftConfig) -> list[Problem]:
    """Targets the configuration lists and no tensor belongs to."""
    targets = config.target_modules if isinstance(config.target_modules, list) else []
    idle = [target for target in targets if not any(name == target or name.endswith("." + target) for name in found.factors)]
    if not idle:
        return []
    return [_problem(AdapterError("adapter.idle_targets", path=label, names=", ".join(shown(name, 60) for name in idle[:MOST])), "warning")]


def _problems_of_extras(label: str, found: dialects.Names, config: configs.PeftConfig) -> list[Problem]:
    """Tensors that nothing in the configuration asks for, and magnitudes that do not fit its use_dora."""
    problems = []
    counts = Counter(found.extras.values())
    if config.use_dora != bool(counts["magnitude"]):
        problems.append(
            _problem(AdapterError("adapter.dora_flag", path=label, said=str(config.use_dora).lower(), count=counts["magnitude"]))
        )
    saved = [*config.modules_to_save, "embed_tokens", "lm_head"]
    strays = [name for name, part in found.extras.items() if part == "module" and not any(f".{word}." in f".{name}." for word in saved)]
    if strays:
        problems.append(_problem(AdapterError("adapter.stray", path=label, count=len(strays), name=shown(strays[0]))))
    return problems


def _problems_of_magnitudes(label: str, header: Header, found: dialects.Names, layers: dict[str, Layer]) -> list[Problem]:
    """Layers of a DoRA adapter without a magnitude for each output, and magnitudes of no layer."""
    if not found.magnitudes:
        return []
    wrong = []
    for name in dict.fromkeys([*layers, *found.magnitudes]):
        entry, layer = header.tensors.get(found.magnitudes.get(name, "")), layers.get(name)
        there, wanted = entry.count if entry else 0, 0 if layer is None else layer.shape[layer.kind == "embedding"]
        if there != wanted or entry.dtype not in FLOATS:
            wrong.append(AdapterError("adapter.magnitudes", path=label, name=shown(name), there=there, wanted=wanted))
    return [_problem(error) for error in wrong[:MOST]]


# ---- with values


def _tensor(file, entry: Entry) -> Tensor:
    """One tensor, read into memory of its own."""
    import torch

    data = bytearray(entry.end - entry.start)
    file.seek(entry.start)
    if file.readinto(data) != len(data):
        raise OSError("the file became shorter while it was read")
    return torch.frombuffer(data, dtype=getattr(torch, TORCH_NAMES[entry.dtype])).view(entry.shape)


def _modules(card: Card, names: dialects.Names, tensors: dict[str, Tensor]) -> dict[str, LowRank | Dora]:
    from lora_studio.dora import Dora
    from lora_studio.lowrank import LowRank

    plain = {
        name: LowRank(tensors[names.factors[name]["A"]], tensors[names.factors[name]["B"]], layer.scale, layer.kind)
        for name, layer in card.layers.items()
        if name in names.factors
    }
    plain |= {name: Dora(plain[name], tensors[own].flatten()) for name, own in names.magnitudes.items()}
    return plain | experts.modules(names.stacks, card.layers, tensors)


def _modules_of_image(card: Card, parts: ImageParts, tensors: dict[str, Tensor]) -> dict[str, LowRank]:
    from lora_studio.lowrank import LowRank

    products, pieces = parts
    found = lycoris.modules(products, tensors)
    for name, piece in pieces.items():
        layer = card.layers[name]
        B = tensors[piece.B] if piece.rows is None else tensors[piece.B][slice(*piece.rows)]
        scale = layer.scale if layer.scale is not None else float(tensors[piece.alpha]) / layer.rank
        found[name] = LowRank(tensors[piece.A], B, scale, layer.kind)
    return found


def _problems_of_values(label: str, tensors: dict[str, Tensor], modules: dict[str, LowRank | Dora | Multiplied], *, may_hold_more: bool) -> list[str]:
    """Numbers that are none, and an adapter that changes nothing."""
    import torch

    bad = []
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            continue
        wide = tensor.float() if tensor.dtype.itemsize < 2 else tensor
        if not bool(torch.isfinite(wide).all()):
            bad.append((name, "NaN" if bool(torch.isnan(wide).any()) else "Inf"))
    if bad:
        name, what = bad[0]
        return [str(AdapterError("adapter.not_finite", path=label, name=shown(name), what=what, count=len(bad)))]
    if may_hold_more and sum(tensor.ndim > 1 for tensor in tensors.values()) > 2 * len(modules):  # a head, a bias or a token may change something by itself
        return []
    if not any(_acts(module) for module in modules.values()):
        reason = "every B (or A) is zero" if any(not hasattr(module, "moves") for module in modules.values()) else "it multiplies every layer by one"
        return [str(AdapterError("adapter.no_effect", path=label, reason=f"{reason}, as in one never trained"))]
    return []


def _acts(module: LowRank | Dora | Multiplied) -> bool:
    """Whether an update changes anything."""
    if hasattr(module, "moves"):
        return module.acts
    product = getattr(module, "product", module)
    return bool(product.B.any()) and bool(product.A.any()) and bool(product.scale)
