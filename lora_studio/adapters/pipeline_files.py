"""An image adapter as the one file that diffusers' `load_lora_weights` reads. Only names change; no number is touched, no torch loaded."""

import json
import re
import struct

from lora_studio.adapters.files import reheaded

PREFIX = "base_model.model."
NAME = "pytorch_lora_weights.safetensors"
# A layer of a text encoder: its name in a PEFT folder begins with the encoder's.
ENCODER = re.compile(r"(text_encoder(?:_\d)?)\.(.+)$")


def to_pipeline_file(weights: bytes, config: dict, component: str) -> bytes:
    """The weights of a PEFT folder with names that begin with the pipeline's part (unet, transformer, text_encoder). The configuration
    goes into the header, once for each part: without it loaders take alpha for the rank, and the adapter is too strong or too weak.
    Names of text encoders have the `text_model.` that every loader knows."""
    (length,) = struct.unpack("<Q", weights[:8])
    names = [_named(name.removeprefix(PREFIX), component) for name in json.loads(weights[8 : 8 + length]) if name != "__metadata__"]
    told = {}
    for part in sorted({name.partition(".")[0] for name in names} | {component}):
        layers = [name.partition(".")[2].partition(".lora_")[0] for name in names if name.startswith(f"{part}.")]
        told |= {f"{part}.{key}": value for key, value in _meant(config, part, layers).items()}
    return reheaded(weights, lambda name: _named(name.removeprefix(PREFIX), component), {"lora_adapter_metadata": json.dumps(told, sort_keys=True)})


def _named(name: str, component: str) -> str:
    encoder = ENCODER.match(name)
    return f"{encoder[1]}.text_model.{encoder[2]}" if encoder else f"{component}.{name}"


def _meant(config: dict, part: str, layers: list[str]) -> dict:
    """The configuration for one part: of the targets and patterns only those it has, without the encoder's name where they are whole names."""
    config = config | {key: _of_part(config[key], part) for key in ("rank_pattern", "alpha_pattern") if config.get(key)}
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        return config
    found = [(ENCODER.match(target), target) for target in targets]
    ends = {encoder[2] if encoder else target for encoder, target in found if not encoder or encoder[1] == part}
    return config | {"target_modules": sorted(end for end in ends if any(layer == end or layer.endswith("." + end) for layer in layers))}


def _of_part(pattern: dict, part: str) -> dict:
    """The entries of a pattern that are for one part."""
    found = [(ENCODER.match(name), name, value) for name, value in pattern.items()]
    is_encoder = part.startswith("text_encoder")
    return {encoder[2] if encoder else name: value for encoder, name, value in found if (encoder[1] == part if encoder else not is_encoder)}


def with_part(name: str, part: str) -> str:
    """A tensor of a text encoder's PEFT adapter as it is called in a folder with several parts."""
    return f"{PREFIX}{part}.{name.removeprefix(PREFIX).removeprefix('text_model.')}"


def of_parameter(name: str) -> str:
    """The name in a PEFT folder of what a run's checkpoint calls by the name of its parameter."""
    name = name.replace(".default.", ".").removeprefix("main.")
    if not name.startswith("encoders."):
        return name
    _, part, rest = name.split(".", 2)
    return with_part(rest, part)


def part_of(config: dict) -> str:
    """The part of a pipeline that an adapter is for: unet, transformer, or "" when it is for a language model."""
    made_for = config.get("auto_mapping")
    if not isinstance(made_for, dict) or not str(made_for.get("parent_library", "")).startswith("diffusers"):
        return ""
    return "unet" if "UNet" in str(made_for.get("base_model_class", "")) else "transformer"


def made_for(model) -> dict[str, str]:
    """How an adapter's configuration names the class of the model it was made for (PEFT's own field)."""
    return {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
