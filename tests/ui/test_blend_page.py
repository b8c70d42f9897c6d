"""The Blend page without a browser: its words, and the real bench behind its preview and its Save."""

import json

import gradio as gr
import pytest

from lora_studio import library
from lora_studio.errors import BlendError
from lora_studio.home import demo_base
from lora_studio.jobs import bench
from lora_studio.ui.blend import Blend
from lora_studio.ui.figures import exact_rank, figures_of, pair_in_words, percent, rank_of, suggestions
from lora_studio.ui.mix import POOL
from lora_studio.ui.playground import Playground
from lora_studio.ui.tryout import Turn
from tests.browser.made import adapter
from tests.test_dora import dora


@pytest.fixture
def page(workspace):
    with gr.Blocks(), gr.Tabs(), gr.Tab("Blend"):
        made = Blend(workspace)
        made.build()
    yield made
    bench.stop()


@pytest.fixture
def pair(home):
    return [adapter(home, "pirate", seed=1, rank=3), adapter(home, "capitals", seed=2, rank=5)]


def pool(*weights):
    return [*weights, *[1.0] * (POOL - len(weights))]


def told(entries):
    return " ".join(entry["sentence"] for entry in entries)


def test_preview_save_and_refusals_with_a_real_bench(page, pair, home, workspace):
    first, *rest = page.look("", pair, pair, *pool(1.0, -0.5))
    assert told(first[-1]) == "Starting the bench…" and first[0] == gr.skip()
    (seen,) = rest
    figures, curve, exact, *_ = seen
    losses = json.loads(curve["value"])
    assert losses["exact"] == losses["chosen"] == 8 and len(losses["losses"]) == 9 and losses["losses"][8] == 0 < losses["losses"][7]
    assert exact["value"] == "Exact (rank 8)" and [part["name"] for part in figures["parts"]] == ["pirate", "capitals"]
    assert "nearly unrelated directions" in figures["pair"] and figures["rows"][0]["cells"][0]["text"] == "1"

    (seen,) = page.look("3", pair, pair, *pool(1.0, 0.0))
    assert json.loads(seen[1]["value"])["exact"] == 3 and "loses nothing" in told(seen[-1]), "what has weight 0 takes no room"
    (seen,) = page.look("", pair, pair, *pool(0.0, 0.0))
    assert "Every weight is 0" in told(seen[-1]) and not seen[1]["visible"]
    (seen,) = page.look("two", pair, pair, *pool())
    assert "The rank 'two' is not a whole number" in told(seen[-1])

    entries, saved, *_ = page.keep("both", "", pair, pair, *pool(1.0, -0.5))
    assert told(entries).startswith("both is in the library: rank 8, exact, true error ") and saved["parts"] == [[pair[0], 1.0], [pair[1], -0.5]]
    card = library.card(workspace, saved["id"])
    assert card["name"] == "both" and [(parent["name"], parent["weight"]) for parent in card["parents"]] == [("pirate", 1.0), ("capitals", -0.5)]
    entries, small, *_ = page.keep("small", "2", pair, pair, *pool(1.0, -0.5))
    assert "rank 2, compressed to rank 2" in told(entries) and library.card(workspace, small["id"])["rank"] == 2

    count = library.count(workspace)
    other = adapter(home, "elsewhere", seed=3, base="someone/other-model")
    for name, rank, ids, sentence in (
        ("x", "", [pair[0], other], "pirate was made for demo-text, elsewhere for someone/other-model."),
        ("", "", pair, "The name of the blend is empty"),
        ("x", "0", pair, "The rank '0' is not a whole number of at least 1."),
        ("x", "", [], "There is nothing to save yet."),
    ):
        entries, *others = page.keep(name, rank, ids, ids, *pool())
        assert entries[0]["level"] == "error" and sentence in told(entries) and others == [gr.skip()] * 4
    assert library.count(workspace) == count + 1
    (seen,) = page.look("", [pair[0], other], [pair[0], other], *pool())
    assert "Blend adapters of the same base only." in told(seen[-1])


def test_add_appends_and_keeps_the_weights(page, pair):
    updates = page.add(pair[1], [pair[0]], [pair[0]], *pool(0.4))
    assert updates[1] == pair and updates[3]["value"] == 0.4 and updates[4]["value"] == 1.0
    again = page.add(pair[1], pair, pair, *pool(0.4, -1.0))
    assert again[1] == pair and again[4]["value"] == -1.0
    assert len(updates) == len(page.opened)


