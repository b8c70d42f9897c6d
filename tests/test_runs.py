"""Run folders: events are numbered and never lost, a cut attempt is voided, and the state is what the lock says."""

import json

import pytest

from lora_studio import durable, runs
from lora_studio.errors import RunError
from lora_studio.spec import parse


@pytest.fixture
def folder(workspace):
    return runs.create(workspace, parse({"name": "a <b>", "data": [{"path": "x"}]}))


def test_a_new_run_is_whole_and_says_what_was_asked_for(workspace, folder):
    assert workspace.run_folders() == [folder]
    assert runs.spec_of(folder).name == "a <b>"
    assert runs.status(folder).name == "a <b>"


def test_a_half_written_last_line_waits_and_is_cut_before_writing_on(folder):
    runs.note(folder, "note", text="one")
    with open(folder / "events.jsonl", "ab") as file:
        file.write(b'{"seq":1,"kind":"note","te')
    found, offset = runs.read(folder)
    assert [event["text"] for event in found] == ["one"]
    runs.note(folder, "note", text="two")
    more, _ = runs.read(folder, offset)
    assert [(event["seq"], event["text"]) for event in more] == [(1, "two")]


def test_events_reach_the_disk_within_a_second(folder):
    import time

    with runs.Events(folder) as events:
        events.emit("step", step=1, loss=1.0)
        events.emit("step", step=2, loss=1.0)
        until = time.monotonic() + 2
        while len(runs.read(folder)[0]) < 2:
            assert time.monotonic() < until
            time.sleep(0.02)


def test_a_resumed_run_voids_the_later_rows_of_the_cut_attempt(folder):
    with runs.Events(folder) as events:
        for step in (1, 2, 3, 4):
            events.emit("step", step=step, loss=float(step))
        events.emit("eval", step=4, loss=9.0, best=False)
        events.emit("resumed", step=2, words="")
        events.emit("step", step=3, loss=30.0)
    kept = [(event["kind"], event["step"], event.get("loss")) for event in runs.read_all(folder)]
    assert kept == [("step", 1, 1.0), ("step", 2, 2.0), ("resumed", 2, None), ("step", 3, 30.0)]


def test_a_run_that_starts_again_voids_everything_even_what_was_said_before_its_first_step(folder):
    with runs.Events(folder) as events:
        events.emit("sample", step=0, prompt="a", answer="b")
        events.emit("eval", step=0, loss=1.0, best=False)
        events.emit("resumed", step=0, words="")
        events.emit("sample", step=0, prompt="a", answer="b")
    assert [event["kind"] for event in runs.read_all(folder)] == ["resumed", "sample"]


def test_the_state_is_what_the_lock_says(folder):
    lock = durable.Lock(folder / "run.lock")
    assert lock.take() and runs.status(folder).state == "starting"
    runs.note(folder, "started", steps=9)
    assert runs.status(folder).state == "running"
    runs.ask(folder, "stop", save=True)
    assert runs.status(folder).state == "stopping"
    runs.answered(folder, "stop")
    (folder / "log.txt").write_text("something\nKilled by the moon\n")
    lock.release()
    status = runs.status(folder)
    assert status.state == "failed" and "Killed by the moon" in status.reason and "vanished" in status.reason
    runs.note(folder, "done", step=9, steps=9, loss=None, reason="")
    assert runs.status(folder).state == "done"


def test_a_long_run_is_summed_up_from_its_end(folder):
    runs.note(folder, "started", steps=5000)
    with runs.Events(folder) as events:
        for step in range(1, 5001):
            events.emit("step", step=step, steps=5000, loss=1 / step, seconds_left=0.0)
    assert (folder / "events.jsonl").stat().st_size > 2 * runs.TAIL_BYTES
    lock = durable.Lock(folder / "run.lock")
    lock.take()
    status = runs.status(folder)
    assert (status.state, status.step, status.loss) == ("running", 5000, 1 / 5000)
    lock.release()
    assert len(runs.read_all(folder)) == 5001


def test_ids_resolve_only_inside_the_workspace(workspace, folder):
    assert workspace.run_folder(folder.name) == folder == workspace.run_folder(folder.name[-4:])
    for id in ("../" + folder.name, "/etc", "", "..", "20260101-000000-ffff", "a\nb", "<img>"):
        with pytest.raises(RunError):
            workspace.run_folder(id)


def test_a_progress_bar_in_the_log_is_shown_by_its_last_state(folder):
    (folder / "log.txt").write_text("0%\r50%\r100%\nend")
    assert runs.log_tail(folder) == "100%\nend"


def test_numbers_go_on_after_reopening(folder):
    for text in "abc":
        runs.note(folder, "note", text=text)
    lines = (folder / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["seq"] for line in lines] == [0, 1, 2]
