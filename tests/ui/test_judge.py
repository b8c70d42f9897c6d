"""The conflict map without a browser: it is of the mix as it is weighed, says when it is of another, and refuses in a sentence."""

import json

import gradio as gr
import pytest

from lora_studio import judging
from lora_studio.jobs import bench
from lora_studio.ui.judge import Judge, drawn, told
from lora_studio.ui.layers import Layers
from lora_studio.ui.mix import POOL, Mix
from tests.browser.made import adapter


@pytest.fixture
def page(workspace):
    with gr.Blocks():
        mix, layers, judge = Mix(workspace, "mix-test"), Layers(workspace), Judge(workspace)
        for part in (mix, layers, judge):
            part.build()
        layers.connect(mix)
        judge.connect(mix, layers)
    yield judge
    bench.stop()


def given(ids, *weights, by=None):
    return [ids, ids, *weights, *[1.0] * (POOL - len(weights)), by or {}]


def test_the_map_is_of_the_mix_as_it_is_weighed_and_says_when_it_is_not(page, home, workspace):
    ids = [adapter(home, "pirate", seed=1, rank=3), adapter(home, "capitals", seed=2, rank=5, ends=("q_proj",))]
    by = {ids[1]: {"model.layers.0": 0.0}}
    *_, (said, shown, parts) = page.judge(*given(ids, 1.0, -0.5, by=by))
    assert parts == [[ids[0], 1.0], [ids[1], {"": -0.5, "model.layers.0": 0.0}]] and said[0]["sentence"]
    shown, found = json.loads(shown), judging.judge(workspace, parts)
    assert (
        shown["whole"]["norm"] == [one["norm"] for one in found["adapters"]]
        and shown["adapters"] == ["pirate", "capitals"]
        and shown["ids"] == ids
    )
    assert (
        shown["by_block"]["norm"][0][1] is None and shown["by_block"]["cosine"][0] == [None] and shown["by_block"]["overlap"][0] == [None]
    )
    assert shown["by_block"]["overlap"][1][0] == min(found["by_block"][side][1][0] for side in ("overlap_out", "overlap_in"))
    assert (
        len(shown["by_layer"]["spectrum"]) == len(shown["layers"]) == len(shown["block_of"])
        and len(shown["by_layer"]["spectrum"][0][0]) == 3
    )
    assert page.age(parts, *given(ids, 1.0, -0.5, by=by)) == gr.skip() and page.age(None, *given(ids)) == gr.skip()
    assert "has changed since" in page.age(parts, *given(ids, 1.0, -0.5))[0]["sentence"]
    found["sampled"]["layers"] = 3
    assert "The signs of 3 large layers are from a sample" in told(found)[-1]["sentence"] and len(drawn(found, ids)["pairs"]) == 1


def test_what_cannot_be_compared_is_a_sentence(page, home):
    *_, (said, shown, parts) = page.judge(*given([]))
    assert "Pick at least one adapter" in said[0]["sentence"] and shown == "" and parts is None
    ids = [adapter(home, "pirate", seed=1), adapter(home, "elsewhere", seed=3, base="someone/other-model")]
    *_, (said, shown, parts) = page.judge(*given(ids))
    assert "pirate was made for demo-text, elsewhere for someone/other-model." in said[0]["sentence"] and shown == ""
