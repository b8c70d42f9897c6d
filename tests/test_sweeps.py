"""Sweeps from the outside: what may vary, what is said before anything is loaded, a real worker, the command line."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lora_studio import durable, library, runs, studio, sweeps
from lora_studio.errors import RunError, SpecError
from lora_studio.jobs import checks
from lora_studio.preflight import preflight
from lora_studio.spec import parse, sweep
from tests import tiny


@pytest.fixture
def spec(base, chat_rows):
    """A run of a dozen steps."""
    return parse({**tiny.tree(base, chat_rows), "output": {"sample_prompts": [], "checkpoint_every": 2}})


def test_every_combination_is_a_variant_that_differs_in_nothing_else(spec):
    asked = sweeps.compose(spec, ["optim.lr=1e-4,3e-4", "method.rank=[4, 8]"])
    found = sweep.variants(asked)
    assert [one.changes for one in found] == [
        {"optim.lr": lr, "method.rank": rank} for lr in (1e-4, 3e-4) for rank in (4, 8)
    ]  # fmt: skip
    for one in found:
        same = one.spec.model_copy(
            update={
                "name": spec.name,
                "optim": one.spec.optim.model_copy(update={"lr": spec.optim.lr}),
                "method": one.spec.method.model_copy(update={"rank": spec.method.rank}),
            }
        )
        assert same == spec
    assert found[0].spec.name == "tiny, lr 0.0001, rank 4" and len({one.spec.name for one in found}) == 4


def test_a_kind_of_optimizer_or_schedule_varies_alone(spec):
    found = sweep.variants(sweeps.compose(spec, ["optim.kind=adamw,sgd", "schedule.kind=linear,wsd"]))
    assert {(one.spec.optim.lr, one.spec.schedule.steps, one.spec.schedule.batch_size) for one in found} == {(2e-3, 12, 4)}


@pytest.mark.parametrize(
    ("over", "words"),
    [
        (["task.max_length=32,64"], "task.max_length cannot vary"),
        (["base.id=demo-text,other"], "base.id cannot vary"),
        (["compute.precision=fp32,bf16"], "compute.precision cannot vary"),
        (["optim.lr"], "not of the form path=value,value"),
        (["optim.lr=1e-4,2"], None),
        (["optim.lr=-1,2"], "lr -1.*it must be above 0"),
        (["optim.lx=1,2"], "lx"),
        (["optim.lr=1e-4,1e-4"], "alike"),
        (["optim.lr=1e-4,2e-4", "optim.lr=3e-4"], "twice"),
        (["method.dropout=0,0.1"], "cannot have dropout"),
        (["method.dora=false,true"], "cannot have DoRA"),
        (["method.init=kaiming,pissa"], "changes the base"),
        (["compute.seed=" + ",".join(map(str, range(65)))], "65 adapters.*at most 64"),
        ([], "A sweep needs a setting that varies"),
    ],
)
def test_what_cannot_be_swept_is_a_sentence(spec, over, words):
    if words is None:
        assert len(sweep.variants(sweeps.compose(spec, over))) == 2
        return
    with pytest.raises(SpecError, match=words):
        sweeps.compose(spec, over)


def test_other_kinds_of_adapter_are_trained_alone(base, chat_rows):
    other = parse({**tiny.tree(base, chat_rows), "method": {"kind": "vera", "rank": 4}, "optim": {"lr": 1e-3}})
    with pytest.raises(SpecError, match="adapters of kind lora"):
        sweeps.compose(other, ["compute.seed=1,2"])


def test_without_validation_the_best_is_not_known(base, chat_rows):
    plain = parse({**tiny.tree(base, chat_rows), "validation": {"size": 0}})
    with pytest.raises(SpecError, match="known by its validation loss"):
        sweeps.compose(plain, ["compute.seed=1,2"])
    assert sweeps.compose(plain, ["compute.seed=1,2"], keep="all").keep == "all"
    assert sweeps.compose(plain, ["compute.seed=1,2"], folds=2).folds == 2


def test_a_sweep_too_large_for_the_memory_is_refused_before_anything_is_loaded(workspace, spec, monkeypatch):
    asked = sweeps.compose(spec, ["compute.seed=0,1,2,3"])
    facts = sweeps.check(workspace, asked).facts
    assert facts["adapters"] == 4 and facts["memory_of_a_batch"] > 0
    assert (
        sweeps.check(workspace, sweeps.compose(spec, ["compute.seed=0,1,2,3"], together=1)).facts["memory"]
        == facts["memory"] - 3 * facts["memory_of_a_batch"]
    )
    monkeypatch.setattr(checks, "free_memory", lambda device: int(facts["memory"] - 1.5 * facts["memory_of_a_batch"]))
    report = sweeps.check(workspace, asked)
    assert not report.can_start and "for 4 adapters" in report.problems[-1].sentence and "Set together to 2" in report.problems[-1].sentence
    with pytest.raises(SpecError, match="Set together to 2"):
        sweeps.start(workspace, asked)
    assert not studio.list_runs(workspace)
    assert sweeps.check(workspace, sweeps.compose(spec, ["compute.seed=0,1,2,3"], together=2)).can_start


def test_a_variant_with_a_problem_of_its_own_is_named(workspace, spec):
    report = sweeps.check(workspace, sweeps.compose(spec, ["method.rank=4,400"]))
    assert not report.can_start and any("rank 400: method.rank is 400" in problem.sentence for problem in report.problems)


def finished(workspace, id: str) -> dict:
    studio.wait_until_ended(workspace, id, seconds=120)
    return sweeps.result(workspace, id)


def adapters_of(workspace, id: str) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in workspace.run_folder(id).glob("adapters/*/adapter_model.safetensors")}


def test_a_worker_that_was_killed_goes_on_to_the_same_bytes(workspace, spec):
    asked = sweeps.compose(
        spec.model_copy(update={"schedule": spec.schedule.model_copy(update={"steps": 30})}), ["optim.lr=1e-6,5e-3", "method.rank=2,4"]
    )
    whole, cut = sweeps.start(workspace, asked), None
    told = finished(workspace, whole)
    assert told["state"] == "done" and told["kept"] == told["best"] == min(told["variants"], key=lambda one: one["validation"])["number"]
    assert [one["state"] for one in told["variants"]] == ["done"] * 4 and all(
        len(one["train"]) == 30 and one["judged"] for one in told["variants"]
    )
    kept = told["variants"][told["kept"]]
    assert [item.id for item in library.find(workspace)] == [kept["library"]] and kept["changes"]["optim.lr"] == 5e-3
    cut = sweeps.start(workspace, asked)
    folder, until = workspace.run_folder(cut), time.monotonic() + 60
    while not any(folder.glob("checkpoints/step-000004/*")) and time.monotonic() < until:
        time.sleep(0.01)
    os.killpg(durable.read_json(folder / "process.json")["pid"], signal.SIGKILL)
    while runs.is_live(folder):
        time.sleep(0.05)
    assert studio.show(workspace, cut).state == "failed" and not adapters_of(workspace, cut)
    assert sweeps.result(workspace, cut)["variants"][3]["step"] >= 4
    studio.resume(workspace, cut)
    assert finished(workspace, cut)["state"] == "done"
    assert adapters_of(workspace, cut) == adapters_of(workspace, whole) and len(adapters_of(workspace, whole)) == 4


def test_a_run_of_another_kind_is_no_sweep_and_a_sweep_has_no_settings_of_one(workspace, spec):
    other, own = runs.create(workspace, spec), runs.create(workspace, sweeps.compose(spec, ["compute.seed=1,2"]))
    with pytest.raises(RunError, match="is no sweep"):
        sweeps.result(workspace, other.name)
    with pytest.raises(RunError, match="is a sweep"):
        studio.spec_of(workspace, own.name)
    assert sweeps.result(workspace, own.name)["best"] is None


def test_the_runs_page_shows_a_sweep(workspace, spec):
    from lora_studio.ui.chart import Curves
    from lora_studio.ui.runs import notes_of, tiles_of

    id = sweeps.start(workspace, sweeps.compose(spec, ["compute.seed=1,2"]))
    assert finished(workspace, id)["state"] == "done"
    events, status = studio.events(workspace, id), studio.show(workspace, id)
    assert {tile["label"]: tile["value"] for tile in tiles_of(status, events)}["step"] == "12 / 12"
    assert any("The best of 2" in str(note) for note in notes_of(status, events))
    drawn = json.loads(Curves(workspace)([id, 0, 0, 0]))
    assert drawn["state"] == "done" and drawn["n"] == 24


def test_the_command_line_trains_a_sweep_and_tells_the_best(home, base, chat_rows, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(tiny.tree(base, chat_rows)))

    def call(*words):
        environment = {**os.environ, "LORA_STUDIO_HOME": str(home)}
        return subprocess.run(
            [sys.executable, "-m", "lora_studio", *words], capture_output=True, text=True, env=environment, check=False, timeout=170
        )

    done = call("sweep", str(file), "--over", "optim.lr=1e-6,5e-3", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["state"] == "done" and told["best"] == told["kept"] == 1 and told["variants"][1]["library"]
    shown = call("sweep-result", told["id"])
    lines = shown.stdout.splitlines()
    assert lines[2].startswith("lr 0.005") and lines[3].startswith("lr 1e-06") and told["variants"][1]["library"] in lines[2]
    refused = call("sweep", str(file), "--over", "task.max_length=32,64")
    assert refused.returncode == 1 and "task.max_length cannot vary in a sweep" in refused.stderr


def test_on_a_cpu_as_many_go_through_at_once_as_little_more_memory_allows(workspace, spec):
    """And a run that goes on does so in the same passes, because its own file says how many."""
    asked, run = ["compute.seed=0,1,2,3,4,5"], spec.model_copy(update={"schedule": spec.schedule.model_copy(update={"batch_size": 256})})
    alone = preflight(workspace, run).facts["memory"]
    facts = sweeps.check(workspace, sweeps.compose(run, asked)).facts
    assert 1 < facts["at_once"] < 6 and facts["memory"] <= sweeps.MORE_MEMORY * alone < facts["memory"] + facts["memory_of_a_batch"]
    id = sweeps.start(workspace, sweeps.compose(run, asked))
    try:
        assert sweeps.read(workspace.run_folder(id))[0].together == facts["at_once"]
    finally:
        studio.stop(workspace, id, save=False)
    assert sweeps.check(workspace, sweeps.compose(run, asked, together=6)).facts["at_once"] == 6
