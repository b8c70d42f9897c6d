"""How the pictures of a run are shown: which are held out, and at which size, which part, mirrored or not, under which caption."""

import operator
from dataclasses import dataclass, replace

from lora_studio import pictures
from lora_studio.errors import DataError
from lora_studio.spec import TrainSpec
from lora_studio.training import order


@dataclass(frozen=True)
class Shown:
    """One picture as the model is shown it: which, at what size, which part of it, mirrored or not, under which caption, how much it
    counts in the loss, and how many frames of a clip."""

    picture: pictures.Picture
    size: tuple[int, int]
    crop: str
    crop_seed: int
    flip: bool
    caption: str
    weight: float = 1.0
    frames: int = 1

    @property
    def key(self) -> str:
        """What its latents are known by."""
        return f"{self.picture.digest}/{self.size}/{self.crop}/{self.crop_seed}/{self.flip}" + (f"/{self.frames}" if self.frames > 1 else "")

    @property
    def source(self) -> "Shown | None":
        """The picture that this one was made of, placed as this one is."""
        of = self.picture
        return replace(self, picture=replace(of, path=of.source, name=of.source.name, digest=of.source_digest, mask=None, mask_digest="")) if of.source else None


class Show:
    """The pictures of a run, `train` by their group and `judged` with the number of theirs, and what each place of the run shows of them."""

    def __init__(self, spec: TrainSpec, collected: list[pictures.Pictures], fold: tuple[int, int] | None = None):
        self.spec, self.groups = spec, collected
        self.train, self.judged = hold_out(spec, collected, fold)
        self.counts = tuple(len(items) for items in self.train)
        self.weights = weights(self.counts, collected)

    def everything(self) -> list[Shown]:
        """All that the run will show, training and held out, with repetitions."""
        schedule, stream = self.spec.schedule, order.Stream(self.plan())
        steps = schedule.steps or stream.plan.steps(schedule.epochs)
        found = [self.drawn(draw) for step in range(steps) for batch in stream.step(step) for draw in batch]
        return found + [self.held_out(index) for index in range(len(self.judged))]

    def plan(self, *, more: int = 0) -> order.Plan:
        """How the groups are drawn from; `more` class pictures are still to be drawn, and come as a group of their own."""
        schedule, counts, found = self.spec.schedule, self.counts, self.weights
        if more:
            counts, found = (*counts, more), (*found, sum(map(operator.mul, counts, found)) / more)
        return order.Plan(counts, found, schedule.batch_size, schedule.accumulate, self.spec.compute.seed)

    def drawn(self, draw: order.Draw) -> Shown:
        """A picture as one place of the run shows it: everything random comes from the draw's seed."""
        task, group, picture = self.spec.task, self.groups[draw.source], self.train[draw.source][draw.index]
        prior = group.source.prior
        caption = pictures.caption(picture, task, trigger=group.trigger, prior=prior, seed=order.key(draw.seed, "caption"))
        edges = pictures.edges(picture.width, picture.height, task)
        size = pictures.bucket(picture.width, picture.height, task, edge=edges[order.key(draw.seed, "edge") % len(edges)])
        flip = task.flip and order.key(draw.seed, "flip") % 2 == 1
        crop_seed = order.key(draw.seed, "crop") if task.crop == "random" else 0
        return Shown(picture, size, task.crop, crop_seed, flip, caption, task.prior_weight if prior else 1.0, pictures.length(picture, task))

    def held_out(self, index: int) -> Shown:
        """A held-out picture, the same every time and at the run's own resolution."""
        (group, picture), task = self.judged[index], self.spec.task
        caption = pictures.caption(picture, task, trigger=self.groups[group].trigger, seed=0, dropped=False)
        size = pictures.bucket(picture.width, picture.height, task)
        return Shown(picture, size, "center", 0, False, caption, frames=pictures.length(picture, task))

    def sizes(self) -> list[tuple[int, int]]:
        """Every size that pictures are trained in."""
        task, everyone = self.spec.task, [picture for items in self.train for picture in items]
        return sorted({pictures.bucket(one.width, one.height, task, edge=edge) for one in everyone for edge in pictures.edges(one.width, one.height, task)})


def weights(counts: tuple[int, ...], collected: list[pictures.Pictures]) -> tuple[float, ...]:
    """How often an epoch shows each picture of each group. Of class pictures it shows as many as of all others together, however many
    there are (times their source's weight): that is how kohya's trainer fills up its reg folder."""
    subject = sum(count * group.repeats for count, group in zip(counts, collected) if not group.source.prior)
    prior = sum(count * group.repeats / group.source.weight for count, group in zip(counts, collected) if group.source.prior)
    return tuple(group.repeats * (subject / prior if group.source.prior and prior else 1.0) for group in collected)


def hold_out(spec: TrainSpec, collected: list[pictures.Pictures], fold: tuple[int, int] | None = None) -> tuple[list[list], list[tuple[int, pictures.Picture]]]:
    """The pictures of each group to train on, and those held out with the number of their group: the same for the same pictures and seed,
    and none that is held out is trained on, not even its double. Class pictures are never held out. Raises DataError."""
    pool = [(number, picture) for number, found in enumerate(collected) if not found.source.prior for picture in found.items]
    chosen = order.held_out(
        [picture.digest for _, picture in pool], size=spec.validation.size, limit=spec.validation.limit, seed=spec.compute.seed, fold=fold
    )
    digests = {pool[index][1].digest for index in chosen}
    train = [[picture for picture in found.items if picture.digest not in digests] for found in collected]
    if not any(items for items, found in zip(train, collected) if not found.source.prior):
        raise DataError("data.nothing_left", path=", ".join(found.source.path for found in collected), reasons="every picture is held out")
    return train, [pool[index] for index in sorted(chosen)]
