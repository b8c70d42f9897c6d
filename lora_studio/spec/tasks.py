"""The settings of each kind of task: what the rows are, and how they are shown to the model."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    """A group of settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ChatTask(Part):
    """Conversations; the loss is on the assistant's words only."""

    kind: Literal["chat"] = "chat"
    """What the rows are: chat, prompt_completion, text, or image."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longest row in tokens. Longer rows are counted and shown before Start."""
    overlength: Literal["cut", "drop"] = "cut"
    """Rows longer than max_length: cut keeps their beginning, drop leaves them out."""
    template: Literal["auto", "chatml"] = "auto"
    """The chat template: auto takes the tokenizer's own (ChatML where it has none), chatml always takes ChatML."""
    system: str | None = None
    """A system prompt for conversations that have none."""


class PromptCompletionTask(Part):
    """A prompt and its completion, without a chat template; the loss is on the completion."""

    kind: Literal["prompt_completion"] = "prompt_completion"
    """What the rows are: chat, prompt_completion, text, or image."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longest row in tokens. Longer rows are counted and shown before Start."""
    overlength: Literal["cut", "drop"] = "cut"
    """Rows longer than max_length: cut keeps their beginning, drop leaves them out."""


class TextTask(Part):
    """Plain text; the loss is on every token."""

    kind: Literal["text"] = "text"
    """What the rows are: chat, prompt_completion, text, or image."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longest row in tokens. Longer rows are counted and shown before Start."""
    overlength: Literal["cut", "drop", "split"] = "split"
    """Rows longer than max_length: split makes several rows, cut keeps the beginning, drop leaves them out."""


class ImageTask(Part):
    """Pictures with captions, for a diffusion model; the loss is on the noise."""

    kind: Literal["image"] = "image"
    """What the rows are: chat, prompt_completion, text, or image."""
    resolution: Annotated[int, Field(ge=32, le=4096, multiple_of=8)] = 512
    """The edge in pixels of a square; every picture is scaled to about its area."""
    more_resolutions: list[Annotated[int, Field(ge=32, le=4096, multiple_of=8)]] = []
    """Other edges pictures are shown at too, such as 512, 768: each showing draws one. No picture is enlarged for these."""
    frames: Annotated[int, Field(ge=1, le=121)] = 1
    """Models of films (Wan): the first so many frames of each clip, 1, 5, 9, ...: an animated GIF, WebP or PNG, or a folder of frames called x.frames. 1 takes still pictures."""
    buckets: bool = True
    """Keep the shape of each picture: those of like shape go together. Off: all are cropped to a square."""
    bucket_step: Annotated[int, Field(ge=8, multiple_of=8)] = 64
    """The edges of buckets are multiples of this, in pixels."""
    crop: Literal["center", "random"] = "center"
    """Which part is kept of a picture that does not fit its bucket exactly. random moves it every epoch."""
    flip: bool = False
    """Mirror half of the pictures, others each epoch. Not for text or faces with a parting."""
    trigger: str | None = None
    """A word that stands first in every caption but those of class pictures, and later calls the adapter."""
    prefix: str | None = None
    """Text that stands before every caption, after the trigger."""
    caption_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of pictures that are shown without their caption, others each epoch."""
    shuffle_tags: bool = False
    """Shuffle the parts of a caption that commas divide, anew each epoch."""
    keep_tags: Annotated[int, Field(ge=0)] = 0
    """How many parts at the beginning of a caption stay where they are."""
    outside_mask: Annotated[float, Field(ge=0, le=1)] = 0.1
    """How much what is black in a picture's mask counts in the loss, against 1 for what is white; 1 ignores masks."""
    prior_weight: Annotated[float, Field(gt=0, le=10)] = 1.0
    """How much class pictures (a source with prior: true) count in the loss, against 1 for the others."""
    prior_prompt: str | None = None
    """What class pictures show, such as a photo of a dog: the caption of those without one, and what they are drawn from."""
    prior_pictures: Annotated[int, Field(ge=0, le=10_000)] = 0
    """So many class pictures are drawn by the base from prior_prompt before training, once. For runs without a source of them."""
    weighting: Literal["none", "min_snr", "debiased"] = "none"
    """How steps of the noise count in the loss: all alike, min-SNR (gamma 5), or debiased by 1/sqrt(SNR); the last two not for flow matching."""
    timesteps: Literal["auto", "uniform", "logit_normal", "sigmoid", "mode"] = "auto"
    """Where in the noise pictures are trained: uniform takes all steps alike, logit_normal mostly the middle, sigmoid the same without the family's shift, mode the middle and both ends, auto what the family is used to."""
    shift: Literal["auto", "resolution"] | Annotated[float, Field(gt=0, le=100)] = "auto"
    """Flow matching: how far training moves towards noise. 1 is not at all, 3 is usual, resolution more for larger pictures, auto what the family is used to."""
    text_encoder: bool = False
    """Put an adapter on the CLIP text encoders too (Stable Diffusion, SDXL, FLUX); their texts are then read anew at each step."""
    noise_offset: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Noise that is the same all over a channel, for very dark and very bright pictures; 0.05 is usual."""
    sample_steps: Annotated[int, Field(ge=1, le=1000)] = 20
    """Steps of each sample picture."""
    guidance: Annotated[float, Field(ge=1, le=100)] | None = None
    """Guidance of each sample picture; 1 is none, null what the family is used to."""
