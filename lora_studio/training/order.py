"""The order of the rows, and every random draw: pure functions of (seed, epoch, index), so that a run can go on anywhere."""

import hashlib
import math
import random
from dataclasses import dataclass

from lora_studio.errors import DataError


def key(*parts) -> int:
    """A 63-bit number that depends on all parts and on nothing else."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def held_out(prints: list[str], *, size: float, limit: int, seed: int, fold: tuple[int, int] | None = None) -> set[int]:
    """Which rows are held out of training: `size` of them (below 1 a share, at most `limit`), the same ones for the same rows and seed;
    or with `fold` (number, count) that part of all rows, alike rows in one part. `prints` is what each row is known by. Raises DataError
    when too few would be left."""
    if fold:
        number, count = fold
        turns = sorted(set(prints), key=lambda one: key(seed, "fold", one))
        if len(turns) < count:
            raise DataError("data.too_few", rows=len(turns))
        mine = set(turns[number::count])
        return {index for index, one in enumerate(prints) if one in mine}
    count = min(limit, round(len(prints) * size)) if size < 1 else int(size)
    if size and count == 0:
        count = 1 if len(prints) > 1 else 0
    if size and (len(prints) < 2 or count >= len(prints)):
        raise DataError("data.too_few", rows=len(prints))
    return set(sorted(range(len(prints)), key=lambda index: key(seed, "hold out", prints[index], index))[:count])


@dataclass(frozen=True)
class Plan:
    """How many rows each source has and how often they are shown; `batch` rows go through the model at once, and
    `accumulate` batches make one step."""

    counts: tuple[int, ...]
    weights: tuple[float, ...]
    batch: int
    accumulate: int
    seed: int

    @property
    def rows_per_step(self) -> int:
        return self.batch * self.accumulate

    def epoch_size(self, epoch: int) -> int:
        """Rows that epoch `epoch` (from 0) shows."""
        return sum(end - start for start, end in (self._span(source, epoch) for source in range(len(self.counts))))

    def steps(self, epochs: float) -> int:
        """Optimizer steps in which `epochs` epochs are shown; at least one."""
        whole = sum(self.epoch_size(epoch) for epoch in range(int(epochs)))
        part = (epochs - int(epochs)) * self.epoch_size(int(epochs))
        return max(1, math.ceil((whole + part) / self.rows_per_step))

    def _span(self, source: int, epoch: int) -> tuple[int, int]:
        """The part of a source's endless shuffled stream that belongs to an epoch."""
        portion = self.counts[source] * self.weights[source]
        return round(epoch * portion), round((epoch + 1) * portion)

    def epoch(self, number: int) -> list[tuple[int, int]]:
        """The (source, index) pairs of an epoch, shuffled. Each pass over a source shows each of its rows once."""
        rows = []
        for source, count in enumerate(self.counts):
            start, end = self._span(source, number)
            for turn in range(start // count, -(-end // count)):
                indices = list(range(count))
                random.Random(key(self.seed, "pass", source, turn)).shuffle(indices)
                rows += [(source, index) for index in indices[max(0, start - turn * count) : end - turn * count]]
        random.Random(key(self.seed, "epoch", number)).shuffle(rows)
        return rows


@dataclass(frozen=True)
class Draw:
    """One row at one place of the run: the epoch, the source, the index, and the seed of whatever is random about it."""

    epoch: int
    source: int
    index: int
    seed: int


class Stream:
    """The rows of a run in order. Holds one epoch at a time; any step can be asked for."""

    def __init__(self, plan: Plan):
        if not any(count * weight > 0 for count, weight in zip(plan.counts, plan.weights)):
            raise ValueError("a stream needs rows")
        self.plan = plan
        self.starts = [0]
        self.number, self.rows = -1, []

    def step(self, step: int) -> list[list[Draw]]:
        """The batches of optimizer step `step` (from 0)."""
        size = self.plan.rows_per_step
        draws = [self._at(position) for position in range(step * size, (step + 1) * size)]
        return [draws[start : start + self.plan.batch] for start in range(0, size, self.plan.batch)]

    def epoch_at(self, step: int) -> float:
        """Epochs shown before optimizer step `step`."""
        position = step * self.plan.rows_per_step
        number = self._epoch_of(position)
        return number + (position - self.starts[number]) / max(1, self.plan.epoch_size(number))

    def _epoch_of(self, position: int) -> int:
        while self.starts[-1] <= position:
            self.starts.append(self.starts[-1] + self.plan.epoch_size(len(self.starts) - 1))
        number = len(self.starts) - 2
        while self.starts[number] > position:
            number -= 1
        return number

    def _at(self, position: int) -> Draw:
        number = self._epoch_of(position)
        if number != self.number:
            self.number, self.rows = number, self.plan.epoch(number)
        source, index = self.rows[position - self.starts[number]]
        return Draw(number, source, index, key(self.plan.seed, number, source, index))
