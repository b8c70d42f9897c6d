"""Text encoders that are trained beside an image model's part: what they make of a caption is made anew at each step, with its graph.

Only those of `families.text_encoders` are; the others (FLUX's T5) stay frozen, and what they make comes from the cache as ever.
"""

from pathlib import Path

import torch
from torch import Tensor

from lora_studio import families
from lora_studio.training import pipelines

TARGETS = families.CLIP_LINEARS


class Parts(torch.nn.Module):
    """The part that is trained, with the text encoders that are. To whoever calls it, it is that part."""

    def __init__(self, main: torch.nn.Module, encoders: dict[str, torch.nn.Module]):
        super().__init__()
        self.main, self.encoders = main, torch.nn.ModuleDict(encoders)

    def forward(self, *given, **more):
        return self.main(*given, **more)

    def get_base_model(self) -> torch.nn.Module:
        """The part itself, adapter and all."""
        return self.main.get_base_model()

    @property
    def config(self):
        """The part's configuration."""
        return self.main.config


def split(model: torch.nn.Module) -> tuple[torch.nn.Module, dict[str, torch.nn.Module]]:
    """The main part and the text encoders by name; none where only the main part is trained."""
    return (model.main, dict(model.encoders.items())) if isinstance(model, Parts) else (model, {})


def targets_in(model: torch.nn.Module) -> list[str]:
    """Which of TARGETS a text encoder has."""
    linears = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    return [end for end in TARGETS if any(name.endswith("." + end) for name in linears)]


class Texts:
    """The text encoders of a run that are trained, inside a pipeline that knows how to ask them."""

    def __init__(self, base: Path, pipeline: str, family, *, device: torch.device, dtype: torch.dtype):
        self.base, self.name, self.family, self.device, self.dtype = base, pipeline, family, device, dtype
        self.trained = families.of_pipeline(pipeline).text_encoders
        self.pipeline = None

    @property
    def is_whole(self) -> bool:
        """Whether they make everything the part is told of a caption, so that nothing of it need be cached."""
        return self.family.reembed is self.family.embed

    def load(self, main: torch.nn.Module, id: str) -> Parts:
        """The part together with its text encoders, frozen as yet. Raises BaseModelError."""
        return Parts(main, {name: pipelines.load_part(self.base, name, self.dtype, id) for name in self.trained})

    def prepare(self, model: Parts) -> None:
        """Trade time for memory in the text encoders too."""
        for encoder in model.encoders.values():
            encoder.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def embed(self, model: Parts, captions: list[str], cached: dict[str, dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """What text encoders make of each caption now, with the graph of those that are trained."""
        if self.pipeline is None:
            given = {name: encoder.get_base_model() for name, encoder in model.encoders.items()}
            index = pipelines.index_of(self.base)
            frozen = tuple(f"{kind}{name.removeprefix('text_encoder')}" for name in index if name.startswith("text_encoder") and name not in given for kind in ("text_encoder", "tokenizer"))
            self.pipeline = pipelines.load_pipeline(self.base, self.name, given, without=("vae", self.family.component, *frozen), dtype=self.dtype)
        made = self.family.reembed(self.pipeline, captions)
        return [
            {**{name: value.to(self.device) for name, value in cached.get(caption, {}).items()}, **found}
            for caption, found in zip(captions, made)
        ]
