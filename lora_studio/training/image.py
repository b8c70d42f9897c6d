"""Pictures with captions for a diffusion model: latents and embeddings made once, batches, the loss on what was added, sample pictures.

What a family does in its own way is in image_families/. The VAE and the text encoders are loaded, used and let go again before the
first step; while the run goes on only the part that is trained is in memory, but for sample pictures, which borrow the VAE.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_studio import bases, families, pictures
from lora_studio.errors import DataError
from lora_studio.home import home
from lora_studio.spec import TrainSpec
from lora_studio.training import latents, objectives, order
from lora_studio.training.image_families import FAMILIES, Conditions, drawn
from lora_studio.training.pipelines import load_part, load_pipeline, load_scheduler
from lora_studio.training.samples import save_sample
from lora_studio.training.text import choose_dtype

# Each held-out picture is judged at these places of the noise schedule, with noise that is the same every time.
PLACES = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Shown:
    """One picture as the model is shown it: which, at what size, which part of it, mirrored or not, under which caption."""

    picture: pictures.Picture
    size: tuple[int, int]
    crop: str
    crop_seed: int
    flip: bool
    caption: str

    @property
    def key(self) -> str:
        """What its latents are known by."""
        return f"{self.picture.digest}/{self.size}/{self.crop}/{self.crop_seed}/{self.flip}"


@dataclass
class Group:
    """Pictures of one size on the device: latents (b, ...), noise like them, places in the schedule (b,), conditions with a batch axis."""

    latents: Tensor
    noise: Tensor
    places: Tensor
    conditions: Conditions
    size: tuple[int, int]


class ImageTask:
    """A diffusion model and its pictures, as the loop asks for them."""

    unit = "pictures"

    def __init__(self, spec: TrainSpec, *, device: str, note: Callable[[str], None], folder: Path):
        self.spec, self.device, self.note, self.folder = spec, torch.device(device), note, folder
        self.dtype = choose_dtype(spec.compute.precision, device)

    # ---- before the first step

    def load(self) -> torch.nn.Module:
        """Look at every picture, make latents and embeddings, and load the part that is trained. Raises StudioError."""
        logging.getLogger("diffusers").setLevel(logging.ERROR)
        self.base = bases.fetch(self.spec.base)
        self.info = bases.inspect(self.spec.base)
        self.family = FAMILIES[self.info.pipeline]
        self.timesteps = families.timesteps(self.info.pipeline, self.spec.task.timesteps)
        for _, error in families.misfits(self.info.pipeline, self.spec):
            raise error
        collected = pictures.collect(self.spec, cache=home() / "cache" / "archives")
        for found in collected:
            for sentence in found.notes:
                self.note(sentence)
            if found.skipped:
                self.note(f"{found.source.path}: left out are {found.skipped_in_words()}.")
        self.train, self.judged = hold_out(self.spec, collected)
        self.triggers = [found.trigger for found in collected]
        self.counts = tuple(len(items) for items in self.train)
        self.weights = tuple(found.repeats for found in collected)
        self.held_out = len(self.judged)
        self.prints = {"base": latents.print_of(self.base, ("",)), "rows": pictures.fingerprint(collected, self.spec.task)}
        self._prepare()
        model = load_part(self.base, self.family.component, self.dtype, self.spec.base.id)
        self.objective = self.family.objective(load_scheduler(self.base))
        return model.to(self.device)

    def _prepare(self) -> None:
        """Latents of every picture and embeddings of every caption that the run will show, from the cache or made now."""
        plan = order.Plan(self.counts, self.weights, self.spec.schedule.batch_size, self.spec.schedule.accumulate, self.spec.compute.seed)
        steps, stream = self.spec.schedule.steps or plan.steps(self.spec.schedule.epochs), order.Stream(plan)
        shown = [self._shown(draw) for step in range(steps) for batch in stream.step(step) for draw in batch]
        shown += [self._judged(index) for index in range(self.held_out)]
        captions = {one.caption for one in shown} | {"", *self.spec.output.sample_prompts}
        store = latents.Store(home() / "cache" / "latents", self.base, self.info.pipeline, self.device)
        self.embedded = store.embeddings(self.family, sorted(captions))
        self.moments = store.moments(self.family, {one.key: one for one in shown})
        made = store.made
        if made:
            self.note(f"Encoded {made['pictures']} pictures and {made['captions']} captions; the VAE and the text encoders are out of memory again.")
        else:
            self.note("Latents and embeddings come from the cache.")

    def parts(self, model: torch.nn.Module) -> list[str]:
        """The ends of the names of the layers that get an adapter."""
        return self.info.targets(self.spec.method.targets)

    def prepare(self, model: torch.nn.Module) -> str:
        """Get the model ready for its first step. Returns how it goes, in words."""
        if self.spec.compute.checkpointing:
            model.get_base_model().enable_gradient_checkpointing()
        sizes = sorted({one.size for source in range(len(self.train)) for one in map(self._plain, self.train[source])})
        return f"latents and embeddings in memory; sizes {', '.join(f'{width}×{height}' for width, height in sizes[:8])}"

    def _plain(self, picture: pictures.Picture, caption: str = "") -> Shown:
        size = pictures.bucket(picture.width, picture.height, self.spec.task)
        return Shown(picture, size, "center", 0, False, caption)

    def _shown(self, draw: order.Draw) -> Shown:
        """A picture as one place of the run shows it: everything random comes from the draw's seed."""
        task, picture = self.spec.task, self.train[draw.source][draw.index]
        caption = pictures.caption(picture, task, trigger=self.triggers[draw.source], seed=order.key(draw.seed, "caption"))
        size = pictures.bucket(picture.width, picture.height, task)
        flip = task.flip and order.key(draw.seed, "flip") % 2 == 1
        crop_seed = order.key(draw.seed, "crop") if task.crop == "random" else 0
        return Shown(picture, size, task.crop, crop_seed, flip, caption)

    def _judged(self, index: int) -> Shown:
        source, picture = self.judged[index]
        return self._plain(picture, pictures.caption(picture, self.spec.task, trigger=self.triggers[source], seed=0, dropped=False))

    # ---- what the loop asks

    def collate(self, draws: list[order.Draw]) -> list[Group]:
        """Pictures as groups of one size each, with the noise and the place in the schedule that their draws say."""
        rows = []
        for draw in draws:
            seed = order.key(draw.seed, "noise")
            rows.append((self._shown(draw), seed, objectives.place(self.timesteps, _generator(order.key(draw.seed, "place")))))
        return self._groups(rows)

    def collate_held_out(self, indices: list[int]) -> list[Group]:
        """Held-out pictures, each at every place of PLACES; the same every time."""
        seeds = [(index, order.key(self.spec.compute.seed, "judge", index, number), place) for index in indices for number, place in enumerate(PLACES)]
        return self._groups([(self._judged(index), seed, place) for index, seed, place in seeds])

    def _groups(self, rows: Iterable[tuple[Shown, int, float]]) -> list[Group]:
        by_size: dict[tuple, list] = {}
        for row in rows:
            by_size.setdefault(row[0].size, []).append(row)
        return [self._group(size, members) for size, members in by_size.items()]

    def _group(self, size: tuple[int, int], members: list[tuple[Shown, int, float]]) -> Group:
        made, noises = [], []
        for shown, seed, _ in members:
            mean, std = self.moments[shown.key]
            draw = _generator(seed)
            noise = torch.randn(mean.shape, generator=draw)
            if self.spec.task.noise_offset:
                noise += self.spec.task.noise_offset * torch.randn((mean.shape[0], *[1] * (mean.ndim - 1)), generator=draw)
            made.append(mean if std is None else mean + std * torch.randn(mean.shape, generator=draw))
            noises.append(noise)
        conditions = self._there(self.family.batch([self.embedded[shown.caption] for shown, _, _ in members]))
        places = torch.tensor([place for *_, place in members])
        return Group(torch.stack(made).to(self.device), torch.stack(noises).to(self.device), places, conditions, size)

    def _there(self, conditions: Conditions) -> Conditions:
        """Conditions on the device, their numbers in the run's precision; masks stay what they are."""
        return {name: value.to(self.device, self.dtype if value.is_floating_point() else value.dtype) for name, value in conditions.items()}

    def units(self, batch: list[Group]) -> float:
        """The number of pictures."""
        return float(sum(len(group.latents) for group in batch))

    def size(self, batch: list[Group]) -> int:
        """The number of pictures."""
        return int(self.units(batch))

    def loss(self, model: torch.nn.Module, batch: list[Group]) -> Tensor:
        """The mean squared error of each picture, weighted, summed over the pictures."""
        total = torch.zeros((), device=self.device)
        for group in batch:
            mixed = self.objective.mix(group.latents, group.noise, group.places, self.spec.task.weighting)
            said = self.family.predict(model, mixed.noisy.to(self.dtype), mixed.times, group.conditions, group.size)
            errors = (said.float() - mixed.target).square().flatten(1).mean(1)
            total = total + (errors * mixed.weight).sum()
        return total

    def sample(self, model: torch.nn.Module, prompt: str, seed: int) -> str:
        """A picture for a prompt, written into samples/; the same weights give the same picture. Returns its name there."""
        task = self.spec.task
        size = pictures.bucket(task.resolution, task.resolution, task)
        pipeline = load_pipeline(self.base, self.info.pipeline, {self.family.component: model.get_base_model()}, dtype=self.dtype)
        pipeline.vae.to(self.device)
        asked = self.family.ask(self._there(self.embedded[prompt]), self._there(self.embedded[""])) | self.family.guide(task.guidance)
        found = drawn(pipeline(**asked, num_inference_steps=task.sample_steps, width=size[0], height=size[1], generator=_generator(seed)))
        return save_sample(self.folder / "samples", found, {"prompt": prompt, "seed": seed, "steps": task.sample_steps, "guidance": task.guidance})

    def extras(self) -> dict[str, bytes]:
        """Files that belong beside the adapter: none."""
        return {}


def hold_out(spec: TrainSpec, collected: list[pictures.Pictures]) -> tuple[list[list], list[tuple[int, pictures.Picture]]]:
    """The pictures of each source to train on, and those held out with their source: the same for the same pictures and seed, and none
    that is held out is trained on, not even its double. Raises DataError."""
    pool = [(source, picture) for source, found in enumerate(collected) for picture in found.items]
    chosen = order.held_out(
        [picture.digest for _, picture in pool], size=spec.validation.size, limit=spec.validation.limit, seed=spec.compute.seed
    )
    digests = {pool[index][1].digest for index in chosen}
    train: list[list] = [[] for _ in collected]
    for index, (source, picture) in enumerate(pool):
        if index not in chosen and picture.digest not in digests:
            train[source].append(picture)
    if not any(train):
        raise DataError("data.nothing_left", path=", ".join(found.source.path for found in collected), reasons="every picture is held out")
    return train, [pool[index] for index in sorted(chosen)]


def _generator(seed: int) -> torch.Generator:
    """Draws on the CPU, so that they are the same on every device."""
    return torch.Generator().manual_seed(seed)
