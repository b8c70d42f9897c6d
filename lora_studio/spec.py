"""The spec of a training run: the one place where settings, their defaults and their help are written.

YAML, command-line flags, form widgets, tooltips, presets and model cards all derive from these fields.
"""

from typing import Annotated, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lora_studio import problems
from lora_studio.errors import Problem, SpecError

VERSION = 1


class Part(BaseModel):
    """A group of settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Base(Part):
    """The model the adapter is trained on."""

    id: Annotated[str, Field(min_length=1)] = "demo-text"
    """A Hub id (owner/name), the folder of a model on this machine, or demo-text, the small base that comes with the studio."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model. A commit makes a run repeatable."""


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


class ChatTask(Part):
    """Conversations; the loss is on the assistant's words only."""

    kind: Literal["chat"] = "chat"
    """What the rows are: chat, prompt_completion, text, or image."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longest row in tokens. Longer rows are counted and shown before Start."""
    overlength: Literal["cut", "drop"] = "cut"
    """Rows longer than max_length: cut keeps their beginning, drop leaves them out."""
    template: Literal["auto", "chatml"] = "auto"
    """The chat template: auto takes the tokenizer's own (ChatML where it has none), chatml always takes ChatML."""
    system: str | None = None
    """A system prompt for conversations that have none."""


class PromptCompletionTask(Part):
    """A prompt and its completion, without a chat template; the loss is on the completion."""

    kind: Literal["prompt_completion"] = "prompt_completion"
    """What the rows are: chat, prompt_completion, text, or image."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longest row in tokens. Longer rows are counted and shown before Start."""
    overlength: Literal["cut", "drop"] = "cut"
    """Rows longer than max_length: cut keeps their beginning, drop leaves them out."""


class TextTask(Part):
    """Plain text; the loss is on every token."""

    kind: Literal["text"] = "text"
    """What the rows are: chat, prompt_completion, text, or image."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longest row in tokens. Longer rows are counted and shown before Start."""
    overlength: Literal["cut", "drop", "split"] = "split"
    """Rows longer than max_length: split makes several rows, cut keeps the beginning, drop leaves them out."""


class ImageTask(Part):
    """Pictures with captions, for a diffusion model; the loss is on the noise."""

    kind: Literal["image"] = "image"
    """What the rows are: chat, prompt_completion, text, or image."""
    resolution: Annotated[int, Field(ge=32, le=4096, multiple_of=8)] = 512
    """The edge in pixels of a square; every picture is scaled to about its area."""
    buckets: bool = True
    """Keep the shape of each picture: those of like shape go together. Off: all are cropped to a square."""
    bucket_step: Annotated[int, Field(ge=8, multiple_of=8)] = 64
    """The edges of buckets are multiples of this, in pixels."""
    crop: Literal["center", "random"] = "center"
    """Which part is kept of a picture that does not fit its bucket exactly. random moves it every epoch."""
    flip: bool = False
    """Mirror half of the pictures, others each epoch. Not for text or faces with a parting."""
    trigger: str | None = None
    """A word that stands first in every caption, and later calls the adapter."""
    prefix: str | None = None
    """Text that stands before every caption, after the trigger."""
    caption_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of pictures that are shown without their caption, others each epoch."""
    shuffle_tags: bool = False
    """Shuffle the parts of a caption that commas divide, anew each epoch."""
    keep_tags: Annotated[int, Field(ge=0)] = 0
    """How many parts at the beginning of a caption stay where they are."""
    weighting: Literal["none", "min_snr", "debiased"] = "none"
    """How steps of the noise count in the loss: all alike, min-SNR (gamma 5), or debiased by 1/sqrt(SNR); the last two not for flow matching."""
    timesteps: Literal["auto", "uniform", "logit_normal"] = "auto"
    """Where in the noise pictures are trained: uniform takes all steps alike, logit_normal mostly the middle, auto what the family is used to."""
    noise_offset: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Noise that is the same all over a channel, for very dark and very bright pictures; 0.05 is usual."""
    sample_steps: Annotated[int, Field(ge=1, le=1000)] = 20
    """Steps of each sample picture."""
    guidance: Annotated[float, Field(ge=1, le=100)] = 5.0
    """Guidance of each sample picture; 1 is none."""


