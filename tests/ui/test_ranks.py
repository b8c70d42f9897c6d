"""What the Runs page shows of ranks is what the run said."""

from lora_studio.ui import ranks


def test_a_run_without_ranks_shows_nothing():
    assert ranks.shown([{"kind": "step", "step": 1}]) == {}


def test_losses_at_every_rank_stand_in_their_order():
    found = ranks.shown([{"kind": "ranks", "step": 9, "losses": {"16": 0.5, "1": 2.0, "4": 1.0}}])
    assert [(row["name"], row["text"], row["share"]) for row in found["rows"]] == [(1, "2.0000", 100), (4, "1.0000", 50), (16, "0.5000", 25)]
    assert "0.5000" in found["note"]


def test_the_ranks_that_are_left_stand_by_layer_and_the_last_word_counts():
    events = [{"kind": "ranks", "step": 3, "layers": {"a": 9}}, {"kind": "ranks", "step": 9, "layers": {"a": 3, "b": 0}}]
    found = ranks.shown(events)
    assert [(row["name"], row["text"], row["share"]) for row in found["rows"]] == [("a", "3", 100), ("b", "0", 0)] and found["note"].startswith("3 directions in 2 layers")
