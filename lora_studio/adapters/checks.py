"""Does an adapter fit: a base, by its headers; and other adapters, in a blend. Names what does not, and says the way out."""

from collections.abc import Collection
from pathlib import Path

from lora_studio import bases
from lora_studio.adapters import config as configs
from lora_studio.adapters import experts, multiplying, natives, virtual
from lora_studio.adapters.card import Card, Layer
from lora_studio.adapters.files import shown
from lora_studio.errors import AdapterError, BlendError, Problem

HEADS, EMBEDDINGS = ("lm_head", "embed_out", "output"), ("embed_tokens", "wte", "word_embeddings", "embed_in")
Shapes = dict[str, tuple[int, ...]]


def base_shapes(folder: Path) -> Shapes:
    """The weights of a base on this machine by the name of their layer, and its stacked experts, from its headers. Raises BaseModelError."""
    found = bases.adaptable(folder)
    return {
        name.removesuffix(".weight"): tuple(shape)
        for name, shape in found.items()
        if (name.endswith(".weight") and len(shape) > 1) or experts.is_stack(name, shape)
    }


def check(card: Card, shapes: Shapes, *, label: str = "The adapter", base: str = "") -> list[Problem]:
    """How an adapter fits a base: layers that are not there, shapes that differ, targets it lacks, another base's name."""
    if card.method in virtual.METHODS.values() and card.is_usable:
        return _check_virtual(card, shapes, label, base)
    fitting = {name for name, layer in card.layers.items() if experts.slots(name, layer.shape, shapes)}
    places = {name: place(name, shapes) for name in card.layers if name not in fitting}
    own, total = card.base or "an unknown base", len(card.layers)
    strangers = [name for name, place in places.items() if place is None]
    if strangers and len(strangers) == total:
        error = AdapterError("adapter.fits_nothing", path=label, count=total, base=base, own=own, name=shown(strangers[0]))
        return [Problem("", str(error))]
    errors, warnings = [], []
    if strangers:
        count, name = len(strangers), shown(strangers[0])
        errors.append(AdapterError("adapter.unknown_layers", path=label, count=count, total=total, base=base, name=name))
    wrong = [name for name, place in places.items() if place and not _fits(card.layers[name], shapes[place], card)]
    if wrong:
        name, count, here, there = shown(wrong[0]), len(wrong), card.layers[wrong[0]].shape, shapes[places[wrong[0]]]
        here, there = list(here), list(there)
        errors.append(AdapterError("adapter.other_shapes", path=label, name=name, here=here, there=there, base=base, count=count, own=own))
    missing = _missing(card, shapes, set(places.values()))
    if missing:
        present, name = total - len(strangers), shown(missing[0])
        warnings.append(AdapterError("adapter.missing_layers", path=label, there=present, total=present + len(missing), name=name))
    if base and card.base and base != card.base:
        warnings.append(AdapterError("adapter.other_base", path=label, own=own, base=base))
    return [Problem("", str(error)) for error in errors] + [Problem("", str(error), "warning") for error in warnings]


def _check_virtual(card: Card, shapes: Shapes, label: str, base: str) -> list[Problem]:
    """How virtual tokens fit a base: as wide as its embedding, or as its keys and values, where the names of its weights tell; and its name."""
    own, ends = card.base or "an unknown base", {}
    for name, shape in shapes.items():
        if "vision" not in name and "visual" not in name:
            ends.setdefault(name.rsplit(".", 1)[-1], []).append(shape)
    said = virtual.Sizes.model_validate(card.config)
    if card.method == "prompt":
        there = next((ends[end][0][-1] for end in EMBEDDINGS if end in ends), None)
    else:
        there = 2 * len(ends["o_proj"]) * max(shape[0] for shape in ends["k_proj"]) if {"o_proj", "k_proj"} <= ends.keys() else None
    here, found = list(said.shape(card.method)), []
    if there not in (None, here[1]):
        found.append(Problem("", str(AdapterError("adapter.virtual_base", path=label, here=here, there=[here[0], there], base=base, own=own))))
    if base and card.base and base != card.base:
        found.append(Problem("", str(AdapterError("adapter.other_base", path=label, own=own, base=base)), "warning"))
    return found


