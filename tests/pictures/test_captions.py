"""Captions as the model sees them: order, draws and their seeds."""

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as some

from lora_studio.pictures import Picture, caption
from tests.pictures import task

fast = settings(max_examples=100, deadline=None, derandomize=True)


def said(text: str, seed: int = 0, trigger: str = "", dropped=None, **settings) -> str:
    return caption(Picture(Path("a.png"), "a.png", text, 64, 64, ""), task(**settings), trigger=trigger, seed=seed, dropped=dropped)


def test_trigger_then_prefix_then_caption():
    assert said("a dog") == "a dog"
    assert said("a dog", trigger="sks") == "sks, a dog"
    assert said("a dog", trigger="sks", prefix="photo of") == "sks, photo of a dog"
    # "trigger" of the task goes first, that of the folder second
    assert caption_of_both("a dog", "style", "sks") == "style, sks, a dog"
    assert said("", trigger="sks") == "sks"
    assert said("", trigger="sks", prefix="photo") == "sks, photo"
    assert said("") == ""


def caption_of_both(text: str, of_task: str, of_folder: str) -> str:
    return caption(Picture(Path("a.png"), "a.png", text, 64, 64, ""), task(trigger=of_task), trigger=of_folder)


def test_a_caption_that_begins_with_the_trigger_is_not_given_it_twice():
    assert said("sks, a dog", trigger="sks") == "sks, a dog"
    assert said("Sks dog on a lawn", trigger="sks") == "Sks dog on a lawn"
    assert said("sks, a dog", trigger="sks", prefix="photo of") == "sks, photo of a dog"
    assert said("sksy dog", trigger="sks") == "sks, sksy dog"
    assert caption_of_both("x", "sks", "sks") == "sks, x"
    for seed in range(20):
        assert said("sks, a, b, c", trigger="sks", shuffle_tags=True, seed=seed).count("sks") == 1


@fast
@given(some.lists(some.text("abcdefgh ", min_size=1).filter(str.strip), max_size=8), some.integers(0, 9), some.integers(0, 2**40))
def test_shuffling_keeps_the_first_tags_and_loses_none(tags, keep, seed):
    text, settings = ",".join(tags), {"shuffle_tags": True, "keep_tags": keep}
    found = [tag for tag in said(text, seed, **settings).split(", ") if tag]
    wanted = [tag.strip() for tag in tags]
    assert found[:keep] == wanted[:keep] and sorted(found) == sorted(wanted)
    assert said(text, seed, **settings) == ", ".join(found)


def test_kept_tags_are_counted_with_the_trigger_when_the_caption_has_it():
    found = {said("sks, a, b, c", seed, trigger="sks", shuffle_tags=True, keep_tags=1) for seed in range(60)}
    assert len(found) == 6 and all(text.startswith("sks, ") for text in found)


def test_orders_differ_between_seeds_and_captions_without_shuffling_stand_as_they_are():
    text = "a, b,c , d, e, f, g"
    assert len({said(text, seed, shuffle_tags=True) for seed in range(50)}) > 40
    assert said(text) == text


def test_dropout_drops_its_share_and_the_whole_text():
    drawn = [said("a dog", seed, trigger="sks", caption_dropout=0.25) for seed in range(4000)]
    assert set(drawn) == {"", "sks, a dog"}
    assert 0.22 < drawn.count("") / 4000 < 0.28
    assert all(said("a dog", seed, caption_dropout=0.9, dropped=False) == "a dog" for seed in range(20))
    assert said("a dog", dropped=True) == ""


def test_dropout_and_order_are_independent_draws():
    """The order of a caption that is shown does not depend on the dropout."""
    for seed in range(50):
        without, with_dropout = (said("a, b, c, d, e", seed, shuffle_tags=True, caption_dropout=rate) for rate in (0.0, 0.5))
        assert with_dropout in ("", without)
