"""The judge of demo-image's pictures, by code alone: colors, shape and place, and the styles stripes and outline."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image

from lora_studio.demo import image_world as world
from lora_studio.demo.image_world import COLORS, PLACES, SHAPES, SIZE, Scene

NAMES = tuple(COLORS)
FULL = np.array([COLORS[name] for name in NAMES], np.float32)
DARK = np.array([world.shade(name) for name in NAMES], np.float32)
BLACK = np.array(world.BLACK, np.float32)
NEAR = 60.0  # a color farther than this from every color of the palette has no name
INK = 40.0  # a pixel this far from every tone of the background belongs to the shape
ALIKE = 0.75  # overlap of a silhouette with the drawn one, from which it counts as that shape
HALF = 0.5  # how much of a style's full contrast must be there
TEMPLATE = 32


@dataclass(frozen=True)
class Seen:
    """What a picture shows; None for what cannot be made out."""

    background: str | None = None
    color: str | None = None
    shape: str | None = None
    place: str | None = None
    stripes: bool = False
    outline: bool = False


def see(picture) -> Seen:
    """Judge one picture of 64×64: a PIL image or an array of bytes (64, 64, 3)."""
    pixels = np.asarray(picture, np.float32)
    ground = _ground(pixels)
    if ground is None:
        return Seen()
    far = _from_line(pixels, FULL[ground], DARK[ground])
    body = _largest(far > INK)
    if body.sum() < 60:
        return Seen(NAMES[ground], stripes=_stripes(pixels, ground, ~body))
    color, away = _color(pixels, body, ground)
    body = _largest(far > min(60.0, _from_line(FULL[color], FULL[ground], DARK[ground]) / 2))
    body = ~_outside(~body)
    ys, xs = np.nonzero(body)
    here = ((xs.min() + xs.max() + 1 - SIZE) / 2, (ys.min() + ys.max() + 1 - SIZE) / 2)
    return Seen(
        background=NAMES[ground],
        color=NAMES[color] if away <= NEAR else None,
        shape=_shape(body) if body.mean() < 0.6 else None,
        place=min(PLACES, key=lambda place: (PLACES[place][0] - here[0]) ** 2 + (PLACES[place][1] - here[1]) ** 2),
        stripes=_stripes(pixels, ground, ~_grow(body)),
        outline=_outline(pixels, color, body),
    )


def _ground(pixels: np.ndarray) -> int | None:
    """The color of the picture's border, plain or in stripes: at least a quarter of it must be the full color."""
    border = np.ones((SIZE, SIZE), bool)
    border[3:-3, 3:-3] = False
    ring = pixels[border][:, None]
    full, dark = np.linalg.norm(ring - FULL, axis=2), np.linalg.norm(ring - DARK, axis=2)
    cost = np.minimum(full, dark).mean(0) + np.where((full < dark).mean(0) < 0.25, 1000.0, 0.0)
    return int(np.argmin(cost)) if cost.min() <= NEAR else None


