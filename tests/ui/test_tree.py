"""The family tree as it is drawn: rows by generation, weights on the members, lines between them; strangers' words do nothing."""

import pytest

from lora_studio import library
from lora_studio.ui import tree
from tests import tiny


@pytest.fixture
def shelved(workspace, base):
    count = iter(range(100))

    def add(name, *parents):
        rows = [{"id": id, "name": "x", "sha256": "", "weight": weight} for id, weight in parents]
        return library.add(workspace, tiny.adapter_files(base, seed=next(count)), {"name": name, "parents": rows, "recipe": {"sum": []} if parents else None})

    return add


def test_rows_are_generations_with_their_weights_and_only_present_adapters_open(workspace, shelved):
    a, b = shelved("a"), shelved("b")
    both = shelved("both", (a, 1.0), (b, {"": 0.6, "mlp": 0.2}))
    child = shelved("child", (both, 0.7), (a, -0.5))
    library.remove(workspace, b)
    shown = tree.drawn(workspace, both)
    assert [(row["label"], [(one["name"], one["weights"], one["opens"]) for one in row["members"]]) for row in shown["rows"]] == [
        ("Made of", [("a", ["× 1"], True), ("x", ["× 0.6, mlp 0.2"], False)]),
        ("This adapter", [("both", [], False)]),
        ("Went into", [("child", ["× 0.7", "× -0.5 of a"], True)]),
    ]  # fmt: skip
    assert shown["rows"][0]["members"][1]["how"] == "removed" and len(shown["links"].split()) == 4
    below = {one["name"]: one["weights"] for row in tree.drawn(workspace, child)["rows"] for one in row["members"]}
    assert below["a"] == ["× 1 in both", "× -0.5"] or below["a"] == ["× -0.5", "× 1 in both"]
    assert below["both"] == ["× 0.7"]
    assert tree.drawn(workspace, shelved("alone")) == tree.EMPTY


def test_a_weight_somebody_wrote_by_hand_is_left_out(workspace, shelved):
    a = shelved("a")
    for number, weight in enumerate(("much", None, {"": "x"}, {"..": 1.0}, True)):
        shown = tree.drawn(workspace, shelved(f"child {number}", (a, weight)))
        assert shown["rows"][0]["members"][0]["weights"] == []
