"""The try-out without a browser: a newer wish makes an older answer void, and what is shown says what it was made of."""

import threading
import time

import gradio as gr
import pytest

from lora_studio.jobs import bench
from lora_studio.ui.mix import POOL, Mix
from lora_studio.ui.tryout import STALE, Tryout, Turn
from tests.browser.made import adapter


@pytest.fixture
def page(workspace):
    with gr.Blocks(), gr.Tabs(), gr.Tab("Blend"):
        made, mix = Tryout(workspace), Mix(workspace, "mix-blend")
        mix.build()
        rank = gr.Textbox("")
        made.build()
        made.connect(mix, rank)
    yield made
    bench.stop()


@pytest.fixture
def pair(home):
    return [adapter(home, "pirate", seed=1, rank=3, size=0.5), adapter(home, "capitals", seed=2, rank=5, size=0.5)]


def given(page, pair, *weights, turn, prompt="What color is the fox?", live=False, rank="", against="base", longest=12, **more):
    mix = dict(zip(page.mix.inputs, [list(pair), list(pair), *weights, *[1.0] * (POOL - len(weights)), {}]))
    return {page.turn: turn, page.live: live, page.prompt: prompt, page.rank: rank, page.against: against, page.seed: 0, page.longest: longest, page.steps: 20, **mix, **more}


def last(page, updates):
    """The answers by their sides and the sentences, as they stand at the end; and whether the page is at rest."""
    shown, told = {"turns": []}, []
    for update in updates:
        shown = shown if update[page.answers] == gr.skip() else update[page.answers]
        told = update.get(page.told, told)
    return {one["side"]: one for turn in shown["turns"] for one in turn["answers"]}, " ".join(one["sentence"] for one in told), shown.get("busy") == "false"


def test_the_mix_answers_beside_what_it_is_held_against_and_says_how_exact_it_is(page, pair):
    turn = Turn()
    sides, told, rests = last(page, page.answer(given(page, pair, 1.0, -0.5, turn=turn)))
    assert list(sides) == ["mix", "base"] and sides["mix"]["label"] == "The mix" and sides["base"]["label"] == "The base" and rests
    assert sides["mix"]["foot"].endswith("pirate × 1, capitals × -0.5") and sides["base"]["foot"].endswith("all adapters off") and "the exact mix" in told
    small, told, _ = last(page, page.answer(given(page, pair, 1.0, -0.5, turn=turn, rank="2", against=pair[0])))
    assert small["mix"]["label"] == "The mix at rank 2" and small["mix"]["foot"].endswith("the mix at rank 2 × 1") and "This was the mix at rank 2, true error" in told
    assert small[pair[0]]["label"] == "pirate alone" and small[pair[0]]["foot"].endswith("pirate × 1") and small["mix"]["text"] != sides["mix"]["text"]


def test_a_change_makes_an_older_answer_void_and_says_so_where_it_is_not_tried_again(page, pair):
    turn = Turn()
    old, new = given(page, pair, 1.0, 1.0, turn=turn, longest=400), given(page, pair, 0.5, 1.0, turn=turn)
    answering = page.answer(old)
    next(answering)
    assert page.want(new) == gr.skip(), "nothing is shown yet that could be stale"
    began = list(answering)
    assert len(began) <= 2 and began[-1][page.told] == [STALE] and turn.shown is None, "the rest of the answer was not waited for"
    last(page, page.answer(new))
    assert turn.shown is not None and page.want(new) == turn.told and page.want({**new, page.rank: "2"}) == [STALE]
    assert page.want({**new, page.rank: "2", page.live: True}) == gr.skip()
    # Two who ask the same: only the later one's answer is shown.
    first = page.answer(old)
    next(first)
    second = page.answer({**old, page.longest: 6})
    next(second)
    assert all(update[page.answers] == gr.skip() or update[page.answers]["busy"] == "false" for update in first)
    assert last(page, second)[2]


def test_it_follows_only_where_that_is_wished_for_and_once_the_mix_rests(page, pair):
    turn = Turn()
    still = [{page.answers: gr.skip(), page.told: gr.skip()}]
    assert list(page.follow(given(page, pair, turn=turn))) == still
    assert list(page.follow(given(page, pair, turn=turn, live=True, prompt=" "))) == still
    assert list(page.follow(given(page, [], turn=turn, live=True))) == still
    moving = page.follow(given(page, pair, 0.4, turn=turn, live=True))
    assert [next(moving)] == still
    following, began = iter(moving), time.monotonic()
    # The slider moves on while it waits: nothing is asked for that weight.
    threading.Timer(0.1, lambda: page.want(given(page, pair, 0.3, turn=turn, live=True))).start()
    assert list(following) == [] and time.monotonic() - began < 20 and bench.status()["state"] == "off"
    sides, _, _ = last(page, page.follow(given(page, pair, 0.3, turn=turn, live=True)))
    assert sides["mix"]["foot"].endswith("pirate × 0.3, capitals × 1")
    assert list(page.follow(given(page, pair, 0.3, turn=turn, live=True))) == still, "the answer is there already"


def test_what_cannot_be_tried_is_a_sentence(page, pair, home):
    other = adapter(home, "elsewhere", seed=3, base="someone/other-model")
    for more, sentence in (({"prompt": ""}, "There is nothing to answer"), ({"rank": "x"}, "The rank 'x' is not a whole number")):
        _, told, rests = last(page, page.answer(given(page, pair, turn=Turn(), **more)))
        assert sentence in told and rests
    for ids, sentence in (([], "There is no mix to try yet"), (["nobody"], "There is no adapter nobody"), ([pair[0], other], "Blend adapters of the same base only")):
        _, told, rests = last(page, page.answer(given(page, ids, turn=Turn())))
        assert sentence in told and rests


def test_choices_and_settings_follow_the_pick(page, pair):
    against, longest, steps = page.suit(pair[0], pair, pair, *[1.0] * POOL)
    assert [key for _, key in against["choices"]] == ["base", *pair, ""] and against["value"] == pair[0] and longest["visible"] and not steps["visible"]
    against, *_ = page.suit(pair[0], [pair[1]], [pair[1]], *[1.0] * POOL)
    assert against["value"] == "base"