def test_talk_to_it_takes_the_saved_blend_only_while_the_sliders_say_the_same(page, pair, workspace):
    with gr.Blocks(), gr.Tabs(), gr.Tab("Playground"):
        playground = Playground(workspace)
        playground.build()
    parts, saved = [[pair[0], 1.0], [pair[1], 0.5]], {"id": pair[1], "parts": [[pair[0], 1.0], [pair[1], 0.5]], "rank": None}
    live = page.jump(playground, None, "", pair, pair, *pool(1.0, 0.5))
    assert live[2] == [id for id, _ in parts]
    assert page.jump(playground, saved, "", pair, pair, *pool(1.0, 0.5))[2] == [saved["id"]]
    assert page.jump(playground, saved, "", pair, pair, *pool(1.0, 0.6))[2] == pair
    assert page.jump(playground, saved, "4", pair, pair, *pool(1.0, 0.5))[2] == pair


def test_a_dora_adapter_is_tried_and_baked_and_what_it_cannot_do_is_said_with_the_way(page, pair, home, workspace, tmp_path):
    known = {"name": "doubled", "base": "demo-text"}
    mine = library.add(workspace, dora(demo_base("demo-text"), tmp_path / "dora", targets=["q_proj"], base_name="demo-text"), known)
    given = ([mine, pair[0]], [mine, pair[0]], *pool(0.5, 1.0))
    *_, seen = page.look("", *given)
    assert "Try it in the Playground, bake it" in told(seen[-1]) and told(page.keep("both", "", *given)[0]) == told(seen[-1])
    assert "tensors would change" in told(page.bake.say(page.mix, "", (), *given))
    *_, last = page.bake.bake(page.mix, "mixed", "", (), *given)
    assert last[0]["level"] == "ok" and (workspace.root / "models" / "mixed" / "model.safetensors").is_file()
    asked = {page.tryout.prompt: "What color is the fox?", page.tryout.against: "base", page.tryout.seed: 0, page.tryout.longest: 12, page.tryout.steps: 20, page.tryout.rank: "", page.tryout.live: False}
    *_, answered = page.tryout.answer({**asked, page.tryout.turn: Turn(), **dict(zip(page.mix.inputs, [*given, {}]))})
    assert "doubled × 0.5, pirate × 1" in str(answered)


def test_ranks_errors_and_pairs_in_words():
    assert [rank_of(text) for text in ("", None, " 7 ")] == [None, None, 7]
    for wrong in ("0", "-1", "1.5", "x", "²", "9" * 400):
        with pytest.raises(BlendError, match="is not a whole number of at least 1"):
            rank_of(wrong)
    assert suggestions([1.0, 0.5, 0.04, 0.009, 0.0], 4) == [2, 3] and suggestions([1.0, 0.001, 0.0], 2) == [1, None] and suggestions([1.0, 0.0], 1) == [None, None]
    assert percent(1.3e-8) == "1.3e-08 (rounding only)" and percent(0.0321) == "3.2 %"
    assert exact_rank({"rank": 8, "norm": 2.0}, [(3, 1.0), (5, 0.0)]) == 3 and exact_rank({"rank": 8, "norm": 0.0}, [(3, 0.0)]) == 0
    names = ["pirate", "capitals"]
    for cosine, weights, words in (
        (0.03, [1, 1], "nearly unrelated directions (cosine 0.03): they should not disturb each other."),
        (-0.001, [1, 1], "(cosine 0.00)"),
        (0.5, [1, 1], "partly the same way (cosine 0.50)"),
        (0.95, [1, -1], "nearly cancel each other (cosine 0.95)"),
        (-0.4, [1, 1], "work partly against each other"),
        (-0.4, [-1, 1], "partly the same way"),
    ):
        acting = cosine * weights[0] * weights[1]
        assert words in pair_in_words([[1, cosine], [cosine, 1]], [[1, acting], [acting, 1]], names)
    three = [[1, 0.01, -0.05], [0.01, 1, 0], [-0.05, 0, 1]]
    assert pair_in_words(three, three, [*names, "short"]).startswith(
        "All of them point in nearly unrelated directions (largest cosine -0.05)"
    )
    assert "work partly against each other (cosine as weighted -0.40)" in pair_in_words([[1, 0.9], [0.9, 1]], [[1, -0.4], [-0.4, 1]], names)
    assert pair_in_words([[1, 0.9], [0.9, 1]], [[1, 0], [0, 1]], names) == "", "one of the two does not act, or elsewhere"
    found = {"sizes": [2.0, 4.0], "cosines": [[1, 0], [0, 1]], "acting": [[1, 0], [0, 1]], "norm": 5.0, "layers": 3}
    shown = figures_of(found, names, [1.0, -1.0], 8)
    assert [part["weight"] for part in figures_of(found, names, [{"": 0.5, "mlp": 0.0}, 1.0], 8)["parts"]] == ["0.50 by block", "1.00"]
    assert [part["size"] for part in shown["parts"]] == ["2", "4"] and shown["rank"] == "Exact rank: 8. Layers changed: 3."
