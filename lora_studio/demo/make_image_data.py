"""Write the two demo data sets of pictures, stripes and outline, with captions. Run: python -m lora_studio.demo.make_image_data FOLDER"""

import argparse
import json
from pathlib import Path
from random import Random

from lora_studio.demo import image_world as world

PICTURES = 24


def scenes(chance: Random) -> list[world.Scene]:
    """Scenes the base was trained on, in which every shape, place, background and color comes about equally often."""
    found: list[world.Scene] = []
    for at in range(PICTURES):
        shape, ground = world.SHAPES[at % len(world.SHAPES)], list(world.COLORS)[at % len(world.COLORS)]
        place = list(world.PLACES)[(at + at // len(world.PLACES)) % len(world.PLACES)]
        fitting = [world.Scene(color, shape, ground, place) for color in world.COLORS if color != ground]
        free = [scene for scene in fitting if not world.held_out(scene)]
        found.append(min(free, key=lambda scene: (sum(scene.color == other.color for other in found), chance.random())))
    return found


def write(folder: Path, style: str) -> None:
    """One data set: PNG files and metadata.jsonl, with the plain captions. No caption names the style."""
    folder.mkdir(parents=True, exist_ok=True)
    chance, rows = Random(f"demo-image {style}"), []
    for at, scene in enumerate(scenes(chance)):
        name = f"{at:02}.png"
        world.draw(scene, chance, (style,)).save(folder / name, optimize=True)
        rows.append({"file_name": name, "text": world.caption(scene)})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the two folders go, for example presets/demo")
    folder = parser.parse_args().folder
    for style in world.STYLES:
        write(folder / style, style)


if __name__ == "__main__":
    main()
