"""Updates that depend on the weight, as baking sees them: full rank, made row by row from the rows that they change."""

from collections.abc import Callable, Iterable
from threading import Lock

from lora_studio.errors import AdapterError


class Rescaled:
    """A `dora.Dora` on one tensor of a base; `name` is its layer's, `label` what the adapter is called."""

    def __init__(self, update, name: str, label: str):
        self.update, self.name, self.label = update, name, label
        self._guard, self._gains = Lock(), None

    @property
    def kind(self) -> str:
        return self.update.kind

    @property
    def groups(self) -> int:
        return self.update.groups

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight it is added to."""
        return self.update.shape

    def part(self, first: int, last: int) -> "Rescaled":
        """Some outputs of it as an update of their own."""
        return Rescaled(self.update.part(first, last), self.name, self.label)

    def rows(self, before, start: int, *, transposed: bool, stretches: Callable[..., Iterable]):
        """Rows of the update as it is added (n, the rest flat) for the rows `before` of the base, which begin at `start`. Where rows are inputs
        the lengths go over all of them, which `stretches` gives, and are kept; `stretches(range)` is those rows at once. Raises AdapterError
        where an output has no direction."""
        if transposed:
            with self._guard:
                if self._gains is None:
                    self._gains = self._checked(self.update.gains(stretches(), transposed=True))
            gains = self._gains.to(before)
        else:
            gains = self._checked(self.update.gains([before], start, transposed=False))[:, None]
        return self.update.moved(before, start, transposed=transposed) * gains - before

    def _checked(self, gains):
        if not bool(gains.isfinite().all()):
            raise AdapterError("adapter.no_direction", path=self.label, name=self.name)
        return gains


class Turned(Rescaled):
    """A `multiplied.Multiplied` on one tensor of a base."""

    @property
    def of_outputs(self) -> bool:
        """Whether it multiplies what comes out of a layer, and so its bias."""
        return self.update.of_outputs

    def part(self, first: int, last: int) -> "Turned":
        return Turned(self.update.part(first, last), self.name, self.label)

    def rows(self, before, start: int, *, transposed: bool, stretches: Callable[..., Iterable]):
        return self.update.rows(before, start, transposed=transposed, stretches=stretches)


def by_rows(module, name: str, label: str):
    """An update as baking takes it: DoRA's, OFT's and IA3's are made from the base's rows, all others are as they are."""
    from lora_studio.dora import Dora
    from lora_studio.multiplied import Multiplied

    if isinstance(module, Multiplied):
        return Turned(module, name, label)
    return Rescaled(module, name, label) if isinstance(module, Dora) else module
