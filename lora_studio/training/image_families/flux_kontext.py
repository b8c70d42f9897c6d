"""FLUX.1 Kontext: FLUX.1 that sees a source picture as further tokens, and makes of it what the caption says."""

import torch
from torch import Tensor

from lora_studio.training.image_families import flux, patches


def predict(model, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
    """What the transformer says to packed latents, the source's tokens behind them; of its answer only those of the picture."""
    source = conditions.get("source")
    tokens, places = patches.pack(noisy), flux.places_of(noisy)
    if source is not None:
        behind = flux.places_of(source)
        behind[:, 0] = 1  # the first number tells the source from the picture
        tokens, places = torch.cat([tokens, patches.pack(source)], 1), torch.cat([places, behind])
    said = flux.ask_model(model, tokens, places, times, conditions)
    return patches.unpack(said[:, : noisy[0, 0].numel() // 4], *noisy.shape[-2:])


def edit(source: Tensor | None, size: tuple[int, int]) -> dict:
    """A source's latents (c, h, w) as the pipeline takes them, and the size as it is: by itself it would choose another."""
    given = {} if source is None else {"image": source[None]}
    return given | {"max_area": size[0] * size[1], "_auto_resize": False}
