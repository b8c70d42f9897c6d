"""Changes of captions: each does what its name says, twice does no more than once where that is the point, and bad text is refused."""

import pytest

from lora_studio.errors import DataError
from lora_studio.pictures import edits
from lora_studio.pictures.edits import Edit


def done(kind, caption, text="", **options) -> str:
    return edits.apply(Edit(kind, text, **options), caption)


@pytest.mark.parametrize(
    ("kind", "caption", "text", "options", "after"),
    [
        ("replace", "a cat, a Cat", "dog", {"find": "cat"}, "a dog, a Cat"),
        ("replace", "a cat, a Cat", "dog", {"find": "cat", "ignore_case": True}, "a dog, a dog"),
        ("replace", "1.5 (a|b)", r"\1", {"find": "(a|b)", "ignore_case": True}, r"1.5 \1"),
        ("replace", "a red cat", "", {"find": "red "}, "a cat"),
        ("prefix", "a cat", "photo of", {}, "photo of a cat"),
        ("prefix", "", "photo of ", {}, "photo of"),
        ("suffix", "a cat", ", at night", {}, "a cat, at night"),
        ("suffix", "a cat", "at night", {}, "a cat at night"),
        ("suffix", "", ", at night", {}, "at night"),
        ("remove_tag", "cat, Red , cat, dog", "red", {}, "cat, cat, dog"),
        ("remove_tag", "a red cat,dog", "red", {}, "a red cat,dog"),
        ("add_tag", "cat, dog", "sun", {}, "cat, dog, sun"),
        ("add_tag", "cat, Sun", "sun", {}, "cat, Sun"),
        ("add_tag", "", "sun", {}, "sun"),
        ("trigger", "a cat", "sks", {}, "sks, a cat"),
        ("trigger", "SKS, a cat", "sks", {}, "SKS, a cat"),
        ("trigger", "skspark", "sks", {}, "sks, skspark"),
        ("trigger", "", "sks,", {}, "sks"),
    ],
)  # fmt: skip
def test_a_change_does_what_its_name_says(kind, caption, text, options, after):
    assert done(kind, caption, text, **options) == after


@pytest.mark.parametrize("kind", ["add_tag", "trigger", "remove_tag"])
def test_tags_changed_twice_are_changed_once(kind):
    once = done(kind, "cat, dog", "dog" if kind == "remove_tag" else "sks")
    assert done(kind, once, "dog" if kind == "remove_tag" else "sks") == once


@pytest.mark.parametrize("change", [Edit("replace", "x"), Edit("prefix", "  "), Edit("add_tag", " , "), Edit("explode", "x")])
def test_a_change_without_words_is_refused(change):
    with pytest.raises(DataError):
        edits.check(change)


@pytest.mark.parametrize("caption", ["a\x00b", "a\ud800b", "x" * 70_000])
def test_a_caption_that_its_reader_would_refuse_is_refused(caption):
    with pytest.raises(DataError, match=r"a\.png was not kept"):
        edits.check_caption("a.png", caption)
