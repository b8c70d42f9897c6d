"""The spec of a training run: the one place where settings, their defaults and their help are written.

YAML, command-line flags, form widgets, tooltips, presets and model cards all derive from these fields.
"""

from typing import Annotated, Literal, Union

from pydantic import Field, ValidationError, model_validator

from lora_studio import problems
from lora_studio.errors import Problem, SpecError
from lora_studio.spec.idle import NO_EFFECT
from lora_studio.spec.methods import Lora, Method
from lora_studio.spec.tasks import ChatTask, ImageTask, Part, PromptCompletionTask, TextTask

VERSION = 1


class Base(Part):
    """The model the adapter is trained on."""

    id: Annotated[str, Field(min_length=1)] = "demo-text"
    """A Hub id (owner/name), the folder of a model here, a Stable Diffusion model in one .safetensors file, or demo-text, the small base that comes along."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model. A commit makes a run repeatable."""
    assistant: Annotated[str, Field(min_length=1)] | None = None
    """For models distilled to a few steps (Z-Image-Turbo): an adapter that is on while the run learns and off in its pictures. A folder, file, library id or Hub id."""


class Source(Part):
    """Where rows come from."""

    path: Annotated[str, Field(min_length=1)]
    """A .jsonl, .json, .csv or .parquet file, a folder of these, a Hub data set (owner/name), or demo/pirate. For pictures a folder or .zip."""
    split: str = "train"
    """The split of a Hub data set."""
    subset: str | None = None
    """The configuration of a Hub data set that has several."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    columns: dict[str, str] = {}
    """Which column plays which part, where names are unusual: {prompt: question, completion: answer}."""
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """How often an epoch shows each row: 2 shows it twice, 0.5 shows another half of the rows each epoch."""
    cap: Annotated[int, Field(ge=1)] | None = None
    """At most this many rows, taken from the top."""
    prior: bool = False
    """Class pictures (kohya's reg folder): others of the same class, so that it is not forgotten. An epoch shows as many as of the rest."""


class Optim(Part):
    """The optimizer and its rates."""

    kind: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "lion", "lion_8bit", "muon", "prodigy", "adafactor", "sgd", "adamw_schedule_free"] = "adamw"
    """The optimizer. adamw is fused; 8bit ones keep their state in 8 bits, a paged one moves it to main memory when the GPU is full. prodigy finds
    its own rate: set lr to 1. muon is for matrices, at rates about ten times higher; lion's are about five times lower. adamw_schedule_free needs
    no schedule but constant: it saves a running average of its steps."""
    lr: Annotated[float, Field(gt=0, le=100)] = 2e-4
    """The rate of A, and without LoRA+ of B too."""
    lora_plus_ratio: Annotated[float, Field(gt=1, le=1000)] | None = None
    """LoRA+: B learns at this multiple of lr; 16 is usual for text, with lr about 8 times lower, and 4 for pictures, with lr halved. null is plain LoRA."""
    text_encoder_lr: Annotated[float, Field(gt=0, le=100)] | None = None
    """The rate of the text encoders' A where task.text_encoder is on; half of lr is usual. null takes lr."""
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decoupled weight decay of A and B; never of biases and magnitudes."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Averaging of gradients; the momentum of SGD and Muon is this too."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's and Prodigy's averaging of squared gradients; Lion's slower averaging of gradients."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """The largest norm of a step's gradient; larger ones are scaled down. null never clips."""


class Schedule(Part):
    """How long, in what portions, and how the rate moves."""

    kind: Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"] = "cosine"
    """How the rate moves after the warm-up. wsd is warm-up, stable, and a linear decay over the last fifth."""
    epochs: Annotated[float, Field(gt=0)] = 3.0
    """How often the run goes through the rows."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """The number of optimizer steps, in place of epochs."""
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """Steps over which the rate rises from zero: below 1 a share of all steps, else a number of steps."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Rows that go through the model at once."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Batches whose gradients make one step, weighted by their tokens."""


class Compute(Part):
    """On what, and how."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    """auto, cpu, cuda, cuda:1, mps. auto takes a GPU where there is one."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """The base's numbers. auto takes bf16 where the device has it. The adapter is always kept in fp32."""
    packing: bool = True
    """Put the rows of a batch one after another instead of padding them; each attends to itself only."""
    fused: bool = True
    """Use the studio's faster layers where they are proven equal."""
    checkpointing: bool = False
    """Gradient checkpointing: less memory, about a third more time."""
    quantize: Literal["none", "8bit", "4bit"] = "none"
    """QLoRA: keep the base in 8 or 4 bits (bitsandbytes): half or a quarter of its memory, slower steps. Image bases need an NVIDIA GPU for it."""
    encoders: Literal["auto", "cpu", "4bit"] = "auto"
    """Where an image model's text encoders work before the first step: auto on the device, cpu in main memory, 4bit on the device in 4 bits."""
    block_swap: Annotated[int, Field(ge=0)] = 0
    """Blocks of an image base that stay in main memory and visit the card for their turn, for bases larger than the card. Needs checkpointing."""
    compile: bool = False
    """Compile the blocks of an image base: some minutes at the start, then faster steps. Not on every machine."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads. null takes one for every 10 million parameters of the model, and no more than there are cores, in a container those it is allowed; a small model is slower on several."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """The number every random draw comes from."""


class Validation(Part):
    """Rows held out of training, to see what is learnt and when to stop."""

    size: Annotated[float, Field(ge=0)] = 0.1
    """Held-out rows: below 1 a share of all rows, else a number of rows, 0 none."""
    limit: Annotated[int, Field(ge=1)] = 200
    """At most this many rows are held out when size is a share."""
    every: Annotated[int, Field(ge=1)] | None = None
    """Steps between validations. null: ten times a run."""
    keep_best: bool = True
    """The finished adapter is the one with the lowest validation loss, not the last one."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop early after this many validations in a row without a better loss. null never stops early."""


