"""What does not fit on this machine, and the line that mends it. Loads no torch."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass

from lora_studio import caches
from lora_studio.home import home
from lora_studio.jobs import devices

# package -> (who needs it, whether the studio works without it)
PACKAGES = {
    "torch": ("training", False),
    "transformers": ("language models", False),
    "peft": ("adapters", False),
    "diffusers": ("image models", False),
    "accelerate": ("training", False),
    "huggingface-hub": ("models and data from the Hub", False),
    "gradio": ("the pages", False),
    "datasets": ("Hub data sets", False),
    "safetensors": ("weights", False),
    "pydantic": ("specs", False),
    "bitsandbytes": ("8-bit optimizers and quantised bases", True),
}
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: ok, a warning or an error, and the line that mends it."""

    level: str
    sentence: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Everything that was looked at, what is wrong first."""
    found = [_python(), *_packages(), *_torch(), _torchvision(), _disk(), _caches(), _write()]
    order = {"error": 0, "warning": 1, "ok": 2}
    return sorted((finding for finding in found if finding), key=lambda finding: order[finding.level])


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("ok", f"Python {version}")
    return Finding("error", f"Python {version} is not among 3.11 to 3.13.", "Make a virtual environment with python3.12 -m venv .venv")


def _packages() -> list[Finding]:
    found = []
    for name, (use, optional) in PACKAGES.items():
        try:
            found.append(Finding("ok", f"{name} {importlib.metadata.version(name)}"))
        except importlib.metadata.PackageNotFoundError:
            level = "warning" if optional else "error"
            found.append(Finding(level, f"{name} is missing, which {use} need.", "pip install -r requirements.txt"))
    return found


def _torch() -> list[Finding]:
    build, driver = devices.torch_build(), _driver()
    if build["torch"] is None:
        return []
    if driver is None:
        return [Finding("ok", "No NVIDIA driver was found: training runs on the CPU.")]
    name, version, supports = driver
    index = f"https://download.pytorch.org/whl/cu{supports.replace('.', '')[:3]}" if supports else "https://pytorch.org/get-started"
    plain = build["torch"].partition("+")[0]
    remedy = f"pip install torch=={plain} --index-url {index}"
    if build["cuda"] is None:
        return [Finding("error", f"{name} is here, but torch {build['torch']} is a build without CUDA, so it would not be used.", remedy)]
    if supports and _number(build["cuda"]) > _number(supports):
        sentence = f"torch was built for CUDA {build['cuda']}, and driver {version} supports up to {supports}."
        return [Finding("error", sentence, f"Update the NVIDIA driver, or {remedy}")]
    return [Finding("ok", f"{name} with driver {version} (CUDA {supports}); torch is built for CUDA {build['cuda']}")]


def _driver() -> tuple[str, str, str] | None:
    """The first GPU's name, the driver's version and the newest CUDA it supports; None without a driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        answer = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20, check=False).stdout
        name = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=20, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    version, cuda = re.search(r"Driver Version: ([\d.]+)", answer), re.search(r"CUDA Version: ([\d.]+)", answer)
    if version is None:
        return None
    return name.strip().splitlines()[0] if name.strip() else "A GPU", version[1], cuda[1] if cuda else ""


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _torchvision() -> Finding | None:
    """A torchvision of another build than torch makes transformers fail at import."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    torch_version, vision = importlib.metadata.version("torch"), importlib.metadata.version("torchvision")
    if torch_version.partition("+")[2] == vision.partition("+")[2]:
        return Finding("ok", f"torchvision {vision}")
    return Finding("error", f"torchvision {vision} does not fit torch {torch_version}, and breaks loading.", "pip uninstall torchvision")


def _disk() -> Finding:
    place = home()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    text = f"{free / GIB:.1f} GiB free for {home()}"
    if free < GIB:
        return Finding("error", text + ", which is too little to train.", "Free some space, or set LORA_STUDIO_HOME to another disk")
    return Finding("warning" if free < 10 * GIB else "ok", text)


def _caches() -> Finding:
    """What may be fetched or made again."""
    return Finding("ok", f"{caches.size() / GIB:.1f} GiB in the caches of models, data and pictures")


def _write() -> Finding:
    try:
        home().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=home()):
            pass
    except OSError as error:
        return Finding("error", f"{home()} cannot be written: {error.strerror}.", "export LORA_STUDIO_HOME=/a/folder/of/yours")
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return Finding("warning", "HF_HUB_OFFLINE is set: nothing is fetched from the Hub.", "unset HF_HUB_OFFLINE")
    return Finding("ok", f"{home()} can be written")
