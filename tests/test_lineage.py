"""The family tree: ancestors above, what was made of an adapter below, with weights; the removed are still named."""

import json

import pytest

from lora_studio import library, lineage
from lora_studio.errors import AdapterError
from tests import tiny


@pytest.fixture
def shelved(workspace, base):
    """Puts adapters on the shelf: a name, and its parents with their weights."""
    count = iter(range(100))

    def add(name, *parents, recipe=None, **facts):
        rows = [{"id": id, "name": library.card(workspace, id)["name"], "sha256": library.card(workspace, id)["sha256"], "weight": weight} for id, weight in parents]
        recipe = recipe or ({"sum": [], "rank": None} if parents else None)
        return library.add(workspace, tiny.adapter_files(base, seed=next(count)), {"name": name, "parents": rows, "recipe": recipe, **facts})

    return add


def generations(found):
    return {member.name: member.generation for member in found.members.values()}


def test_a_family_is_all_ancestors_and_three_generations_of_descendants(workspace, shelved):
    a, b = shelved("a", run="20260101-000000-abcd"), shelved("b")
    both = shelved("both", (a, 1.0), (b, -0.5))
    small = shelved("small", (both, 1.0), recipe={"resize": {"adapter": both, "rank": 2}})
    ties = shelved("ties", (small, 0.7), (a, {"": 0.6, "layers.0-1": 0.2}), recipe={"merge": {"how": "ties", "parts": []}})
    last = shelved("last", (ties, 1.0))
    shelved("too far", (last, 1.0))
    found = lineage.family(workspace, both)
    assert generations(found) == {"both": 0, "a": -1, "b": -1, "small": 1, "ties": 2, "last": 3}
    assert {member.name: member.how for member in found.members.values()} == {"both": "blend", "a": "trained", "b": "", "small": "resized", "ties": "ties", "last": "blend"}
    assert set(map(str, found.links)) == set(map(str, [(a, both, 1.0), (b, both, -0.5), (both, small, 1.0), (small, ties, 0.7), (a, ties, {"": 0.6, "layers.0-1": 0.2}), (ties, last, 1.0)]))
    above = lineage.family(workspace, ties)
    assert generations(above) == {"ties": 0, "small": -1, "both": -2, "a": -3, "b": -3, "last": 1, "too far": 2}
    assert (a, ties, {"": 0.6, "layers.0-1": 0.2}) in above.links
    assert list(lineage.family(workspace, shelved("alone")).members.values()) != [] and len(lineage.family(workspace, "alone").members) == 1
    with pytest.raises(AdapterError):
        lineage.family(workspace, "nobody")


def test_a_removed_parent_is_still_named_and_one_that_is_its_own_ends_the_walk(workspace, shelved):
    gone = shelved("gone")
    child = shelved("child", (gone, 0.5))
    library.remove(workspace, gone)
    found = lineage.family(workspace, child)
    assert [(member.name, member.present) for member in found.members.values()] == [("child", True), ("gone", False)] and found.links == [(gone, child, 0.5)]
    file = workspace.root / "library" / child / "card.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "parents": [{"id": child, "name": "x", "weight": "much"}, 7, {"id": "../etc"}]}))
    odd = lineage.family(workspace, child)
    assert odd.members[child].generation == 0 and len(odd.members) == 2
    file.write_text(json.dumps({**json.loads(file.read_text()), "parents": [], "recipe": "odd"}))
    assert lineage.family(workspace, child).members[child].how == ""


def test_models_are_below_what_was_baked_into_them_and_above_what_was_taken_out(workspace, shelved):
    id = shelved("pirate")
    folder = workspace.root / "models" / "Mine"
    folder.mkdir(parents=True)
    (folder / "lora_studio.json").write_text(json.dumps({"base": "x", "sum": [{"adapter": id, "name": "pirate", "weight": 0.8}, "odd"]}))
    broken = workspace.root / "models" / "broken"
    broken.mkdir()
    (broken / "lora_studio.json").write_text("[")
    found = lineage.family(workspace, id)
    assert [(member.name, member.kind, member.how, member.generation) for member in found.members.values()][1:] == [("Mine", "model", "baked", 1)]
    assert found.links == [(id, "models/Mine", 0.8)]
    taken = shelved("taken", recipe={"extracted": {"from": "/somewhere/tuned", "base": "x", "rank": 4, "loss": 0.1}})
    assert generations(lineage.family(workspace, taken)) == {"taken": 0, "tuned": -1}


def test_a_large_family_is_cut_and_says_by_how_many(workspace, shelved, monkeypatch):
    monkeypatch.setattr(lineage, "MOST", 3)
    a = shelved("a")
    for number in range(4):
        shelved(f"child {number}", (a, 1.0))
    found = lineage.family(workspace, a)
    assert len(found.members) == 3 and found.left_out == 2
