"""Clips for models of films: an animated picture, or a folder of frames that is called so: walk.frames/0001.png, with walk.txt beside it."""

import posixpath
from pathlib import Path

from lora_studio.pictures.decoding import SUFFIXES
from lora_studio.pictures.picture import Picture
from lora_studio.spec import ImageTask

ENDING = ".frames"
GROUP = 4
"""The VAEs of films take the first frame by itself and then four as one."""


def gathered(files: dict[str, Path]) -> tuple[dict[str, Path], dict[str, tuple[Path, ...]]]:
    """The files with each folder of frames as one of them, by its first frame, and the frames of each such folder in the order of their
    names."""
    found: dict[str, list[str]] = {}
    for name in sorted(files):
        folder = posixpath.dirname(name)
        if folder.endswith(ENDING) and posixpath.splitext(name)[1].lower() in SUFFIXES:
            found.setdefault(folder, []).append(name)
    inside = {name for names in found.values() for name in names}
    rest = {name: path for name, path in files.items() if name not in inside}
    return rest | {folder: files[names[0]] for folder, names in found.items()}, {folder: tuple(map(files.get, names)) for folder, names in found.items()}


def length(picture: Picture, task: ImageTask) -> int:
    """How many frames of it are shown: task.frames, or the most that it has of 1, 5, 9, ..."""
    return (min(task.frames, picture.frames) - 1) // GROUP * GROUP + 1
