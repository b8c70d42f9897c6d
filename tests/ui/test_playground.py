"""The Playground without a browser: its sides, what each side has heard, and the real bench behind its answers."""

import os
import signal

import gradio as gr
import pytest

from lora_studio import durable, runs
from lora_studio.errors import BenchError
from lora_studio.jobs import bench, queue
from lora_studio.spec import parse
from lora_studio.ui.answers import foot
from lora_studio.ui.mix import POOL
from lora_studio.ui.playground import Playground, bench_in_words, history, whole
from tests.browser.made import adapter


@pytest.fixture
def page(workspace):
    with gr.Blocks(), gr.Tabs(), gr.Tab("Playground"):
        made = Playground(workspace)
        made.build()
    yield made
    bench.stop()


@pytest.fixture
def pair(home):
    return [adapter(home, "pirate", seed=1, size=0.5), adapter(home, "capitals", seed=2, size=0.5)]


def pool(*weights):
    return [*weights, *[1.0] * (POOL - len(weights))]


def asking(page, prompt, *, talk=(), sides=("base",), base="demo-text", held=(), weights=(), longest=12, chatml=False, seed=0):
    """What the page hands over with a prompt."""
    mix = dict(zip(page.mix.inputs, [list(held), list(held), *pool(*weights), {}]))
    settings = {page.seed: seed, page.temperature: 0.0, page.top_p: 1.0, page.longest: longest, page.chatml: chatml}
    return {page.prompt: prompt, page.talk: list(talk), page.base: base, page.sides: list(sides), **settings, **mix}


def last(page, *words, **more):
    """All updates of an answer, the later over the earlier."""
    found = {}
    for update in page.speak(asking(page, *words, **more)):
        found |= update
    return found


def test_sides_are_the_base_all_together_and_each_alone(page, pair):
    assert page.sides_of([]) == [("Base", "base")]
    assert page.sides_of(pair) == [("Base", "base"), ("All together", "all"), ("pirate alone", pair[0]), ("capitals alone", pair[1])]
    parts = [[pair[0], 1.0], [pair[1], -0.5]]
    assert page.asked(["base", "all", pair[1], "gone"], parts) == {"base": [], "all": parts, pair[1]: [[pair[1], -0.5]]}
    for sides in ([], None, ["gone"]):
        with pytest.raises(BenchError, match="There are 0 sides to show, and it must be 1 to 4."):
            page.asked(sides, parts)
    with pytest.raises(BenchError):
        page.asked(["all"], [])


def test_sides_and_base_follow_the_pick(page, pair):
    base, sides = page.follow("x", ["base"], pair, pair, *pool())
    assert base == "demo-text" and sides["value"] == ["base", "all"]
    _, sides = page.follow("x", ["base", pair[0], pair[1]], [pair[0]], [pair[0]], *pool())
    assert sides["value"] == ["base", pair[0]], "a side that is gone goes, the others stay"
    base, sides = page.follow("mine", ["base", "all"], [], [], *pool())
    assert base == gr.skip() and sides["value"] == ["base"] and sides["choices"] == [("Base", "base")]
    updates = page.open([[pair[0], 0.5]])
    assert len(updates) == len(page.opened) and updates[-4] == "demo-text" and updates[-3]["value"] == ["base", "all"]
    assert page.open([])[-3]["value"] == ["base"]


def test_each_side_remembers_what_it_heard_and_said(page):
    talk = [
        {"prompt": "one", "answers": [{"side": "base", "text": "a", "lost": False}, {"side": "all", "text": "b", "lost": False}]},
        {"prompt": "two", "answers": [{"side": "all", "text": "", "lost": False}]},
        {"prompt": "three", "answers": [{"side": "base", "text": "half", "lost": True}, {"side": "all", "text": "c", "lost": False}]},
    ]
    assert [message["content"] for message in history(talk, "base")] == ["one", "a"]
    assert [message["content"] for message in history(talk, "all")] == ["one", "b", "three", "c"]
    assert history(talk, "new") == [] and [message["role"] for message in history(talk, "base")] == ["user", "assistant"]


