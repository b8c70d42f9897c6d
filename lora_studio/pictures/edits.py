"""Changes of captions: each a plain function of one caption, in a table by its name."""

import re
from dataclasses import dataclass

from lora_studio.errors import DataError
from lora_studio.pictures.labels import LONGEST
from lora_studio.pictures.picture import shown

MARKS = ",.;:!?) "


@dataclass(frozen=True)
class Edit:
    """One change, to be made to many captions: `text` is what is put in or taken out, `find` what is looked for by replace."""

    kind: str
    text: str = ""
    find: str = ""
    ignore_case: bool = False


def apply(edit: Edit, caption: str) -> str:
    """The caption after the change, without white space around it."""
    return EDITS[edit.kind](caption, edit).strip()


def check(edit: Edit) -> None:
    """Raise DataError when a change can have no effect on any caption."""
    if edit.kind not in EDITS:
        raise DataError("album.edit", kind=edit.kind, known=", ".join(EDITS))
    if not (edit.find if edit.kind == "replace" else edit.text.strip(" ,\n\t")):
        raise DataError("album.no_words", kind=edit.kind.replace("_", " "))


def check_caption(name: str, caption: str) -> str:
    """The caption as it is kept. Raises DataError for what the reader of pictures would refuse."""
    text = caption.replace("\r\n", "\n").replace("\r", "\n").strip()
    if "\x00" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DataError("album.caption", picture=shown(name), reason="it holds signs that are no text")
    if len(text.encode()) > LONGEST:
        raise DataError("album.caption", picture=shown(name), reason=f"it has more than {LONGEST >> 10} KB")
    return text


def in_words(edit: Edit, count: int) -> str:
    """What a change did, as a person would call it."""
    text, where = quoted(edit.text), pictures(count)
    if edit.kind == "replace":
        return f"replace {quoted(edit.find)} by {text} in {where}" if edit.text else f"delete {quoted(edit.find)} in {where}"
    verb = {"prefix": "put {} before", "suffix": "put {} after", "remove_tag": "remove the tag {} from", "add_tag": "add the tag {} to", "trigger": "put the trigger {} before"}[edit.kind]
    return f"{verb.format(text)} {where}"


def pictures(count: int) -> str:
    """A number of captions in words."""
    return "1 caption" if count == 1 else f"{count:,} captions"


def quoted(text: str) -> str:
    """The beginning of a text in quotes, on one line."""
    return f"“{shown(text.strip(), 40)}”"


def tags_of(caption: str) -> list[str]:
    """The parts of a caption that commas divide."""
    return [tag for part in caption.split(",") if (tag := part.strip())]


# ---- the changes


def replace(caption: str, edit: Edit) -> str:
    """Every occurrence of `find`, letter by letter, becomes `text`."""
    if not edit.ignore_case:
        return caption.replace(edit.find, edit.text)
    return re.sub(re.escape(edit.find), lambda _: edit.text, caption, flags=re.IGNORECASE)


def prefix(caption: str, edit: Edit) -> str:
    """`text` before the caption, with one space between."""
    return f"{edit.text.strip()} {caption}"


def suffix(caption: str, edit: Edit) -> str:
    """`text` after the caption; a space stands between unless it begins with a punctuation mark."""
    text = edit.text.strip()
    if not caption:
        return text.lstrip(MARKS)
    return f"{caption}{'' if text[0] in MARKS else ' '}{text}"


def remove_tag(caption: str, edit: Edit) -> str:
    """The caption without the comma-divided parts that are `text`, whatever their case. Where there is none, as it was."""
    wanted = edit.text.strip(" ,").casefold()
    kept = [tag for tag in tags_of(caption) if tag.casefold() != wanted]
    return caption if len(kept) == len(tags_of(caption)) else ", ".join(kept)


def add_tag(caption: str, edit: Edit) -> str:
    """`text` as the last comma-divided part, unless it is one already."""
    text = edit.text.strip(" ,")
    if text.casefold() in (tag.casefold() for tag in tags_of(caption)):
        return caption
    return f"{caption.rstrip(' ,')}, {text}" if caption else text


def trigger(caption: str, edit: Edit) -> str:
    """`text` as the first comma-divided part, unless the caption begins with it already."""
    text = edit.text.strip(" ,")
    following = caption[len(text) : len(text) + 1]
    if caption[: len(text)].casefold() == text.casefold() and not (following.isalnum() or following == "_"):
        return caption
    return f"{text}, {caption}" if caption else text


EDITS = {"replace": replace, "prefix": prefix, "suffix": suffix, "remove_tag": remove_tag, "add_tag": add_tag, "trigger": trigger}
