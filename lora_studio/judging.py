"""The verb of judging adapters before they are put together."""

from lora_studio import library, shelf
from lora_studio.jobs import bench
from lora_studio.workspace import Workspace


def judge(workspace: Workspace, parts: shelf.Parts) -> dict:
    """How adapters with these weights stand to each other, per layer, per block and overall: norms, effective ranks and spectra of each;
    cosines, principal angles and sign conflicts of each pair; and one or two sentences of advice. The keys are those of
    lora_studio/conflicts.py. Raises StudioError."""
    rows = [[str(library.adapter_folder(workspace, id)), weight, library.card(workspace, id)["name"]] for id, weight in parts]
    return bench.ask("judge", parts=rows)
