"""Class pictures that the base draws itself before training, once: the same base, prompt and settings find them in the cache again.

cache/priors/<hash of base, prompt and brush>/00000.png, 00001.png, ...: each by its own seed, so that more can be added later.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch

from lora_studio import pictures
from lora_studio.home import home
from lora_studio.spec import Source, TrainSpec
from lora_studio.training import order
from lora_studio.training.image_families import Family, drawn


def prepare(spec: TrainSpec, base_print: str, guidance: float, *, family: Family, ask: Callable[[], dict], load: Callable) -> tuple[Source, int]:
    """The source of the class pictures that a spec wants, and how many had to be drawn. `ask()` gives what the stock pipeline is asked
    by for task.prior_prompt, and `load()` that pipeline; neither is called when all are there. Each file is whole or absent."""
    task = spec.task
    size = pictures.bucket(task.resolution, task.resolution, task)
    said = repr([base_print, task.prior_prompt.strip(), size, task.sample_steps, guidance])
    folder = home() / "cache" / "priors" / hashlib.sha256(said.encode()).hexdigest()[:24]
    files = [(number, folder / f"{number:05d}.png") for number in range(task.prior_pictures)]
    missing = [(number, file) for number, file in files if not file.is_file()]
    if missing:
        brush = ask() | family.guide(guidance) | {"num_inference_steps": task.sample_steps, "width": size[0], "height": size[1]}
        pipeline = load()
        folder.mkdir(parents=True, exist_ok=True)
        for number, file in missing:
            with torch.no_grad():
                found = drawn(pipeline(**brush, generator=torch.Generator().manual_seed(order.key("class picture", number))))
            _write(found, file)
    return Source(path=str(folder), cap=task.prior_pictures, prior=True), len(missing)


def _write(picture, file: Path) -> None:
    part = file.with_name(f".part-{os.getpid()}-{file.name}")
    picture.save(part, "PNG")
    os.replace(part, file)
