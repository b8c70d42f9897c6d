"""The search box without a browser: what is asked becomes a run, what it finds goes onto the sliders, and what is missing is a sentence."""

import json
from pathlib import Path

import gradio as gr
import pytest

from lora_studio import runs, search
from lora_studio.errors import SpecError
from lora_studio.jobs import queue
from lora_studio.spec.search import parse
from lora_studio.ui.mix import POOL, Mix
from lora_studio.ui.search import Search, in_words, read_pairs
from lora_studio.ui.search_curve import points_of
from tests.browser.made import adapter


@pytest.fixture
def page(workspace, monkeypatch):
    monkeypatch.setattr(queue, "pump", lambda: [])  # runs are queued, and started by nobody
    with gr.Blocks(), gr.Tabs(), gr.Tab("Blend"):
        mix, made = Mix(workspace, "mix-test"), Search(workspace)
        mix.build()
        made.build()
        made.connect(mix)
    return made


@pytest.fixture
def pair(home):
    return [adapter(home, "pirate", seed=1), adapter(home, "capitals", seed=2)]


def given(ids, by=None):
    return [ids, ids, *[1.0] * POOL, by or {}]


def test_a_search_is_a_run_that_is_found_again_and_its_weights_go_onto_the_sliders(page, pair, workspace):
    told, id, shown, said, stop, use = page.begin(
        "demo/pirate", "What is it? => A fox => or so.\n\n", 20.0, *given(pair, {pair[0]: {"mlp": 0.0}})
    )
    assert id == shown and "waits for its turn" in said[0]["sentence"] and stop["interactive"] and not use["interactive"]
    assert "the weights by block of the mix are left out" in told[0]["sentence"]
    spec = parse(runs.settings.read_tree(workspace.run_folder(id) / "spec.yaml"))
    assert spec.evaluations == 20 and [one.id for one in spec.adapters] == pair and spec.data[0].path == "demo/pirate"
    kept = Path(spec.data[1].path)
    assert kept.is_relative_to(workspace.root) and json.loads(kept.read_text()) == {
        "prompt": "What is it?",
        "completion": "A fox => or so.",
    }
    assert page.find("")[:2] == [id, id] and page.find("")[2]["open"], (
        "after a reload the newest search is there, unfolded while it goes on"
    )

    assert "found nothing yet" in page.take(id)[0][0]["sentence"]
    with runs.Events(workspace.run_folder(id)) as events:
        events.emit("started", steps=20, rows=3)
        for step, (what, weights, loss) in enumerate(
            (("base", [0, 0], 2.0), ("all", [1, 1], 1.5), ("search", [0.6, 1.1], 1.2), ("search", [1.4, 0], None)), 1
        ):
            events.emit("step", step=step, steps=20, what=what, weights=weights, **({} if loss is None else {"loss": loss}))
    said, *updates = page.take(id)
    assert (
        "The sliders have the weights" in said[0]["sentence"]
        and updates[0]["value"] == pair
        and [one["value"] for one in updates[3:5]] == [0.6, 1.1]
    )
    assert updates[-2] == {}, "no weights by block are left of the mix before"
    points = json.loads(points_of(page.result)([id]))
    assert (
        points["best"] == [0.6, 1.1]
        and points["names"] == ["pirate", "capitals"]
        and [loss for loss, *_ in points["tries"]] == [2.0, 1.5, 1.2, None]
    )
    assert points_of(page.result)(["nobody"]) == points_of(page.result)(None) == "{}"
    assert page.state(id)[2]["interactive"] and search.result(workspace, id)["loss"] == 1.2
    assert "taken out" in in_words(search.result(workspace, id) | {"state": "stopped", "reason": "It was taken out."})[0]["sentence"]


def test_what_is_missing_is_a_sentence_and_starts_nothing(page, pair, workspace):
    for asked, said in (
        (("", "", 40, *given(pair)), "Give both"),
        (("demo/pirate", "", 40, *given([])), "Give both"),
        (("demo/pirate", "", 3, *given(pair)), "3 tries are too few"),
        (("demo/nothing", "", 40, *given(pair)), "demo/nothing"),
        (("", "one => two\nthree", 40, *given(pair)), "Line 2 is no pair: three."),
        (("demo/pirate", "", None, *given(pair)), "evaluations"),
    ):
        told, *others = page.begin(*asked)
        assert said in told[0]["sentence"] and told[0]["level"] == "error" and others == [gr.skip()] * 5
    assert not workspace.run_folders() and page.find("")[:2] == [gr.skip()] * 2 and page.result("nobody") is None
    assert page.state("")[0] == [] and "no run" in page.end("nobody")[0][0]["sentence"]
    with pytest.raises(SpecError, match="Line 1 is no pair"):
        read_pairs("=> answer")
