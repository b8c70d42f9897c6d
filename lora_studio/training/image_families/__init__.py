"""The families of image models: what each does in its own way. What they share is in image.py and objectives.py.

A family is a row of plain functions. FAMILIES is the table, by the class of the diffusers pipeline.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_studio.training import objectives
from lora_studio.training.image_families import (
    flux,
    flux2,
    flux_kontext,
    lumina2,
    pixart,
    qwen_image,
    ragged,
    sana,
    sd,
    sd3,
    sdxl,
    wan,
    z_image,
)

Conditions = dict[str, Tensor]


def stacked(known: list[Conditions]) -> Conditions:
    """Conditions of one length as a batch."""
    return {name: torch.stack([one[name] for one in known]) for name in known[0]}


def guided(guidance: float) -> dict:
    """Guidance by the name that most pipelines have for it."""
    return {"guidance_scale": guidance}


@dataclass(frozen=True)
class Family:
    """`component` is the part that is trained. `embed(pipeline, captions)` gives one mapping of tensors for each caption, without a
    batch axis, and `batch(list of these)` makes one of several; `encode(vae, pixels)` mean and standard deviation (or None) of the
    normalised latents of pictures (b, 3, h, w) from -1 to 1; `predict(model, noisy, times, conditions, size)` what the model says to a
    batch, in the terms of `objective(scheduler)`, which makes noise and target. `ask(conditions, nothing)` are the arguments by which
    the stock pipeline takes embeddings in place of a prompt, `guide(guidance)` those it wants besides; guidance 1 is none.
    `reembed(pipeline, captions)` is the part of `embed` that text encoders make which may be trained; None where none may.
    `edit(source, size)` are the arguments by which an editing pipeline takes a source's latents; such a `predict` finds them in the
    conditions as `source`."""

    component: str
    embed: Callable
    encode: Callable
    predict: Callable
    ask: Callable
    objective: Callable = objectives.of_scheduler
    batch: Callable = stacked
    guide: Callable = guided
    reembed: Callable | None = None
    edit: Callable | None = None


FLOW = {"objective": objectives.flow_of_scheduler}
RAGGED = {"batch": ragged.padded}

FAMILIES = {
    "StableDiffusionPipeline": Family("unet", sd.embed, sd.encode, sd.predict, sd.ask, reembed=sd.embed),
    "StableDiffusionXLPipeline": Family("unet", sdxl.embed, sd.encode, sdxl.predict, sdxl.ask, reembed=sdxl.embed),
    "StableDiffusion3Pipeline": Family("transformer", sd3.embed, sd.encode, sd3.predict, sdxl.ask, **FLOW),
    "FluxPipeline": Family("transformer", flux.embed, sd.encode, flux.predict, flux.ask, reembed=flux.reembed, **FLOW),
    "FluxKontextPipeline": Family(
        "transformer", flux.embed, sd.encode, flux_kontext.predict, flux.ask, reembed=flux.reembed, edit=flux_kontext.edit, **FLOW
    ),
    "Flux2KleinPipeline": Family("transformer", flux2.embed, flux2.encode, flux2.predict, sd.ask, **FLOW),
    "QwenImagePipeline": Family(
        "transformer", qwen_image.embed, wan.encode, qwen_image.predict, qwen_image.ask, guide=qwen_image.guide, **FLOW, **RAGGED
    ),
    "ZImagePipeline": Family("transformer", z_image.embed, sd.encode, z_image.predict, z_image.ask, guide=z_image.guide, **FLOW, **RAGGED),
    "SanaPipeline": Family("transformer", sana.embed, sana.encode, sana.predict, ragged.ask, guide=sana.guide, **FLOW, **RAGGED),
    "Lumina2Pipeline": Family("transformer", lumina2.embed, sd.encode, lumina2.predict, ragged.ask, **FLOW, **RAGGED),
    "PixArtSigmaPipeline": Family("transformer", pixart.embed, sd.encode, pixart.predict, ragged.ask, guide=pixart.guide, **RAGGED),
    "WanPipeline": Family("transformer", wan.embed, wan.encode, wan.predict, wan.ask, batch=wan.filled, guide=wan.guide, **FLOW),
}


def drawn(answer):
    """The picture in a pipeline's answer; of a film its first frame."""
    return film(answer)[0]


def film(answer) -> list:
    """The frames in a pipeline's answer; of a picture that alone."""
    return answer.images[:1] if hasattr(answer, "images") else list(answer.frames[0])
