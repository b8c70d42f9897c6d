"""Adapters judged on the bench, as they are weighed, before they are put together."""

from lora_studio import blend, conflicts
from lora_studio.checkpoints.numbers import one_thread


@one_thread()
def judge(reader, job, request: dict) -> tuple[str, dict]:
    """What `conflicts.judge` says of weighted adapters."""
    parts = reader.parts(job, request.get("parts"), least=1)
    job.doing = "comparing the adapters"
    weighed = [blend.stack([part.adapter.modules], [part.weight]) for part in parts]
    return "result", conflicts.judge(weighed, [part.name for part in parts], look=job.check)
