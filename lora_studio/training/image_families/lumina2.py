"""Lumina Image 2: flow matching told backwards (time 0 is noise, the answer points to the picture), and Gemma 2."""

from torch import Tensor

from lora_studio.training.image_families import ragged

LENGTH = 256


def embed(pipeline, captions: list[str]) -> list[dict[str, Tensor]]:
    """Gemma's last but one hidden states behind the system prompt; the empty caption comes without it, as the pipeline has it."""
    made = []
    for caption in captions:
        if caption:
            found, mask, _, _ = pipeline.encode_prompt([caption], do_classifier_free_guidance=False, max_sequence_length=LENGTH)
        else:
            found, mask = pipeline._get_gemma_prompt_embeds([""], max_sequence_length=LENGTH)
        made.append({"prompt": ragged.trimmed(found, mask)[0]})
    return made


def predict(model, noisy: Tensor, times: Tensor, conditions: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
    """The transformer's answer, turned round."""
    return -model(
        hidden_states=noisy,
        timestep=1 - times / 1000,
        encoder_hidden_states=conditions["prompt"],
        encoder_attention_mask=conditions["mask"],
        return_dict=False,
    )[0]
