"""Captions by a model: a run of the queue like any other, right for each picture, one step to undo, and nothing lost when it is cut off."""

import os
import signal
import time

import pytest
from PIL import Image

from lora_studio import albums, runs, studio
from lora_studio.errors import BaseModelError, DataError, RunError, SpecError, StudioError
from lora_studio.inference import captioning
from lora_studio.jobs import queue
from lora_studio.worker import RunDesk
from tests import tiny_captioners


@pytest.fixture(scope="session")
def blip(tmp_path_factory):
    return tiny_captioners.blip(tmp_path_factory.mktemp("blip") / "tiny-blip")


@pytest.fixture
def album(workspace, tmp_path):
    """An album of six red and blue pictures; the first has a caption."""
    for index in range(6):
        Image.new("RGB", (48, 32), tiny_captioners.COLOURS["red" if index % 2 == 0 else "blue"]).save(tmp_path / f"{index}.png")
    (tmp_path / "0.txt").write_text("mine")
    files = [*(tmp_path / f"{index}.png" for index in range(6)), tmp_path / "0.txt"]
    return albums.create(workspace, files, name="mine")[0]


@pytest.fixture
def queued(monkeypatch):
    """Runs are queued, and started by nobody: the tests run them in their own process."""
    monkeypatch.setattr(queue, "pump", lambda: [])


def captions(workspace) -> list[str]:
    return list(albums.view(workspace, "mine").captions.values())


def work(folder, *, before=lambda: None, at: int = 0, run=captioning.run) -> list[dict]:
    """Do a queued run here; `before` is called when step `at` is told. Its folded history."""
    queue.remove(folder)
    with runs.Events(folder) as events:
        desk = RunDesk(folder, events)
        emit = desk.emit

        def telling(kind, **fields):
            emit(kind, **fields)
            if kind == "step" and fields["step"] == at:
                before()

        desk.emit = telling
        run(folder, desk)
    return runs.read_all(folder)


RIGHT = ["mine", *["a blue picture", "a red picture"] * 2, "a blue picture"]


def test_from_the_queue_to_captions_that_are_right_and_can_be_undone(workspace, album, blip):
    id = albums.write_captions(workspace, album, model=str(blip))
    seen = studio.list_runs(workspace)[0]
    assert seen.name == "captions for mine" and seen.state in ("queued", "starting", "running", "done")
    status = studio.wait_until_ended(workspace, id, seconds=120)
    assert (status.state, status.step, status.steps) == ("done", 5, 5), studio.log(workspace, id)
    assert "5 captions are in mine" in status.reason
    assert captions(workspace) == RIGHT
    assert albums.undo(workspace, album).startswith("captions by ") and captions(workspace) == ["mine"] + [""] * 5
    with pytest.raises(RunError, match="writes captions"):
        studio.spec_of(workspace, id)


def test_a_model_that_is_talked_to_answers_without_repeating_what_it_was_asked(workspace, album, tmp_path, queued):
    model = tiny_captioners.llava(tmp_path / "tiny-llava")
    work(workspace.run_folder(albums.write_captions(workspace, album, model=str(model))))
    assert captions(workspace) == ["mine", "blue.", "red.", "blue.", "red.", "blue."]


def test_a_prompt_begins_the_captions_of_a_model_that_is_not_talked_to(workspace, album, blip, queued):
    work(workspace.run_folder(albums.write_captions(workspace, album, model=str(blip), prompt="a")))
    assert captions(workspace) == RIGHT


def test_all_and_the_chosen_ones_are_captioned_when_asked_for(workspace, album, blip, queued):
    work(workspace.run_folder(albums.write_captions(workspace, album, model=str(blip), pictures=["0.png", "3.png"])))
    assert captions(workspace) == ["a red picture", "", "", "a blue picture", "", ""]
    albums.write(workspace, album, {"0.png": "other"})
    work(workspace.run_folder(albums.write_captions(workspace, album, model=str(blip), pictures="all")))
    assert captions(workspace) == ["a red picture", *RIGHT[1:]]


