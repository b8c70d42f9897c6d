"""The chart's reader: every point belongs to its variant, folds become their mean, and what a resume voids is gone."""

import json

from lora_studio import runs
from lora_studio.spec import parse
from lora_studio.ui import chart
from lora_studio.ui.chart import Curves

NAMES = ["lr 0.1", "lr 0.2"]


def made(workspace, *events: dict):
    """A run folder with those events, and a reader of it."""
    folder = runs.create(workspace, parse({"data": [{"path": "x"}]}))
    write(folder, *events)
    return folder, Curves(workspace)


def write(folder, *events: dict) -> None:
    with runs.Events(folder) as out:
        for event in events:
            out.emit(**event)


def begun(folds=None) -> dict:
    return {"kind": "started", "folds": folds, "variants": [{"name": words, "words": words, "changes": {}} for words in NAMES]}


def step(number: int, variant: int, loss: float = 1.0, **more) -> dict:
    return {"kind": "step", "step": number, "steps": 9, "loss": loss, "lr_A": 0.1, "lr_B": 0.2, "variant": variant, **more}


def judged(number: int, variant: int, loss: float, **more) -> dict:
    return {"kind": "eval", "step": number, "loss": loss, "variant": variant, **more}


def asked(curves, folder, turn=-1, n=0, m=0) -> dict:
    return json.loads(curves([folder.name, turn, n, m]))


def test_each_point_belongs_to_its_variant_and_only_new_ones_are_sent(workspace):
    folder, curves = made(workspace, begun(), step(1, 0, 3.0), step(1, 1, 2.0), judged(1, 1, 1.5))
    first = asked(curves, folder)
    assert first["names"] == NAMES and first["whose"] == [0, 1] and first["points"][1::4] == [3.0, 2.0]
    assert first["judged"] == [1, 1.5] and first["judge"] == [1]
    write(folder, step(2, 1, 1.0), judged(2, 0, 0.5))
    second = asked(curves, folder, first["turn"], first["n"], first["m"])
    assert (second["fresh"], second["whose"], second["points"][:2], second["judge"]) == (False, [1], [2, 1.0], [0])


def test_losses_over_folds_are_their_mean_once_all_are_there(workspace):
    folder, curves = made(workspace, begun(2), step(1, 0, 3.0), step(1, 0, 9.0, fold=0), judged(4, 0, 1.0, fold=0))
    assert asked(curves, folder)["judged"] == [] and asked(curves, folder)["n"] == 1
    write(folder, judged(4, 0, 2.0, fold=1))
    assert asked(curves, folder)["judged"] == [4, 1.5]


def test_what_a_resume_voids_is_gone_for_every_variant(workspace):
    folder, curves = made(workspace, begun(2), *(step(number, variant) for number in (1, 2) for variant in (0, 1)), judged(2, 0, 5.0, fold=0))
    before = asked(curves, folder)
    write(folder, {"kind": "resumed", "step": 1}, begun(2), judged(2, 0, 1.0, fold=0), judged(2, 0, 2.0, fold=1))
    after = asked(curves, folder, before["turn"], before["n"], before["m"])
    assert after["fresh"] and after["points"][::4] == [1, 1] and after["judged"] == [2, 1.5]
    assert [(event["variant"], event["step"], event["steps"]) for event in curves.latest(folder.name)] == [(0, 1, 9), (1, 1, 9)]


def test_evaluations_before_the_first_step_are_not_lost(workspace):
    folder, curves = made(workspace, begun(), judged(0, 0, 5.0), judged(0, 1, 5.0))
    first = asked(curves, folder)
    write(folder, step(1, 0), step(1, 1))
    second = asked(curves, folder, first["turn"], first["n"], first["m"])
    assert second["fresh"] and second["judge"] == [0, 1] and second["whose"] == [0, 1]


def test_a_long_sweep_is_thinned_without_losing_a_spike_of_any_variant():
    rows = [(number, 100.0 + variant if number == 4321 else 1.0, 0.0, 0.0, variant) for number in range(10_000) for variant in range(4)]
    kept = chart.thin(rows)
    assert len(kept) <= chart.MOST and {row[4] for row in kept if row[0] == 4321 and row[1] >= 100} == {0, 1, 2, 3}
    assert all([row[0] for row in kept if row[4] == variant] == sorted(row[0] for row in kept if row[4] == variant) for variant in range(4))
    assert chart.thin(rows[:40]) == rows[:40]


def test_a_run_of_one_adapter_has_no_variants(workspace):
    folder, curves = made(workspace, {"kind": "started"}, {"kind": "step", "step": 1, "steps": 2, "loss": 1.0})
    assert "names" not in asked(curves, folder)


def test_two_workspaces_with_a_run_of_the_same_id_are_told_apart(workspace, tmp_path):
    from lora_studio.workspace import Workspace

    folder, _ = made(workspace, step(1, 0, 3.0))
    other = Workspace(tmp_path / "other")
    (other.runs / folder.name).mkdir(parents=True)
    for name in ("spec.yaml", "card.json"):
        (other.runs / folder.name / name).write_bytes((folder / name).read_bytes())
    who = [workspace]
    curves = Curves(lambda: who[0])
    assert asked(curves, folder)["n"] == 1
    who[0] = other
    assert asked(curves, folder)["n"] == 0
