"""What this machine can compute on, found out without loading torch."""

import importlib.util
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

from lora_studio import allotment
from lora_studio.errors import MachineError
from lora_studio.home import home


@cache
def known() -> tuple[str, ...]:
    """The devices torch could use here, best first: cuda:0, ..., mps, cpu."""
    # On ZeroGPU a GPU is lent to single calls of the server, and a run in a process of its own has none.
    gpus = _gpus() if (torch_build()["cuda"] or torch_build()["hip"]) and not os.environ.get("SPACES_ZERO_GPU") else []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = gpus[: len([item for item in visible.split(",") if item.strip() not in ("", "-1")])]
    apple = ["mps"] if os.uname().sysname == "Darwin" and os.uname().machine == "arm64" else []
    return tuple([f"cuda:{number}" for number in range(len(gpus))] + apple + ["cpu"])


def resolve(device: str) -> str:
    """The device a spec's `compute.device` means here. Raises MachineError."""
    wanted = {"auto": known()[0], "cuda": "cuda:0"}.get(device, device)
    if wanted not in known():
        raise MachineError("machine.no_device", device=wanted, known=", ".join(known()))
    return wanted


def device_lock(device: str) -> Path:
    """The lock file of a device; who holds it computes there."""
    return home() / "locks" / f"{device.replace(':', '-')}.lock"


@cache
def torch_build() -> dict[str, str | None]:
    """Version and CUDA or ROCm build of the installed torch, read from its version file: {torch, cuda, hip}."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        return {"torch": None, "cuda": None, "hip": None}
    text = (Path(found.submodule_search_locations[0]) / "version.py").read_text(encoding="utf-8")
    return {name: _value(text, name) for name in ("torch", "cuda", "hip")}


def _value(text: str, name: str) -> str | None:
    key = "__version__" if name == "torch" else name
    match = re.search(rf"^{key}\b[^=\n]*=\s*['\"]([^'\"]*)['\"]", text, re.MULTILINE)
    return match[1] if match else None


@cache
def _gpus() -> list[str]:
    """The GPUs the driver lists, by name; empty without a driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        folder = Path("/proc/driver/nvidia/gpus")
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    try:
        answer = subprocess.run(
            [tool, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()] if answer.returncode == 0 else []


def describe() -> str:
    """The machine in a few words, for the badge of the page."""
    gpus = _gpus()
    if known()[0].startswith("cuda") and gpus:
        more = f" and {len(gpus) - 1} more" if len(gpus) > 1 else ""
        return gpus[0] + more
    return f"CPU · {allotment.cores()} cores" if known()[0] == "cpu" else "Apple GPU"
