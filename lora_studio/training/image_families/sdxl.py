"""Stable Diffusion XL: a UNet, two CLIP text encoders, and the size of the picture as a condition."""

from torch import Tensor

from lora_studio.training.image_families import sd


def embed(pipeline, captions: list[str]) -> list[dict[str, Tensor]]:
    """The hidden states of both encoders side by side, (77, width), and the pooled text (width,). The empty caption is zeros where the
    pipeline has it so: that is what the model was trained with, and what guidance compares with."""
    found, _, pooled, _ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)
    empty = [not caption and pipeline.config.force_zeros_for_empty_prompt for caption in captions]
    return [{"prompt": row * (not none), "pooled": one * (not none)} for row, one, none in zip(found, pooled, empty)]


def predict(model, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
    """The UNet's answer; it is told that the picture has the size it has and was not cropped."""
    prompt, (width, height) = conditions["prompt"], size
    ids = sd.repeated([height, width, 0, 0, height, width], prompt)
    added = {"text_embeds": conditions["pooled"], "time_ids": ids}
    return model(noisy, times, encoder_hidden_states=prompt, added_cond_kwargs=added).sample


def ask(conditions: dict[str, Tensor], nothing: dict[str, Tensor]) -> dict[str, Tensor]:
    """A caption and the empty caption as the pipeline's arguments."""
    return {
        "prompt_embeds": conditions["prompt"][None],
        "pooled_prompt_embeds": conditions["pooled"][None],
        "negative_prompt_embeds": nothing["prompt"][None],
        "negative_pooled_prompt_embeds": nothing["pooled"][None],
    }
