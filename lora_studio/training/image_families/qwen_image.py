"""Qwen-Image: flow matching on 2x2 patches, Qwen2.5-VL reads the text, and the VAE is one of films: a picture is one frame."""

from torch import Tensor

from lora_studio.training.image_families import patches, ragged

LENGTH = 512


def embed(pipeline, captions: list[str]) -> list[dict[str, Tensor]]:
    """The last hidden states behind the pipeline's own instruction, (length, width), as long as the text is."""
    found, mask = pipeline.encode_prompt(list(captions), max_sequence_length=LENGTH)
    rows = ragged.trimmed(found, mask) if mask is not None else list(found)
    return [{"prompt": row} for row in rows]


def predict(model, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
    """What the transformer says to latents (b, c, 1, h, w); it is told the time from 0 to 1."""
    height, width = noisy.shape[-2:]
    mask = conditions["mask"]
    said = model(
        hidden_states=patches.pack(noisy.squeeze(2)),
        timestep=times / 1000,
        guidance=None,
        encoder_hidden_states=conditions["prompt"],
        encoder_hidden_states_mask=None if bool(mask.all()) else mask,
        img_shapes=[[(1, height // 2, width // 2)]] * len(noisy),
        return_dict=False,
    )[0]
    return patches.unpack(said, height, width).unsqueeze(2)


def ask(conditions: dict[str, Tensor], nothing: dict[str, Tensor]) -> dict[str, Tensor]:
    """A caption and the empty caption as the pipeline's arguments."""
    one, none = ragged.padded([conditions]), ragged.padded([nothing])
    return {
        "prompt_embeds": one["prompt"],
        "prompt_embeds_mask": one["mask"],
        "negative_prompt_embeds": none["prompt"],
        "negative_prompt_embeds_mask": none["mask"],
    }


def guide(guidance: float) -> dict:
    """Guidance by a second pass for the empty caption has a name of its own here."""
    return {"true_cfg_scale": guidance}