def place(name: str, shapes: Shapes) -> str | None:
    """The layer of the base that a layer of an adapter means. A model may put a word or two before the names of its checkpoint
    (transformer.h.0 for h.0); a tied head is the embedding."""
    words = name.split(".")
    found = next((end for end in (".".join(words[cut:]) for cut in range(min(3, len(words)))) if end in shapes), None)
    if found is None and words[-1] in HEADS:
        found = next((other for other in shapes if other.rsplit(".", 1)[-1] in EMBEDDINGS), None)
    return found


def _fits(layer: Layer, weight: tuple[int, ...], card: Card) -> bool:
    if len(weight) == 2 and weight[1] == 1:
        return True  # packed 4-bit weights hide their shape
    if layer.kind == "conv":  # of a grouped one the adapter sees every channel
        grouped = len(weight) == len(layer.shape) and layer.shape[1] % weight[1] == 0
        return grouped and weight[0] == layer.shape[0] and weight[2:] == layer.shape[2:]
    return weight == layer.shape or (card.fan_in_fan_out and weight == layer.shape[::-1])


def _missing(card: Card, shapes: Shapes, present: set) -> list[str]:
    """Layers of the base that the adapter's configuration means and that have no weights in it."""
    config, _ = configs.read(None, card.config)
    if config.target_modules is None:
        return []
    ends = (*HEADS, *EMBEDDINGS)
    encoders = {name.partition(".")[0] for name in card.layers if name.startswith("text_encoder")}
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith("text_encoder") or name.partition(".")[0] in encoders}
    wide = config.target_modules == "all-linear"
    return [
        name
        for name, shape in shapes.items()
        if name not in present and not experts.is_stack(name, shape) and configs.means(config, name) and not (wide and (len(shape) != 2 or name.rsplit(".", 1)[-1] in ends))
    ]


def refuse_blend(cards: dict[str, Card], *, prints: dict[str, str] | None = None, takes: Collection[str] = ()) -> None:
    """Raise BlendError naming the first adapter that cannot take part in a sum, or the two whose bases differ. `prints` are hashes of the
    bases where they are known; names decide otherwise. `takes` are the methods that a verb can use beside those that add a product: dora,
    oft and ia3, whose updates have full rank, prompt and prefix, which stand before the input."""
    for name, card in cards.items():
        _refuse_one(name, card, takes)
    names = list(cards)
    for name in names[1:]:
        left, right = (prints or {}).get(names[0], ""), (prints or {}).get(name, "")
        first, other = cards[names[0]].base or "an unknown base", cards[name].base or "an unknown base"
        if left != right if left and right else first != other:
            raise BlendError("blend.bases", left=names[0], left_base=first, right=name, right_base=other)


def _refuse_one(name: str, card: Card, takes: Collection[str]) -> None:
    taken = card.method in takes and card.format == "peft"
    if card.method == "dora" and not taken:
        raise BlendError("blend.dora", name=name)
    if card.method in multiplying.METHODS.values() and card.format == "peft" and not taken:
        raise BlendError("blend.multiplies", name=name, method=card.method.upper())
    if card.method in virtual.METHODS.values() and card.format == "peft" and not taken:
        raise BlendError("blend.virtual", name=name, what=virtual.WORDS[card.method])
    if not taken and (card.method not in ("lora", *natives.METHODS.values()) or card.format != "peft"):
        raise BlendError("blend.method", name=name, method=card.method if card.format == "peft" else f"{card.format} {card.method}")
    if card.mutates:
        raise BlendError("blend.mutates", name=name, init=card.mutates)
    if card.variants:
        raise BlendError("blend.variant", name=name, variant=card.variants[0])
    if "bias" in card.extras.values():
        raise BlendError("blend.bias", name=name)
    extras = [tensor for tensor, part in card.extras.items() if part not in ("copy", "magnitude", "virtual")]
    if extras:
        raise BlendError("blend.extras", name=name, tensor=shown(extras[0]))
