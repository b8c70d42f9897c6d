"""Pictures with captions for a diffusion model: latents and embeddings made once, batches, the loss on what was added, sample pictures.

What a family does in its own way is in image_families/. The VAE and the text encoders are loaded, used and let go again before the
first step; while the run goes on only the part that is trained is in memory, but for sample pictures, which borrow the VAE.
"""

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_studio import bases, families, pictures
from lora_studio.errors import MachineError
from lora_studio.home import home
from lora_studio.pictures.samples import save_sample
from lora_studio.spec import TrainSpec, methods
from lora_studio.spec.idle import needs_gpu
from lora_studio.training import assistants, blocks, fused_image, latents, masks, objectives, order, pairs, priors
from lora_studio.training.image_families import FAMILIES, Conditions, film
from lora_studio.training.loop import Pass
from lora_studio.training.packed import bare
from lora_studio.training.pipelines import load_part, load_pipeline, load_scheduler
from lora_studio.training.showing import Show, Shown
from lora_studio.training.text import choose_dtype
from lora_studio.training.text_encoders import Texts
from lora_studio.workspace import Workspace

# Each held-out picture is judged at these places of the noise schedule, with noise that is the same every time.
PLACES = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass
class Group:
    """Pictures of one size on the device: latents (b, ...), noise like them, places in the schedule (b,), conditions with a batch axis
    (none where text encoders are trained, which read the captions anew);
    how far the places are moved, how much each picture counts (b,), and each place of it (b, h, w) where some have a mask."""

    latents: Tensor
    noise: Tensor
    places: Tensor
    conditions: Conditions
    size: tuple[int, int]
    shift: float = 1.0
    weights: Tensor | None = None
    masks: Tensor | None = None
    captions: tuple[str, ...] = ()
    source: Tensor | None = None

    @property
    def shape(self) -> tuple:
        """What groups must have in common to go through the model together."""
        tensors = {"latents": self.latents, "weights": self.weights, "masks": self.masks, "source": self.source, **self.conditions}
        return (self.size, self.shift, *((name, None if value is None else value.shape[1:]) for name, value in sorted(tensors.items())))


def joined(groups: list[Group]) -> Group:
    """Groups of one shape as one."""
    if len(groups) == 1:
        return groups[0]

    def all_of(name: str) -> Tensor | None:
        found = [getattr(group, name) for group in groups]
        return None if found[0] is None else torch.cat(found)

    conditions = {name: torch.cat([group.conditions[name] for group in groups]) for name in groups[0].conditions}
    captions = tuple(caption for group in groups for caption in group.captions)
    parts = {name: all_of(name) for name in ("latents", "noise", "places", "weights", "masks", "source")}
    return Group(conditions=conditions, size=groups[0].size, shift=groups[0].shift, captions=captions, **parts)