class Output(Part):
    """What a run leaves behind."""

    checkpoint_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between checkpoints, from which a run can go on. null: ten times a run."""
    keep: Annotated[int, Field(ge=1)] = 2
    """Checkpoints kept: the newest ones (the best one is kept besides)."""
    sample_prompts: list[str] = []
    """Prompts that are answered while training, always the same ones."""
    sample_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between sample answers. null: at the start, four times a run, and at the end."""
    sample_tokens: Annotated[int, Field(ge=1, le=4096)] = 48
    """The longest sample answer in tokens."""


class TrainSpec(Part):
    """Everything that makes a training run."""

    version: Literal[1] = VERSION
    """The version of this format."""
    name: Annotated[str, Field(min_length=1, max_length=80, pattern=r"^[^\x00-\x1f\x7f]*\S[^\x00-\x1f\x7f]*$")] = "my adapter"
    """What you call the adapter. Any name; folders are numbered."""
    base: Base = Base()
    task: Annotated[Union[ChatTask, PromptCompletionTask, TextTask, ImageTask], Field(discriminator="kind")] = ChatTask()
    data: Annotated[list[Source], Field(min_length=1)]
    """Where the rows come from: one or several sources."""
    validation: Validation = Validation()
    method: Method = Lora()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    compute: Compute = Compute()
    output: Output = Output()

    @model_validator(mode="before")
    @classmethod
    def kinds_unless_said(cls, tree):
        """A task without a kind is a chat, a method without one LoRA."""
        for name, kind in (("task", "chat"), ("method", "lora")):
            if isinstance(tree, dict) and isinstance(tree.get(name), dict) and "kind" not in tree[name]:
                tree = {**tree, name: {"kind": kind, **tree[name]}}
        return tree

    @model_validator(mode="after")
    def every_setting_has_an_effect(self):
        """Refuse settings that differ from their default and would do nothing."""
        found = [Problem(path, sentence) for path, idle, sentence in NO_EFFECT if idle(self)]
        if found:
            raise SpecError("spec.problems", problems=found)
        return self


def parse(tree: dict) -> TrainSpec:
    """The spec of a nested dict. Raises SpecError with every problem at once, each with its field."""
    if isinstance(tree, dict) and isinstance(tree.get("version"), int) and tree["version"] > VERSION:
        raise SpecError("spec.too_new", version=tree["version"], newest=VERSION)
    try:
        return TrainSpec.model_validate(tree)
    except ValidationError as error:
        raise SpecError("spec.problems", problems=problems.of_validation(error, TrainSpec, tree)) from None


def to_tree(spec: TrainSpec, *, sparse: bool = False) -> dict:
    """The spec as nested plain values; sparse leaves out what equals the default (version, name, base and kinds stay)."""
    full = spec.model_dump(mode="json")
    if not sparse:
        return full
    slim = spec.model_dump(mode="json", exclude_defaults=True)
    slim.setdefault("task", {})["kind"] = full["task"]["kind"]
    if full["method"]["kind"] != "lora":
        slim.setdefault("method", {})["kind"] = full["method"]["kind"]
    return {"version": full["version"], "name": full["name"], "base": {"id": full["base"]["id"]}, **slim}
