"""The adapter between two models of one shape: what was fine-tuned minus what it was made from, each layer at a rank or a loss."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lora_studio import bases
from lora_studio.adapters.files import Entry
from lora_studio.checkpoints import numbers
from lora_studio.checkpoints.plan import WIDTHS, header_of, weights_of
from lora_studio.errors import BakeError
from lora_studio.spec.methods import EMBEDDED


@dataclass(frozen=True)
class Extracted:
    """The layers' updates, the true loss of all of them together and of each, and the tensors that differ and that no adapter carries."""

    modules: dict
    loss: float
    layers: dict[str, float]
    left_out: tuple[str, ...]


class _Difference:
    """One tensor of the two models, by its rows."""

    def __init__(self, files: tuple[int, int], entries: tuple[Entry, Entry]):
        self.files, self.entries = files, entries
        shape = entries[0].shape
        self.shape = (shape[0] if shape else 1, math.prod(shape[1:]))

    def rows(self, start: int, stop: int):
        """Rows of tuned minus base, in fp32 or wider."""
        tuned, base = (numbers.plain_rows(file, entry, range(start, stop)) for file, entry in zip(self.files, self.entries))
        return tuned - base

    def is_zero(self) -> bool:
        """Whether the two are the same in every number."""
        step = max(1, (1 << 20) // max(1, self.shape[1]))
        return not any(bool(self.rows(at, min(at + step, self.shape[0])).any()) for at in range(0, self.shape[0], step))


def extract(
    tuned: Path, base: Path, *, rank: int | None = None, loss: float | None = None, report: Callable[[int, int], None] = lambda done, total: None
) -> Extracted:
    """The LowRank of every linear and convolution of the blocks that differs, at most of `rank` and at best within `loss` of its own
    difference. Embeddings, heads, norms and biases are named when they differ. Raises BakeError where the two are not of one shape."""
    if rank is None and loss is None:
        raise BakeError("extract.how")
    from lora_studio import sketch
    from lora_studio.lowrank import LowRank

    places = _pairs(tuned, base)
    modules, losses, left_out, wrong, size = {}, {}, [], 0.0, 0.0
    with ExitStack() as stack, numbers.one_thread():
        handles: dict[Path, int] = {}

        def opened(path: Path) -> int:
            if path not in handles:
                handles[path] = stack.enter_context(open(path, "rb")).fileno()
            return handles[path]

        for number, (name, ((file, entry), (other, before))) in enumerate(places.items()):
            report(number, len(places))
            found = _Difference((opened(file), opened(other)), (entry, before))
            if found.is_zero():
                continue
            layer = name.removesuffix(".weight")
            carried = name.endswith(".weight") and len(entry.shape) in (2, 3, 4, 5) and not any(part in layer for part in EMBEDDED) and min(found.shape) > 1
            if not carried:
                left_out.append(name)
                continue
            B, A, lost = sketch.near(found, rank=rank, loss=loss)
            kind = "conv" if len(entry.shape) > 2 else "linear"
            A, B = A.float().view(-1, *entry.shape[1:]), B.float().view(*B.shape, *[1] * (len(entry.shape) - 2))
            modules[layer], losses[layer] = LowRank(A, B, 1.0, kind), lost
            square = sum(float(rows.square().sum()) for rows in sketch.stretches(found))
            wrong, size = wrong + lost * lost * square, size + square
    if not modules:
        raise BakeError("extract.same", tuned=tuned.name, base=base.name)
    return Extracted(modules, math.sqrt(wrong / size), losses, tuple(left_out))


def _pairs(tuned: Path, base: Path) -> dict[str, tuple[tuple[Path, Entry], tuple[Path, Entry]]]:
    """Every tensor of both, with its file. Raises BakeError naming the first that is not in both, or has another shape."""
    sides = []
    for folder in (tuned, base):
        if not folder.is_dir():
            raise BakeError("bake.folder", path=folder)
        found = {}
        for path in weights_of(folder, bases.weights_folder(folder)):
            found |= {name: (folder / path, entry) for name, entry in header_of(folder, path)[0].tensors.items()}
        sides.append(found)
    left, right = sides
    for name in [*left, *right]:
        if name not in left or name not in right or left[name][1].shape != right[name][1].shape:
            here, there = (list(side[name][1].shape) if name in side else "not there" for side in (left, right))
            raise BakeError("extract.shape", name=name, tuned=tuned.name, here=here, base=base.name, there=there)
    packed = next((name for name, (_, entry) in left.items() if entry.dtype not in WIDTHS and name.endswith(".weight")), None)
    if packed:
        raise BakeError("bake.packed", name=packed)
    return {name: (place, right[name]) for name, place in left.items() if place[1].dtype in WIDTHS and right[name][1].dtype in WIDTHS}
