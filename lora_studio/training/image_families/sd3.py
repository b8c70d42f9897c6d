"""Stable Diffusion 3 and 3.5: flow matching, two CLIP encoders and T5, text and picture side by side in one transformer."""

from torch import Tensor

LENGTH = 256


def embed(pipeline, captions: list[str]) -> list[dict[str, Tensor]]:
    """Both CLIPs' hidden states and then T5's, (77 + 256, width), and both pooled texts."""
    found, _, pooled, _ = pipeline.encode_prompt(captions, captions, captions, do_classifier_free_guidance=False, max_sequence_length=LENGTH)
    return [{"prompt": row, "pooled": one} for row, one in zip(found, pooled)]


def predict(model, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
    """What the transformer says of the way from the picture to the noise; it is told the time from 0 to 1000."""
    return model(
        hidden_states=noisy, timestep=times, encoder_hidden_states=conditions["prompt"], pooled_projections=conditions["pooled"], return_dict=False
    )[0]