def test_what_was_edited_or_removed_meanwhile_stays_as_it_is(workspace, album, blip, queued):
    folder = workspace.run_folder(albums.write_captions(workspace, album, model=str(blip)))

    def meddle():
        albums.write(workspace, album, {"1.png": "by hand"})
        albums.remove(workspace, album, ["5.png"])

    history = work(folder, before=meddle, at=2)
    assert captions(workspace) == ["mine", "by hand", "a red picture", "a blue picture", "a red picture"]
    assert history[-1]["kind"] == "done" and "3 captions are in mine" in history[-1]["reason"] and "1 more was not written" in history[-1]["reason"]
    assert any(event.get("text") == "5.png was passed over: it was taken out meanwhile" for event in history)


@pytest.mark.parametrize(("save", "left"), [(True, ["mine", "a blue picture", "a red picture", "", "", ""]), (False, ["mine"] + [""] * 5)])
def test_stop_keeps_what_was_written_or_leaves_the_album_alone_and_it_goes_on(workspace, album, blip, queued, save, left):
    id = albums.write_captions(workspace, album, model=str(blip))
    folder = workspace.run_folder(id)
    history = work(folder, before=lambda: runs.ask(folder, "stop", save=save), at=2)
    assert history[-1]["kind"] == "stopped" and captions(workspace) == left
    studio.resume(workspace, id)
    assert work(folder)[-1]["kind"] == "done"
    assert captions(workspace) == RIGHT


def test_a_killed_process_leaves_the_album_as_it_was_and_the_run_goes_on(workspace, album, blip):
    id = albums.write_captions(workspace, album, model=str(blip))
    folder, before = workspace.run_folder(id), (workspace.data / album / "metadata.jsonl").read_bytes()
    until = time.monotonic() + 90
    while not (folder / "pictures.json").exists() and time.monotonic() < until:
        time.sleep(0.01)
    for process in studio.local.processes(folder):
        process.send_signal(signal.SIGKILL)
    while studio.show(workspace, id).is_live and time.monotonic() < until:
        time.sleep(0.05)
    assert studio.show(workspace, id).state == "failed"
    assert (workspace.data / album / "metadata.jsonl").read_bytes() == before
    with open(folder / "captions.jsonl", "a") as file:
        file.write('{"file_name": "1.png", "te')  # as a power cut would leave it
    studio.resume(workspace, id)
    assert studio.wait_until_ended(workspace, id, seconds=120).state == "done"
    assert captions(workspace) == RIGHT


def test_a_picture_that_broke_meanwhile_is_passed_over_by_name(workspace, album, blip, queued):
    folder = workspace.run_folder(albums.write_captions(workspace, album, model=str(blip)))
    (workspace.data / album / "3.png").write_bytes(b"x")
    history = work(folder)
    assert any("3.png was passed over" in event.get("text", "") for event in history)
    assert captions(workspace)[3] == "" and captions(workspace)[5] == "a blue picture"


@pytest.mark.parametrize(
    ("asked", "kind", "sentence"),
    [
        ({"model": "nowhere"}, BaseModelError, "neither a folder here nor a Hub id"),
        ({"model": ""}, SpecError, "model.id"),
        ({"pictures": []}, DataError, "nothing to caption"),
        ({"tokens": 0}, SpecError, "tokens"),
        ({"device": "cuda:7"}, StudioError, "no cuda:7"),
    ],
)
def test_what_cannot_start_gets_a_sentence_and_no_run(workspace, album, blip, asked, kind, sentence):
    with pytest.raises(kind, match=sentence):
        albums.write_captions(workspace, album, **{"model": str(blip), **asked})
    assert studio.list_runs(workspace) == []


def test_a_model_that_reads_no_pictures_is_named(workspace, album, base, queued):
    folder = workspace.run_folder(albums.write_captions(workspace, album, model=str(base)))
    with pytest.raises(BaseModelError, match="cannot write captions: .* Choose an image-to-text model"):
        work(folder)
    assert captions(workspace) == ["mine"] + [""] * 5


def test_no_network_and_no_code_of_a_model_is_used(workspace, album, blip, queued):
    import json
    import shutil

    hostile = workspace.root / "hostile"
    shutil.copytree(blip, hostile)
    config = json.loads((hostile / "config.json").read_text())
    (hostile / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForImageTextToText": "own.Model"}}))
    (hostile / "own.py").write_text("import os; os.environ['HACKED'] = '1'")
    folder = workspace.run_folder(albums.write_captions(workspace, album, model=str(hostile)))
    with pytest.raises(BaseModelError, match="cannot write captions"):
        work(folder)
    assert "HACKED" not in os.environ
