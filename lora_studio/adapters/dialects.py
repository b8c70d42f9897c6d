"""Whose file is it? Names of tensors to layers and parts, and the image adapters that are recognised by them."""

import re
from dataclasses import dataclass, field

from lora_studio.adapters.experts import Stack

PREFIX = "base_model.model."
PARTS = {
    "lora_A": ("A", "linear"),
    "lora_B": ("B", "linear"),
    "lora_embedding_A": ("A", "embedding"),
    "lora_embedding_B": ("B", "embedding"),
    "lora_magnitude_vector": ("magnitude", ""),
}
FORMATS = [
    ("lycoris", re.compile(r"^lycoris_|\.(hada_w\d|lokr_w\d|oft_blocks|diff_b?$)")),
    ("kohya", re.compile(r"^lora_(unet|te\d?|transformer|prior)_")),
    ("diffusers", re.compile(r"^(unet|transformer(_2)?|text_encoder(_\d)?|prior)\..*(lora_[AB]|\.lora\.(up|down)|_lora\.(up|down))")),
    ("diffusers", re.compile(r"\.processor\..*_lora\.(up|down)\.weight$")),
    ("native", re.compile(r"^(diffusion_model\.|double_blocks\.|single_blocks\.).*lora_[ABud]")),
]
# In this order: what the file says of itself, else what the names of its layers give away.
FAMILIES = [
    ("FLUX.2", re.compile(r"flux-?_?2", re.I), None),
    ("Qwen-Image", re.compile(r"qwen[-_]?image", re.I), re.compile(r"transformer_blocks[._]\d+[._](img|txt)_mlp")),
    ("Z-Image", re.compile(r"z-?_?image", re.I), re.compile(r"(noise_refiner|context_refiner)")),
    ("FLUX.1", re.compile(r"flux", re.I), re.compile(r"single_transformer_blocks|double_blocks|single_blocks")),
    ("Stable Diffusion 3", re.compile(r"stable-diffusion-3|sd3", re.I), re.compile(r"joint_blocks|attn[._]add_[qkv]_proj")),
    (
        "Stable Diffusion XL",
        re.compile(r"xl", re.I),
        re.compile(r"lora_te2_|text_encoder_2\.|(input|output)_blocks_\d+_\d_transformer_blocks_[1-9]|attentions[._]\d[._]transformer_blocks[._][2-9]"),
    ),
    ("Wan", re.compile(r"wan", re.I), re.compile(r"blocks[._]\d+[._]cross_attn")),
    ("Stable Diffusion 1.5 or 2", re.compile(r"sd_?v?[12]|stable-diffusion-v[12]", re.I), re.compile(r"(down|up|input|output)_blocks")),
]  # fmt: skip


@dataclass
class Names:
    """The tensors of a PEFT file by what they are: `factors[layer]["A" | "B"]` are names of tensors, `kinds[layer]` its kind, `stacks` the
    parameters of experts, `magnitudes[layer]` the tensor of a DoRA layer's lengths."""

    factors: dict[str, dict[str, str]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    extras: dict[str, str] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)
    stacks: dict[str, Stack] = field(default_factory=dict)
    magnitudes: dict[str, str] = field(default_factory=dict)


def format_of(names: list[str]) -> str | None:
    """The dialect of a file by the names of its tensors; None when it is not an adapter that is known here."""
    if any(name.startswith(PREFIX) for name in names):
        return "peft"
    return next((label for label, sign in FORMATS if any(sign.search(name) for name in names)), None)


def family_of(names: list[str], metadata: dict[str, str]) -> str:
    """The family of image models an adapter is for, as far as its file tells."""
    said = " ".join(metadata.get(key, "") for key in ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name"))
    for family, words, _ in FAMILIES:
        if said.strip() and words.search(said):
            return family
    for family, _, layers in FAMILIES:
        if layers is not None and any(layers.search(name) for name in names):
            return family
    return "an image model"


def split(names: list[str]) -> Names:
    """Sort the names of a PEFT file. A name may carry the adapter's own (`lora_A.default.weight`)."""
    found = Names()
    for name in names:
        words = name.removeprefix(PREFIX).split(".")
        at = next((number for number in range(len(words) - 1, 0, -1) if words[number] in PARTS), None)
        rest = words[at + 1 :] if at is not None else []
        if at is None or len(rest) > 2 or (len(rest) == 2 and rest[1] not in ("weight", "bias")):
            found.extras[name] = _part_of_extra(words)
            continue
        layer, (part, kind) = ".".join(words[:at]), PARTS[words[at]]
        if part == "magnitude" or rest[-1:] == ["bias"]:
            found.extras[name] = "magnitude" if part == "magnitude" else "bias"
            if part == "magnitude" and found.magnitudes.setdefault(layer, name) != name:
                found.twice.append(layer)
            continue
        if part in found.factors.setdefault(layer, {}) or found.kinds.setdefault(layer, kind) != kind:
            found.twice.append(layer)
        found.factors[layer][part] = name
    for layer in found.factors:
        own = f"{PREFIX}{layer}.base_layer.weight"
        if own in found.extras:  # PEFT writes an adapted embedding itself beside its factors
            found.extras[own] = "copy"
    return found


def _part_of_extra(words: list[str]) -> str:
    if "trainable_tokens_delta" in words or "token_adapter" in words:
        return "token"
    return "bias" if words[-1] == "bias" else "module"


def is_whole_model(names: list[str]) -> bool:
    """Whether the names are those of a model and not of an adapter."""
    return sum(name.endswith((".weight", ".bias")) and "lora" not in name for name in names) > len(names) / 2
