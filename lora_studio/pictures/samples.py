"""Pictures that were drawn, as files: named by their content, their settings inside."""

import hashlib
import json
from pathlib import Path

from PIL.PngImagePlugin import PngInfo


def save_sample(folder: Path, picture, facts: dict, more=()) -> str:
    """Write a picture under a name that its content gives, its settings inside the file; of a film `more` are the frames that follow, at
    16 a second. Returns the name."""
    told = PngInfo()
    told.add_text("lora-studio", json.dumps(facts, ensure_ascii=False, sort_keys=True))
    folder.mkdir(exist_ok=True)
    content = b"".join(one.tobytes() for one in (picture, *more)) + repr(sorted(facts.items())).encode()
    name = f"{hashlib.sha256(content).hexdigest()[:16]}.png"
    part = folder / f".part-{name}"
    moving = {"save_all": True, "append_images": list(more), "duration": 1000 / 16, "loop": 0} if more else {}
    picture.save(part, "PNG", pnginfo=told, **moving)
    part.replace(folder / name)
    return name
