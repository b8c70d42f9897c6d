"""Settings that would do nothing where they are: a spec refuses them, each with a sentence."""

from lora_studio.spec.tasks import Part


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
