"""Weights by block without a browser: boxes and lines say one and the same, and what means nothing is a sentence that changes nothing."""

import json

import gradio as gr
import pytest

from lora_studio.ui.layers import Layers
from lora_studio.ui.mix import POOL, Mix
from tests.browser.made import adapter


@pytest.fixture
def page(workspace, home):
    ids = [adapter(home, name, seed=seed, ends=("q_proj", "up_proj")) for seed, name in enumerate(("pirate", "capitals"))]
    with gr.Blocks():
        mix, layers = Mix(workspace, "mix-test"), Layers(workspace)
        mix.build()
        layers.build()
        layers.connect(mix)
    layers.ids = ids
    return layers


class Changed:
    """The updates of a change by what they are of."""

    def __init__(self, updates):
        assert len(updates) == 6 + POOL
        self.by, self.turn, self.sliders, (self.grid, self.lines, self.told, self.shown) = (
            updates[0],
            updates[1],
            updates[2 : 2 + POOL],
            updates[-4:],
        )

    @property
    def is_nothing(self):
        return self.by == self.turn == self.lines == gr.skip() and all(update == gr.skip() for update in self.sliders)


def given(page, by=None, weights=(1.0, 0.5)):
    return [page.ids, page.ids, *weights, *[1.0] * (POOL - 2), by or {}]


def boxes(grid: str) -> dict:
    return {block["name"]: (block["weight"], block["rest"]) for block in json.loads(grid)["blocks"]}


def sentence(entries):
    return " ".join(entry["sentence"] for entry in entries)


def test_a_box_is_a_line_and_a_line_is_a_box(page):
    a, b = page.ids
    done = Changed(page.set_blocks(a, {"model.layers.1": "0.25"}, *given(page)))
    assert done.by == {a: {"model.layers.1": 0.25}} and done.lines == "model.layers.1 = 0.25" and not done.told and done.turn != gr.skip()
    assert done.sliders[0] == gr.update(label="pirate · by block") and done.sliders[1] == gr.skip()
    assert boxes(done.grid)["model.layers.1"] == ("0.25", "1") and boxes(done.grid)["model.layers.0"] == ("", "1")
    text = "model.layers.1 = 0.25\nmodel.layers.2-3 = -0.5\nmlp=0"
    typed = Changed(page.write(text, done.shown, a, *given(page, done.by)))
    assert typed.by == {a: {"model.layers.1": 0.25, "model.layers.2-3": -0.5, "mlp": 0.0}} and typed.lines == gr.skip(), (
        "what is typed is left alone"
    )
    assert boxes(typed.grid)["model.layers.2"] == ("", "-0.5"), "an empty box says the weight that its block has"
    again = Changed(page.write(text, typed.shown, a, *given(page, typed.by)))
    assert again.is_nothing, "the same lines set nothing anew"
    # An emptied box takes its line away, and leaves the patterns and the other adapter.
    both = {**typed.by, b: {"mlp": 1.0}}
    emptied = Changed(page.set_blocks(a, {}, *given(page, both)))
    assert emptied.by == {a: {"model.layers.2-3": -0.5, "mlp": 0.0}, b: {"mlp": 1.0}} and "layers.1" not in emptied.lines
    cleared = Changed(page.clear(a, *given(page, both)))
    assert cleared.by == {b: {"mlp": 1.0}} and cleared.lines == "" and cleared.sliders[0] == gr.update(label="pirate")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "model.layers.10 = 0.5",
            "model.layers.10 means no layer of pirate, so its weight has no effect. Name one of its blocks: model.layers.0,",
        ),
        ("mlp = 0.5\nv_proj = 0", "v_proj means no layer of pirate"),
        ("model..layers = 1", "is no pattern of layers"),
        ("mlp = 3", "The weight of pirate in mlp is 3.0, but it must be a number from -2 to 2."),
        ("mlp = one", "The weight of pirate in mlp is 'one'"),
        ("mlp = nan", "The weight of pirate in mlp is nan"),
        ("mlp = 1\nmlp = 0", "mlp has two weights. Keep one of them."),
        ("mlp = 1\nmodel.lay", "model.lay says no weight yet."),
        ("= 1", "= 1 says no weight yet."),
    ],
)
def test_what_means_nothing_is_a_sentence_and_nothing_else_changes(page, text, said):
    done = Changed(page.write(text, [page.ids[0], {}], page.ids[0], *given(page)))
    assert said in sentence(done.told) and done.is_nothing and done.shown == gr.skip()


def test_a_box_out_of_range_and_lines_of_another_adapter_change_nothing(page):
    a, b = page.ids
    done = Changed(page.set_blocks(a, {"model.layers.0": "0.5", "model.layers.3": "9"}, *given(page)))
    assert "The weight of pirate in model.layers.3 is 9.0" in sentence(done.told) and done.is_nothing
    assert Changed(page.write("mlp = 0", [a, {}], b, *given(page))).is_nothing, "these lines are still those of the other"
    assert Changed(page.set_blocks("gone", {"model.layers.0": "1"}, *given(page))).is_nothing


def test_it_follows_the_mix_and_leaves_what_is_typed_alone(page):
    a, b = page.ids
    which, grid, lines, told, shown = page.follow(None, None, *given(page, {b: {"mlp": 0.5}}))
    assert which["value"] == a and [label for label, _ in which["choices"]] == ["pirate", "capitals"] and lines == "" and shown == [a, {}]
    which, grid, lines, told, shown = page.follow(shown, b, *given(page, {b: {"mlp": 0.5}}))
    assert lines == "mlp = 0.5" and boxes(grid)["model.layers.0"] == ("", "0.5") and shown == [b, {"mlp": 0.5}], "the rest is its slider's"
    _, grid, lines, told, _ = page.follow(shown, b, *given(page, {b: {"mlp": 0.5}}, weights=(1.0, -1.0)))
    assert lines == told == gr.skip() and boxes(grid)["model.layers.0"] == ("", "-1")
    assert page.follow(shown, b, [], [], *[1.0] * POOL, {})[1:] == ["", "", [], None]
    box, which, grid = page.open("model.layers.2", a, *given(page))
    assert box["open"] and which == a and json.loads(grid)["focus"] == "model.layers.2"
