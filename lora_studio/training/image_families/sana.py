"""Sana: flow matching on the latents of a deep autoencoder, 32 pixels to one, and Gemma 2 behind a long instruction."""

import inspect

from torch import Tensor

from lora_studio.training.image_families import ragged


def embed(pipeline, captions: list[str]) -> list[dict[str, Tensor]]:
    """Gemma's hidden states of up to 300 tokens; the empty caption comes without the instruction, as the pipeline has it."""
    wanted = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
    made = []
    for caption in captions:
        found, mask, _, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False, complex_human_instruction=wanted if caption else None)
        made.append({"prompt": ragged.trimmed(found, mask)[0]})
    return made


def encode(vae, pixels: Tensor) -> tuple[Tensor, None]:
    """The latents, scaled; this autoencoder has one answer, not a distribution."""
    return vae.encode(pixels).latent * vae.config.scaling_factor, None


def predict(model, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
    """What the transformer says; it is told the time from 0 to 1000, scaled as its configuration says."""
    return model(
        noisy,
        encoder_hidden_states=conditions["prompt"],
        encoder_attention_mask=conditions["mask"],
        timestep=times * model.config.timestep_scale,
        return_dict=False,
    )[0]


def guide(guidance: float) -> dict:
    """Pictures of the size that was asked for, not of the nearest one in a list."""
    return {"guidance_scale": guidance, "use_resolution_binning": False}
