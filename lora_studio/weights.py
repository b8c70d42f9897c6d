"""The weight of an adapter in a mix: one number, or numbers by layer pattern such as `{"": 0.6, "model.layers.0-3": 0.2, "mlp": 0}`.

A pattern is words with dots between, and means every layer whose name holds them as a run of whole words, anywhere: `layers.1` is in
`model.layers.1.mlp.up_proj` and never in `model.layers.10`. `*` stands for any one word, `0-3` for a number from 0 to 3. The key ""
is the weight of the layers that no pattern means; where it is absent that is 1.

Of several patterns that mean a layer the one wins that ends nearer the end of its name, because it means a smaller part: `mlp` wins
over `model.layers.0-3`. Of two that end at the same word the one with more words wins (`model.layers.0-3.mlp` over `mlp`); then the
one that fits fewer names (a word before a range, a narrow range before a wide one, a range before *); last the one later in the
alphabet. The order in which they are written never matters, because files of JSON do not keep it.
"""

import re
from collections.abc import Collection, Iterable
from functools import lru_cache

from lora_studio.errors import BlendError

Weight = float | dict[str, float]
LIMIT = 1e6
WORD = re.compile(r"[\w-]+|\*", re.ASCII)
RANGE = re.compile(r"(\d{1,6})-(\d{1,6})")
WIDEST = 10**7  # more than any range fits
SHOWN = 6  # blocks that a sentence names
# What a layer's name begins with where its block is not a numbered one but that whole part.
WHOLE = re.compile(r"(text_encoder(_\d+)?|mid_block)(?=\.|$)")


def is_number(value) -> bool:
    """Whether a value is a number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check(weight) -> Weight:
    """A weight as floats. Raises BlendError when a number or a pattern is none."""
    if not isinstance(weight, dict):
        return _number(weight)
    for pattern in weight:
        if pattern != "":
            _parsed(pattern)
    return {pattern: _number(one, pattern) for pattern, one in weight.items()}


def _number(value, pattern: str = "") -> float:
    if not is_number(value) or not abs(value) <= LIMIT:
        raise BlendError("blend.weight", weight=repr(value)[:40] + (f" of {pattern}" if pattern else ""), limit=f"{LIMIT:,.0f}")
    return float(value)


def by_layer(weight: Weight, names: Collection[str], label: str = "the adapter") -> dict[str, float]:
    """The weight of each of an adapter's layers. Raises BlendError when a pattern means none of them; `label` is what it is called."""
    weight = check(weight)
    if not isinstance(weight, dict):
        return dict.fromkeys(names, weight)
    idle = next((pattern for pattern in weight if pattern and not any(means(pattern, name) for name in names)), None)
    if idle is not None:
        known = blocks(names)
        more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
        raise BlendError("weights.idle", pattern=idle, name=label, blocks=", ".join(known[:SHOWN]) + more)
    return {name: of(weight, name) for name in names}


def of(weight: Weight, name: str) -> float:
    """The weight of the layer of that name, whether or not an adapter has it."""
    if not isinstance(weight, dict):
        return weight
    found = [(place, pattern) for pattern in weight if pattern and (place := _place(pattern, name))]
    if not found:
        return weight.get("", 1.0)
    return weight[max((place, *_specific(pattern), pattern) for place, pattern in found)[-1]]


def acts(weight: Weight) -> bool:
    """Whether any layer can have a weight other than 0."""
    return any([weight.get("", 1.0), *weight.values()]) if isinstance(weight, dict) else bool(weight)


def times(weight: Weight, factor: float) -> Weight:
    """A weight multiplied, in every layer."""
    if not isinstance(weight, dict):
        return weight * factor
    return {pattern: one * factor for pattern, one in {"": 1.0, **weight}.items()}