def test_answers_of_a_real_bench_and_what_is_said_of_them(page, pair):
    weights = (1.5, -1.0)
    first = last(page, "What color is the fox?", sides=["base", "all", pair[0]], held=pair, weights=weights)
    base, mixed, alone = first[page.talk][0]["answers"]
    assert base["foot"].endswith("all adapters off") and mixed["foot"].endswith("pirate × 1.5, capitals × -1") and alone["foot"].endswith("pirate × 1.5")
    assert base["label"] == "Base" and alone["label"] == "pirate alone" and len({base["text"], mixed["text"], alone["text"]}) == 3
    assert first[page.prompt] == "" and first[page.state]["timing"].startswith("Weights applied in ") and first[page.token] == ""
    assert first[page.state]["bench"] == "The bench holds demo-text on cpu, with 2 adapters at hand."
    loads = bench.status()["loads"]

    off = last(page, "What color is the fox?", sides=["base", "all"], held=pair, weights=(0.0, 0.0))[page.talk][0]["answers"]
    assert off[0]["text"] == off[1]["text"] == base["text"] and off[1]["foot"].endswith("all adapters off")
    second = last(page, "And the bear?", talk=first[page.talk], sides=["base", "all"], held=pair, weights=weights)
    assert [turn["prompt"] for turn in second[page.talk]] == ["What color is the fox?", "And the bear?"]
    assert bench.status()["loads"] == loads
    alone_again = last(page, "And the bear?", sides=["base"])[page.talk][0]["answers"][0]["text"]
    messages = [*history(first[page.talk], "base"), {"role": "user", "content": "And the bear?"}]
    meant = list(bench.stream("answer", base="demo-text", messages=messages, longest=12))[-1]["sides"]["answer"]["text"]
    assert second[page.talk][1]["answers"][0]["text"] == meant and isinstance(alone_again, str)


def test_an_error_is_a_sentence_and_prompt_and_history_stay(page, pair):
    talk = [{"prompt": "one", "answers": [{"side": "base", "label": "Base", "text": "a", "foot": "", "lost": False}]}]
    for more, sentence in (
        ({"base": "nope"}, "nope"),
        ({"sides": []}, "There are 0 sides to show"),
        ({"seed": None}, "seed is None, but it must be a whole number"),
        ({"held": ["nobody"], "sides": ["all"]}, "There is no adapter nobody"),
        ({"held": pair, "weights": (None,), "sides": ["all"]}, "The weight of pirate is empty"),
    ):
        found = last(page, "Hello?", talk=talk, **more)
        assert sentence in found[page.told][0]["sentence"] and found[page.prompt] == "Hello?" and found[page.talk] == talk
        assert found[page.send]["interactive"] and not found[page.stop]["interactive"]
    assert "There is nothing to answer" in last(page, "  \n", talk=talk)[page.told][0]["sentence"]


def test_stop_ends_the_answer_and_keeps_what_was_said(page, home):
    loud = adapter(home, "loud", seed=5, size=1.0)  # it drives the base to where it never ends a sentence
    updates = page.speak(asking(page, "Hello?", sides=["all"], held=[loud], weights=(2.0,), longest=480))
    token, seen = next(updates)[page.token], {}
    for update in updates:
        seen |= update
        if seen[page.answers]["turns"][-1]["answers"][0]["text"]:
            page.stops.add(token)
    said = seen[page.talk][-1]["answers"][0]
    assert said["text"] and said["foot"] == "stopped" and not page.stops
    assert seen[page.answers]["busy"] == "false" and page.prompt not in seen and seen[page.send]["interactive"]
    assert [message["content"] for message in history(seen[page.talk], "all")] == ["Hello?", said["text"]]


