"""The spec of a job that writes captions: which album, which model, which pictures."""

from typing import Annotated, Literal

from pydantic import Field, ValidationError

from lora_studio.errors import Problem, SpecError
from lora_studio.spec import Base
from lora_studio.spec.tasks import Part


class CaptionSpec(Part):
    """Everything that makes a job that writes captions."""

    kind: Literal["captions"] = "captions"
    """What tells this spec from that of a training run."""
    name: Annotated[str, Field(min_length=1, max_length=120)] = "captions"
    """What the job is called."""
    album: Annotated[str, Field(min_length=1)]
    """The folder of the album."""
    model: Base
    """An image-to-text model: a Hub id (owner/name), or a folder on this machine."""
    pictures: Literal["missing", "all"] | list[str] = "missing"
    """Those without a caption, all, or these by their names."""
    prompt: str = ""
    """What a model that can be talked to is asked, or how the captions of another one begin. Empty: its usual way."""
    tokens: Annotated[int, Field(ge=4, le=1024)] = 75
    """The longest caption in tokens."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    """auto, cpu, cuda, cuda:1, mps. auto takes a GPU where there is one."""


def parse(tree: dict) -> CaptionSpec:
    """The spec of a nested dict. Raises SpecError with every problem at once."""
    try:
        return CaptionSpec.model_validate(tree)
    except ValidationError as error:
        found = [Problem(".".join(map(str, one["loc"])), f"{'.'.join(map(str, one['loc']))}: {one['msg']}.") for one in error.errors()]
        raise SpecError("spec.problems", problems=found) from None
