"""FLUX.2 klein: flow matching on 2x2 patches that the VAE's own statistics normalise, and three layers of Qwen3."""

import torch
from torch import Tensor

from lora_studio.training.image_families import patches


def embed(pipeline, captions: list[str]) -> list[dict[str, Tensor]]:
    """Three layers of Qwen3 side by side, (512, 3 * width), padding and all."""
    found, _ = pipeline.encode_prompt(list(captions))
    return [{"prompt": row} for row in found]


def encode(vae, pixels: Tensor) -> tuple[Tensor, None]:
    """The latents (b, 4 * c, h/16, w/16): folded, and normalised by the running statistics of the VAE's batch norm."""
    folded = patches.fold(vae.encode(pixels).latent_dist.mode())
    mean, variance = (value.view(1, -1, 1, 1) for value in (vae.bn.running_mean, vae.bn.running_var))
    return (folded - mean) / (variance + vae.config.batch_norm_eps).sqrt(), None


def predict(model, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
    """What the transformer says; it is told the time from 0 to 1, and in four numbers where each patch and each token lies."""
    batch, _, height, width = noisy.shape
    prompt = conditions["prompt"]
    one = torch.arange(1)
    places = torch.cartesian_prod(one, torch.arange(height), torch.arange(width), one)
    words = torch.cartesian_prod(one, one, one, torch.arange(prompt.shape[1]))
    said = model(
        hidden_states=noisy.flatten(2).transpose(1, 2),
        timestep=times / 1000,
        guidance=torch.ones_like(times) if model.config.guidance_embeds else None,
        encoder_hidden_states=prompt,
        txt_ids=words.expand(batch, -1, -1).to(noisy.device),
        img_ids=places.expand(batch, -1, -1).to(noisy.device),
        return_dict=False,
    )[0]
    return said.transpose(1, 2).unflatten(2, (height, width))