def test_a_run_that_needs_the_device_and_a_bench_that_dies_are_sentences(page, home, workspace):
    loud = adapter(home, "loud", seed=5, size=1.0)
    before = last(page, "What color is the fox?")[page.talk]
    folder = runs.create(workspace, parse({"name": "busy", "data": [{"path": "x"}]}))
    assert bench.make_room(folder, device="cpu")
    assert page.held()["bench"].startswith(f"The run {folder.name} needs the device (cpu)")
    with durable.Lock(queue.device_lock("cpu")), durable.Lock(folder / "run.lock"):
        runs.note(folder, "started", device="cpu")
        refused = last(page, "And now?", talk=before)
    assert f"The run {folder.name} needs the device" in refused[page.told][0]["sentence"]
    assert refused[page.prompt] == "And now?" and refused[page.talk] == before
    runs.note(folder, "done")

    seen, killed = {}, False
    for update in page.speak(asking(page, "And now?", talk=before, sides=["base", "all"], held=[loud], weights=(2.0,), longest=400)):
        seen |= update
        if not killed and seen[page.answers]["turns"][-1]["answers"][1]["text"]:
            os.kill(bench.status()["pid"], signal.SIGKILL)
            killed = True
    assert "The bench ended before it had answered." in seen[page.told][0]["sentence"] and seen[page.prompt] == "And now?"
    broken = seen[page.talk][-1]["answers"]
    assert seen[page.talk][:-1] == before and {answer["foot"] for answer in broken} == {"broken off"} and history(seen[page.talk], "all") == []
    again = last(page, "And now?", talk=seen[page.talk])
    assert again[page.talk][-1]["answers"][0]["text"] and again[page.told][0]["level"] == "note"


def test_words_for_the_bench_and_for_the_foot():
    assert bench_in_words({"state": "off"}) == "The bench is off; the first answer starts it."
    assert bench_in_words({"state": "empty", "note": "The run x needs the device."}) == "The run x needs the device."
    assert bench_in_words({"state": "empty", "note": ""}) == "The bench holds no model; the next answer loads one."
    assert bench_in_words({"state": "loading", "base": "b", "note": ""}) == "The bench is loading b."
    assert foot({"tokens": 1, "ended": "longest", "active": []}, {}) == "1 token · cut at the longest answer · all adapters off"
    assert foot({"tokens": 2, "ended": "end", "active": [["/x/adapter", -0.5]]}, {"/x/adapter": "pirate"}) == "2 tokens · ended by itself · pirate × -0.5"
    assert [whole(value) for value in (3.0, 2, 1.5, None)] == [3, 2, 1.5, None]


def test_an_image_model_draws_with_settings_of_its_own(page, workspace):
    from lora_studio import studio

    words, brush, grid, width, height, guidance, source = page.suit("demo-image")
    assert not source["visible"] and page.suit("black-forest-labs/FLUX.1-Kontext-dev")[-1]["visible"]
    assert (words["visible"], brush["visible"], width["value"], height["value"], guidance["value"]) == (False, True, 64, 64, 2.0)
    assert [update["visible"] for update in page.suit("demo-text")[:2]] == [True, False]
    brushes = {page.picture_seed: 0, page.steps: 2, page.guidance: 2.0, page.width: 64, page.height: 64}
    found = {}
    for update in page.speak(asking(page, "a red star", base="demo-image") | brushes):
        found |= update
    (answer,) = found[page.talk][-1]["answers"]
    assert answer["foot"] == "all adapters off" and not answer["text"]
    assert studio.picture(workspace, answer["picture"].rpartition("/")[2]).is_file()
    for update in page.speak(asking(page, "a red star", base="demo-image") | {**brushes, page.width: 33}):
        found |= update
    assert "width is 33, but it must be a multiple of 8" in found[page.told][0]["sentence"] and found[page.prompt] == "a red star"
