"""What to say when a run is out of memory: what to cut, to which value, and by how much that helps."""

from lora_studio import memory


def advice(trainer) -> str:
    """What to change, for the trainer whose step did not fit."""
    spec, ways = trainer.spec, _lighter(trainer)
    size = next((way.values["schedule.batch_size"] for way in ways if "schedule.batch_size" in way.values), max(1, spec.schedule.batch_size // 2))
    more = spec.schedule.accumulate * -(-spec.schedule.batch_size // size)
    smaller = f"Set schedule.batch_size to {size} and schedule.accumulate to {more}" if spec.schedule.batch_size > 1 else ""
    other = "" if spec.compute.checkpointing else "set compute.checkpointing to true"
    if spec.task.kind == "image":
        shorter = f"lower task.resolution (now {spec.task.resolution}), or set compute.quantize or compute.block_swap"
    else:
        length = next((way.values["task.max_length"] for way in ways if "task.max_length" in way.values), None)
        shorter = f"lower task.max_length (now {spec.task.max_length})" + (f" to {length}" if length else "")
    told = "; ".join(f"{memory.in_words(way.values)} saves {way.share:.0%}" for way in ways)
    return ", or ".join(part for part in (smaller, other, shorter) if part) + "." + (f" By the estimate {told} of what the model takes." if told else "")


def _lighter(trainer) -> list[memory.Change]:
    """Settings that take less, by the estimate; none for a task that knows of no base."""
    task = trainer.task
    info, encoded = getattr(task, "info", None), getattr(task, "encoded", None)
    if info is None:
        return []
    rows = memory.rows_of_facts(encoded.facts) if encoded else None
    trainable = sum(parameter.numel() for parameter in trainer.parameters.values())
    device = str(next(trainer.model.parameters()).device)
    return memory.after_running_out(trainer.spec, info, rows or memory.Rows(count=sum(task.counts)), trainable=trainable, device=device)
