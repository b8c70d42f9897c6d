"""PixArt-Sigma: a transformer that says the noise (and beside it a variance, which nobody uses), and T5.

diffusers itself cannot load an adapter into this pipeline: it has no load_lora_weights. Ours goes in through PEFT's
inject_adapter_in_model and set_peft_model_state_dict, and into the studio as any other.
"""

from torch import Tensor

from lora_studio.training.image_families import ragged


def embed(pipeline, captions: list[str]) -> list[dict[str, Tensor]]:
    """T5's hidden states of up to 300 tokens, as long as the text is."""
    found, mask, _, _ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)
    return [{"prompt": row} for row in ragged.trimmed(found, mask)]


def predict(model, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
    """The noise that the transformer sees, the first half of its channels where it says a variance too."""
    said = model(
        noisy,
        encoder_hidden_states=conditions["prompt"],
        encoder_attention_mask=conditions["mask"],
        timestep=times,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    return said[:, : noisy.shape[1]]


def guide(guidance: float) -> dict:
    """Pictures of the size that was asked for, not of the nearest one in a list."""
    return {"guidance_scale": guidance, "use_resolution_binning": False}
