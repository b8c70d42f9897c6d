"""A search for weights: its loss is training's own, it is never worse than the simple weights, and a cut one goes on as if it had not been."""

import json
import os
import signal
import subprocess
import sys

import numpy
import pytest
import torch

from lora_studio import library, runs, search, studio
from lora_studio.errors import AdapterError, BlendError, DataError, RunError, SpecError, StudioError
from lora_studio.home import PACKAGE
from lora_studio.inference import searching
from lora_studio.inference.blends import Reader
from lora_studio.inference.proposals import proposals, starts
from lora_studio.jobs import queue
from lora_studio.spec import parse
from lora_studio.spec.search import SearchSpec
from lora_studio.training import loop
from lora_studio.training.text import TextTask
from lora_studio.ui.runs import tiles_of
from tests import tiny, tiny_image
from tests.inference import test_captioning


@pytest.fixture
def shelved(workspace, base, tmp_path):
    """Two random adapters of the tiny base, in the library."""
    return [
        library.add(workspace, tiny.write_adapter(tmp_path / name, base, seed=seed, size=0.1), {"name": name, "base": str(base)})
        for seed, name in enumerate(("one", "two"), 1)
    ]


@pytest.fixture
def queued(monkeypatch):
    """Runs are queued, and started by nobody: the tests run them in their own process."""
    monkeypatch.setattr(queue, "pump", lambda: [])


ASKED = {"evaluations": 14, "device": "cpu", "precision": "fp32", "threads": 1, "batch_size": 4}


def work(folder, *, before=lambda: None, at: int = 0) -> list[dict]:
    """Do a queued search here; `before` is called when try `at` is told. Its folded history."""
    return test_captioning.work(folder, before=before, at=at, run=searching.run)


def told(folder) -> bytes:
    """What a search has told of its tries, without the hours."""
    rows = [event for event in runs.read_all(folder) if event["kind"] in ("step", "eval")]
    return "\n".join(json.dumps({key: row.get(key) for key in ("kind", "step", "what", "weights", "loss")}) for row in rows).encode()


# ---- what is tried


def hill(weights) -> float:
    return sum((weight - 0.3 - 0.1 * number) ** 2 for number, weight in enumerate(weights))


def tried(count: int, tries: int, *, noise: bool = False, seed: int = 0) -> list[tuple]:
    source, found = proposals(count, low=0.0, high=1.5, seed=seed), []
    _, weights = next(source)
    for _ in range(tries):
        found.append((hill(weights), weights))
        if noise:
            numpy.random.rand(5)
        try:
            _, weights = source.send(found[-1][0])
        except StopIteration:
            break
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_tries_come_to_the_lowest_place_within_the_bounds(count):
    found = tried(count, 60 + 40 * count)
    assert min(found)[0] < 0.01 and len(set(found)) == len(found)
    assert all(0 <= weight <= 1.5 for _, weights in found for weight in weights)


def test_the_simple_weights_come_first():
    assert starts(3) == {
        (0, 0, 0): "base",
        (1, 0, 0): "alone",
        (0, 1, 0): "alone",
        (0, 0, 1): "alone",
        (1, 1, 1): "all",
        (0.3333,) * 3: "equal",
    }
    assert starts(1) == {(0.0,): "base", (1.0,): "alone"}


def test_the_same_seed_tries_the_same_whoever_else_draws_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tried(2, 30) == tried(2, 30, noise=True) != tried(2, 30, seed=1)
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_no_number_is_merely_bad():
    source = proposals(2, low=0.0, high=1.5, seed=0)
    _, weights = next(source)
    for _ in range(30):
        _, weights = source.send(float("nan") if weights[0] > 0.8 else hill(weights))
    assert all(numpy.isfinite(weights))


# ---- the loss


