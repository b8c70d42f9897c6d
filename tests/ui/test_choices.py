"""What makes no sense is greyed out on the Train page, and choosing it changes nothing, whichever event comes first."""

import gradio as gr
import pytest

from lora_studio import studio
from lora_studio.ui import choices, forms
from lora_studio.ui.train import Train


@pytest.fixture
def page(workspace):
    found = Train(workspace)
    with gr.Blocks():
        found.build()
    return found


def given(page, known=None, **changes) -> dict:
    values = studio.form_values("demo/pirate") | {path.replace("__", "."): value for path, value in changes.items()}
    return {**forms.fill(page.form, values), page.choices.known: known or {"reasons": {}, "values": {}}}


def looked(page, known=None, **changes) -> tuple[dict, dict]:
    """Updates by path, and what is remembered."""
    asked, part = given(page, known, **changes), page.choices
    remembered, reasons = part.look(asked)
    *updates, _ = part.draw({**asked, part.reasons: reasons, part.drawn: (known or {"reasons": {}})["reasons"]})
    return dict(zip(part.fields, updates)), remembered


def test_a_method_that_does_not_go_with_the_base_is_marked_with_the_reason_and_not_taken(page, monkeypatch):
    said = []
    monkeypatch.setattr(gr, "Warning", said.append)
    updates, known = looked(page, compute__quantize="4bit")
    labels = {value: label for label, value in updates["method.kind"]["choices"]}
    assert labels["loha"] == "✗ loha: does not work on a base in 4 bits" and labels["lora"] == "lora"
    assert page.choices.take("method.kind", "loha", known) == "lora" and "Set compute.quantize to 8bit or none" in said[0]
    assert page.start_afresh("loha", known) == gr.skip() and page.choices.take("method.kind", "vera", known) == gr.skip()
    # The other order: the form is looked at with the refused choice in it before the choice is answered.
    _, after = looked(page, known, compute__quantize="4bit", method__kind="loha")
    assert page.choices.take("method.kind", "loha", after) == "lora"
    _, settled = looked(page, after, compute__quantize="none", method__kind="loha")
    assert page.choices.take("method.kind", "loha", settled) == gr.skip() and settled["values"]["method.kind"] == "lora"
    assert looked(page, settled, compute__quantize="none", method__kind="loha")[1]["values"]["method.kind"] == "loha"


def test_a_switch_is_off_and_says_why_and_one_that_is_on_can_be_put_off(page):
    assert choices.drawn("method.dora", {True: "No."}, False) == gr.update(interactive=False, info="✗ No.")
    assert choices.drawn("method.dora", {True: "No."}, True)["interactive"] and choices.drawn("method.dora", {}, False)["info"] == forms.leaf("method.dora").help


def test_only_what_has_changed_is_drawn_anew(page):
    _, known = looked(page)
    updates, _ = looked(page, known)
    assert all(update == gr.skip() for update in updates.values())
    changed = looked(page, known, compute__quantize="4bit")[0]
    assert {path for path, update in changed.items() if update != gr.skip()} >= {"method.kind", "method.init"}
