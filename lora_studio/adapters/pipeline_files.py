"""An image adapter as the one file that diffusers' `load_lora_weights` reads. Only names change; no number is touched, no torch loaded."""

import json
import struct

PREFIX = "base_model.model."
NAME = "pytorch_lora_weights.safetensors"


def to_pipeline_file(weights: bytes, config: dict, component: str) -> bytes:
    """The weights of a PEFT folder with names that begin with the pipeline's part (unet, transformer, text_encoder). The configuration
    goes into the header: without it loaders take alpha for the rank, and the adapter is too strong or too weak."""
    (length,) = struct.unpack("<Q", weights[:8])
    header = json.loads(weights[8 : 8 + length])
    entries = {f"{component}.{name.removeprefix(PREFIX)}": entry for name, entry in header.items() if name != "__metadata__"}
    told = {f"{component}.{key}": value for key, value in config.items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(told, sort_keys=True)}
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + weights[8 + length :]


def part_of(config: dict) -> str:
    """The part of a pipeline that an adapter is for: unet, transformer, or "" when it is for a language model."""
    made_for = config.get("auto_mapping")
    if not isinstance(made_for, dict) or not str(made_for.get("parent_library", "")).startswith("diffusers"):
        return ""
    return "unet" if "UNet" in str(made_for.get("base_model_class", "")) else "transformer"


def made_for(model) -> dict[str, str]:
    """How an adapter's configuration names the class of the model it was made for (PEFT's own field)."""
    return {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
