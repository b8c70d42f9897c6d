"""The spec of a job that searches the weights of adapters: which adapters, on which rows, between which bounds."""

from typing import Annotated, Literal, Union

from pydantic import Field, ValidationError

from lora_studio import problems
from lora_studio.errors import SpecError
from lora_studio.spec import Base, Compute, Schedule, Source, TrainSpec, Validation
from lora_studio.spec.tasks import ChatTask, ImageTask, Part, PromptCompletionTask, TextTask

Task = Annotated[Union[ChatTask, PromptCompletionTask, TextTask, ImageTask], Field(discriminator="kind")]


class Sought(Part):
    """An adapter whose weight is sought."""

    id: Annotated[str, Field(min_length=1)]
    """Its id in the library."""
    name: Annotated[str, Field(min_length=1)]
    """What it is called."""
    path: Annotated[str, Field(min_length=1)]
    """Its folder."""


class SearchSpec(Part):
    """Everything that makes a search."""

    kind: Literal["search"] = "search"
    """What tells this spec from that of a training run."""
    name: Annotated[str, Field(min_length=1, max_length=120)] = "search"
    """What the job is called."""
    base: Base
    """The base that the weighted adapters are tried on."""
    task: Task = ChatTask()
    """What the rows are."""
    data: Annotated[list[Source], Field(min_length=1)]
    """The rows whose loss is to be low: rows that no adapter was trained on, or prompts with the answers that are wanted."""
    adapters: Annotated[list[Sought], Field(min_length=1, max_length=16)]
    """The adapters whose weights are sought."""
    low: Annotated[float, Field(ge=-10, le=0)] = 0.0
    """The lowest weight that is tried. At most 0, so that each adapter can be left out."""
    high: Annotated[float, Field(ge=1, le=10)] = 1.5
    """The highest weight that is tried. At least 1, so that each adapter can be as it is."""
    evaluations: Annotated[int, Field(ge=2, le=10_000)] = 40
    """How many weights are tried at most, the simple ones among them."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Rows that go through the model at once."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """The number that what is tried comes from, and the noise of pictures."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    """auto, cpu, cuda, cuda:1, mps. auto takes a GPU where there is one."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """The base's numbers. auto takes bf16 where the device has it."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads. null takes one for every 10 million parameters of the model, and no more than there are cores, in a container those it is allowed; a small model is slower on several."""

    def as_training(self) -> TrainSpec:
        """The run whose task judges these rows: all of them, as rows held out of a training are judged."""
        compute = Compute(device=self.device, precision=self.precision, seed=self.seed, threads=self.threads)
        schedule = Schedule(steps=1, batch_size=self.batch_size)
        return TrainSpec(base=self.base, task=self.task, data=self.data, validation=Validation(size=0), schedule=schedule, compute=compute)


def parse(tree: dict) -> SearchSpec:
    """The spec of a nested dict. Raises SpecError with every problem at once."""
    try:
        return SearchSpec.model_validate(tree)
    except ValidationError as error:
        raise SpecError("spec.problems", problems=problems.of_validation(error, SearchSpec, tree)) from None
