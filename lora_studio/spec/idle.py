"""Settings that would do nothing where they are: a spec refuses them, each with a sentence."""

from lora_studio import weights
from lora_studio.errors import BlendError
from lora_studio.spec.methods import FROM_SOMETHING, MULTIPLYING, VIRTUAL, WITH_B
from lora_studio.spec.tasks import Part

# Settings outside of task that only one kind of model has a use for. A form hides them from the other.
OF_LANGUAGE = ("compute.packing", "output.sample_tokens")
OF_PICTURES = ("compute.encoders", "compute.block_swap", "compute.compile")


OF_B = ("optim.lora_plus_ratio",)


def foreign(kind: str, method: str = "lora") -> tuple[str, ...]:
    """The settings outside of task and method that do nothing for a kind of these."""
    return (OF_LANGUAGE if kind == "image" else OF_PICTURES) + (() if method in WITH_B else OF_B)


def changed(part: Part, field: str) -> bool:
    """Whether a field differs from its default."""
    return getattr(part, field) != type(part).model_fields[field].get_default()


def _is_image(spec) -> bool:
    return spec.task.kind == "image"


def _has_prior(spec) -> bool:
    """Whether there are class pictures, given or to be drawn."""
    return any(source.prior for source in spec.data) or spec.task.prior_pictures > 0


def _names_layers(layers) -> bool:
    """Whether these are "all" or patterns of layers."""
    try:
        return layers == "all" or bool([weights.means(pattern, "") for pattern in layers])
    except BlendError:
        return False


def needs_gpu(spec) -> list[str]:
    """The settings that an NVIDIA GPU is needed for."""
    compute = spec.compute
    asked = {"compute.quantize": _is_image(spec) and compute.quantize != "none", "compute.encoders": compute.encoders == "4bit", "compute.block_swap": compute.block_swap > 0}
    return [field for field, is_asked in asked.items() if is_asked]


