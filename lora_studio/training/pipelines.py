"""A diffusers pipeline, from its folder or from one file: one part of it, its scheduler, or the stock pipeline around parts at hand."""

import json
from pathlib import Path

import torch

from lora_studio import bases
from lora_studio.errors import BaseModelError
from lora_studio.training import single_file
from lora_studio.training.encode import first_line


def load_part(folder: Path, component: str, dtype: torch.dtype, id: str, **more) -> torch.nn.Module:
    """One part of a pipeline, from safetensors, frozen; `more` goes to diffusers' own loading of a folder. Raises BaseModelError."""
    kind = part_class(folder, component)
    if folder.is_file():
        if more:
            raise BaseModelError("image.one_file", id=id)
        return single_file.load_part(folder, component, kind, dtype, id, **more).requires_grad_(False)
    try:
        model = kind.from_pretrained(folder / component, torch_dtype=dtype, use_safetensors=True, local_files_only=True, **more)
    except (OSError, ValueError, RuntimeError) as error:
        raise BaseModelError("base.broken", id=id, reason=first_line(error)) from None
    return model.requires_grad_(False)


def part_class(folder: Path, component: str):
    """The class of a pipeline's part, as model_index.json names it: of diffusers or transformers, and of nothing else."""
    import diffusers
    import transformers

    library, name = index_of(folder)[component]
    return getattr({"diffusers": diffusers, "transformers": transformers}[library], name)


def index_of(folder: Path) -> dict:
    """What a pipeline is made of: its model_index.json."""
    return json.loads((bases.sizes_folder(folder) / "model_index.json").read_text(encoding="utf-8"))


def load_scheduler(folder: Path):
    """The scheduler of a pipeline."""
    told = single_file.told(folder) if folder.is_file() else {}
    return part_class(folder, "scheduler").from_pretrained(bases.sizes_folder(folder) / "scheduler", local_files_only=True, **told)


def load_pipeline(
    folder: Path, pipeline: str, given: dict, *, without: tuple[str, ...] = ("text_encoder", "tokenizer"), dtype: torch.dtype = torch.float32
):
    """The stock pipeline around parts that are at hand; text encoders and tokenizers stay on the disk."""
    import diffusers

    diffusers.utils.logging.disable_progress_bar()  # bars would fill the run's log
    index = index_of(folder)
    left_out = {name: None for name in index if name.startswith(without) or name in ("safety_checker", "feature_extractor", "image_encoder")}
    if folder.is_file():
        missing = [name for name, value in index.items() if isinstance(value, list) and value[0] and name not in given and name not in left_out]
        given = given | {name: _piece(folder, name, dtype) for name in missing}
    made = getattr(diffusers, pipeline).from_pretrained(bases.sizes_folder(folder), **left_out, **given, torch_dtype=dtype, local_files_only=True, use_safetensors=True)
    made.set_progress_bar_config(disable=True)
    return made


def _piece(file: Path, name: str, dtype: torch.dtype):
    """What a pipeline in one file has by that name: scheduler, tokenizer or a part."""
    if name == "scheduler":
        return load_scheduler(file)
    if name.startswith("tokenizer"):
        return single_file.load_tokenizer(file, name, part_class(file, name))
    return load_part(file, name, dtype, str(file))