class Lora(Part):
    """Low-rank adaptation: W0 + scale·B·A, with A (rank, in) and B (out, rank)."""

    kind: Literal["lora"] = "lora"
    """The kind of adapter."""
    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    """The rank r of the update. Rank, alpha and rate belong together."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Strength: the update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's input that is dropped while training. Above 0 the fast path is off."""
    targets: Literal["auto"] | list[str] = "auto"
    """The layers that get an adapter, by the end of their name: [q_proj, v_proj]. auto takes all linear layers of the blocks."""
    rslora: bool = False
    """Rank-stabilised scale alpha / sqrt(rank), for high ranks."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """How A starts. B starts at zero, so a fresh adapter changes nothing."""


class Optim(Part):
    """The optimizer and its rates."""

    kind: Literal["adamw", "adamw_8bit", "adafactor", "sgd"] = "adamw"
    """The optimizer. adamw is fused; adamw_8bit keeps its state in 8 bits."""
    lr: Annotated[float, Field(gt=0, le=100)] = 2e-4
    """The rate of A, and without LoRA+ of B too."""
    lora_plus_ratio: Annotated[float, Field(gt=1, le=1000)] | None = None
    """LoRA+: B learns at this multiple of lr; 16 is usual, with lr about 8 times lower. null is plain LoRA."""
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decoupled weight decay of A and B; never of biases and magnitudes."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's averaging of gradients; SGD's momentum is this too."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's averaging of squared gradients."""
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
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads. null takes all cores."""
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
    method: Lora = Lora()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    compute: Compute = Compute()
    output: Output = Output()

    @model_validator(mode="before")
    @classmethod
    def task_is_chat_unless_said(cls, tree):
        """A task without a kind is a chat."""
        if isinstance(tree, dict) and isinstance(tree.get("task"), dict) and "kind" not in tree["task"]:
            return {**tree, "task": {"kind": "chat", **tree["task"]}}
        return tree

    @model_validator(mode="after")
    def every_setting_has_an_effect(self):
        """Refuse settings that differ from their default and would do nothing."""
        found = [Problem(path, sentence) for path, idle, sentence in NO_EFFECT if idle(self)]
        if found:
            raise SpecError("spec.problems", problems=found)
        return self


def changed(part: Part, field: str) -> bool:
    """Whether a field differs from its default."""
    return getattr(part, field) != type(part).model_fields[field].get_default()


# (field, the setting has no effect there, what to say)
NO_EFFECT = [
    (
        "task.keep_tags",
        lambda spec: spec.task.kind == "image" and spec.task.keep_tags > 0 and not spec.task.shuffle_tags,
        "task.keep_tags has no effect without task.shuffle_tags. Set task.shuffle_tags, or remove it.",
    ),
    *(
        (
            path,
            lambda spec, path=path: spec.task.kind == "image" and changed(getattr(spec, path.partition(".")[0]), path.partition(".")[2]),
            f"{path} has no effect on pictures. Remove it.",
        )
        for path in ("compute.packing", "compute.fused", "output.sample_tokens")
    ),
    (
        "task.bucket_step",
        lambda spec: spec.task.kind == "image" and changed(spec.task, "bucket_step") and not spec.task.buckets,
        "task.bucket_step has no effect without task.buckets. Set task.buckets, or remove it.",
    ),
    (
        "schedule.epochs",
        lambda spec: spec.schedule.steps is not None and changed(spec.schedule, "epochs"),
        "schedule.epochs has no effect beside schedule.steps. Keep one of them.",
    ),
    (
        "validation.patience",
        lambda spec: spec.validation.size == 0 and spec.validation.patience is not None,
        "validation.patience has no effect without held-out rows. Raise validation.size, or remove it.",
    ),
    (
        "validation.every",
        lambda spec: spec.validation.size == 0 and spec.validation.every is not None,
        "validation.every has no effect without held-out rows. Raise validation.size, or remove it.",
    ),
    (
        "output.sample_every",
        lambda spec: spec.output.sample_every is not None and not spec.output.sample_prompts,
        "output.sample_every has no effect without output.sample_prompts. Give a prompt, or remove it.",
    ),
    (
        "optim.beta1",
        lambda spec: spec.optim.kind == "adafactor" and changed(spec.optim, "beta1"),
        "optim.beta1 has no effect on adafactor. Choose adamw, or remove it.",
    ),
    (
        "optim.beta2",
        lambda spec: spec.optim.kind in ("adafactor", "sgd") and changed(spec.optim, "beta2"),
        "optim.beta2 has an effect on adamw only. Choose adamw, or remove it.",
    ),
    (
        "schedule.warmup",
        lambda spec: spec.schedule.steps is not None and spec.schedule.warmup > spec.schedule.steps,
        "schedule.warmup is longer than the run (schedule.steps). Lower it.",
    ),
    (
        "base.revision",
        lambda spec: spec.base.revision is not None and spec.base.id.startswith(("demo-", "/", ".", "~")),
        "base.revision has no effect on a local base. Remove it.",
    ),
]


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
    return {"version": full["version"], "name": full["name"], "base": {"id": full["base"]["id"]}, **slim}