def test_the_loss_is_the_one_that_training_tells_of_rows_held_out(workspace, base, chat_rows, tmp_path, shelved, queued):
    """The held-out rows of a run, given to a search as rows, lose under the base exactly what the run says."""
    spec = parse(tiny.tree(base, chat_rows, schedule={"steps": 1, "batch_size": 4}))
    task = TextTask(spec, device="cpu", note=lambda sentence: None)
    model = task.load()
    torch.set_num_threads(1)
    meant = loop.evaluate(task, model.eval(), batch_size=4, seed=0)
    prints = {example.ids for example in task.encoded.held_out}
    rows = [row for row in tiny.conversations(60) if tuple(task.encoder(row, "")[0]) in prints]
    assert len(rows) == 8
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    id = search.start(workspace, shelved, [str(tmp_path / "held.jsonl")], task={"kind": "chat", "max_length": 64}, **ASKED)
    work(workspace.run_folder(id))
    assert search.result(workspace, id)["marks"][0]["loss"] == pytest.approx(meant, rel=1e-6)


def test_the_loss_of_weights_is_that_of_the_base_with_the_sum_in_its_layers(workspace, base, chat_rows, shelved, tmp_path):
    data, weights = [{"path": str(chat_rows), "cap": 12}], (0.7, -0.4)
    found = [{"id": id, "name": id, "path": str(library.adapter_folder(workspace, id))} for id in shelved]
    spec = SearchSpec(base={"id": str(base)}, data=data, adapters=found, precision="fp32")
    parts = Reader().parts(type("Job", (), {})(), [[one["path"], 1.0] for one in found])
    judge = searching.Judge(spec, parts, tmp_path, note=lambda sentence: None)
    before = {name: value.clone() for name, value in judge.model.state_dict().items()}
    got, bare = judge.loss(weights), judge.loss((0.0, 0.0))
    assert all(torch.equal(value, before[name]) for name, value in judge.model.state_dict().items())
    with torch.no_grad():
        for part, weight in zip(parts, weights):
            for name, module in part.adapter.modules.items():
                judge.model.get_submodule(name).weight += weight * module.delta()
    assert got == pytest.approx(judge.loss((0.0, 0.0)), rel=1e-5) and abs(got - bare) > 1e-3


def test_adapters_of_text_encoders_act_on_how_captions_are_read(workspace, tmp_path):
    base = tiny_image.write_pipeline(tmp_path / "tiny-sd")
    updates = tiny_image.random_adapter(base, seed=1, ends=("to_q", "text_encoder.encoder.layers.0.self_attn.q_proj"), size=0.5)
    pictures, place = tiny_image.write_pictures(tmp_path / "pictures", count=2), tmp_path / "both"
    place.mkdir()
    for file, data in tiny_image.adapter_files(base, updates).items():
        (place / file).write_bytes(data)
    task = {"kind": "image", "resolution": 32, "bucket_step": 8}
    spec = SearchSpec(
        base={"id": str(base)},
        task=task,
        data=[{"path": str(pictures)}],
        adapters=[{"id": "x", "name": "x", "path": str(place)}],
        precision="fp32",
    )
    judge = searching.Judge(
        spec, Reader().parts(type("Job", (), {})(), [[str(place), 1.0]]), tmp_path / "runs" / "x", note=lambda sentence: None
    )
    got, bare, encoder = judge.loss((0.6,)), judge.loss((0.0,)), judge.model.encoders["text_encoder"]
    read = [name for name in updates if name.startswith("text_encoder.")]
    assert len(read) == 1 < len(updates)
    with torch.no_grad():
        for name, module in updates.items():
            layer = (
                judge.model.main.get_submodule(name)
                if name not in read
                else next(one for own, one in encoder.named_modules() if own.endswith("layers.0.self_attn.q_proj"))
            )
            layer.weight += 0.6 * module.delta()
    assert got == pytest.approx(judge.loss((0.0,)), rel=1e-5) and abs(got - bare) > 1e-4
    with torch.no_grad():
        next(one for own, one in encoder.named_modules() if own.endswith("layers.0.self_attn.q_proj")).weight -= (
            0.6 * updates[read[0]].delta()
        )
    assert abs(judge.loss((0.0,)) - got) > 1e-7


