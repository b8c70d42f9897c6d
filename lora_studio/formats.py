"""The verb of exporting: an adapter of the library in the form that another program reads, opened again by its own loader."""

from pathlib import Path
from typing import Literal

from lora_studio import library
from lora_studio.adapters import pipeline_files
from lora_studio.errors import AdapterError
from lora_studio.jobs import bench
from lora_studio.workspace import Workspace

Form = Literal["peft", "diffusers", "kohya", "gguf"]
# How a form's one file ends; a PEFT adapter is a folder.
ENDS = {"peft": "", "diffusers": ".safetensors", "kohya": ".safetensors", "gguf": ".gguf"}


def export_as(workspace: Workspace, id: str, target: str | Path, *, form: Form = "peft", dtype: str | None = None, base: str | None = None) -> dict:
    """Write an adapter in a form to `target` (which gets the form's ending where it lacks it), and open it again: modules, layers, the worst
    relative error of one, bytes, `by` whom it was read, what is `lost`, and the `target`. dtype is float32, float16 or bfloat16. Raises
    StudioError; then nothing is written."""
    if form not in ENDS:
        raise AdapterError("export.form", form=str(form)[:40], known=", ".join(ENDS))
    known, folder, place = library.card(workspace, id), library.adapter_folder(workspace, id), Path(target).expanduser().absolute()
    if form == "diffusers" and place.suffix != ENDS[form] and (place.is_dir() or str(target).endswith("/")):
        place = place / pipeline_files.NAME
    elif ENDS[form] and place.suffix != ENDS[form]:
        place = place.with_name(place.name + ENDS[form])
    if place.exists():
        raise AdapterError("adapter.target", path=place)
    asked = {"path": str(folder), "target": str(place), "form": form, "dtype": dtype, "base": base or known["base"] or None, "name": known["name"]}
    return bench.ask("export", seconds=3600.0, **asked)