def _from_line(pixels: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Distance of each color from the line between two colors."""
    along = end - start
    part = np.clip((pixels - start) @ along / (along @ along), 0, 1)
    return np.linalg.norm(pixels - start - part[..., None] * along, axis=-1)


def _color(pixels: np.ndarray, body: np.ndarray, ground: int) -> tuple[int, float]:
    """The palette color of the shape's innermost pixels, other than the background's, and how far they are from it."""
    inner, deeper = body, _shrink(body, 1)
    while deeper.sum() >= 12:
        inner, deeper = deeper, _shrink(deeper, 1)
    middle = np.median(pixels[inner], axis=0)
    away = np.linalg.norm(FULL - middle, axis=1)
    away[ground] = np.inf
    return int(np.argmin(away)), float(away.min())


def _shape(body: np.ndarray) -> str | None:
    found = _fitted(body)
    overlap = {name: float(np.minimum(found, drawn).sum() / np.maximum(found, drawn).sum()) for name, drawn in _templates().items()}
    best = max(overlap, key=overlap.get)
    return best if overlap[best] >= ALIKE else None


@cache
def _templates() -> dict[str, np.ndarray]:
    return {name: _fitted(np.asarray(world.silhouette(name, (32, 32), 17)) > 127) for name in SHAPES}


def _fitted(body: np.ndarray) -> np.ndarray:
    """A silhouette cut out and brought to one size, as shares of 0 to 1."""
    ys, xs = np.nonzero(body)
    cut = body[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    image = Image.fromarray(cut.astype(np.uint8) * 255)
    return np.asarray(image.resize((TEMPLATE, TEMPLATE), Image.Resampling.BOX), np.float32) / 255


def _stripes(pixels: np.ndarray, ground: int, outside: np.ndarray) -> bool:
    """Whether the rows of the background change between its full and its dark shade, band by band."""
    depth = _depth(pixels, FULL[ground], DARK[ground])
    dark_rows = np.broadcast_to((np.arange(SIZE) // world.BAND % 2 == 1)[:, None], outside.shape)
    dark, full = depth[outside & dark_rows], depth[outside & ~dark_rows]
    return bool(len(dark) and len(full) and np.median(dark) - np.median(full) > HALF)


def _outline(pixels: np.ndarray, color: int, body: np.ndarray) -> bool:
    """Whether the shape's edge is black and its inside is not."""
    edge, inside = _shrink(body, 1) & ~_shrink(body, 3), _shrink(body, 5)
    if not edge.any() or not inside.any():
        return False
    black = _depth(pixels, FULL[color], BLACK)
    near = np.linalg.norm(pixels - BLACK, axis=2) < np.linalg.norm(pixels - FULL[color], axis=2)
    return bool(np.median(black[edge]) - np.median(black[inside]) > HALF and near[edge].mean() > HALF)


def _depth(pixels: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """How far each pixel is on the way from one color (0) to another (1)."""
    along = end - start
    return np.clip((pixels - start) @ along / (along @ along), -0.5, 1.5)


# ---- regions


def _grow(region: np.ndarray) -> np.ndarray:
    wide = np.pad(region, 1)
    return wide[1:-1, 1:-1] | wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]


def _shrink(region: np.ndarray, times: int) -> np.ndarray:
    for _ in range(times):
        region = ~_grow(~region)
    return region


def _flood(start: np.ndarray, within: np.ndarray) -> np.ndarray:
    """All of a region that hangs together with the start."""
    while True:
        grown = _grow(start) & within
        if (grown == start).all():
            return grown
        start = grown


def _outside(region: np.ndarray) -> np.ndarray:
    """The part of a region that reaches the picture's border."""
    start = region.copy()
    start[1:-1, 1:-1] = False
    return _flood(start, region)


def _largest(region: np.ndarray) -> np.ndarray:
    """The largest part of a region that hangs together."""
    best, left = np.zeros_like(region), region.copy()
    while left.sum() > best.sum():
        start = np.zeros_like(region)
        start[np.unravel_index(np.argmax(left), left.shape)] = True
        part = _flood(start, left)
        best = part if part.sum() > best.sum() else best
        left &= ~part
    return best


# ---- pictures and their shares


@torch.no_grad()
def paint(pipeline, prompts: Sequence[str], *, seed: int, steps: int = 12, guidance: float = 2.0, batch: int = 32) -> list[np.ndarray]:
    """The pipeline's picture of each prompt, as bytes (64, 64, 3). Each has a seed of its own, whatever stands beside it."""
    pipeline.set_progress_bar_config(disable=True)
    found: list[np.ndarray] = []
    for at in range(0, len(prompts), batch):
        part = list(prompts[at : at + batch])
        chances = [torch.Generator().manual_seed(seed * 100_003 + at + place) for place in range(len(part))]
        made = pipeline(
            part, num_inference_steps=steps, guidance_scale=guidance, height=SIZE, width=SIZE, generator=chances, output_type="np"
        )
        found += list(np.round(made.images * 255).astype(np.uint8))
    return found


@dataclass(frozen=True)
class Score:
    """Shares of pictures: both colors right; shape right; place right; each style shown; both styles; colors and shape."""

    colors: float
    shape: float
    place: float
    stripes: float
    outline: float
    both: float
    joint: float


def score(scenes: Sequence[Scene], pictures: Sequence) -> Score:
    seen = [see(picture) for picture in pictures]
    pairs = list(zip(scenes, seen, strict=True))
    colors = [scene.color == found.color and scene.background == found.background for scene, found in pairs]
    shape = [scene.shape == found.shape for scene, found in pairs]
    return Score(
        colors=_share(colors),
        shape=_share(shape),
        place=_share([scene.place == found.place for scene, found in pairs]),
        stripes=_share([found.stripes for found in seen]),
        outline=_share([found.outline for found in seen]),
        both=_share([found.stripes and found.outline for found in seen]),
        joint=_share([one and other for one, other in zip(colors, shape, strict=True)]),
    )


def shape_by_kind(scenes: Sequence[Scene], pictures: Sequence) -> dict[str, float]:
    """The share of pictures of each shape that show it."""
    right: dict[str, list[bool]] = {name: [] for name in SHAPES}
    for scene, picture in zip(scenes, pictures, strict=True):
        right[scene.shape].append(see(picture).shape == scene.shape)
    return {name: _share(each) for name, each in right.items() if each}


def _share(found: list[bool]) -> float:
    return sum(found) / len(found)
