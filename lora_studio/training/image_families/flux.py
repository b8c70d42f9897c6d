"""FLUX.1: flow matching on 2x2 patches, pooled CLIP and T5; its guidance is an input, which training sets to 1."""

import torch
from torch import Tensor

from lora_studio.training.image_families import patches

LENGTH = 512


def embed(pipeline, captions: list[str]) -> list[dict[str, Tensor]]:
    """T5's hidden states (512, width), padding and all, and CLIP's pooled text."""
    found, pooled, _ = pipeline.encode_prompt(captions, captions, max_sequence_length=LENGTH)
    return [{"prompt": row, "pooled": one} for row, one in zip(found, pooled)]


def predict(model, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
    """What the transformer says to packed latents; it is told the time from 0 to 1, and where each patch lies."""
    height, width = noisy.shape[-2:]
    prompt = conditions["prompt"]
    places = torch.zeros(height // 2, width // 2, 3)
    places[..., 1], places[..., 2] = torch.arange(height // 2)[:, None], torch.arange(width // 2)
    said = model(
        hidden_states=patches.pack(noisy),
        timestep=times / 1000,
        guidance=torch.ones_like(times) if model.config.guidance_embeds else None,
        encoder_hidden_states=prompt,
        pooled_projections=conditions["pooled"],
        txt_ids=prompt.new_zeros(prompt.shape[1], 3),
        img_ids=places.flatten(0, 1).to(noisy),
        return_dict=False,
    )[0]
    return patches.unpack(said, height, width)


def ask(conditions: dict[str, Tensor], nothing: dict[str, Tensor]) -> dict[str, Tensor]:
    """A caption as the pipeline's arguments; without a second pass for the empty caption, as FLUX is used."""
    return {"prompt_embeds": conditions["prompt"][None], "pooled_prompt_embeds": conditions["pooled"][None]}
