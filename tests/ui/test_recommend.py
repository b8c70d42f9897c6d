"""Recommended settings on the Train page: filled in with their reasons, and taken back whole."""

import gradio as gr
import pytest

from lora_studio import studio
from lora_studio.advice import PATHS
from lora_studio.spec import parse
from lora_studio.ui import forms
from lora_studio.ui.train import Train
from tests import tiny


@pytest.fixture
def page(workspace):
    found = Train(workspace)
    with gr.Blocks():
        found.build()
    return found


def given(page, values) -> dict:
    return {**forms.fill(page.form, values), page.plus: values["optim.lora_plus_ratio"] is not None, page.recommend.before: {}}


def test_they_fill_the_form_with_reasons_and_are_taken_back(page, base, chat_rows):
    before = given(page, studio.values_of(parse(tiny.tree(base, chat_rows))))
    *shown, undo, why, reasons, notes, kept = page.recommend.fill(before)
    after = before | {part: update for part, update in zip(page.recommend.fields, shown) if update != gr.skip()}
    assert after[page.form["method.rank"]] == "16" and after[page.form["schedule.epochs"]] == "3" and after[page.plus] is False
    assert page.spec(after).base.id == str(base) and page.spec(after).schedule.steps is None
    assert undo["visible"] and why["visible"] and all(row["reason"] for row in reasons["rows"]) and "cross-validation" in notes[0]["sentence"]
    # A second press keeps what was there before the first.
    assert page.recommend.fill(after | {page.recommend.before: kept})[-1] == kept
    *back, undo, _, _, _, empty = page.recommend.take_back(kept)
    assert after | {part: update for part, update in zip(page.recommend.fields, back) if update != gr.skip()} == before
    assert not undo["visible"] and empty == {}


def test_what_is_wrong_elsewhere_does_not_matter_and_a_base_that_is_not_there_is_a_sentence(page, monkeypatch):
    said = []
    monkeypatch.setattr(gr, "Warning", said.append)
    filled = given(page, studio.form_values("demo/pirate")) | {page.form["optim.lr"]: "fast", page.form["data"]: ""}
    assert page.recommend.fill(filled)[PATHS.index("optim.lr")] == "0.0006" and not said
    nothing = page.recommend.fill(filled | {page.form["base.id"]: "./not/there"})
    assert all(update == gr.skip() for update in nothing) and "not/there" in said[0]
