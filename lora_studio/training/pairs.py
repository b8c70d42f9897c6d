"""Pairs for editing models: a picture, and the source it was made of. Which are complete, and which pair a sample picture is drawn from."""

from lora_studio import pictures
from lora_studio.errors import DataError
from lora_studio.pictures.picture import shown as in_words
from lora_studio.training.showing import Show, Shown


def refuse_halves(id: str, collected: list[pictures.Pictures]) -> None:
    """Raise DataError where a picture has no source."""
    for group in collected:
        halves = [item.name for item in group.items if item.source is None]
        if halves:
            raise DataError("image.no_source", id=id, count=len(halves), total=len(group.items), path=group.source.path, name=in_words(halves[0]))


def with_sources(shown: list[Shown]) -> list[Shown]:
    """What is shown, and the source of each, placed as it is."""
    return shown + [one.source for one in shown]


def for_sample(show: Show, prompt: str) -> Shown:
    """The pair whose source a sample picture is made of: the one with that caption, else the first held-out one, else the first."""
    known = [show.held_out(index) for index in range(len(show.judged))] or show.everything()
    return next((one for one in known if one.caption == prompt), known[0])
