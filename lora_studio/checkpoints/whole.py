"""The update of a merge entry by entry, as baking sees it: full rank, made row by row, with the shape and kind of its layer."""

from collections import OrderedDict
from dataclasses import dataclass, replace
from threading import Lock

TILE = 64  # rows; what a merge makes at once
KEPT = 2  # layers whose update is held whole, because they lie transposed in the checkpoint


@dataclass(frozen=True, eq=False)
class Whole:
    """A `merging.Merged` from row `first` on, `height` rows of it (all where None)."""

    merged: object
    first: int = 0
    height: int | None = None

    @property
    def kind(self) -> str:
        return self.merged.module.kind

    @property
    def groups(self) -> int:
        return self.merged.module.groups

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight it is added to."""
        shape = self.merged.module.shape
        return shape if self.height is None else (self.height, *shape[1:])

    def part(self, first: int, last: int) -> "Whole":
        """Some rows of it as an update of their own."""
        return replace(self, first=self.first + first, height=last - first)

    def rows(self, start: int, stop: int, *, transposed: bool):
        """Rows of the update as it is added, (stop - start, the rest flat)."""
        if not transposed:
            return self.merged.rows(self.first + start, self.first + stop)
        return _held(self.merged)[:, start:stop].T


_lock, _whole = Lock(), OrderedDict()


def _held(merged):
    with _lock:
        if id(merged) not in _whole:
            _whole[id(merged)] = (merged, merged.rows(0, merged.shape[0]))
            while len(_whole) > KEPT:
                _whole.popitem(last=False)
        return _whole[id(merged)][1]
