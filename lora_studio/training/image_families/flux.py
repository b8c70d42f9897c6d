"""FLUX.1: flow matching on 2x2 patches, pooled CLIP and T5; its guidance is an input, which training sets to 1."""

import torch
from torch import Tensor

from lora_studio.training.image_families import patches

LENGTH = 512


def embed(pipeline, captions: list[str]) -> list[dict[str, Tensor]]:
    """T5's hidden states (512, width), padding and all, and CLIP's pooled text."""
    found, pooled, _ = pipeline.encode_prompt(captions, captions, max_sequence_length=LENGTH)
    return [{"prompt": row, "pooled": one} for row, one in zip(found, pooled)]


def reembed(pipeline, captions: list[str]) -> list[dict[str, Tensor]]:
    """CLIP's pooled text alone: T5 is too large to be trained beside."""
    found = pipeline._get_clip_prompt_embeds(list(captions), device=pipeline.text_encoder.device)
    return [{"pooled": one} for one in found]


def predict(model, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
    """What the transformer says to packed latents; it is told where each patch lies."""
    return patches.unpack(ask_model(model, patches.pack(noisy), places_of(noisy), times, conditions), *noisy.shape[-2:])


def places_of(latents: Tensor) -> Tensor:
    """Where each patch of latents (b, c, h, w) lies: rows of (0, y, x)."""
    height, width = latents.shape[-2:]
    places = torch.zeros(height // 2, width // 2, 3)
    places[..., 1], places[..., 2] = torch.arange(height // 2)[:, None], torch.arange(width // 2)
    return places.flatten(0, 1).to(latents)


def ask_model(model, tokens: Tensor, places: Tensor, times: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    """What the transformer says to tokens (b, n, width); it is told the time from 0 to 1."""
    prompt = conditions["prompt"]
    return model(
        hidden_states=tokens,
        timestep=times / 1000,
        guidance=torch.ones_like(times) if model.config.guidance_embeds else None,
        encoder_hidden_states=prompt,
        pooled_projections=conditions["pooled"],
        txt_ids=prompt.new_zeros(prompt.shape[1], 3),
        img_ids=places,
        return_dict=False,
    )[0]


def ask(conditions: dict[str, Tensor], nothing: dict[str, Tensor]) -> dict[str, Tensor]:
    """A caption as the pipeline's arguments; without a second pass for the empty caption, as FLUX is used."""
    return {"prompt_embeds": conditions["prompt"][None], "pooled_prompt_embeds": conditions["pooled"][None]}
