"""The folder of a diffusers pipeline: one part of it, its scheduler, or the stock pipeline around parts that are at hand."""

import json
from pathlib import Path

import torch

from lora_studio.errors import BaseModelError
from lora_studio.training.encode import first_line


def load_part(folder: Path, component: str, dtype: torch.dtype, id: str) -> torch.nn.Module:
    """One part of a pipeline's folder, from safetensors, frozen. Raises BaseModelError."""
    kind = part_class(folder, component)
    try:
        model = kind.from_pretrained(folder / component, torch_dtype=dtype, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise BaseModelError("base.broken", id=id, reason=first_line(error)) from None
    return model.requires_grad_(False)


def part_class(folder: Path, component: str):
    """The class of a pipeline's part, as model_index.json names it: of diffusers or transformers, and of nothing else."""
    import diffusers
    import transformers

    library, name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))[component]
    return getattr({"diffusers": diffusers, "transformers": transformers}[library], name)


def load_scheduler(folder: Path):
    """The scheduler of a pipeline's folder."""
    return part_class(folder, "scheduler").from_pretrained(folder / "scheduler", local_files_only=True)


def load_pipeline(
    folder: Path, pipeline: str, given: dict, *, without: tuple[str, ...] = ("text_encoder", "tokenizer"), dtype: torch.dtype = torch.float32
):
    """The stock pipeline around parts that are at hand; text encoders and tokenizers stay on the disk."""
    import diffusers

    diffusers.utils.logging.disable_progress_bar()  # bars would fill the run's log
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    left_out = {name: None for name in index if name.startswith(without) or name in ("safety_checker", "feature_extractor", "image_encoder")}
    made = getattr(diffusers, pipeline).from_pretrained(folder, **left_out, **given, torch_dtype=dtype, local_files_only=True, use_safetensors=True)
    made.set_progress_bar_config(disable=True)
    return made
