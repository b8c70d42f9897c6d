"""FLUX.1 adapters by kohya's names: layers that its makers keep in one (q, k and v; in single blocks the MLP too) put together again.

The updates of such layers stand in blocks on a diagonal, [A_q; A_k; A_v] and diag(B_q, B_k, B_v), which is exact; diffusers' converter
knows the blocks by their zeros and takes them apart without a loss.
"""

import re

import torch

from lora_studio.adapters import images, shown
from lora_studio.errors import AdapterError
from lora_studio.lowrank import LowRank

# (blocks and layer of diffusers: blocks, layer and place in it, of how many) by its makers
PLACES = {
    (there, end): (top, old, place, len(ends))
    for top, table, there in (("double_blocks", images.FLUX_DOUBLE, "transformer_blocks"), ("single_blocks", images.FLUX_SINGLE, "single_transformer_blocks"))
    for old, ends in table.items()
    for place, end in enumerate(ends)
}
MLP = 4  # the MLP of FLUX.1 is so many times as wide as its layers


def tensors(modules: dict[str, LowRank], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a file: lora_down, lora_up and an alpha equal to the rank, as the scale is in the factors. Raises AdapterError naming
    a layer that has no name there."""
    found, groups = {}, {}
    for name, module in modules.items():
        encoder = name.startswith("text_encoder.")
        block = re.match(r"(transformer_blocks|single_transformer_blocks)\.(\d+)\.(.+)$", name)
        place = PLACES.get((block[1], block[3])) if block else None
        if encoder:
            found[f"lora_te1_text_model_{name.removeprefix('text_encoder.').replace('.', '_')}"] = module.balanced()
        elif place is None or module.kind != "linear":
            raise AdapterError("export.kohya_layer", name=shown(name))
        else:
            top, old, number, count = place
            groups.setdefault((f"lora_unet_{top}_{block[2]}_{old.replace('.', '_')}", count), {})[number] = module.balanced()
    for (stem, count), parts in groups.items():
        found[stem] = parts[0] if count == 1 else _together(parts, count)
    made = {}
    for stem, module in found.items():
        made |= {f"{stem}.lora_down.weight": module.A.to(dtype).contiguous(), f"{stem}.lora_up.weight": module.B.to(dtype).contiguous()}
        made[f"{stem}.alpha"] = torch.tensor(float(module.rank))
    return made


def _together(parts: dict[int, LowRank], count: int) -> LowRank:
    """Updates of the layers that one holds as one update; a layer that has none is zero. All parts get one rank, as the converter expects."""
    rank, into = max(module.rank for module in parts.values()), next(iter(parts.values())).A.shape[1]
    blocks = []
    for number in range(count):
        height = into * MLP if number == 3 else into
        empty = LowRank(torch.zeros(rank, into), torch.zeros(height, rank))
        blocks.append(parts[number].padded(rank) if number in parts else empty)
    return LowRank(torch.cat([block.A for block in blocks]), torch.block_diag(*(block.B for block in blocks)))
