"""A caption as it is shown to the model: trigger, prefix, shuffled tags, and at times none at all."""

from random import Random

from lora_studio.pictures.picture import Picture
from lora_studio.spec import ImageTask


def caption(picture: Picture, task: ImageTask, *, trigger: str = "", prior: bool = False, seed: int = 0, dropped: bool | None = None) -> str:
    """The text a picture is trained with: `trigger, prefix caption`, the same for the same seed.

    A class picture (`prior`) gets neither the task's trigger nor its prefix, which are the subject's, and task.prior_prompt where it
    has no caption; the token of its own kohya folder (1_dog) stays.

    `trigger` is that of the picture's folder and follows the task's own. A caption that begins with a trigger is not
    given it twice. `dropped` says whether the text is left away; None draws it from `seed` at task.caption_dropout.
    """
    # Each draw has a stream of its own, so that one setting never changes another's luck.
    if Random(f"drop {seed}").random() < task.caption_dropout if dropped is None else dropped:
        return ""
    text, keep, triggers = picture.caption, task.keep_tags, _triggers("" if prior else task.trigger or "", trigger)
    if prior and not text and not triggers:
        text = (task.prior_prompt or "").strip()
    for first in triggers:
        head, _, rest = text.partition(",")
        if head.strip().casefold() == first.casefold():
            text, keep = rest.strip(), max(0, keep - 1)
    if task.shuffle_tags:
        text = _shuffled(text, keep, seed)
    words = " ".join(part for part in ("" if prior else (task.prefix or "").strip(), text) if part)
    for first in reversed(triggers):
        if not _begins(words, first):
            words = f"{first}, {words}" if words else first
    return words


def _triggers(*words: str) -> list[str]:
    found = [word.strip() for word in words if word.strip()]
    return found[:1] if len(found) == 2 and found[0].casefold() == found[1].casefold() else found


def _begins(text: str, word: str) -> bool:
    following = text[len(word) : len(word) + 1]
    return text[: len(word)].casefold() == word.casefold() and not (following.isalnum() or following == "_")


def _shuffled(text: str, keep: int, seed: int) -> str:
    """The comma-divided parts of a caption in another order, all but the first `keep`."""
    tags = [tag.strip() for tag in text.split(",") if tag.strip()]
    rest = tags[keep:]
    Random(f"tags {seed}").shuffle(rest)
    return ", ".join([*tags[:keep], *rest])
