"""Pictures: every test draws its own files."""

from pathlib import Path

import pytest
from PIL import Image

from lora_studio import pictures
from lora_studio.errors import DataError
from lora_studio.pictures import Picture, Pictures
from lora_studio.spec import ImageTask, TrainSpec, parse


def draw(path: Path, size=(64, 64), color=(200, 40, 40), **options) -> Path:
    """A picture file whose left half has another colour than its right half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, color)
    image.paste((20, 60, 220), (size[0] // 2, 0, size[0], size[1]))
    image.save(path, **options)
    return path


def spec(*sources, **task) -> TrainSpec:
    """A spec that trains on these folders, or on these sources as they would stand in YAML."""
    listed = [source if isinstance(source, dict) else {"path": str(source)} for source in sources]
    task = {"kind": "image", "resolution": 64, "bucket_step": 8, **task}
    return parse({"task": task, "data": listed})


def collect(*sources, limit=None, decode=True, cache=None, **task) -> list[Pictures]:
    first = sources[0]["path"] if isinstance(sources[0], dict) else sources[0]
    cache = cache or Path(first).parent / "cache"
    return pictures.collect(spec(*sources, **task), cache=cache, limit=limit, decode=decode)


def one(folder, **options) -> Pictures:
    """The only group of a folder."""
    (group,) = collect(folder, **options)
    return group


def refused(folder, **options) -> str:
    """What is said when a folder cannot be used."""
    with pytest.raises(DataError) as caught:
        collect(folder, **options)
    return str(caught.value)


def names(group: Pictures) -> list[str]:
    return [item.name for item in group.items]


def captions(group: Pictures) -> dict[str, str]:
    return {item.name: item.caption for item in group.items}


def made(path: Path, caption: str = "", **options) -> Picture:
    """A picture as collect would give it, of a file."""
    with Image.open(path) as image:
        width, height = image.size
    return Picture(path, path.name, caption, options.pop("width", width), options.pop("height", height), "0" * 64, **options)


def task(**settings) -> ImageTask:
    return ImageTask(**{"resolution": 64, "bucket_step": 8, **settings})
