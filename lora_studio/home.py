"""Where everything lives: one function of LORA_STUDIO_HOME."""

import os
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def home() -> Path:
    """The studio's folder: $LORA_STUDIO_HOME, or ~/.lora-studio. It need not exist yet."""
    return Path(os.environ.get("LORA_STUDIO_HOME") or Path.home() / ".lora-studio").expanduser().absolute()


def presets_folder() -> Path:
    """The folder of presets: beside the package in a checkout, inside it when installed."""
    beside = PACKAGE.parent / "presets"
    return beside if beside.is_dir() else PACKAGE / "presets"


def demo_base(name: str) -> Path | None:
    """The folder of a bundled base (`demo-text`, `demo-image`), or None when `name` is not one."""
    folder = PACKAGE / "demo" / name.removeprefix("demo-")
    whole = re.fullmatch(r"demo-[a-z0-9-]+", name) and any((folder / file).is_file() for file in ("config.json", "model_index.json"))
    return folder if whole else None
