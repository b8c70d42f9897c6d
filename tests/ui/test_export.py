"""The Export part without a browser: what fits, what it will be, and the report."""

import gradio as gr
import pytest

from lora_studio import exports
from lora_studio.jobs import bench
from lora_studio.ui.export import Export
from tests.browser.made import adapter


@pytest.fixture
def part(workspace):
    with gr.Blocks():
        made = Export(workspace, "x")
        made.build()
    yield made
    bench.stop()


def words(entries):
    return " ".join(entry["sentence"] for entry in entries)


def test_it_offers_what_fits_says_what_it_will_be_and_reports_what_it_was(part, home, workspace):
    id = adapter(home, "pirate", seed=1)
    box, form, outlook, get, told = part.fit({"id": id}, None, "float16")
    assert box["visible"] and [name for _, name in form["choices"]] == ["peft", "gguf"] and form["value"] == "gguf" and not get["visible"] and not told
    assert "It will have rank 4 in 12 layers" in words(outlook) and "rounded by 0.049 % at most" in words(outlook) and "kohya is left out: " in words(outlook)
    assert "GGUF is written in float32 or float16" in words(part.look(id, "gguf", "bfloat16")[0])
    waiting, (told, get) = part.make(id, "gguf", "float16")
    assert "opened again" in words(waiting[0]) and "12 of 12 layers matched, read again by gguf" in words(told) and "Not carried: the base's name" in words(told)
    _, _, _, token, name = get["link"].split("/")
    assert get["visible"] and exports.file(workspace, token, name).name == "pirate.gguf"
    *_, (told, get) = part.make(id, "gguf", "bfloat16")
    assert told[0]["level"] == "error" and not get["visible"]
    for nothing in (None, "", "nobody", {"id": "gone"}):
        assert not part.fit(nothing, None, "float32")[0]["visible"]