def plus(left: Weight, right: Weight, names: Iterable[str]) -> Weight:
    """Two weights of the same adapter added, for layers of these names."""
    if not isinstance(left, dict) and not isinstance(right, dict):
        return left + right
    # Where a name stands within another, both end at the same word and the longer one wins, so each means its own layer.
    return {name: of(left, name) + of(right, name) for name in names}


def in_words(weight: Weight) -> str:
    """A weight in a few words: 0.6, or `0.6, model.layers.0-3 0.2`; of many patterns only how many there are. What somebody wrote into a
    card by hand is shown as it is."""
    if not isinstance(weight, dict):
        return f"{weight:g}" if is_number(weight) else str(weight)[:40]
    told = [f"{pattern} {in_words(one)}" for pattern, one in sorted(weight.items()) if pattern]
    told = told if len(told) <= 3 else [f"{len(told)} by layer"]
    return ", ".join([in_words(weight.get("", 1.0)), *told])


def blocks(names: Iterable[str]) -> list[str]:
    """The blocks that layers lie in, each a pattern, in the order in which a model goes through them: the words up to the first number
    (model.layers.3, down_blocks.1, single_transformer_blocks.12); `mid_block` and each text encoder whole; other layers by their names."""
    return sorted({_block(name) for name in names}, key=_order)


def _block(name: str) -> str:
    whole = WHOLE.match(name)
    if whole:
        return whole[0]
    words = name.split(".")
    number = next((at for at, word in enumerate(words) if word.isdigit()), len(words) - 1)
    return ".".join(words[: number + 1])


def _order(block: str) -> tuple:
    """Text encoders, what comes in, the blocks, FLUX's single blocks after its double ones, what goes out."""
    last, is_numbered = block.rsplit(".", 1)[-1], block.rsplit(".", 1)[-1].isdigit() or block == "mid_block"
    if block.startswith("text_encoder"):
        stage = 0
    elif is_numbered:
        stage = 3 if block.startswith("single_") else 2
    else:
        stage = 1 if "embed" in block or last.endswith("_in") or last in ("wte", "wpe") else 4
    return stage, [(int(word), "") if word.isdigit() else (-1, word) for word in block.split(".")]


# ---- patterns


def means(pattern: str, name: str) -> bool:
    """Whether a pattern means the layer of that name. Raises BlendError when it is no pattern."""
    return bool(_place(pattern, name))


@lru_cache(maxsize=1 << 16)
def _place(pattern: str, name: str) -> int:
    """How many words of the name come up to the end of the last run that the pattern means; 0 where there is none."""
    wanted = _parsed(pattern)
    if any(word not in name for word in wanted if isinstance(word, str) and word != "*"):
        return 0  # nearly always, with a pattern for each of many blocks
    there = name.split(".")
    ends = range(len(there), len(wanted) - 1, -1)
    return next((end for end in ends if all(map(_fits, wanted, there[end - len(wanted) : end]))), 0)


def _fits(wanted: str | tuple[int, int], word: str) -> bool:
    if isinstance(wanted, tuple):
        return word.isascii() and word.isdigit() and wanted[0] <= int(word) <= wanted[1]
    return wanted in ("*", word)


@lru_cache(maxsize=4096)
def _parsed(pattern: str) -> tuple[str | tuple[int, int], ...]:
    """The words of a pattern, ranges as their two numbers. Raises BlendError."""
    found = []
    for word in pattern.split(".") if isinstance(pattern, str) else [""]:
        ends = RANGE.fullmatch(word)
        if not WORD.fullmatch(word) or (ends and int(ends[1]) > int(ends[2])):
            raise BlendError("weights.pattern", pattern=repr(pattern)[:60])
        found.append((int(ends[1]), int(ends[2])) if ends else word)
    return tuple(found)


def _specific(pattern: str) -> tuple[int, int]:
    """How much a pattern says: how many words it has, and how few others they fit."""
    words = _parsed(pattern)
    return len(words), -sum(WIDEST if word == "*" else word[1] - word[0] + 1 if isinstance(word, tuple) else 0 for word in words)
