"""The assistant in a run: on the part's layers from the first step on, taken away for sample pictures, never in what is saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lora_studio import adapters
from lora_studio.adapters import assistant
from lora_studio.inference.hooks import Hooks
from lora_studio.spec import Base
from lora_studio.workspace import Workspace


def of_run(base: Base, model: torch.nn.Module, workspace: Workspace, device: torch.device) -> "Assistant | None":
    """The assistant that a run asks for, on its part; None where it asks for none. Raises StudioError."""
    return Assistant(assistant.fetch(base.assistant, workspace), model, base.id, device) if base.assistant else None


class Assistant:
    """An adapter of weight 1 on a part. It hangs on the part's own layers, below the adapter that is trained, and has no gradient. It is
    on by itself, because gradient checkpointing runs the layers once more when the loss is long computed."""

    def __init__(self, path: Path, model: torch.nn.Module, base: str, device: torch.device):
        self.print = assistant.print_of(path)
        self.hooks = Hooks(model, base, device)
        self.hooks.put("assistant", adapters.read(path).modules, label="The assistant")
        self.hooks.active = (("assistant", 1.0),)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Take it away for a while."""
        with self.hooks.using({}):
            yield
