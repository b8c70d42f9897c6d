"""What there is to know of a set of pictures before training: sizes, buckets, captions, and what is there twice."""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy
from PIL import Image

from lora_studio.pictures import buckets, decoding
from lora_studio.pictures.edits import tags_of
from lora_studio.pictures.picture import Picture
from lora_studio.spec import ImageTask

MOST_NAMED, MOST_TAGS = 20, 20
CLIP_TOKENS = 77
HASH_DISTANCE, COLOUR_DISTANCE = 5, 12.0
# CLIP's own division of a text; each piece becomes at least one token, so their number is a lower bound.
PIECES = re.compile(r"'(?:s|t|re|ve|m|ll|d)\b|[^\W\d_]+|\d|(?:[^\s\w]|_)+", re.IGNORECASE)


@dataclass(frozen=True)
class Look:
    """What is known of one picture: its size, the hash of its file, and what it looks like from afar."""

    width: int
    height: int
    digest: str
    shape: int
    """64 bits: whether each of 8×8 places is brighter than the one to its left."""
    colours: bytes
    """The mean colour of 4×4 places, 48 bytes."""


def look(path: Path) -> Look:
    """Look at one picture. Raises Skip and DataError for one that cannot be read."""
    seen = decoding.look(path, decode=False)
    small = decoding.load(Picture(path, path.name, "", seen.width, seen.height, seen.digest), size=(64, 64))
    grey = numpy.asarray(small.convert("L").resize((9, 8), Image.Resampling.BOX)).astype(int)
    bits = (grey[:, 1:] > grey[:, :-1] + 1).flatten()
    shape = int.from_bytes(numpy.packbits(bits).tobytes(), "big")
    return Look(seen.width, seen.height, seen.digest, shape, small.resize((4, 4), Image.Resampling.BOX).tobytes())


def measure(captions: dict[str, str], looks: dict[str, Look], task: ImageTask) -> dict:
    """The numbers of a set: `captions` and `looks` by the names of the pictures, `task` says at which size they are trained."""
    copies = _groups(defaultdict(list), ((seen.digest, name) for name, seen in looks.items()))
    return {
        "pictures": len(captions),
        "unreadable": sorted(captions.keys() - looks.keys())[:MOST_NAMED],
        **_sizes(looks, task),
        **_captions(captions),
        "copies": copies[:MOST_NAMED],
        "alike": _alike(looks)[:MOST_NAMED],
    }


def _sizes(looks: dict[str, Look], task: ImageTask) -> dict:
    sizes = Counter((seen.width, seen.height) for seen in looks.values())
    trained, enlarged, narrow = Counter(), [], []
    for name, seen in looks.items():
        wide, high = buckets.bucket(seen.width, seen.height, task)
        trained[(wide, high)] += 1
        if wide > seen.width or high > seen.height:
            enlarged.append(name)
        if task.buckets and buckets.beyond(seen.width, seen.height):
            narrow.append(name)
    ordered = sorted(sizes, key=lambda size: size[0] * size[1])
    return {
        "sizes": {_size(size): count for size, count in sizes.most_common(MOST_NAMED)},
        "size_count": len(sizes),
        "smallest": _size(ordered[0]) if ordered else "",
        "largest": _size(ordered[-1]) if ordered else "",
        "resolution": task.resolution,
        "buckets": {_size(size): count for size, count in trained.most_common()},
        "enlarged": {"count": len(enlarged), "names": enlarged[:MOST_NAMED]},
        "narrow": {"count": len(narrow), "names": narrow[:MOST_NAMED]},
    }


def _captions(captions: dict[str, str]) -> dict:
    missing = [name for name, text in captions.items() if not text]
    words = {name: len(text.split()) for name, text in captions.items() if text}
    cut = [name for name, text in captions.items() if least_tokens(text) > CLIP_TOKENS]
    tags = Counter(tag.casefold() for text in captions.values() for tag in set(tags_of(text)))
    told: dict = {"least": 0, "middle": 0, "most": 0, "lengths": {}}
    if words:
        told = {"least": min(words.values()), "middle": median(words.values()), "most": max(words.values()), "lengths": _lengths(list(words.values()))}
    same = _groups(defaultdict(list), ((text, name) for name, text in captions.items() if text))
    return {
        "missing": {"count": len(missing), "names": missing[:MOST_NAMED]},
        "words": told,
        "over_clip": {"count": len(cut), "names": cut[:MOST_NAMED], "tokens": CLIP_TOKENS},
        "same_caption": [{"caption": captions[names[0]][:120], "count": len(names), "names": names[:MOST_NAMED]} for names in same[:MOST_NAMED]],
        "tags": [{"tag": tag[:60], "count": count} for tag, count in tags.most_common(MOST_TAGS) if count > 1],
    }


def least_tokens(text: str) -> int:
    """At least how many tokens CLIP makes of a caption, with the two that it puts around it."""
    return len(PIECES.findall(text)) + 2


def _lengths(words: list[int]) -> dict[str, int]:
    """How many captions have about how many words."""
    steps = ((5, "1 to 5"), (10, "6 to 10"), (20, "11 to 20"), (40, "21 to 40"), (75, "41 to 75"))
    found = Counter(next((name for most, name in steps if count <= most), "over 75") for count in words)
    return {name: found[name] for name in (*(name for _, name in steps), "over 75") if found[name]}


def _groups(found: dict[object, list[str]], pairs) -> list[list[str]]:
    """The names that share a key, largest group first."""
    for key, name in pairs:
        found[key].append(name)
    return sorted((names for names in found.values() if len(names) > 1), key=lambda names: (-len(names), names))


def _alike(looks: dict[str, Look]) -> list[list[str]]:
    """Groups of pictures that look nearly the same, though their files differ; each group once, named by its first."""
    first = {}
    for name, seen in looks.items():
        first.setdefault(seen.digest, name)
    names = list(first.values())
    if len(names) < 2:
        return []
    shapes = numpy.array([looks[name].shape for name in names], dtype=numpy.uint64)
    colours = numpy.array([list(looks[name].colours) for name in names], dtype=numpy.float32)
    taken, groups = set(), []
    for index, name in enumerate(names):
        if index in taken:
            continue
        near = numpy.bitwise_count(shapes[index + 1 :] ^ shapes[index]) <= HASH_DISTANCE
        near &= numpy.abs(colours[index + 1 :] - colours[index]).max(axis=1) <= COLOUR_DISTANCE
        others = [int(place) + index + 1 for place in numpy.flatnonzero(near) if int(place) + index + 1 not in taken]
        if others:
            taken.update(others)
            groups.append([name, *(names[other] for other in others)])
    return groups


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"
