"""The mix: weights stay with their adapters, and whatever cannot be mixed is said in a sentence."""

import math

import gradio as gr
import pytest

from lora_studio import library
from lora_studio.errors import AdapterError, BlendError
from lora_studio.ui.mix import POOL, Mix
from tests.browser.made import adapter, tuned_prompt


@pytest.fixture
def shelf(workspace, home):
    """Three adapters in the library, oldest first: their ids."""
    return [adapter(home, name, seed=seed, ends=("layers.0.self_attn.q_proj",)) for seed, name in enumerate(("pirate", "capitals", "short"))]


@pytest.fixture
def mix(workspace, shelf):
    with gr.Blocks():
        made = Mix(workspace, "mix-test")
        made.build()
    return made


def held_of(updates):
    return updates[1]


def weights_of(mix, updates, before=()):
    """What the sliders show after updates: value by adapter."""
    shown = {}
    for number, update in enumerate(updates[3 : 3 + POOL]):
        if number < len(held_of(updates)):
            value = update.get("value")
            shown[held_of(updates)[number]] = before[number] if value is None else value
    return shown


def pool(*weights):
    return [*weights, *[1.0] * (POOL - len(weights))]


def told(updates):
    return " ".join(entry["sentence"] for entry in updates[-1]["value"])


def test_weights_stay_with_their_adapters_when_the_pick_changes(mix, shelf):
    a, b, c = shelf
    updates = mix.choose([a, b], [], *pool())
    assert held_of(updates) == [a, b] and weights_of(mix, updates) == {a: 1.0, b: 1.0}
    updates = mix.choose([b], [a, b], *pool(0.3, -0.5))
    assert held_of(updates) == [b] and weights_of(mix, updates)[b] == -0.5
    updates = mix.choose([b, c, a], [b], *pool(-0.5, 0.7))
    assert held_of(updates) == [b, c, a] and weights_of(mix, updates, pool(-0.5)) == {b: -0.5, c: 1.0, a: 1.0}
    assert "value" not in updates[3], "a weight that is being dragged is left alone"
    assert [update.get("visible", True) for update in updates[3 : 3 + POOL]] == [True] * 3 + [False] * (POOL - 3)
    assert mix.parts([b, c, a], [b], *pool(-0.5)) == [[b, -0.5], [c, 1.0], [a, 1.0]]
    assert mix.choose([], [b], *pool())[1] == [] and mix.parts(None, None, *pool()) == []


def test_open_shows_other_parts_with_their_weights(mix, shelf):
    a, b, _ = shelf
    updates = mix.open([[b, 0.25], [a, -1.5]])
    assert updates[0]["value"] == [b, a] and weights_of(mix, updates) == {b: 0.25, a: -1.5} and updates[-1]["value"] == []
    assert [update["label"] for update in updates[3:5]] == ["capitals", "pirate"]
    assert len(updates) == len(mix.opened) and mix.open([])[0]["value"] == [] and mix.open([])[1] == []


def test_weights_by_block_go_with_their_adapter_into_every_sum(mix, shelf):
    a, b, c = shelf
    by = {a: {"model.layers.0": 0.2}}
    assert mix.parts([a, b], [a, b], *pool(0.5, 0.7), by) == [[a, {"": 0.5, "model.layers.0": 0.2}], [b, 0.7]]
    updates = mix.choose([b, c, a], [a, b], *pool(0.5, 0.7), by)
    assert updates[-2] == by and updates[5]["label"] == "pirate · by block" and updates[5]["value"] == 0.5 and updates[3]["label"] == "capitals"
    assert mix.choose([b], [a, b], *pool(0.5, 0.7), by)[-2] == {}, "who is taken out comes back without them"
    updates = mix.open([[b, {"": 0.4, "mlp": 0.0}], [a, 1.0]])
    assert updates[-2] == {b: {"mlp": 0.0}} and updates[3]["value"] == 0.4 and mix.open([[b, {"mlp": 0.0}]])[3]["value"] == 1.0
    with pytest.raises(BlendError, match=r"The weight of pirate in model.layers.0 is 7, but it must be a number from -2 to 2"):
        mix.parts([a], [a], *pool(0.5), {a: {"model.layers.0": 7}})


def test_what_has_no_rank_is_called_by_its_method(mix, workspace):
    id = tuned_prompt(workspace.root, "whisper", seed=1)
    assert ("whisper · demo-text · prompt", id) in mix.fresh([])["choices"]


def test_a_typed_name_is_the_adapter_and_an_unknown_one_is_a_sentence(mix, shelf, workspace):
    a, b, _ = shelf
    updates = mix.choose([b, "pirate"], [b], *pool(0.5))
    assert updates[0]["value"] == [b, a] and held_of(updates) == [b, a]
    assert ("pirate · demo-text · r4", a) in updates[0]["choices"]
    updates = mix.choose([b, "nobody"], [b], *pool(0.5))
    assert held_of(updates) == [b] and "There is no adapter nobody in the library." in told(updates) and updates[-1]["visible"]
    with pytest.raises(AdapterError, match="There is no adapter nobody"):
        mix.parts([b, "nobody"], [b], *pool(0.5))
    library.remove(workspace, b)
    assert "There is no adapter" in told(mix.open([[b, 1.0], [a, 1.0]])) and held_of(mix.open([[b, 1.0], [a, 1.0]])) == [a]


def test_nine_adapters_are_a_sentence_and_none_is_dropped_silently(mix, home, shelf):
    more = [adapter(home, f"number {seed}", seed=100 + seed, ends=("layers.0.self_attn.q_proj",)) for seed in range(9)]
    updates = mix.choose(more, [], *pool())
    assert len(held_of(updates)) == POOL and told(updates).startswith("There are 9 adapters in the mix, and it has room for 8.")
    with pytest.raises(BlendError, match="room for 8"):
        mix.parts(more, held_of(updates), *pool())
    assert len(mix.parts(more[:8], held_of(updates), *pool())) == 8


@pytest.mark.parametrize(("weight", "shown"), [(None, "empty"), (math.nan, "nan"), (math.inf, "inf"), (2.5, "2.5"), ("x", "'x'"), (True, "True")])
def test_a_weight_that_is_no_number_in_range_is_a_sentence_that_names_its_adapter(mix, shelf, weight, shown):
    a, b, _ = shelf
    with pytest.raises(BlendError) as caught:
        mix.parts([a, b], [a, b], *pool(1.0, weight))
    assert str(caught.value) == f"The weight of capitals is {shown}, but it must be a number from -2 to 2. Change it."
    assert mix.parts([a], [a, b], *pool(1.0, weight)) == [[a, 1.0]], "a slider that is not shown does not count"
    assert mix.sliders[0].preprocess(weight) is weight


def test_new_adapters_can_be_picked_without_reloading_the_page(mix, home, shelf):
    new = adapter(home, "new", seed=77, ends=("layers.0.self_attn.q_proj",))
    assert mix.fresh([shelf[0]])["choices"][0] == ("new · demo-text · r4", new)
