"""LyCORIS' LoHa and LoKr: which tensors make a layer's update, of what shape and rank, and the update itself as B @ A, exactly.

    LoHa   hada_w1_a hada_w1_b hada_w2_a hada_w2_b [hada_t1 hada_t2]               scale alpha / r
    LoKr   lokr_w1 | lokr_w1_a lokr_w1_b, lokr_w2 | lokr_w2_a lokr_w2_b [lokr_t2]   scale alpha / r where a factor is decomposed, else 1

Without an alpha the scale is 1, as other programs take it. A convolution's factors are flat, so its kernel follows from the layer's name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from lora_studio.adapters import dialects, images
from lora_studio.adapters.card import Layer
from lora_studio.adapters.files import FLOATS, Entry, Header, shown
from lora_studio.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

    from lora_studio.lowrank import LowRank

PART = re.compile(r"\.(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))$")
HADA, TUCKER = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}), frozenset({"hada_t1", "hada_t2"})
FIRST = (frozenset({"lokr_w1"}), frozenset({"lokr_w1_a", "lokr_w1_b"}))
SECOND = (frozenset({"lokr_w2"}), frozenset({"lokr_w2_a", "lokr_w2_b"}), frozenset({"lokr_w2_a", "lokr_w2_b", "lokr_t2"}))
WHOLE = {"loha": (HADA, HADA | TUCKER), "lokr": tuple(one | two for one in FIRST for two in SECOND)}
# Layers of a UNet that are convolutions, and their kernels; these last may be either (a convolution in Stable Diffusion 1 only).
KERNELS = {"conv1": (3, 3), "conv2": (3, 3), "conv": (3, 3), "conv_in": (3, 3), "conv_out": (3, 3), "conv_shortcut": (1, 1)}
EITHER = ("proj_in", "proj_out")
MAIN = re.compile(r"(down_blocks|up_blocks|mid_block|transformer_blocks|single_transformer_blocks|conv_in|conv_out|time_embedding|add_embedding)_")
LIMIT = 8e9  # bytes of the adapter that comes of it


@dataclass(frozen=True)
class Product:
    """The update of one layer of a file: its tensors by their part, the layers of the model it is for, the shape of the weight it adds
    to, its rank as B @ A (never above the weight's own), and what alpha is divided by (0: alpha says nothing)."""

    method: str
    parts: dict[str, str]
    alpha: str
    layers: tuple[str, ...]
    shape: tuple[int, ...]
    rank: int
    dim: int


def sort(label: str, header: Header) -> tuple[list[Product], dict[str, Entry]]:
    """The products of a file, and the tensors that belong to none. Raises AdapterError naming the first that cannot be taken."""
    groups: dict[str, dict[str, str]] = {}
    for name in header.tensors:
        end = PART.search(name)
        if end:
            groups.setdefault(name[: end.start()], {})[end[1]] = name
    convolved = _projections(groups, header)
    found, taken = [], set()
    for stem, parts in groups.items():
        for word in ("dora_scale", "scalar"):
            if f"{stem}.{word}" in header.tensors:
                raise AdapterError("adapter.lycoris_word", path=label, name=shown(f"{stem}.{word}"))
        alpha = f"{stem}.alpha" if f"{stem}.alpha" in header.tensors else ""
        found.append(_product(label, stem, parts, alpha, header, convolved))
        taken |= {*parts.values(), alpha}
    return found, {name: entry for name, entry in header.tensors.items() if name not in taken}


def _product(label: str, stem: str, parts: dict[str, str], alpha: str, header: Header, convolved: bool | None) -> Product:
    method, layers = "loha" if any(part.startswith("hada") for part in parts) else "lokr", _layers(stem)
    if not layers:
        raise AdapterError("adapter.lycoris_layer", path=label, name=shown(stem))
    if frozenset(parts) not in WHOLE[method]:
        raise AdapterError("adapter.lycoris_parts", path=label, name=shown(stem), have=", ".join(sorted(parts)))
    for name in (*parts.values(), *([alpha] if alpha else [])):
        if header.tensors[name].dtype not in FLOATS and name != alpha:
            raise AdapterError("adapter.not_floats", path=label, name=shown(name), dtype=header.tensors[name].dtype)
        if name == alpha and prod(header.tensors[name].shape) != 1:
            raise AdapterError("adapter.lycoris_shapes", path=label, name=shown(stem))
    shapes = {part: header.tensors[name].shape for part, name in parts.items()}
    sizes = (loha_sizes if method == "loha" else lokr_sizes)(shapes)
    if sizes is None:
        raise AdapterError("adapter.lycoris_shapes", path=label, name=shown(stem))
    out, flat, kernel, rank, dim = sizes
    if kernel is None:
        kernel = kernel_of(label, layers[0], convolved)
    if flat % prod(kernel) or (len(layers) > 1 and kernel) or (len(layers) == 3 and out % 3):
        raise AdapterError("adapter.lycoris_shapes", path=label, name=shown(stem))
    return Product(method, parts, alpha, layers, (out, flat // prod(kernel), *kernel), min(rank, out, flat), dim)


def _layers(stem: str) -> tuple[str, ...]:
    """The layers of diffusers' model that a name stands for; LyCORIS' own wrapper names them by where they are."""
    if stem.startswith("lycoris_"):
        own = stem.removeprefix("lycoris_")
        return images.layers_of(f"lora_unet_{own}") if MAIN.match(own) else ()
    return images.layers_of(stem)


def loha_sizes(shapes: dict[str, tuple[int, ...]]) -> tuple | None:
    """(out, in·k, kernel where the file says it, rank, dim), or None where the shapes do not fit each other."""
    pairs = [[shapes[f"hada_w{number}_{end}"] for end in "ab"] for number in "12"]
    if any(len(shape) != 2 for pair in pairs for shape in pair):
        return None
    cores = [shapes.get(f"hada_t{number}") for number in "12"]
    if cores[0] is None:
        (a1, b1), (a2, b2) = pairs
        fits = a1 == a2 and b1 == b2 and a1[1] == b1[0]
        return (a1[0], b1[1], None, a1[1] * a2[1], b1[0]) if fits else None
    (a1, b1), (a2, b2) = pairs
    fits = a1 == a2 and b1 == b2 and cores[0] == cores[1] and len(cores[0]) > 2 and cores[0][:2] == (a1[0], b1[0]) and a1[0] == b1[0]
    return (a1[1], b1[1] * prod(cores[0][2:]), cores[0][2:], a1[0] * a2[0], b1[0]) if fits else None


def lokr_sizes(shapes: dict[str, tuple[int, ...]]) -> tuple | None:
    """As `loha_sizes`. The rank of a Kronecker product is the product of both ranks."""
    first = _factor([shapes.get(f"lokr_w1{end}") for end in ("", "_a", "_b")], None)
    second = _factor([shapes.get(f"lokr_w2{end}") for end in ("", "_a", "_b")], shapes.get("lokr_t2"))
    if first is None or second is None or first[2] not in (None, ()):
        return None
    (a, b, _, own, one), (c, d, kernel, inner, two) = first, second
    if one and two and one != two:  # what alpha would be divided by is not known then
        return None
    return a * c, b * d, kernel, min(a, b) * inner if not one else min(min(a, b), own) * inner, two or one


def _factor(shapes: list, core) -> tuple | None:
    """(rows, columns, kernel where it is said, rank, rank of its decomposition or 0) of one side of a Kronecker product."""
    whole, left, right = shapes
    if whole is not None:
        if len(whole) < 2:
            return None
        rows, columns = whole[0], prod(whole[1:])
        return rows, columns, tuple(whole[2:]) if len(whole) > 2 else None, min(rows, columns), 0
    if len(left) != 2 or len(right) != 2:
        return None
    if core is None:
        return (left[0], right[1], None, left[1], right[0]) if left[1] == right[0] else None
    fits = len(core) > 2 and core[:2] == (left[0], right[0]) and left[0] == right[0]
    return (left[1], right[1] * prod(core[2:]), core[2:], left[0], right[0]) if fits else None


def kernel_of(label: str, layer: str, convolved: bool | None) -> tuple[int, ...]:
    """The kernel of a layer by its name; () of a linear one. Raises AdapterError where the file leaves it open."""
    if layer.startswith("text_encoder") or not re.match(r"(down_blocks|up_blocks|mid_block|conv_in|conv_out)\b", layer):
        return ()
    word = layer.rsplit(".", 1)[-1]
    if word in EITHER and convolved is None:
        raise AdapterError("adapter.lycoris_open", path=label, name=shown(layer))
    return KERNELS.get(word, (1, 1) if word in EITHER and convolved else ())


def _projections(groups: dict[str, dict[str, str]], header: Header) -> bool | None:
    """Whether a UNet's projections around its attention are convolutions: in Stable Diffusion 1 they are, in 2 and XL not. By what the
    file says of its base, else by the width of the text that its cross-attention takes; None where neither tells."""
    said = header.metadata.get("ss_base_model_version", "") + header.metadata.get("modelspec.architecture", "")
    if re.search(r"xl", said, re.I) or dialects.family_of(list(header.tensors), {}) == "Stable Diffusion XL":
        return False
    if re.search(r"sd_?v?1|diffusion-v1", said, re.I):
        return True
    if re.search(r"sd_?v?2|diffusion-v2", said, re.I):
        return False
    for stem, parts in groups.items():
        if stem.endswith(("attn2_to_k", "attn2.to_k", "attn2_to_v", "attn2.to_v")):
            shapes = {part: header.tensors[name].shape for part, name in parts.items()}
            method = "loha" if "hada_w1_a" in parts else "lokr"
            sizes = (loha_sizes if method == "loha" else lokr_sizes)(shapes) if frozenset(parts) in WHOLE[method] else None
            if sizes and sizes[1] in (768, 1024, 2048):
                return sizes[1] == 768
    return None


def layers(label: str, products: list[Product]) -> dict[str, Layer]:
    """What a card says of them. Raises AdapterError when two are for one layer, or the adapter would be too large to handle."""
    found: dict[str, Layer] = {}
    for product in products:
        out, into = product.shape[:2]
        for name, rows in zip(product.layers, images.rows_of((product.rank, into), (out, product.rank), len(product.layers))):
            if name in found:
                raise AdapterError("adapter.twice", path=label, name=shown(name))
            height = out if rows is None else rows[1] - rows[0]
            if height < 1:
                raise AdapterError("adapter.lycoris_shapes", path=label, name=shown(name))
            scale = None if product.alpha and product.dim else 1.0
            found[name] = Layer("conv" if product.shape[2:] else "linear", (height, *product.shape[1:]), product.rank, None, scale)
    widest = max((layer.rank for layer in found.values()), default=0)
    size = 4.0 * widest * sum(layer.shape[0] + prod(layer.shape[1:]) for layer in found.values())
    if size > LIMIT:
        raise AdapterError("adapter.lycoris_wide", path=label, rank=widest, size=f"{size / 1e9:.0f} GB")
    return found


def modules(products: list[Product], tensors: dict[str, Tensor]) -> dict[str, LowRank]:
    """Their updates by the names of diffusers' layers, computed in fp64 and kept in fp32 (or wider, where the file is)."""
    import torch

    from lora_studio.lowrank import LowRank

    found: dict[str, LowRank] = {}
    for product in products:
        given = {part: tensors[name] for part, name in product.parts.items()}
        own = torch.float64 if any(tensor.dtype == torch.float64 for tensor in given.values()) else torch.float32
        scale = float(tensors[product.alpha].reshape(())) / product.dim if product.alpha and product.dim else 1.0
        whole = made(product.method, {part: tensor.double() for part, tensor in given.items()}, scale, product.shape, product.rank)
        for name, rows in zip(product.layers, images.rows_of(whole.A.shape, whole.B.shape, len(product.layers))):
            B = whole.B if rows is None else whole.B[slice(*rows)]
            found[name] = LowRank(whole.A.to(own), B.to(own).contiguous(), whole.scale, whole.kind)
    return found


def made(method: str, parts: dict[str, Tensor], scale: float, shape: tuple[int, ...], rank: int) -> LowRank:
    """The update of one layer: loha or lokr, from its tensors by their part, of no more rank than that."""
    from lora_studio import blend, products

    if method == "loha":
        pairs = [(parts[f"hada_w{number}_a"], parts[f"hada_w{number}_b"]) for number in "12"]
        if "hada_t1" in parts:
            pairs = [products.tucker(parts[f"hada_t{number}"], *pair) for number, pair in zip("12", pairs)]
        whole = products.loha(*pairs[0], *pairs[1], scale=scale, shape=shape)
    else:
        second = (parts["lokr_w2"].flatten(1),) if "lokr_w2" in parts else (parts["lokr_w2_a"], parts["lokr_w2_b"])
        if "lokr_t2" in parts:
            second = products.tucker(parts["lokr_t2"], *second)
        first = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
        whole = products.lokr(first, *second, scale=scale, shape=shape)
    if whole.rank > rank:  # more rank than the weight has: the same update in fewer columns
        whole = blend.compress({"x": whole}, rank)[0]["x"]
    return whole
