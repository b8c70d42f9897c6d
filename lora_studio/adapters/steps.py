"""A checkpoint of a run as an adapter of its own: only names change, no number is touched, no torch loaded."""

import re
from pathlib import Path

from lora_studio import durable, runs
from lora_studio.adapters import pipeline_files
from lora_studio.adapters.files import CONFIG, WEIGHTS, reheaded
from lora_studio.errors import RunError
from lora_studio.spec import methods

NAME = re.compile(r"step-(\d{6,})")


def steps(run: Path) -> list[int]:
    """The steps of a run whose checkpoints are whole, ascending; none where a checkpoint is no adapter by itself (PiSSA, AdaLoRA, ...)."""
    if not methods.is_checkpoint_an_adapter(runs.spec_of(run).method):
        return []
    folder = run / "checkpoints"
    found = (NAME.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(match[1]) for match in found if match and durable.damage(folder / match[0]) is None)


def adapter_of(run: Path, step: int) -> Path:
    """The PEFT folder of a run's checkpoint, made beside the run when it is first asked for. The configuration is that of the run's
    adapter. Raises RunError."""
    target, name = run / "steps" / f"step-{step:06d}", f"step-{step:06d}"
    if durable.damage(target) is None:
        return target
    if durable.damage(run / "adapter") is not None:
        raise RunError("run.no_adapter", id=run.name, state=runs.status(run).state)
    if step not in steps(run):
        raise RunError("run.no_checkpoint", id=run.name, step=step, known=", ".join(map(str, steps(run))) or "none")
    weights = (run / "checkpoints" / name / "adapter.safetensors").read_bytes()
    files = {WEIGHTS: reheaded(weights, pipeline_files.of_parameter), CONFIG: (run / "adapter" / CONFIG).read_bytes()}
    durable.publish_folder(target, files)
    return target
