"""The form: its widgets are exactly the settings of the spec, and it gives back what was put into it."""

import subprocess
import sys

import gradio as gr
import pytest

from lora_studio import presets, settings, studio
from lora_studio.spec import parse
from lora_studio.ui import forms


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    from lora_studio.ui.train import Train
    from lora_studio.workspace import Workspace

    with gr.Blocks():
        train = Train(Workspace(tmp_path_factory.mktemp("home")))
        train.build()
    return train


def test_widgets_are_exactly_the_settings(pages):
    assert set(pages.form) == {leaf.path for leaf in settings.leaves()}
    assert all(component.info for component in pages.form.values())


@pytest.mark.parametrize("name", [preset.name for preset in presets.available()])
def test_every_preset_goes_through_the_form_unchanged(pages, name):
    values = studio.form_values(name)
    values["data"] = values["data"] or [{"path": "a b", "weight": 2}]
    shown = forms.fill(pages.form, values)
    spec = studio.spec_of_values(forms.collect(pages.form, shown))
    assert spec == parse({"data": values["data"], **presets.find(name).tree()})
    again = forms.fill(pages.form, studio.values_of(spec))
    assert studio.spec_of_values(forms.collect(pages.form, again)) == spec


def test_small_numbers_are_not_rounded(pages):
    leaf = forms.leaf("optim.lr")
    for value in (2e-4, 1.23456789e-5, 0.1 + 0.2):
        assert float(forms.read(leaf, forms.show(leaf, value))) == value


def test_what_cannot_be_read_is_a_sentence(pages):
    shown = forms.fill(pages.form, {**studio.form_values("demo/pirate"), "data": [{"path": "x"}]})
    shown[pages.form["data"]] = "- path: [x"
    assert pages.assess(shown, deep=False)[1][0]["sentence"].startswith("Sources is not readable as YAML")
    shown[pages.form["data"]] = ""
    assert pages.assess(shown, deep=False)[1][0]["sentence"].startswith("data is []; it needs at least 1")


def test_the_pages_leave_torch_alone():
    code = "import sys; from lora_studio import ui; ui.build(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
