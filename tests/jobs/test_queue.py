"""The queue and the processes: one run per device, none started twice, none left alive, none forgotten."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from lora_studio import durable, runs, studio
from lora_studio.errors import RunError, SpecError
from lora_studio.jobs import local, queue
from lora_studio.spec import parse
from tests import tiny


def spec_of(base, rows, **changes):
    return parse({**tiny.tree(base, rows), **changes})


LONG = {"schedule": {"steps": 4000, "batch_size": 4}, "validation": {"size": 0}, "output": {"checkpoint_every": 50}}


def wait_for(what, seconds=60.0):
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.05)


def step_of(workspace, id):
    return studio.show(workspace, id).step


def test_two_runs_on_one_device_go_one_after_another_without_a_server(workspace, base, chat_rows):
    first, second = (studio.start(workspace, spec_of(base, chat_rows)) for _ in range(2))
    assert studio.show(workspace, second).state == "queued" and studio.show(workspace, first).is_live
    # Nobody pumps here: the first run's keeper starts the second.
    wait_for(lambda: runs.ended(workspace.run_folder(second)))
    ends = [runs.read_all(workspace.run_folder(id)) for id in (first, second)]
    assert [events[-1]["kind"] for events in ends] == ["done", "done"]
    started = next(event for event in ends[1] if event["kind"] == "started")
    assert started["time"] >= ends[0][-1]["time"] - 0.01
    wait_for(lambda: not any(local.processes(workspace.run_folder(id)) for id in (first, second)))


def test_racing_pumps_start_a_run_once(workspace, base, chat_rows):
    spec = studio.pinned(spec_of(base, chat_rows))
    folder = runs.create(workspace, spec)
    queue.add(workspace, folder, device="cpu")
    started, threads = [], [threading.Thread(target=lambda: started.extend(queue.pump())) for _ in range(6)]
    code = "from lora_studio.jobs import queue; print(len(queue.pump()))"
    others = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = len(started) + sum(int(other.communicate(timeout=60)[0].split()[-1]) for other in others)
    assert total == 1
    queue.add(workspace, folder, device="cpu")
    assert queue.waiting() == []
    assert studio.wait_until_ended(workspace, folder.name, seconds=60).state == "done"


def test_stop_saves_and_the_run_goes_on_later(workspace, base, chat_rows):
    id = studio.start(workspace, spec_of(base, chat_rows, **LONG))
    wait_for(lambda: step_of(workspace, id) > 3)
    studio.stop(workspace, id)
    status = studio.wait_until_ended(workspace, id, seconds=30)
    assert status.state == "stopped" and "saved" in status.reason
    assert durable.damage(studio.adapter_folder(workspace, id)) is None
    wait_for(lambda: not local.processes(workspace.run_folder(id)))
    before = status.step
    studio.resume(workspace, id)
    wait_for(lambda: step_of(workspace, id) > before)
    studio.stop(workspace, id, save=False)
    assert studio.wait_until_ended(workspace, id, seconds=30).state == "stopped"
    words = [event["words"] for event in studio.events(workspace, id) if event["kind"] == "resumed"]
    assert words[0].startswith(f"Restored step {before} of 4000")
    with pytest.raises(RunError, match="nothing to stop"):
        studio.stop(workspace, id)


def test_a_request_to_stop_can_be_taken_back(workspace, base, chat_rows):
    folder = runs.create(workspace, spec_of(base, chat_rows))
    runs.ask(folder, "stop", save=True)
    studio.keep_going(workspace, folder.name)
    assert runs.asked(folder, "stop") is None


def test_a_waiting_run_can_be_taken_out_of_the_queue(workspace, base, chat_rows):
    with durable.Lock(queue.device_lock("cpu")):
        id = studio.start(workspace, spec_of(base, chat_rows))
        assert studio.show(workspace, id).state == "queued"
        studio.stop(workspace, id)
    assert studio.show(workspace, id).state == "stopped" and queue.waiting() == []


def test_a_killed_worker_leaves_a_sentence_and_the_queue_moves_on(workspace, base, chat_rows):
    first = studio.start(workspace, spec_of(base, chat_rows, **LONG))
    second = studio.start(workspace, spec_of(base, chat_rows))
    wait_for(lambda: step_of(workspace, first) > 10)
    folder = workspace.run_folder(first)
    keeper = durable.read_json(folder / "process.json")["pid"]
    worker = next(process for process in local.processes(folder) if process.pid != keeper)
    worker.kill()
    wait_for(lambda: runs.ended(workspace.run_folder(second)))
    status = studio.show(workspace, first)
    assert status.state == "failed" and "was killed (signal 9" in status.reason and "Its last log line: s" in status.reason
    assert studio.show(workspace, second).state == "done"


def test_a_run_whose_processes_all_vanish_is_failed_with_its_last_line(workspace, base, chat_rows):
    id = studio.start(workspace, spec_of(base, chat_rows, **LONG))
    wait_for(lambda: step_of(workspace, id) > 10)
    folder = workspace.run_folder(id)
    os.killpg(durable.read_json(folder / "process.json")["pid"], signal.SIGKILL)
    wait_for(lambda: not runs.is_live(folder))
    status = studio.show(workspace, id)
    assert status.state == "failed" and "vanished" in status.reason and "Its last log line: s" in status.reason
    local.reap()
    assert not local.processes(folder)


def test_a_worker_that_ignores_the_request_is_ended_by_its_keeper(workspace, base, chat_rows):
    id = studio.start(workspace, spec_of(base, chat_rows, **LONG))
    wait_for(lambda: step_of(workspace, id) > 1)
    folder = workspace.run_folder(id)
    keeper = durable.read_json(folder / "process.json")["pid"]
    worker = next(process for process in local.processes(folder) if process.pid != keeper)
    worker.suspend()
    runs.ask(folder, "stop", save=True, grace=0.5)
    wait_for(lambda: runs.ended(folder))
    assert "did not react" in studio.show(workspace, id).reason
    wait_for(lambda: not psutil.pid_exists(worker.pid))


def test_a_bug_in_the_worker_is_a_traceback_in_the_log_and_a_sentence_in_the_run(workspace, base, chat_rows, tmp_path):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", count=20)
    with durable.Lock(queue.device_lock("cpu")):
        id = studio.start(workspace, spec_of(base, rows))
        rows.unlink()  # between the check and the start
    studio.pump()
    status = studio.wait_until_ended(workspace, id, seconds=60)
    assert status.state == "failed" and "rows.jsonl is not there" in status.reason


def test_start_refuses_what_cannot_work_and_leaves_nothing(workspace, base, tmp_path):
    with pytest.raises(SpecError) as caught:
        studio.start(workspace, parse({**tiny.tree(base, tmp_path / "none.jsonl"), "base": {"id": "nope"}, "compute": {"device": "cuda:7"}}))
    assert [problem.path for problem in caught.value.problems] == ["base.id", "data.0", "compute.device"]
    assert workspace.run_folders() == [] and queue.waiting() == []


def test_no_token_reaches_a_worker(workspace, base, chat_rows, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    id = studio.start(workspace, spec_of(base, chat_rows, **LONG))
    folder = workspace.run_folder(id)
    wait_for(lambda: step_of(workspace, id) > 0)
    for process in local.processes(folder):
        assert "HF_TOKEN" not in process.environ() and "hf_canary" not in " ".join(process.cmdline())
    studio.stop(workspace, id, save=False)
    studio.wait_until_ended(workspace, id, seconds=30)
    for path in folder.rglob("*"):
        assert path.is_dir() or b"hf_canary" not in path.read_bytes()


def test_a_run_that_needs_the_device_makes_the_bench_let_go_of_it(workspace, base, chat_rows):
    from lora_studio.jobs import bench

    try:
        bench.ask("load", base=str(base))
        assert durable.is_locked(queue.device_lock("cpu"))
        id = studio.start(workspace, spec_of(base, chat_rows))
        assert studio.show(workspace, id).is_live
        assert id in bench.status()["note"]
        assert studio.wait_until_ended(workspace, id, seconds=60).state == "done"
    finally:
        bench.stop()
