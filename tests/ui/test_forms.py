"""The form: its widgets are exactly the settings of the spec, and it gives back what was put into it."""

import subprocess
import sys

import gradio as gr
import pytest

from lora_studio import presets, settings, studio
from lora_studio.spec import methods, parse
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


def test_lists_of_numbers_stand_on_one_line_and_a_word_or_a_number_is_either():
    edges, shift = forms.leaf("task.more_resolutions"), forms.leaf("task.shift")
    assert forms.show(edges, [512, 768]) == "512, 768" and forms.show(edges, []) == ""
    for text in ("512, 768", "[512, 768]", " 512,768 "):
        assert parse({"data": [{"path": "x"}], "task": {"kind": "image", "resolution": 1024, "more_resolutions": forms.read(edges, text)}}).task.more_resolutions == [512, 768]
    for text, wanted in (("", "auto"), ("auto", "auto"), ("resolution", "resolution"), ("3", 3.0), ("2.5", 2.5)):
        assert parse({"data": [{"path": "x"}], "task": {"kind": "image", "shift": forms.read(shift, text)}}).task.shift == wanted
    assert [forms.show(shift, value) for value in ("auto", 3.0)] == ["auto", "3"]


def test_what_only_pictures_or_only_words_have_a_use_for_is_hidden_from_the_other_and_left_out(pages):
    for kind, hidden, shown in (("chat", "compute.block_swap", "compute.packing"), ("image", "output.sample_tokens", "compute.compile")):
        told = forms.adapt(pages.form, kind, "lora")
        assert told[pages.form[hidden]]["visible"] is False and told[pages.form[shown]]["visible"] is True
    values = studio.form_values("demo/pirate") | {"compute.encoders": "4bit", "compute.compile": True}
    assert studio.spec_of_values(values) == studio.spec_of_values(studio.form_values("demo/pirate"))
    values = studio.form_values("demo/stripes") | {"compute.packing": False, "output.sample_tokens": 7}
    assert studio.spec_of_values(values) == studio.spec_of_values(studio.form_values("demo/stripes"))


def test_the_switch_of_lora_plus_goes_by_the_kind_of_rows_there_and_back(pages):
    form = pages.form
    for kind, ratio, lower in (("chat", "16", "2.5e-05"), ("image", "4", "0.0001")):
        given = {form["task.kind"]: kind, form["optim.lora_plus_ratio"]: "", form["optim.lr"]: "2e-4", pages.plus: True}
        assert pages.switch(given) == (lower, ratio)
        assert pages.switch({**given, form["optim.lr"]: lower, pages.plus: False}) == ("0.0002", "")


def test_each_kind_of_adapter_shows_its_own_settings_at_their_own_defaults(pages):
    form = pages.form
    told = forms.adapt(form, "chat", "vera")
    assert told[form["method.d_initial"]]["visible"] and not told[form["method.alpha"]]["visible"] and not told[form["optim.lora_plus_ratio"]]["visible"]
    assert forms.start_afresh(form, "vera")[form["method.rank"]] == "256" and forms.start_afresh(form, "lora")[form["method.rank"]] == "16"
    for kind in methods.KINDS:
        values = studio.form_values("demo/pirate") | methods.defaults(kind) | {"method.kind": kind}
        assert studio.spec_of_values(values).method == methods.KINDS[kind]()
