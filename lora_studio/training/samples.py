"""Pictures that were drawn, as files: named by their content, their settings inside."""

import hashlib
import json
from pathlib import Path

from PIL.PngImagePlugin import PngInfo


def save_sample(folder: Path, picture, facts: dict) -> str:
    """Write a picture under a name that its content gives, its settings inside the file. Returns the name."""
    told = PngInfo()
    told.add_text("lora-studio", json.dumps(facts, ensure_ascii=False, sort_keys=True))
    folder.mkdir(exist_ok=True)
    name = f"{hashlib.sha256(picture.tobytes() + repr(sorted(facts.items())).encode()).hexdigest()[:16]}.png"
    part = folder / f".part-{name}"
    picture.save(part, "PNG", pnginfo=told)
    part.replace(folder / name)
    return name