class ImageTask:
    """A diffusion model and its pictures, as the loop asks for them."""

    unit = "pictures"
    fold: tuple[int, int] | None = None
    swap: blocks.Swap | None = None

    def __init__(self, spec: TrainSpec, *, device: str, note: Callable[[str], None], folder: Path):
        self.spec, self.device, self.note, self.folder = spec, torch.device(device), note, folder
        self.dtype = choose_dtype(methods.precision(spec.method, spec.compute.precision), device)

    # ---- before the first step

    def load(self, model: torch.nn.Module | None = None) -> torch.nn.Module:
        """Look at every picture, make latents and embeddings, and load the part that is trained, unless it is given. Raises StudioError."""
        logging.getLogger("diffusers").setLevel(logging.ERROR)
        self.base = bases.fetch(self.spec.base)
        self.info = bases.inspect(self.spec.base)
        self.family = FAMILIES[self.info.pipeline]
        if self.info.note:
            self.note(self.info.note)
        self.timesteps = families.timesteps(self.info.pipeline, self.spec.task.timesteps)
        for _, error in families.misfits(self.info.pipeline, self.spec):
            raise error
        for field in needs_gpu(self.spec):
            if self.device.type != "cuda":
                raise MachineError("machine.needs_gpu", field=field, device=str(self.device))
        self.guidance = self.spec.task.guidance or families.guidance(self.spec.base.id, self.info.pipeline)
        self.prints = {"base": latents.print_of(self.base, ("",))}
        self.store = latents.Store(home() / "cache" / "latents", self.base, self.info.pipeline, self.device, encoders=self.spec.compute.encoders)
        collected = pictures.collect(self._with_priors(), cache=home() / "cache" / "archives")
        for found in collected:
            for sentence in found.notes:
                self.note(sentence)
            if found.skipped:
                self.note(f"{found.source.path}: left out are {found.skipped_in_words()}.")
        self.texts = None
        if self.spec.task.text_encoder:
            self.texts = Texts(self.base, self.info.pipeline, self.family, device=self.device, dtype=self.dtype)
        if self.family.edit:
            pairs.refuse_halves(self.spec.base.id, collected)
        self.show = Show(self.spec, collected, self.fold)
        self.train, self.judged, self.counts, self.weights = self.show.train, self.show.judged, self.show.counts, self.show.weights
        self.held_out = len(self.judged)
        self.prints["rows"] = pictures.fingerprint(collected, self.spec.task)
        self._prepare()
        model = self._part() if model is None else model
        self.objective = self.family.objective(load_scheduler(self.base))
        self.assistant = assistants.of_run(self.spec.base, model, Workspace(self.folder.parent.parent), self.device)
        if self.assistant:
            self.prints["assistant"] = self.assistant.print
            self.note(f"{self.spec.base.assistant} is on while the run learns, and off in its pictures and in what it saves.")
        if self.texts:
            model = self.texts.load(model, self.spec.base.id)
            model.encoders.to(self.device)
        return model

    def _part(self) -> torch.nn.Module:
        """The part that is trained, frozen, where it will be used."""
        compute, id = self.spec.compute, self.spec.base.id
        model = load_part(self.base, self.family.component, self.dtype, id, **blocks.options(compute.quantize, self.dtype, self.device))
        self.swap = blocks.place(model, compute, self.device, id)
        return model

    def _with_priors(self) -> TrainSpec:
        """The spec with the class pictures that are to be drawn as a source, drawn."""
        if not self.spec.task.prior_pictures:
            return self.spec
        source, made = priors.prepare(
            self.spec, self.prints["base"], self.guidance, family=self.family, ask=lambda: self._asked(self.spec.task.prior_prompt.strip()),
            load=self._whole,
        )  # fmt: skip
        self.swap = None
        latents.let_go(self.device)
        self.note(f"The base drew {made} class pictures." if made else f"{self.spec.task.prior_pictures} class pictures come from the cache.")
        return self.spec.model_copy(update={"data": [*self.spec.data, source]})

    def _asked(self, prompt: str) -> dict:
        """A prompt and the empty one as the stock pipeline's arguments."""
        known = self.store.embeddings(self.family, ["", prompt])
        return self.family.ask(self._there(known[prompt]), self._there(known[""]))

    def _whole(self):
        """The stock pipeline with the untouched base in it."""
        part = self._part().eval()
        if self.swap:
            self.swap.adopt()
        return self._pipeline(part)

    def _pipeline(self, part: torch.nn.Module):
        """The stock pipeline around the part that is trained, without text encoders."""
        pipeline = load_pipeline(self.base, self.info.pipeline, {self.family.component: part}, dtype=self.dtype)
        pipeline.vae.to(self.device)
        return pipeline

    def _prepare(self) -> None:
        """Latents of every picture and embeddings of every caption that the run will show, from the cache or made now."""
        shown = self.show.everything()
        captions = {one.caption for one in shown} | {"", *self.spec.output.sample_prompts}
        self.embedded = {} if self.texts and self.texts.is_whole else self.store.embeddings(self.family, sorted(captions))
        self.moments = self.store.moments(self.family, {one.key: one for one in (pairs.with_sources(shown) if self.family.edit else shown)})
        masked = {(one.key, one.picture.mask_digest): one for one in shown if one.picture.mask and self.spec.task.outside_mask < 1}
        self.masks = {key: masks.weights_of(one, self.moments[one.key][0], self.spec.task.outside_mask) for key, one in masked.items()}
        made = self.store.made
        if made:
            self.note(f"Encoded {made['pictures']} pictures and {made['captions']} captions; {'the VAE is' if self.texts else 'the VAE and the text encoders are'} out of memory again.")
        else:
            self.note("Latents and embeddings come from the cache.")

    def parts(self, model: torch.nn.Module) -> list[str]:
        """The ends of the names of the layers that get an adapter."""
        return self.info.targets(self.spec.method.targets)

    def prepare(self, model: torch.nn.Module) -> str:
        """Get the model ready for its first step. Returns how it goes, in words."""
        if self.spec.compute.checkpointing:
            bare(model).enable_gradient_checkpointing()
            if self.texts:
                self.texts.prepare(model)
        if self.swap:
            self.swap.adopt()
        if self.spec.compute.compile:
            self.note(f"Compiling {blocks.compiled(bare(model))} blocks; the first steps take minutes.")
        # The laid out convolutions give channels_last, at which torch 2.13 ends the process when the weight of a GroupNorm behind them learns.
        can = not self.spec.compute.compile and self.spec.method.kind != "full"
        fast = fused_image.install(model) if self.spec.compute.fused and can else {}
        sizes = self.show.sizes()
        how = f"fast {' and '.join(fast)}, " if fast else ""
        return f"{how}latents and embeddings in memory; sizes {', '.join(f'{width}×{height}' for width, height in sizes[:8])}"

    # ---- what the loop asks

    def collate(self, draws: list[order.Draw]) -> list[Group]:
        """Pictures as groups of one size each, with the noise and the place in the schedule that their draws say."""
        rows = []
        for draw in draws:
            seed = order.key(draw.seed, "noise")
            rows.append((self.show.drawn(draw), seed, objectives.place(self.timesteps, _generator(order.key(draw.seed, "place")))))
        groups = self._groups(rows)
        for group in groups:
            group.shift = self.objective.shift(self.spec.task.shift, self.timesteps, self._tokens(group.latents))
        return groups

    def _tokens(self, found: Tensor) -> float:
        """How many tokens the part makes of a picture's latents."""
        return found.shape[-2] * found.shape[-1] / families.of_pipeline(self.info.pipeline).patch ** 2

    def collate_held_out(self, indices: list[int]) -> list[Group]:
        """Held-out pictures, each at every place of PLACES; the same every time, and whatever task.timesteps and task.shift are."""
        seeds = [(index, order.key(self.spec.compute.seed, "judge", index, number), place) for index in indices for number, place in enumerate(PLACES)]
        return self._groups([(self.show.held_out(index), seed, place) for index, seed, place in seeds])

    def _groups(self, rows: Iterable[tuple[Shown, int, float]]) -> list[Group]:
        by_size: dict[tuple, list] = {}
        for row in rows:
            by_size.setdefault((row[0].size, row[0].frames), []).append(row)
        return [self._group(size, members) for (size, _), members in by_size.items()]

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
        captions = [shown.caption for shown, *_ in members]
        conditions = {} if self.texts else self._there(self.family.batch([self.embedded[caption] for caption in captions]))
        places = torch.tensor([place for *_, place in members])
        found = Group(torch.stack(made).to(self.device), torch.stack(noises).to(self.device), places, conditions, size, captions=tuple(captions))
        if self.family.edit:
            found.source = torch.stack([self.moments[shown.source.key][0] for shown, *_ in members]).to(self.device, self.dtype)
        if any(shown.weight != 1 for shown, *_ in members):
            found.weights = torch.tensor([shown.weight for shown, *_ in members], device=self.device)
        known = [self.masks.get((shown.key, shown.picture.mask_digest)) for shown, *_ in members]
        if any(mask is not None for mask in known):
            found.masks = torch.stack([torch.ones(made[0].shape[-2:]) if mask is None else mask for mask in known]).to(self.device)
        return found

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
        """The mean squared error of each picture, weighted by its mask, its step and its kind, summed over the pictures."""
        total = torch.zeros((), device=self.device)
        for group in batch:
            total = total + self._errors(model, group).sum()
        return total

    def _errors(self, model: torch.nn.Module, group: Group) -> Tensor:
        """The weighted error of each picture, (b,)."""
        mixed = self.objective.mix(group.latents, group.noise, group.places, self.spec.task.weighting, group.shift)
        conditions = self._there(self.family.batch(self.texts.embed(model, list(group.captions), self.embedded))) if self.texts else group.conditions
        conditions = conditions if group.source is None else conditions | {"source": group.source}
        said = self.family.predict(model, mixed.noisy.to(self.dtype), mixed.times, conditions, group.size)
        squares = (said.float() - mixed.target).square()
        errors = squares.flatten(1).mean(1) if group.masks is None else masks.mean(squares, group.masks)
        return errors * (mixed.weight if group.weights is None else mixed.weight * group.weights)

    def passes(self, batches: list[list[Group]]) -> list[Pass]:
        """Batches of several adapters as one pass for all pictures of a size whose conditions are of one shape."""
        alike: dict[tuple, list[tuple[int, Group]]] = {}
        for number, batch in enumerate(batches):
            for group in batch:
                alike.setdefault(group.shape, []).append((number, group))
        return [self._pass(members) for members in alike.values()]

    def shared(self, model: torch.nn.Module) -> AbstractContextManager:
        """A while in which several threads may take passes: nothing stands in the way."""
        return nullcontext()

    def _pass(self, members: list[tuple[int, Group]]) -> Pass:
        groups = [group for _, group in members]
        sizes = [len(group.latents) for group in groups]
        return Pass(
            [(number, size) for (number, _), size in zip(members, sizes)],
            lambda model: [errors.sum() for errors in self._errors(model, joined(groups)).split(sizes)],
        )

    def sample(self, model: torch.nn.Module, prompt: str, seed: int) -> str:
        """A picture for a prompt, written into samples/; the same weights give the same picture. Returns its name there."""
        task = self.spec.task
        pair = pairs.for_sample(self.show, prompt) if self.family.edit else None
        size = pair.size if pair else pictures.bucket(task.resolution, task.resolution, task)
        pipeline = self._pipeline(bare(model))
        known = self.texts.embed(model, [prompt, ""], self.embedded) if self.texts else (self.embedded[prompt], self.embedded[""])
        asked = self.family.ask(*map(self._there, known)) | self.family.guide(self.guidance)
        if task.frames > 1:
            asked |= {"num_frames": task.frames}
        if pair:
            asked |= self.family.edit(self.moments[pair.source.key][0].to(self.device, self.dtype), size)
        with self.assistant.away() if self.assistant else nullcontext():
            found = film(pipeline(**asked, num_inference_steps=task.sample_steps, width=size[0], height=size[1], generator=_generator(seed)))
        return save_sample(self.folder / "samples", found[0], more=found[1:], facts={"prompt": prompt, "seed": seed, "steps": task.sample_steps, "guidance": self.guidance})

    def extras(self) -> dict[str, bytes]:
        """Files that belong beside the adapter: none."""
        return {}


def _generator(seed: int) -> torch.Generator:
    """Draws on the CPU, so that they are the same on every device."""
    return torch.Generator().manual_seed(seed)
