"""Write adapters in the one layout that every loader reads alike: scale 1, one rank, alpha = rank, no patterns.

Loaders disagree about alphas per layer, patterns and rank-stabilised scales (some drop them without a word), so the scale is put
into the factors, lower ranks are padded with zeros, and alpha equals the rank: whoever computes α/r or α/r·anything gets 1.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from typing import TYPE_CHECKING

from lora_studio.adapters import experts
from lora_studio.adapters.card import Adapter, Card, Layer
from lora_studio.adapters.dialects import PREFIX
from lora_studio.adapters.files import CONFIG, WEIGHTS, shown
from lora_studio.errors import AdapterError

if TYPE_CHECKING:
    from lora_studio.lowrank import LowRank


def with_modules(card: Card, modules: dict[str, LowRank]) -> Adapter:
    """An adapter of other updates for the base of `card`: what a blend or a compression makes."""
    layers = {
        name: Layer(module.kind, module.shape, module.rank, module.rank * module.scale, module.scale) for name, module in modules.items()
    }
    kept = {"base": card.base, "revision": card.revision, "task_type": card.task_type, "fan_in_fan_out": card.fan_in_fan_out}
    kept["config"] = {"auto_mapping": card.config["auto_mapping"]} if card.config.get("auto_mapping") else {}
    targets = tuple(sorted({name.rsplit(".", 1)[-1] for name in layers}))
    return Adapter(
        modules, {}, Card("peft", layers=layers, targets=targets, parameters=sum(module.parameters for module in modules.values()), **kept)
    )


def write(adapter: Adapter, *, dtype: str = "float32", even: bool = True) -> dict[str, bytes]:
    """The files of a PEFT folder. Heads and other whole layers are kept as they are. Where it is not `even` every layer keeps its own rank,
    which the configuration then lists; alpha is the rank there too. Raises AdapterError for what cannot be said in this layout, and when
    a number does not fit the dtype."""
    import torch
    from safetensors.torch import save

    card = adapter.card
    _refuse_what_would_be_lost(adapter)
    rank = _common_rank(adapter.modules)
    plain, stacked = experts.apart(adapter.modules)
    ranks = {name: rank if even else module.rank for name, module in plain.items()}
    ranks |= {name: rank if even else max(module.rank for module in own.values()) for name, own in stacked.items()}

    def layer(name: str, module: LowRank) -> LowRank:
        made = module.balanced().padded(ranks[name]).cast(getattr(torch, dtype))
        if not bool(torch.isfinite(made.A).all() and torch.isfinite(made.B).all()):
            raise AdapterError("adapter.overflow", name=shown(name), dtype=dtype)
        return made

    factors = {name: (made.A, made.B) for name, module in plain.items() for made in [layer(name, module)]}
    factors |= experts.joined({name: {number: layer(name, module) for number, module in own.items()} for name, own in stacked.items()})
    tensors = {name: tensor for name, tensor in adapter.extras.items() if card.extras.get(name) == "module"}
    for name, pair in factors.items():
        word, end = ("lora_embedding_", "") if name in plain and plain[name].kind == "embedding" else ("lora_", ".weight")
        tensors |= {f"{PREFIX}{name}.{word}{part}{end}": tensor.contiguous() for part, tensor in zip("AB", pair)}
    config = _config(card, list(plain), rank) | ({"target_parameters": sorted(stacked)} if stacked else {})
    if not even:
        own = {name: number for name, number in ranks.items() if number != rank}
        config |= {"rank_pattern": own, "alpha_pattern": own}
    return {WEIGHTS: save(tensors, {"format": "pt"}), CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()}


def _refuse_what_would_be_lost(adapter: Adapter) -> None:
    card = adapter.card
    if not adapter.modules:
        raise AdapterError("adapter.nothing_to_write")
    if card.method != "lora" or card.mutates or card.variants or set(card.extras.values()) & {"bias", "token", "magnitude"}:
        what = card.mutates or next(iter(card.variants), "") or (card.method if card.method != "lora" else "its biases or tokens")
        raise AdapterError("adapter.rewrite", what=what)


def _common_rank(modules: dict[str, LowRank]) -> int:
    """The largest rank, rounded up so that every grouped convolution can be padded to it."""
    step = math.lcm(*(module.groups for module in modules.values()))
    return math.ceil(max(module.rank for module in modules.values()) / step) * step


def _config(card: Card, names: list[str], rank: int) -> dict:
    return {
        "peft_type": "LORA",
        "task_type": card.task_type,
        "base_model_name_or_path": card.base or None,
        "revision": card.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "init_lora_weights": True,
        "fan_in_fan_out": card.fan_in_fan_out,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": targets_of(names),
        "modules_to_save": card.config.get("modules_to_save") or None,
        **({"auto_mapping": card.config["auto_mapping"]} if card.config.get("auto_mapping") else {}),
    }


def targets_of(names: list[str]) -> list[str]:
    """Targets that mean these layers: the ends of their names where each end occurs in the same blocks, else the whole names."""
    blocks = defaultdict(set)
    for name in names:
        blocks[name.rsplit(".", 1)[-1]].add(tuple(int(word) for word in name.split(".") if word.isdigit()))
    numbered = [places for places in blocks.values() if places != {()}]
    full = {(number,) for number in range(len(numbered[0]))} if numbered else set()
    if all(places == full for places in numbered) and sum(map(len, blocks.values())) == len(names):
        return sorted(blocks)
    return sorted(names)
