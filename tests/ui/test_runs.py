"""The Runs page: a question that is asked stays until it is answered or the run is over, whatever else comes in."""

import gradio as gr
import pytest

from lora_studio import durable, runs
from lora_studio.spec import parse
from lora_studio.ui.runs import Runs


@pytest.fixture
def page(workspace):
    found = Runs(workspace)
    with gr.Blocks():
        found.build()
    return found


def box_of(page, ticked: list):
    return next(update for component, update in zip(page.shown, ticked[1:]) if component is page.box)


def test_a_tick_that_was_sent_before_the_question_does_not_take_it_away(page, workspace):
    folder = runs.create(workspace, parse({"data": [{"path": "x"}]}))
    runs.note(folder, "started", steps=9, rows=1, device="cpu", precision="float32", fast="plain", targets=["q_proj"])
    with durable.Lock(folder / "run.lock"):  # as a worker holds it while it lives
        assert box_of(page, page.tick(folder.name, False, None)) == gr.skip()
        assert box_of(page, page.tick(folder.name, True, None))["visible"] is True
        assert page.open(folder.name)[len(page.opened) - 2]["visible"] is False, "another run was opened"
        # So does one that the page sent while it was loaded.
        landed = dict(zip(map(id, page.opened), page.land(None)))
        assert landed[id(page.box)] == landed[id(page.asking)] == gr.skip() and landed[id(page.chosen)] == folder.name
    runs.note(folder, "done", step=9, steps=9)
    assert box_of(page, page.tick(folder.name, True, None))["visible"] is False


def test_a_tick_after_which_nothing_happened_draws_nothing(page, workspace):
    folder = runs.create(workspace, parse({"data": [{"path": "x"}]}))
    seen = page.tick(folder.name, False, None)[0]
    assert all(update == gr.skip() for update in page.tick(folder.name, False, seen)[1:])