# ---- the run


def test_a_search_loads_its_model_once_and_is_never_worse_than_the_simple_weights(workspace, base, chat_rows, shelved, queued, monkeypatch):
    loads, load = [], TextTask.load
    monkeypatch.setattr(TextTask, "load", lambda task: loads.append(1) or load(task))
    id = search.start(workspace, shelved, [str(chat_rows)], cap=8, **ASKED)
    assert work(workspace.run_folder(id))[-1]["kind"] == "done" and loads == [1]
    found = search.result(workspace, id)
    assert (
        [one["what"] for one in found["marks"]] == ["base", "alone", "alone", "all", "equal"]
        and len(found["tries"]) == 14
        and found["rows"] == 8
    )
    assert found["loss"] == min(one["loss"] for one in found["tries"]) <= min(one["loss"] for one in found["marks"])
    assert found["curve"][-1] == [14, found["loss"]] and all(
        after[1] <= before[1] for before, after in zip(found["curve"], found["curve"][1:])
    )
    best = next(one for one in found["tries"] if one["loss"] == found["loss"])
    assert found["parts"] == [[id, weight] for id, weight in zip(shelved, best["weights"])]
    status = studio.show(workspace, id)
    assert status.validation == found["loss"] and "The best weights of 14 tries: one " in status.reason
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    tiles = {tile["label"]: tile["value"] for tile in tiles_of(status, studio.events(workspace, id))}
    assert tiles["step"] == "14 / 14" and tiles["best validation"] == f"{found['loss']:.4f}" and "tries/s" in tiles
    with pytest.raises(RunError, match="searches weights"):
        studio.spec_of(workspace, id)


