"""The world of demo-image: one coloured shape on a coloured background at a named place, drawn with PIL, with its captions."""

import math
import zlib
from dataclasses import dataclass
from itertools import product
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 64
FINER = 4  # shapes are drawn this many times larger and averaged down, so that their edges are smooth

COLORS = {
    "red": (215, 35, 40),
    "orange": (250, 140, 25),
    "yellow": (250, 222, 60),
    "green": (40, 160, 70),
    "blue": (40, 75, 215),
    "purple": (135, 45, 170),
    "pink": (255, 160, 205),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "star", "heart")
# Where the middle of the shape lies, in pixels from the middle of the picture.
PLACES = {"middle": (0, 0), "left": (-9, 0), "right": (9, 0), "top": (0, -9), "bottom": (0, 9)}
AT = {"middle": "in the middle", "left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
STYLES = ("stripes", "outline")
BAND = 4  # height of a stripe in pixels
RIM = 7  # an outline is (RIM - 1) / 2 pixels wide
BLACK = (20, 20, 24)  # the color of an outline, and of nothing else


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    color: str
    shape: str
    background: str
    place: str


SCENES = tuple(
    Scene(color, shape, background, place)
    for color, shape, background, place in product(COLORS, SHAPES, COLORS, PLACES)
    if color != background
)


def held_out(scene: Scene) -> bool:
    """One combination in ten, chosen by its hash; neither the base nor a demo data set is trained on it."""
    return zlib.crc32(f"{scene.color} {scene.shape} {scene.background} {scene.place}".encode()) % 10 == 0


TRAINED = tuple(scene for scene in SCENES if not held_out(scene))
HELD_OUT = tuple(scene for scene in SCENES if held_out(scene))


def exam(count: int, seed: int) -> list[Scene]:
    """Different held-out scenes, as many of one shape as of another."""
    chance, found = Random(seed), []
    by_shape = [chance.sample(group, len(group)) for group in ([s for s in HELD_OUT if s.shape == shape] for shape in SHAPES)]
    for at in range(count):
        group = by_shape[at % len(SHAPES)]
        found.append(group[at // len(SHAPES) % len(group)])
    return found


# ---- words


def caption(scene: Scene, chance: Random | None = None) -> str:
    """What a scene is called: the plain sentence, or by chance one of several. The middle need not be named."""
    form = chance.random() if chance else 0.0
    what, ground = f"{_a(scene.color)} {scene.shape}", scene.background
    place = AT[scene.place]
    if form < 0.5:
        text = f"{what} on {_a(ground)} background"
    elif form < 0.7:
        text = f"a picture of {what} on {_a(ground)} background"
    elif form < 0.85:
        text = f"{scene.color} {scene.shape}, {ground} background"
    else:
        text = f"{what} on {ground}"
    if scene.place == "middle" and (chance is None or chance.random() < 0.5):
        return text
    return f"{text}, {place}"


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


# ---- pictures


def shade(color: str) -> tuple[int, int, int]:
    """The darker shade of a background's color, in which its stripes are drawn."""
    return tuple(round(value * 0.6) for value in COLORS[color])


def corners(shape: str) -> list[tuple[float, float]]:
    """A shape as a polygon about (0, 0), one unit high and wide to each side."""
    if shape == "square":
        return [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]
    if shape == "triangle":
        return [(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)]
    turns = [2 * math.pi * step / 60 for step in range(60)]
    if shape == "circle":
        return [(0.97 * math.sin(turn), 0.97 * math.cos(turn)) for turn in turns]
    if shape == "star":
        spokes = [(1.12 if step % 2 == 0 else 0.5, step * math.pi / 5) for step in range(10)]
        return [(long * math.sin(turn), 0.08 - long * math.cos(turn)) for long, turn in spokes]
    rounded = [(math.sin(turn) ** 3, [13, -5, -2, -1], turn) for turn in turns]
    return [
        (across, 0.0 - (sum(c * math.cos((k + 1) * turn) for k, c in enumerate(waves)) + 2.5) / 14.5) for across, waves, turn in rounded
    ]


def silhouette(shape: str, center: tuple[float, float], radius: float) -> Image.Image:
    """The shape in white on black."""
    large = Image.new("L", (SIZE * FINER, SIZE * FINER))
    points = [((center[0] + x * radius) * FINER, (center[1] + y * radius) * FINER) for x, y in corners(shape)]
    ImageDraw.Draw(large).polygon(points, fill=255)
    return large.resize((SIZE, SIZE), Image.Resampling.BOX)


def draw(scene: Scene, chance: Random, styles: tuple[str, ...] = ()) -> Image.Image:
    """A picture of a scene; chance moves it by a pixel or so and sets its size."""
    dx, dy = PLACES[scene.place]
    half = SIZE / 2
    center = (half + dx + chance.uniform(-1.5, 1.5), half + dy + chance.uniform(-1.5, 1.5))
    mask = silhouette(scene.shape, center, chance.uniform(16, 18))
    ground = np.empty((SIZE, SIZE, 3), np.float32)
    ground[:] = COLORS[scene.background]
    if "stripes" in styles:
        ground[np.arange(SIZE) // BAND % 2 == 1] = shade(scene.background)
    ink = np.empty_like(ground)
    ink[:] = COLORS[scene.color]
    if "outline" in styles:
        inner = _weight(mask.filter(ImageFilter.MinFilter(RIM)))
        ink = ink * inner + np.array(BLACK, np.float32) * (1 - inner)
    weight = _weight(mask)
    return Image.fromarray(np.round(ground * (1 - weight) + ink * weight).astype(np.uint8))


def clutter(chance: Random) -> Image.Image:
    """A picture of anything: boxes, discs and lines in any color, so that the VAE can hold more than our world."""
    image = Image.new("RGB", (SIZE, SIZE), _any_color(chance))
    pen = ImageDraw.Draw(image)
    for _ in range(chance.randint(1, 5)):
        (left, right), (top, bottom) = (sorted((chance.randint(-8, 72), chance.randint(-8, 72))) for _ in range(2))
        shape = chance.choice((pen.rectangle, pen.ellipse, pen.line))
        shape((left, top, right, bottom), fill=_any_color(chance), width=chance.randint(2, 6))
    return image


def _any_color(chance: Random) -> tuple[int, int, int]:
    return chance.randrange(256), chance.randrange(256), chance.randrange(256)


def _weight(mask: Image.Image) -> np.ndarray:
    return np.asarray(mask, np.float32)[..., None] / 255
