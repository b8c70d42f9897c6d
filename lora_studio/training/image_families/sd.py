"""Stable Diffusion 1.5 and 2: a UNet, one CLIP text encoder, noise or velocity as the target."""

import torch
from torch import Tensor


def embed(pipeline, captions: list[str]) -> list[dict[str, Tensor]]:
    """The last hidden states of CLIP, (77, width) for each caption."""
    found, _ = pipeline.encode_prompt(captions, pipeline.text_encoder.device, 1, False)
    return [{"prompt": row} for row in found]


def encode(vae, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents (b, 4, h/8, w/8), scaled as the UNet knows them."""
    found, scale = vae.encode(pixels).latent_dist, vae.config.scaling_factor
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (found.mean - shift) * scale, found.std * scale


def predict(model, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
    """The UNet's answer to noisy latents at whole time steps."""
    return model(noisy, times, encoder_hidden_states=conditions["prompt"]).sample


def ask(conditions: dict[str, Tensor], nothing: dict[str, Tensor]) -> dict[str, Tensor]:
    """A caption and the empty caption as the pipeline's arguments."""
    return {"prompt_embeds": conditions["prompt"][None], "negative_prompt_embeds": nothing["prompt"][None]}


def repeated(value: list[float], like: Tensor) -> Tensor:
    """A row of numbers for every picture of a batch."""
    return torch.tensor([value] * len(like), device=like.device, dtype=like.dtype)
