"""The assistant of a run: an adapter that is on while the run learns, and off in its pictures and in what it saves. Where it is.

Models distilled to a few steps lose that when they are trained as they are. With an adapter that undoes the distillation on them,
training teaches the new thing only (ostris' way of training Z-Image-Turbo).
"""

import hashlib
from pathlib import Path

from lora_studio import fence, library
from lora_studio.adapters import files
from lora_studio.errors import AdapterError, BaseModelError, RunError
from lora_studio.workspace import Workspace


def locate(text: str, workspace: Workspace) -> Path | None:
    """The assistant on this machine: a folder, a .safetensors file, or an adapter of the library by its id; None for what has to be
    fetched from the Hub (owner/name, or owner/name/file.safetensors). Raises AdapterError."""
    here = fence.place(text)
    if here is not None:
        return here
    if "/" not in text:
        try:
            return library.adapter_folder(workspace, text)
        except (AdapterError, RunError):
            raise AdapterError("adapter.no_assistant", path=files.shown(text)) from None
    if text.startswith((".", "/", "~")) or text.count("/") > 3:
        raise AdapterError("adapter.no_assistant", path=files.shown(text))
    return None


def fetch(text: str, workspace: Workspace) -> Path:
    """The assistant, fetched from the Hub when it is not here. Only .safetensors and .json are. Raises StudioError."""
    here = locate(text, workspace)
    if here is not None:
        return here
    import httpx2
    import huggingface_hub
    from huggingface_hub import errors as hub

    owner, name, *rest = text.split("/", 2)
    try:
        if rest:
            return Path(huggingface_hub.hf_hub_download(f"{owner}/{name}", _safe(rest[0])))
        return Path(huggingface_hub.snapshot_download(text, allow_patterns=["*.safetensors", "adapter_config.json"]))
    except (hub.RepositoryNotFoundError, hub.EntryNotFoundError):
        raise AdapterError("adapter.no_assistant", path=files.shown(text)) from None
    except (hub.HfHubHTTPError, hub.LocalEntryNotFoundError, httpx2.HTTPError, OSError, ValueError) as error:
        raise BaseModelError("base.offline", id=text, reason=(str(error).splitlines() or ["no answer"])[0][:160]) from None


def _safe(name: str) -> str:
    if Path(name).suffix.lower() in files.PICKLED:
        raise AdapterError("adapter.pickle", path=files.shown(name))
    return name


def print_of(path: Path) -> str:
    """A hash of its weights: a run does not go on with another assistant."""
    with open(files.locate(path).weights, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:24]
