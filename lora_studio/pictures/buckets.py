"""Buckets: the sizes pictures are trained in, all of about one area, so that those of like shape can share a batch."""

from functools import lru_cache
from math import log

from lora_studio.spec import ImageTask

WIDEST = 4
"""Buckets are at most this many times as wide as high, or as high as wide."""


def bucket(width: int, height: int, task: ImageTask, *, edge: int | None = None) -> tuple[int, int]:
    """The (width, height) a picture of `width` by `height` pixels is trained in, at the resolution `edge` (by default the task's own).

    Edges are multiples of task.bucket_step, the area is the largest such of at most resolution² pixels (so that no
    bucket needs more memory than the square), and of these the shape nearest to the picture's is taken. Without
    buckets it is the square of that resolution. A step above the resolution leaves one bucket: a square of one step.
    """
    edge = edge or task.resolution
    if not task.buckets:
        return edge, edge
    wanted = log(max(width, height) / min(width, height))
    long, short = min(
        _landscapes(edge, task.bucket_step), key=lambda size: (abs(log(size[0] / size[1]) - wanted), -size[0] * size[1])
    )
    return (long, short) if width >= height else (short, long)


def edges(width: int, height: int, task: ImageTask) -> list[int]:
    """The resolutions a picture is shown at: the task's own, and those of task.more_resolutions that need not enlarge it."""
    more = ((edge, bucket(width, height, task, edge=edge)) for edge in task.more_resolutions)
    return [task.resolution, *(edge for edge, (wide, high) in more if wide <= width and high <= height)]


def beyond(width: int, height: int) -> bool:
    """Whether a picture is narrower than any bucket, so that much of it is cut off."""
    return max(width, height) > WIDEST * min(width, height)


@lru_cache(maxsize=32)
def _landscapes(resolution: int, step: int) -> tuple[tuple[int, int], ...]:
    """Every bucket that is at least as wide as high; portraits are these, turned."""
    if step > resolution:
        return ((step, step),)
    area, square = resolution * resolution, resolution // step * step
    found = set()
    for short in range(step, resolution + 1, step):
        found.add((min(area // short, WIDEST * short) // step * step, short))
    for long in range(step, WIDEST * resolution + 1, step):
        found.add((long, min(area // long, long) // step * step))
    fits = [
        (long, short) for long, short in found if short >= step and short <= long <= WIDEST * short and _is_full(long, short, step, area)
    ]
    # The square is there even where a step more would fit one way, so that a square picture is never cut.
    return tuple(sorted({*fits, (square, square)}))


def _is_full(long: int, short: int, step: int, area: int) -> bool:
    """Whether the bucket's area is the largest of at most `area` in one direction: one step more would exceed it."""
    return long * short <= area and (long * (short + step) > area or (long + step) * short > area)
