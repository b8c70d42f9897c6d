"""Wan 2.1: a model of films, for short clips and for still pictures, films of one frame; flow matching, and UMT5 with zeros behind the text."""

import torch
from torch import Tensor

LENGTH = 512


def embed(pipeline, captions: list[str]) -> list[dict[str, Tensor]]:
    """UMT5's hidden states, (length, width), without the zeros that the transformer wants behind them."""
    found, _ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False, max_sequence_length=LENGTH)
    lengths = [int(row.any(-1).nonzero().max()) + 1 for row in found]
    return [{"prompt": row[:length]} for row, length in zip(found, lengths)]


def filled(known: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Texts as one batch (b, 512, width), with zeros behind them that the transformer sees too."""
    rows = [torch.nn.functional.pad(one["prompt"], (0, 0, 0, LENGTH - len(one["prompt"]))) for one in known]
    return {"prompt": torch.stack(rows)}


def encode(vae, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents (b, c, 1, h/8, w/8) of one frame, or (b, c, 1 + f/4, h/8, w/8) of a clip (b, 3, 1 + f, h, w),
    normalised channel by channel."""
    found = vae.encode(pixels if pixels.ndim == 5 else pixels.unsqueeze(2)).latent_dist
    mean, std = (torch.tensor(value, device=pixels.device).view(1, -1, 1, 1, 1) for value in (vae.config.latents_mean, vae.config.latents_std))
    return (found.mean - mean) / std, found.std / std


def predict(model, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
    """What the transformer says of the way from the picture to the noise; it is told the time from 0 to 1000."""
    return model(hidden_states=noisy, timestep=times, encoder_hidden_states=conditions["prompt"], return_dict=False)[0]


def ask(conditions: dict[str, Tensor], nothing: dict[str, Tensor]) -> dict[str, Tensor]:
    """A caption and the empty caption as the pipeline's arguments."""
    both = filled([conditions, nothing])["prompt"]
    return {"prompt_embeds": both[:1], "negative_prompt_embeds": both[1:]}


def guide(guidance: float) -> dict:
    """One frame, as a picture."""
    return {"guidance_scale": guidance, "num_frames": 1, "output_type": "pil"}
