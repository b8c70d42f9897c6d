"""Latents and embeddings made once: cached on disk by what they are made of, so that the encoders need not stay in memory.

cache/latents/<pipeline>-<print of the encoder>/<hash of what was encoded>.safetensors: two families may read the same encoder differently.
"""

import gc
import hashlib
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_studio import bases, pictures
from lora_studio.errors import BaseModelError
from lora_studio.training import blocks, pipelines, single_file

BATCH = 8
HEAVY = 4 << 30


class Store:
    """The cache of one base. `made` counts what was not in it."""

    def __init__(self, root: Path, base: Path, pipeline: str, device: torch.device, *, encoders: str = "auto"):
        self.root, self.base, self.pipeline, self.device, self.encoders = root, base, pipeline, device, encoders
        self.made: dict[str, int] = {}

    def embeddings(self, family, captions: list[str]) -> dict[str, dict[str, Tensor]]:
        """What the text encoders make of each caption, in fp32 on the CPU."""
        place = self.root / f"{self.pipeline}-{print_of(self.base, ('text_encoder', 'tokenizer'))}"
        if self.encoders == "4bit":  # fewer bits make other embeddings; where they were made does not count
            place = place.with_name(f"{place.name}-4bit")
        found = {caption: _read(place / _name(caption)) for caption in captions}
        missing = [caption for caption, tensors in found.items() if tensors is None]
        if missing:
            encoders = self._pipeline(without=("vae", family.component))
            with torch.no_grad():
                for start in range(0, len(missing), BATCH):
                    portion = missing[start : start + BATCH]
                    for caption, tensors in zip(portion, family.embed(encoders, portion)):
                        found[caption] = {name: value.float().cpu().contiguous() for name, value in tensors.items()}
                        _write(place / _name(caption), found[caption])
            del encoders
            let_go(self.device)
            self.made = {"pictures": 0, **self.made, "captions": len(missing)}
        return found

    def moments(self, family, shown: dict) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Mean and standard deviation of each picture's latents, in fp32 on the CPU; one picture or one batch gives the same."""
        place = self.root / f"{self.pipeline}-{print_of(self.base, ('vae',))}"
        found = {key: _read(place / _name(key)) for key in shown}
        missing = [key for key, tensors in found.items() if tensors is None]
        if missing:
            vae = pipelines.load_part(self.base, "vae", torch.float32, str(self.base)).to(self.device).eval()
            with torch.no_grad():
                for key in missing:
                    mean, std = family.encode(vae, pixels(shown[key])[None].to(self.device))
                    tensors = {"mean": mean[0].cpu().contiguous()} | ({} if std is None else {"std": std[0].cpu().contiguous()})
                    found[key] = tensors
                    _write(place / _name(key), tensors)
            del vae
            let_go(self.device)
            self.made = {"captions": 0, **self.made, "pictures": len(missing)}
        return {key: (tensors["mean"], tensors.get("std")) for key, tensors in found.items()}

    def _pipeline(self, *, without: tuple[str, ...]):
        """The text encoders: in fp32, or in bf16 where they take more than four gigabytes of the disk, or in 4 bits."""
        size = 0 if self.base.is_file() else sum(file.stat().st_size for file in self.base.glob("text_encoder*/*.safetensors"))
        names = [name for name in pipelines.index_of(self.base) if name.startswith("text_encoder")]
        more = blocks.encoder_options(self.encoders, names)
        if more and self.base.is_file():
            raise BaseModelError("image.one_file", id=str(self.base))
        made = pipelines.load_pipeline(self.base, self.pipeline, more, without=without, dtype=torch.bfloat16 if size > HEAVY or more else torch.float32)
        return made if self.encoders == "cpu" else made.to(self.device)


def pixels(shown) -> Tensor:
    """A picture as (3, h, w) from -1 to 1, or a clip as (3, frames, h, w)."""
    import numpy

    placed = {"size": shown.size, "crop": shown.crop, "seed": shown.crop_seed, "flip": shown.flip}
    if shown.frames > 1:
        frames = [numpy.asarray(frame) for frame in pictures.load_frames(shown.picture, shown.frames, **placed)]
        return torch.from_numpy(numpy.stack(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1
    found = pictures.load(shown.picture, **placed)
    return torch.from_numpy(numpy.asarray(found).copy()).permute(2, 0, 1).float() / 127.5 - 1


def print_of(base: Path, parts: tuple[str, ...]) -> str:
    """A hash that changes when the parts of a pipeline's folder do: their small files whole, of large ones size, beginning and end.
    A model in one file is looked at in many places, as all of its parts."""
    digest = hashlib.sha256()
    if base.is_file():
        bases.digest_ends(digest, base, "single")
        bases.digest_spread(digest, base)
        digest.update(repr(sorted(single_file.told(base).items())).encode())
        base = bases.sizes_folder(base)
    for folder in sorted(path for path in base.iterdir() if path.is_dir() and path.name.startswith(parts)):
        for file in sorted(folder.iterdir()):
            bases.digest_ends(digest, file, f"{folder.name}/{file.name}")
    return digest.hexdigest()[:24]


def _name(key: str) -> str:
    return f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.safetensors"


def _read(path: Path) -> dict[str, Tensor] | None:
    """What was cached; a file that is broken is as good as none."""
    try:
        return load_file(path)
    except (OSError, ValueError, RuntimeError) as error:
        if not isinstance(error, FileNotFoundError):
            path.unlink(missing_ok=True)
        return None
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        path.unlink(missing_ok=True)
        return None


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Whole or absent. Losing it in a power cut costs only its making, so nothing is fsynced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    save_file(tensors, part)
    os.replace(part, path)


def let_go(device: torch.device) -> None:
    """Give memory that nobody uses any more back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
