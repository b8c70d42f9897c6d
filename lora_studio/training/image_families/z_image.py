"""Z-Image: flow matching told backwards. Its time runs from noise (0) to picture (1) and its answer points from noise to picture."""

import torch
from torch import Tensor

from lora_studio.training.image_families import ragged


def embed(pipeline, captions: list[str]) -> list[dict[str, Tensor]]:
    """The last but one hidden states of Qwen3, (length, width), as long as the text is."""
    found, _ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)  # a copy: it writes into the list
    return [{"prompt": row} for row in found]


def predict(model, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
    """The transformer's answer, turned round; it takes lists of pictures (c, 1, h, w) and of texts."""
    texts = ragged.trimmed(conditions["prompt"], conditions["mask"])
    said = model(list(noisy.unsqueeze(2).unbind()), (1000 - times) / 1000, texts, return_dict=False)[0]
    return -torch.stack(said).squeeze(2)


def ask(conditions: dict[str, Tensor], nothing: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """A caption and the empty caption as the pipeline's arguments."""
    return {"prompt_embeds": [conditions["prompt"]], "negative_prompt_embeds": [nothing["prompt"]]}


def guide(guidance: float) -> dict:
    """This pipeline counts guidance from 0, where there is none; ours counts from 1."""
    return {"guidance_scale": guidance - 1}
