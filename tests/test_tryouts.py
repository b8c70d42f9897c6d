"""Trying a mix out: what answers is what would be saved, beside the base or a part alone, and nothing stays behind."""

import pytest

from lora_studio import durable, library, shelf, tryouts
from lora_studio.errors import BenchError, BlendError
from tests import tiny_image
from tests.browser.made import adapter

ASK = "What color is the fox?"
pytestmark = pytest.mark.usefixtures("with_bench")


@pytest.fixture
def pair(home):
    return [adapter(home, "pirate", seed=1, rank=3, size=0.5), adapter(home, "capitals", seed=2, rank=5, size=0.5)]


def tried(workspace, parts, **more):
    *before, last = tryouts.answer(workspace, tryouts.Asked(ASK, parts, longest=24, **more))
    return last["sides"], [event for event in before if event["event"] == "made"]


def said(workspace, parts):
    """What the Playground's own verb answers."""
    (*_, last) = shelf.chat(workspace, "demo-text", [{"role": "user", "content": ASK}], {"it": parts}, seed=0, longest=24)
    return last["sides"]["it"]["text"]


def leftovers(workspace):
    return [path.name for path in workspace.root.iterdir() if path.name.startswith(durable.TEMPORARY)]


def test_what_is_saved_answers_as_the_try_out_did_exact_and_compressed(workspace, pair):
    parts = [(pair[0], 1.0), (pair[1], -0.5)]
    exact, made = tried(workspace, parts)
    assert not made and exact["mix"]["text"] != exact["base"]["text"] == said(workspace, [])
    id, _ = shelf.blend(workspace, parts, name="both")
    assert exact["mix"]["text"] == said(workspace, [(id, 1.0)])
    small, (told,) = tried(workspace, parts, rank=2)
    id, done = shelf.blend(workspace, parts, name="small", rank=2)
    assert (told["rank"], told["loss"]) == (done["rank"], done["loss"]) == (2, done["loss"]) and done["loss"] > 0.1
    assert small["mix"]["text"] == said(workspace, [(id, 1.0)]) != exact["mix"]["text"]
    assert not leftovers(workspace)


def test_a_parent_answers_alone_with_weight_1_and_against_nothing_there_is_one_side(workspace, pair):
    parts = [(pair[0], 0.3), (pair[1], -0.5)]
    sides, _ = tried(workspace, parts, against=pair[0])
    assert list(sides) == ["mix", pair[0]] and sides[pair[0]]["text"] == said(workspace, [(pair[0], 1.0)])
    assert sides[pair[0]]["active"] == [[str(library.adapter_folder(workspace, pair[0])), 1.0]]
    assert list(tried(workspace, parts, against="")[0]) == ["mix"]


def test_what_cannot_be_tried_is_a_sentence_and_one_broken_off_leaves_nothing(workspace, pair):
    with pytest.raises(BlendError, match="There is no mix to try yet"):
        next(tryouts.answer(workspace, tryouts.Asked(ASK, [])))
    with pytest.raises(BenchError, match="There is nothing to answer"):
        next(tryouts.answer(workspace, tryouts.Asked(" ", [(pair[0], 1.0)])))
    for stop in ("made", "piece"):
        events = tryouts.answer(workspace, tryouts.Asked(ASK, [(pair[0], 1.0)], rank=1))
        assert any(event["event"] == stop for event in events)
        assert leftovers(workspace)
        events.close()
        assert not leftovers(workspace)


def test_a_picture_of_a_compressed_mix_is_the_saved_ones_bit_for_bit(workspace, tmp_path):
    base = tiny_image.write_pipeline(tmp_path / "base")
    ids = [library.add(workspace, tiny_image.adapter_files(base, tiny_image.random_adapter(base, seed=seed)), {"name": f"style {seed}", "base": str(base)}) for seed in (1, 2)]
    parts = [(ids[0], 1.0), (ids[1], 0.5)]
    *_, last = tryouts.answer(workspace, tryouts.Asked("a red star", parts, rank=2, seed=3, steps=2))
    id, _ = shelf.blend(workspace, parts, name="both", rank=2)
    *_, again = tryouts.answer(workspace, tryouts.Asked("a red star", [(id, 1.0)], seed=3, steps=2))
    drawn = [open(one["sides"][side]["path"], "rb").read() for one, side in ((last, "mix"), (again, "mix"), (last, "base"))]
    assert drawn[0] == drawn[1] != drawn[2]