def test_a_stopped_search_keeps_what_it_has_and_goes_on_to_the_same_history(workspace, base, chat_rows, shelved, queued):
    whole, cut = (search.start(workspace, shelved, [str(chat_rows)], cap=8, **ASKED) for _ in range(2))
    work(workspace.run_folder(whole))
    folder = workspace.run_folder(cut)
    assert work(folder, before=lambda: runs.ask(folder, "stop", save=True), at=9)[-1]["kind"] == "stopped"
    part = search.result(workspace, cut)
    assert part["state"] == "stopped" and len(part["tries"]) == 9 and part["loss"] == part["curve"][-1][1]
    studio.resume(workspace, cut)
    work(folder)
    assert (
        told(folder) == told(workspace.run_folder(whole))
        and search.result(workspace, cut)["parts"] == search.result(workspace, whole)["parts"]
    )


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.inference import test_searching
test_searching.work(Path(sys.argv[1]), before=lambda: os.kill(os.getpid(), signal.SIGKILL), at=int(sys.argv[2]))
"""


@pytest.mark.parametrize("at", [1, 9])
def test_a_search_that_is_killed_while_it_tells_of_a_try_goes_on_to_the_same_weights(workspace, base, chat_rows, shelved, monkeypatch, at):
    pump = queue.pump
    monkeypatch.setattr(queue, "pump", lambda: [])
    whole, cut = (search.start(workspace, shelved, [str(chat_rows)], cap=8, **ASKED) for _ in range(2))
    work(workspace.run_folder(whole))
    folder = workspace.run_folder(cut)
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(at)], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert studio.show(workspace, cut).state == "failed" and len(search.result(workspace, cut)["tries"]) in (at - 1, at)
    with open(folder / "events.jsonl", "a") as file:
        file.write('{"seq": 99, "kind": "st')  # as a power cut would leave it
    monkeypatch.setattr(queue, "pump", pump)
    studio.resume(workspace, cut)
    assert studio.wait_until_ended(workspace, cut, seconds=300).state == "done", studio.log(workspace, cut)
    assert told(folder) == told(workspace.run_folder(whole)) and len(search.result(workspace, cut)["tries"]) == 14


def test_other_rows_under_the_same_name_are_not_taken_for_the_same(workspace, base, tmp_path, shelved, queued):
    rows = tiny.write_rows(tmp_path / "own.jsonl", count=8)
    folder = workspace.run_folder(search.start(workspace, shelved, [str(rows)], **ASKED))
    work(folder, before=lambda: runs.ask(folder, "stop"), at=4)
    tiny.write_rows(rows, count=7)
    studio.resume(workspace, folder.name)
    with pytest.raises(RunError, match="cannot go on: the rows changed since"):
        work(folder)
    assert len(search.result(workspace, folder.name)["tries"]) == 4


def test_one_adapter_alone_is_searched_too(workspace, base, chat_rows, shelved, queued):
    id = search.start(workspace, shelved[:1], [str(chat_rows)], cap=4, **{**ASKED, "evaluations": 9})
    work(workspace.run_folder(id))
    assert [one["what"] for one in search.result(workspace, id)["marks"]] == ["base", "alone"]


def test_pictures_with_captions_are_judged_with_noise_that_stays(workspace, tmp_path, queued):
    base = tiny_image.write_pipeline(tmp_path / "tiny-sd")
    ids = []
    for seed, name in enumerate(("one", "two")):
        place = tmp_path / name
        place.mkdir()
        for file, data in tiny_image.adapter_files(base, tiny_image.random_adapter(base, seed=seed)).items():
            (place / file).write_bytes(data)
        ids.append(library.add(workspace, place, {"name": name, "base": str(base)}))
    pictures = tiny_image.write_pictures(tmp_path / "pictures", count=3)
    asked = {**ASKED, "evaluations": 8, "task": {"kind": "image", "resolution": 32, "bucket_step": 8}}
    first, second = (search.start(workspace, ids, [str(pictures)], **asked) for _ in range(2))
    for id in (first, second):
        work(workspace.run_folder(id))
    found = search.result(workspace, first)
    assert told(workspace.run_folder(first)) == told(workspace.run_folder(second)) and found["rows"] == 3
    assert len({one["loss"] for one in found["marks"]}) == 5 and found["loss"] <= min(one["loss"] for one in found["marks"])


@pytest.mark.parametrize(
    ("asked", "kind", "sentence"),
    [
        ({"evaluations": 4}, SpecError, "4 tries are too few: .* at least 5"),
        ({"low": 0.5}, SpecError, "low"),
        ({"high": 0.5}, SpecError, "high"),
        ({"data": ["/nowhere.jsonl"]}, DataError, "nowhere"),
        ({"task": {"kind": "text"}}, DataError, "column"),
        ({"ids": ["nobody"]}, AdapterError, "There is no adapter nobody"),
        ({"ids": []}, SpecError, "."),
        ({"device": "cuda:7"}, StudioError, "no cuda:7"),
    ],
)
def test_what_cannot_start_gets_a_sentence_and_no_run(workspace, base, chat_rows, shelved, asked, kind, sentence):
    given = {"ids": shelved, "data": [str(chat_rows)], **ASKED, **asked}
    with pytest.raises(kind, match=sentence):
        search.start(workspace, given.pop("ids"), given.pop("data"), **given)
    assert studio.list_runs(workspace) == []


def test_an_adapter_of_another_model_is_named(workspace, base, chat_rows, shelved, tmp_path, queued):
    other = tiny.write_base(tmp_path / "other", hidden_size=48)
    stranger = library.add(workspace, tiny.write_adapter(tmp_path / "stranger", other, seed=3), {"name": "stranger", "base": str(base)})
    folder = workspace.run_folder(search.start(workspace, [shelved[0], stranger], [str(chat_rows)], **ASKED))
    with pytest.raises(BlendError, match="stranger for"):
        work(folder)
