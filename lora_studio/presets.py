"""Presets: sparse YAML files that say only what differs from the defaults."""

from dataclasses import dataclass
from pathlib import Path

from lora_studio import settings
from lora_studio.errors import SpecError
from lora_studio.home import presets_folder

FIRST = "demo/pirate"


@dataclass(frozen=True)
class Preset:
    """A preset: its name (`qwen3/0.6b`), what its first comment says, and its file."""

    name: str
    description: str
    path: Path

    def tree(self) -> dict:
        """Its settings, not yet checked."""
        return settings.read_tree(self.path)


def available() -> list[Preset]:
    """Every preset, the demos first, then by name."""
    folder = presets_folder()
    found = [
        Preset(path.relative_to(folder).with_suffix("").as_posix(), _description(path), path)
        for path in folder.rglob("*.yaml")
    ]
    return sorted(found, key=lambda preset: (preset.name != FIRST, not preset.name.startswith("demo/"), preset.name))


def find(name: str) -> Preset:
    """The preset of that name. Raises SpecError listing the known ones."""
    for preset in available():
        if preset.name == name:
            return preset
    raise SpecError("spec.unknown_preset", name=name, known=", ".join(preset.name for preset in available()))


def _description(path: Path) -> str:
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    return " ".join(lines)
