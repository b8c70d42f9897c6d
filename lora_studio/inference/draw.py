"""An image model with weighted adapters in memory, and its pictures. How adapters hang on a model is in hooks.py."""

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_studio import bases, families
from lora_studio.errors import BenchError
from lora_studio.inference.hooks import Hooks
from lora_studio.pictures import decoding
from lora_studio.pictures.picture import Picture, Skip
from lora_studio.pictures.samples import save_sample
from lora_studio.spec import Base
from lora_studio.training import latents, pipelines
from lora_studio.training.image_families import FAMILIES, drawn
from lora_studio.training.showing import Shown
from lora_studio.training.text import choose_dtype
from lora_studio.weights import Weight, is_number


@dataclass(frozen=True)
class Brush:
    """How a picture is drawn; width and height are in pixels."""

    seed: int = 0
    steps: int = 20
    guidance: float = 5.0
    width: int = 512
    height: int = 512

    def __post_init__(self):
        rules = {
            "seed": (isinstance(self.seed, int) and 0 <= self.seed < 2**63, "it must be a whole number from 0 on"),
            "steps": (isinstance(self.steps, int) and 1 <= self.steps <= 1000, "it must be a whole number from 1 to 1000"),
            "guidance": (is_number(self.guidance) and 1 <= self.guidance <= 100, "it must be a number from 1 to 100"),
            "width": (_is_edge(self.width), "it must be a multiple of 8 from 32 to 4096"),
            "height": (_is_edge(self.height), "it must be a multiple of 8 from 32 to 4096"),
        }
        for name, (is_right, rule) in rules.items():
            if not is_right:
                raise BenchError("bench.setting", name=name, value=repr(getattr(self, name))[:40], rule=rule)


def _is_edge(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 32 <= value <= 4096 and value % 8 == 0


class Easel(Hooks):
    """One image model and any number of adapters on the part of it that is trained. Not safe for several threads at once."""

    def __init__(self, base: Base, *, device: str = "cpu", precision: str = "auto"):
        """Load the whole pipeline. Raises StudioError with the way out."""
        logging.getLogger("diffusers").setLevel(logging.ERROR)
        folder, info = bases.fetch(base), bases.inspect(base)
        # On a processor a picture is drawn in fp32, as the stock pipeline draws it.
        self.dtype = choose_dtype("fp32" if precision == "auto" and device == "cpu" else precision, device)
        self.base, self.device = base, torch.device(device)
        self.family = FAMILIES[info.pipeline]
        part = pipelines.load_part(folder, self.family.component, self.dtype, base.id).eval()
        self.pipeline = pipelines.load_pipeline(folder, info.pipeline, {self.family.component: part}, without=(), dtype=self.dtype)
        self.pipeline.to(self.device)
        self._tells_steps = "callback_on_step_end" in inspect.signature(self.pipeline.__call__).parameters
        self.scheduler = lambda: pipelines.load_scheduler(folder)
        super().__init__(part, base.id, self.device)
        # Layers of text encoders are called by the encoder's name and their own, and by nothing else.
        self.encoders = {
            f"{name}.{layer.removeprefix('text_model.')}": module
            for name in families.of_pipeline(info.pipeline).text_encoders
            for layer, module in getattr(self.pipeline, name).named_modules()
        }

    def layer_of(self, name: str) -> torch.nn.Module | None:
        return self.encoders.get(name) or super().layer_of(name)

    def draw(self, prompt: str, brush: Brush, target: Path, *, weights: dict[str, Weight], step: Callable[[int], None], source: Path | None = None) -> Path:
        """Draw a picture into the folder `target`, its settings inside the file. `step` is told each step's number and may raise to stop.
        An editing model makes it of the picture `source`. The same model, prompt, brush and weights give the same picture. Returns the
        file. Raises BenchError."""
        if source is not None and self.family.edit is None:
            raise BenchError("bench.source", base=self.base.id)
        if not prompt.strip():
            raise BenchError("bench.nothing_asked")

        def after(_pipeline, number, _time, tensors):
            step(number + 1)
            return tensors

        self.pipeline.scheduler = self.scheduler()  # a pipeline leaves its last table of steps behind
        heard = {"callback_on_step_end": after} if self._tells_steps else {}
        with self.using(weights), torch.inference_mode():
            asked = self.family.ask(*self.family.embed(self.pipeline, [prompt, ""])) | self.family.guide(brush.guidance)
            if self.family.edit:
                asked |= self.family.edit(self._latents(source, brush), (brush.width, brush.height))
            found = drawn(
                self.pipeline(
                    **asked, **heard, num_inference_steps=brush.steps, width=brush.width, height=brush.height,
                    generator=torch.Generator().manual_seed(brush.seed),
                )
            )  # fmt: skip
        facts = {"prompt": prompt, "base": self.base.id, **vars(brush)} | ({"source": source.name} if source else {})
        target.mkdir(parents=True, exist_ok=True)
        return target / save_sample(target, found, facts)

    def _latents(self, source: Path | None, brush: Brush) -> torch.Tensor | None:
        """A picture's latents at the brush's size, for an editing model."""
        if source is None:
            return None
        try:
            seen = decoding.look(source)
        except Skip as reason:
            raise BenchError("bench.source_broken", path=source.name, reason=str(reason)) from None
        picture = Picture(source, source.name, "", seen.width, seen.height, seen.digest)
        found = latents.pixels(Shown(picture, (brush.width, brush.height), "center", 0, False, ""))
        return self.family.encode(self.pipeline.vae, found[None].to(self.device, self.dtype))[0][0]