def _repeated(spec) -> bool:
    edges = [spec.task.resolution, *spec.task.more_resolutions]
    return len(set(edges)) < len(edges)


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
        for path in OF_LANGUAGE
    ),
    *(
        (
            path,
            lambda spec, path=path: not _is_image(spec) and changed(spec.compute, path.partition(".")[2]),
            f"{path} has an effect on image models only. Remove it.",
        )
        for path in OF_PICTURES
    ),
    (
        "compute.block_swap",
        lambda spec: spec.compute.block_swap > 0 and not spec.compute.checkpointing,
        "compute.block_swap has no effect without compute.checkpointing, which lets go of a block before the next. Set it, or remove block_swap.",
    ),
    (
        "compute.block_swap",
        lambda spec: spec.compute.block_swap > 0 and (spec.compute.quantize != "none" or spec.compute.compile),
        "compute.block_swap does not go with compute.quantize or compute.compile. Keep one of them.",
    ),
    (
        "data",
        lambda spec: not _is_image(spec) and any(source.prior for source in spec.data),
        "prior has an effect on sources of pictures only. Remove it.",
    ),
    (
        "data",
        lambda spec: _is_image(spec) and all(source.prior for source in spec.data),
        "Every source is one of class pictures (prior: true), so there is nothing to learn. Add the pictures that are meant.",
    ),
    (
        "task.prior_weight",
        lambda spec: _is_image(spec) and changed(spec.task, "prior_weight") and not _has_prior(spec),
        "task.prior_weight has no effect without class pictures. Mark a source with prior: true, or remove it.",
    ),
    (
        "task.prior_prompt",
        lambda spec: _is_image(spec) and spec.task.prior_prompt is not None and not _has_prior(spec),
        "task.prior_prompt has no effect without class pictures. Set task.prior_pictures, mark a source with prior: true, or remove it.",
    ),
    (
        "task.prior_pictures",
        lambda spec: _is_image(spec) and spec.task.prior_pictures > 0 and any(source.prior for source in spec.data),
        "task.prior_pictures has no effect beside a source of class pictures. Keep one of them.",
    ),
    (
        "task.prior_pictures",
        lambda spec: _is_image(spec) and spec.task.prior_pictures > 0 and not (spec.task.prior_prompt or "").strip(),
        "task.prior_pictures needs task.prior_prompt, from which they are drawn. Set it, or remove prior_pictures.",
    ),
    (
        "task.more_resolutions",
        lambda spec: _is_image(spec) and _repeated(spec),
        "task.more_resolutions names an edge twice, or names task.resolution. Each has an effect once.",
    ),
    (
        "task.frames",
        lambda spec: _is_image(spec) and spec.task.frames % 4 != 1,
        "task.frames must be one more than a multiple of 4, such as 5, 9 or 17: what is beyond that would not be seen. Change it.",
    ),
    (
        "task.shift",
        lambda spec: _is_image(spec) and spec.task.shift != "auto" and spec.task.timesteps == "sigmoid",
        "task.shift has no effect beside task.timesteps sigmoid, which has none. Choose logit_normal, or remove it.",
    ),
    (
        "base.assistant",
        lambda spec: spec.base.assistant is not None and not _is_image(spec),
        "base.assistant has an effect on pictures only. Remove it.",
    ),
    (
        "optim.text_encoder_lr",
        lambda spec: spec.optim.text_encoder_lr is not None and not (_is_image(spec) and spec.task.text_encoder),
        "optim.text_encoder_lr has no effect without task.text_encoder. Set task.text_encoder, or remove it.",
    ),
    (
        "task.bucket_step",
        lambda spec: spec.task.kind == "image" and changed(spec.task, "bucket_step") and not spec.task.buckets,
        "task.bucket_step has no effect without task.buckets. Set task.buckets, or remove it.",
    ),
    (
        "optim.lora_plus_ratio",
        lambda spec: spec.optim.lora_plus_ratio is not None and spec.method.kind not in WITH_B,
        "optim.lora_plus_ratio has no effect on this method, which has no B to learn faster. Remove it, or choose lora.",
    ),
    (
        "optim.lora_plus_ratio",
        lambda spec: spec.optim.lora_plus_ratio is not None and getattr(spec.method, "freeze_a", False),
        "optim.lora_plus_ratio has no effect beside method.freeze_a: there is no A to learn slower. Remove one of them.",
    ),
    (
        "method.init",
        lambda spec: getattr(spec.method, "init", "") == "orthogonal" and spec.method.rank % 2 == 1,
        "method.init orthogonal needs an even method.rank. Change one of them.",
    ),
    (
        "method.init",
        lambda spec: getattr(spec.method, "init", "") in FROM_SOMETHING and spec.method.dora,
        "method.init pissa, olora, corda, lora_ga and loftq do not go with method.dora: their file could not be made for the untouched base. Keep one of them.",
    ),
    (
        "method.init",
        lambda spec: getattr(spec.method, "init", "") in (*FROM_SOMETHING, "orthogonal") and spec.method.freeze_a,
        "method.init pissa, olora, corda, lora_ga, loftq and orthogonal do not go with method.freeze_a. Keep one of them.",
    ),
    (
        "method.init",
        lambda spec: getattr(spec.method, "init", "") in ("pissa", "olora", "corda", "lora_ga", "orthogonal") and spec.compute.quantize != "none",
        "method.init pissa, olora, corda, lora_ga and orthogonal need the base's own numbers, which a quantised one has not. Set compute.quantize to none, or another init.",
    ),
    (
        "method.init",
        lambda spec: getattr(spec.method, "init", "") == "loftq" and (_is_image(spec) or spec.compute.quantize != "4bit"),
        "method.init loftq makes up for what 4 bits lose, and is for language models only. Set compute.quantize to 4bit there, or take another init.",
    ),
    (
        "method.init",
        lambda spec: getattr(spec.method, "init", "") in ("eva", "corda", "lora_ga") and spec.compute.block_swap > 0,
        "method.init eva, corda and lora_ga look at the rows before any block waits in main memory. Set compute.block_swap to 0, or take another init.",
    ),
    *(
        (
            "method.kind",
            lambda spec, kind=kind: spec.method.kind == kind and spec.compute.quantize == "4bit",
            f"method.kind {kind} does not work on a base in 4 bits. Set compute.quantize to 8bit or none, or choose lora.",
        )
        for kind in ("loha", "lokr")
    ),
    (
        "method.kind",
        lambda spec: spec.method.kind == "ia3" and spec.compute.quantize != "none",
        "method.kind ia3 does not work on a quantised base, where PEFT's layer for it answers in fp32. Set compute.quantize to none, or choose oft or lora.",
    ),
    *(
        (
            "method.kind",
            lambda spec, kind=kind: spec.method.kind == kind and _is_image(spec),
            f"method.kind {kind} is for language models only: no loader of image models knows it. Choose lora.",
        )
        for kind in (*MULTIPLYING, *VIRTUAL)
    ),
    (
        "compute.checkpointing",
        lambda spec: spec.method.kind == "prefix" and spec.compute.checkpointing,
        "compute.checkpointing does not go with method.kind prefix: it throws away the keys and values that stand before the input. Set it to false, or choose prompt.",
    ),
    *(
        ("method.kind", lambda spec, is_so=is_so: spec.method.kind == "full" and is_so(spec), f"method.kind full {sentence}")
        for is_so, sentence in (
            (lambda spec: _is_image(spec) and spec.task.text_encoder, "trains the part that draws, and no text encoder. Set task.text_encoder to false, or choose lora."),
            (lambda spec: _is_image(spec) and spec.compute.block_swap > 0, "changes blocks that would wait in main memory. Set compute.block_swap to 0, or choose lora."),
            (lambda spec: _is_image(spec) and spec.compute.compile, "does not go with compiled blocks. Set compute.compile to false, or choose lora."),
            (lambda spec: spec.base.assistant is not None, "does not go with base.assistant, beside which only an adapter is trained. Remove it, or choose lora."),
            (lambda spec: spec.compute.quantize != "none", "changes the base's own numbers, which a quantised base has not. Set compute.quantize to none, or choose lora."),
            (lambda spec: spec.compute.precision == "bf16", "keeps the base's numbers in fp32: its steps are too small for bf16. Set compute.precision to auto, or choose lora."),
        )
    ),
    (
        "method.layers",
        lambda spec: spec.method.kind == "full" and not _names_layers(spec.method.layers),
        "method.layers names no layers that learn. Write words of their names with dots between, such as [model.layers.0-3, mlp], or all.",
    ),
    (
        "method.rank",
        lambda spec: spec.method.kind == "full" and spec.method.save == "model" and changed(spec.method, "rank"),
        "method.rank has no effect where a whole model is saved. Set method.save to lora, or remove it.",
    ),
    (
        "method.text",
        lambda spec: getattr(spec.method, "text", None) is not None and not spec.method.text.strip(),
        "method.text has no words for the virtual tokens to start from. Write some, or remove it.",
    ),
    *(
        ("method.experts", lambda spec, is_so=is_so: getattr(spec.method, "experts", False) and is_so(spec), f"method.experts does not go with {sentence}")
        for is_so, sentence in (
            (_is_image, "image models, which have none. Remove it."),
            (lambda spec: spec.method.dora, "method.dora: only a sum can be put on their weights. Keep one of them."),
            (lambda spec: spec.method.dropout > 0, "method.dropout: it acts on their weights, which have no input to drop from. Keep one of them."),
            (lambda spec: spec.compute.quantize != "none", "a quantised base: bitsandbytes packs no experts, which are most of a mixture. Set compute.quantize to none, or remove experts."),
            (lambda spec: spec.method.init not in ("kaiming", "gaussian"), "this method.init, which is known for single layers. Set it to kaiming, or remove experts."),
        )
    ),
    (
        "method.start",
        lambda spec: getattr(spec.method, "start", None) is not None and (spec.method.init != "kaiming" or spec.method.dora),
        "method.start does not go with another method.init or with method.dora: the adapter there is says how it starts. Keep one of them.",
    ),
    (
        "method.rank",
        lambda spec: spec.method.kind == "adalora" and spec.method.rank > spec.method.first_rank,
        "method.rank is above method.first_rank, so there is nothing to take away. Lower it, or raise first_rank.",
    ),
    (
        "method.begin",
        lambda spec: spec.method.kind == "adalora" and spec.method.begin + spec.method.settle >= 1,
        "method.begin and method.settle leave no part of the run in which rank is taken away. Lower one of them.",
    ),
    (
        "method.rank_step",
        lambda spec: spec.method.kind == "dylora" and spec.method.rank_step >= spec.method.rank,
        "method.rank_step leaves a single rank to train. Lower it, or choose lora.",
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
        lambda spec: spec.optim.kind in ("adafactor", "sgd", "muon") and changed(spec.optim, "beta2"),
        "optim.beta2 has no effect on adafactor, sgd and muon. Choose adamw, or remove it.",
    ),
    (
        "optim.kind",
        lambda spec: spec.optim.kind == "muon" and (spec.method.kind in ("vera", "adalora", *MULTIPLYING) or getattr(spec.method, "dora", False)),
        "optim.kind muon is for matrices, and this method learns vectors. Choose adamw.",
    ),
    (
        "schedule.kind",
        lambda spec: spec.optim.kind == "adamw_schedule_free" and spec.schedule.kind != "constant",
        "schedule.kind must be constant for optim.kind adamw_schedule_free, whose running average takes the place of a falling rate. Set it, or choose adamw.",
    ),
    (
        "optim.beta1",
        lambda spec: spec.optim.kind == "adamw_schedule_free" and spec.optim.beta1 == 0,
        "optim.beta1 must be above 0 for optim.kind adamw_schedule_free, which steps between two places by it. Raise it, or choose adamw.",
    ),
    (
        "optim.kind",
        lambda spec: spec.optim.kind == "adamw_schedule_free" and spec.method.kind == "adalora",
        "optim.kind adamw_schedule_free does not go with method.kind adalora: its average brings back the rank that was taken away. Choose adamw.",
    ),
    (
        "optim.lora_plus_ratio",
        lambda spec: spec.optim.kind == "prodigy" and spec.optim.lora_plus_ratio is not None,
        "optim.lora_plus_ratio does not go with optim.kind prodigy, which finds one rate for all. Keep one of them.",
    ),
    (
        "optim.text_encoder_lr",
        lambda spec: spec.optim.kind == "prodigy" and spec.optim.text_encoder_lr is not None,
        "optim.text_encoder_lr does not go with optim.kind prodigy, which finds one rate for all. Keep one of them.",
    ),
    (
        "schedule.warmup",
        lambda spec: spec.schedule.steps is not None and spec.schedule.warmup > spec.schedule.steps,
        "schedule.warmup is longer than the run (schedule.steps). Lower it.",
    ),
    (
        "base.revision",
        lambda spec: spec.base.revision is not None and (spec.base.id.startswith(("demo-", "/", ".", "~")) or spec.base.id.endswith(".safetensors")),
        "base.revision has no effect on a local base. Remove it.",
    ),
]
