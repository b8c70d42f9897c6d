"""The numbers of a bake: rows of a tensor with every change added, and how much of the update the target's precision takes."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lora_studio.adapters.files import Entry
from lora_studio.checkpoints.plan import WIDTHS, Change, Out, Plan
from lora_studio.checkpoints.rescaled import Rescaled
from lora_studio.checkpoints.whole import TILE, Whole

BLOCK = 1 << 20  # bytes of fp32


@contextmanager
def one_thread() -> Iterator[None]:
    """Blocks are small and several are at work at once: each alone on a core."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def blocks(out: Out) -> list[range]:
    """The rows of a tensor in portions that stay in a core's cache. All but the last have the same number, a multiple of 16: a product of
    very few rows is summed in another order."""
    rows = out.rows
    wide = max(1, out.source.count // rows)
    least = TILE if any(isinstance(change.module, Whole) for change in out.changes) else 16
    step = max(least, BLOCK // (wide * 4) // least * least)
    found = [range(start, min(rows, start + step)) for start in range(0, rows, step)]
    if len(found) > 1 and len(found[-1]) < 16:
        found[-2:] = [range(found[-2].start, rows)]
    return found


class Scratch:
    """Buffers of one thread, used again for every block: fresh ones cost more in page faults than the sums."""

    def __init__(self):
        self.bytes, self.wide, self.product = bytearray(), None, None

    def data(self, count: int) -> memoryview:
        """Room for that many bytes."""
        if len(self.bytes) < count:
            self.bytes = bytearray(count)
        return memoryview(self.bytes)[:count]

    def floats(self, name: str, rows: int, columns: int, dtype):
        """Room for numbers, (rows, columns)."""
        import torch

        held = getattr(self, name)
        if held is None or held.numel() < rows * columns or held.dtype != dtype:
            held = torch.empty(rows * columns, dtype=dtype)
            setattr(self, name, held)
        return held[: rows * columns].view(rows, columns)


def rewritten(given: int, out: Out, rows: range, scratch: Scratch):
    """Rows as they will be written, and where in the tensor they begin, in bytes. They hold until the scratch is used again."""
    value = summed(given, out, rows, scratch)
    made = _dtype(out.dtype)
    if out.is_converted:
        return value.to(made).view(_dtype("U8")).numpy().reshape(-1).data, rows.start * value.shape[1] * WIDTHS[out.dtype]
    data = memoryview(scratch.bytes)[: value.numel() * WIDTHS[out.dtype]]
    _tensor(data, out.dtype, value.shape).copy_(value)
    return data, rows.start * value.shape[1] * WIDTHS[out.dtype]


def summed(given: int, out: Out, rows: range, scratch: Scratch):
    """Rows of a tensor (n, the rest flat) with every change added, in fp32 or wider."""
    value = _read_rows(given, out, rows, scratch)
    before = value.clone() if any(isinstance(change.module, Rescaled) for change in out.changes) else value
    for change in out.changes:
        own = _own_rows(out, change, rows)
        if not own:
            continue
        at = own.start + (change.start or 0) - rows.start
        part = value[at : at + len(own)]
        if isinstance(change.module, Whole | Rescaled):
            part.add_(_in_full(given, out, change, own, before[at : at + len(own)]))
            continue
        B, A, left = _factors(change, own, value.dtype)
        if left == 1:
            part.addmm_(B, A)
        else:  # the product is scaled and then added, as PEFT does it, so that one adapter gives its very bits
            part.add_(_product(B, A, scratch).mul_(left))
    return value


def _own_rows(out: Out, change: Change, rows: range) -> range:
    """Those of a tensor's rows that a change means, counted from where it begins."""
    if change.start is None:
        return rows
    return range(max(0, rows.start - change.start), max(0, min(_height(out, change), rows.stop - change.start)))


def _height(out: Out, change: Change) -> int:
    """How many of a tensor's rows a change means: all, or those of one expert in a stack."""
    return out.rows if change.start is None else out.source.shape[1]


def _in_full(given: int, out: Out, change: Change, rows: range, before):
    """These rows of an update of full rank; `before` are the base's."""
    if isinstance(change.module, Whole):
        return change.module.rows(rows.start, rows.stop, transposed=change.transposed).to(before.dtype) * change.weight

    def stretches(wanted: range | None = None):
        start, scratch, height = change.start or 0, Scratch(), _height(out, change)
        stop, step = (start + height, len(blocks(out)[0])) if wanted is None else (start + wanted.stop, len(wanted))
        for at in range(start + (wanted.start if wanted else 0), stop, step):
            yield _read_rows(given, out, range(at, min(at + step, stop)), scratch)

    return change.module.rows(before, rows.start, transposed=change.transposed, stretches=stretches) * change.weight


def _factors(change: Change, rows: range, dtype):
    """The matrices whose product is these rows of the update, and the factor that is left. A power of two goes into a matrix: that rounds
    nothing."""
    module, factor = change.module, change.module.scale * change.weight
    A, B = module.A.to(dtype).flatten(1), module.B.to(dtype).flatten(1)
    left, right = (A[:, rows.start : rows.stop].T, B.T) if change.transposed else (B[rows.start : rows.stop], A)
    return (left * factor, right, 1) if math.frexp(abs(factor))[0] == 0.5 else (left, right, factor)


def _product(left, right, scratch: Scratch):
    import torch

    return torch.mm(left, right, out=scratch.floats("product", len(left), right.shape[1], left.dtype))


def _read_rows(given: int, out: Out, rows: range, scratch: Scratch):
    """Rows of a tensor (n, the rest flat), in fp32 or wider, in the scratch."""
    entry = out.source
    wide, size = entry.count // out.rows, WIDTHS[entry.dtype]
    data = scratch.data(len(rows) * wide * size)
    if os.preadv(given, [data], entry.start + rows.start * wide * size) != len(data):
        raise OSError("the base became shorter while it was read")
    found = _tensor(data, entry.dtype, (len(rows), wide))
    return scratch.floats("wide", len(rows), wide, _dtype("F64" if entry.dtype == "F64" else "F32")).copy_(found)


def plain_rows(given: int, entry: Entry, rows: range):
    """Rows of a tensor (n, the rest flat) as they are in a file, in fp32 or wider."""
    scratch = Scratch()
    return _read_rows(given, Out("", entry, entry.dtype), rows, scratch)


def _tensor(data, dtype: str, shape):
    import torch

    return torch.frombuffer(data, dtype=_dtype(dtype)).view(shape)


def _dtype(name: str):
    import torch

    return {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "U8": torch.uint8}[name]


@dataclass(frozen=True)
class Loss:
    """|round(W + ΔW) - W - ΔW| / |ΔW|, of all layers together and of each; `share` of the rows was looked at."""

    overall: float
    layers: dict[str, float]
    share: float


def loss(plan: Plan, *, rows: int = 512) -> Loss:
    """How much of the update the target's precision takes, from at most about `rows` rows of each tensor, spread over it."""
    wrong_all = size_all = looked = total = 0.0
    layers, scratch = {}, Scratch()
    with one_thread():
        for shard in plan.shards:
            with open(plan.base / shard.path, "rb") as given:
                for out in shard.outs:
                    if not out.changes:
                        continue
                    wrong = size = 0.0
                    height = out.rows
                    chosen = _spread(height, rows)
                    for part in chosen:
                        found = _errors(given.fileno(), out, part, scratch)
                        wrong, size = wrong + found[0], size + found[1]
                    seen = sum(map(len, chosen))
                    looked, total = looked + seen, total + height
                    wrong_all, size_all = wrong_all + wrong * height / seen, size_all + size * height / seen
                    layers[out.name.removesuffix(".weight")] = math.sqrt(wrong / size) if size else 0.0
    return Loss(math.sqrt(wrong_all / size_all) if size_all else 0.0, layers, looked / total if total else 1.0)


def _spread(height: int, rows: int) -> list[range]:
    """Short stretches of rows, evenly over the height; all of a tensor that has few."""
    if height <= rows:
        return [range(height)]
    count = max(1, rows // 16)
    return [range(start, min(height, start + 16)) for start in (round(number * (height - 16) / max(1, count - 1)) for number in range(count))]


def _errors(given: int, out: Out, rows: range, scratch: Scratch) -> tuple[float, float]:
    """Squared norms of what rounding takes and of the update, in fp64."""
    import torch

    before = _read_rows(given, out, rows, scratch).to(torch.float64, copy=True)
    after = summed(given, out, rows, scratch).to(_dtype(out.dtype)).double()
    update = torch.zeros_like(before)
    for change in out.changes:
        own = _own_rows(out, change, rows)
        if not own:
            continue
        at = own.start + (change.start or 0) - rows.start
        part = update[at : at + len(own)]
        if isinstance(change.module, Whole | Rescaled):
            part += _in_full(given, out, change, own, before[at : at + len(own)])
        else:
            left, right, factor = _factors(change, own, torch.float64)
            part += factor * left @ right
    return float((after - before - update).square().sum()), float(update.square().sum())
